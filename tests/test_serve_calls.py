"""Calls of tools in the forms of the families: complete ones are read, all else stays text, however it is cut."""

import json
from pathlib import Path

import pytest

pytest.importorskip("uvicorn")
from edge_moe.server.call_formats import FORMATS, format_of
from edge_moe.server.calls import CallReader

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "days": {"type": "integer"},
                    "hot": {"type": "boolean"},
                    "where": {"type": "object"},
                    "zip": {"type": ["string", "null"]},
                    "either": {"anyOf": [{"type": "number"}, {"type": "string"}]},
                },
            },
        },
    },
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}},
]
BY_NAME = {form.name: form for form in FORMATS}
ONE = {"city": "Zürich, 漢字", "days": 3, "hot": True, "where": {"x": [1, None]}}
# By form: a call of weather with ONE, a call of now, both at once, and texts that are no calls, or not yet.
CALLS = json.loads((Path(__file__).parent / "tool_calls.json").read_text(encoding="utf-8"))
WANT = [("weather", ONE), ("now", {})]


def read(name: str, *parts: str) -> tuple[str, list]:
    """The text and the calls, in the order of the events."""
    reader = CallReader(BY_NAME[name], TOOLS)
    events = [event for part in parts for event in reader.add(part)] + reader.finish()
    text = "".join(value for kind, value in events if kind == "text")
    return text, [(call.name, json.loads(call.arguments)) for kind, call in events if kind == "call"]


def cuts(text: str):
    yield tuple(text)
    for at in range(1, len(text)):
        yield text[:at], text[at:]


@pytest.mark.parametrize("name", BY_NAME)
def test_calls_are_read_wherever_the_text_is_cut(name):
    first, second = CALLS[name]["one"], CALLS[name]["without arguments"]
    cases = {
        "": ("", []),
        "no call": ("no call", []),
        " a < b\n\n": (" a < b\n\n", []),
        first: ("", WANT[:1]),
        f"{second}\n": ("", WANT[1:]),
        CALLS[name]["both"]: ("", WANT),
        f"Let me see.\n\n{CALLS[name]['both']}\n": ("Let me see.", WANT),
        f"One: {first}\n\nand then": ("One:and then", WANT[:1]),
        f"{first} {second}": ("", WANT),
    }
    for text, want in cases.items():
        assert read(name, text) == want
        for parts in cuts(text):
            assert read(name, *parts) == want, parts


@pytest.mark.parametrize("name", BY_NAME)
def test_what_is_no_call_is_text_to_the_last_character(name):
    first, second = CALLS[name]["one"], CALLS[name]["without arguments"]
    halves = tuple(
        text[:end] for text in (first, second) for end in range(1, len(text)) if not read(name, text[:end])[1]
    )
    assert len(halves) > 10
    for text in (*CALLS[name]["malformed"], *(f"a\n{text} \n" for text in CALLS[name]["malformed"])):
        assert read(name, text) == (text, [])
        for parts in cuts(text):
            assert read(name, *parts) == (text, []), parts
    for text in halves:
        assert read(name, text) == read(name, *text) == (text, [])


@pytest.mark.parametrize("name", BY_NAME)
def test_a_call_after_a_malformed_one_is_read(name):
    for bad in CALLS[name]["malformed"]:
        text = f"{bad}\n{CALLS[name]['one']}"
        want = read(name, text)
        for parts in cuts(text):
            assert read(name, *parts) == want, parts
    bad = CALLS[name]["malformed"][0]
    if name not in ("Mistral", "Qwen3-Coder"):  # whose first example has no end before the next one
        assert read(name, f"{bad}\n{CALLS[name]['one']}") == (bad, WANT[:1])


def test_an_end_within_a_text_is_none():
    inner = "say </tool_call> and <tool_call> and </arg_value"
    body = json.dumps({"name": "weather", "arguments": {"city": inner}})
    assert read("Hermes", f"<tool_call>{body}</tool_call>") == ("", [("weather", {"city": inner})])
    for text in (f"<function=weather>\n<parameter=city>\n{inner}\n</parameter>\n</function>\n",):
        assert read("Qwen3-Coder", f"<tool_call>\n{text}</tool_call>") == ("", [("weather", {"city": inner})])
    glm = f"<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>{inner}</arg_value>\n</tool_call>"
    assert read("GLM", glm) == ("", [("weather", {"city": inner})])
    assert read("Mistral", '[TOOL_CALLS]weather[ARGS]{"city": "}]"}') == ("", [("weather", {"city": "}]"})])


@pytest.mark.parametrize(
    "key, text, want",
    [
        ("city", "5", "5"), ("city", "null", "null"), ("city", "True", "True"), ("city", "", ""),
        ("city", "a\nb", "a\nb"),
        ("days", "5", 5), ("days", "five", "five"), ("unknown", "7", 7), ("unknown", "x y", "x y"),
        ("hot", "False", False), ("hot", "false", False), ("zip", "null", None), ("zip", "8000", "8000"),
        ("either", "2.5", 2.5), ("either", "x", "x"), ("either", "true", "true"),
        ("where", '{"a": 1}', {"a": 1}), ("where", "{", "{"),
    ],
)  # fmt: skip
def test_values_without_types_get_those_of_their_schema(key, text, want):
    qwen, minimax = f"<parameter={key}>\n{text}\n</parameter>\n", f'<parameter name="{key}">{text}</parameter>\n'
    forms = {
        "Qwen3-Coder": f"<tool_call>\n<function=weather>\n{qwen}</function>\n</tool_call>",
        "GLM": f"<tool_call>weather\n<arg_key>{key}</arg_key>\n<arg_value>{text}</arg_value>\n</tool_call>",
        "MiniMax": f'<minimax:tool_call>\n<invoke name="weather">\n{minimax}</invoke>\n</minimax:tool_call>',
    }
    for name, written in forms.items():
        assert read(name, written) == ("", [("weather", {key: want})])


def test_ids():
    def ids(name: str) -> list[str]:
        reader = CallReader(BY_NAME[name], TOOLS)
        return [call.identity for kind, call in reader.add(CALLS[name]["both"]) + reader.finish() if kind == "call"]

    assert ids("Kimi") == ["functions.weather:0", "functions.now:1"]  # its template reads them
    assert all(len(one) == 9 and one.isalnum() for one in ids("Mistral"))
    assert len(set(ids("Hermes"))) == 2


FAMILIES = {
    "qwen3_moe": "Hermes", "qwen3_5_moe": "Qwen3-Coder", "nemotron_h": "Qwen3-Coder", "glm4_moe": "GLM",
    "deepseek_v3": "DeepSeek-V3.1", "deepseek_v32": "DeepSeek-V3.2", "deepseek_v4": "DeepSeek-V4", "kimi": "Kimi",
    "minimax_m2": "MiniMax", "mistral": "Mistral", "gpt_oss": "harmony", "gemma4": "Gemma", "lfm2_moe": "LFM2",
    "hunyuan_v1_moe": "Hunyuan",
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_a_familys_template_tells_its_form(family):
    pytest.importorskip("transformers")
    from family_tokenizers import FAMILY_TEMPLATES

    form = format_of((FAMILY_TEMPLATES / f"{family}.jinja").read_text(encoding="utf-8"))
    assert form.name == FAMILIES[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_of_a_familys_calls_are_read(family, tmp_path):
    """What its template writes for an answer with calls, as tokens, is read as those calls."""
    pytest.importorskip("transformers")
    from family_tokenizers import write_tokenizer

    from edge_moe.runtime.answer_text import AnswerText
    from edge_moe.runtime.channels import opened_thought
    from edge_moe.runtime.tokenizer import Tokenizer
    from edge_moe.server.reader import MessageReader

    write_tokenizer(family, tmp_path)
    tokenizer = Tokenizer(tmp_path)
    asked = [{"role": "user", "content": "How is it?"}]
    calls = [("weather", {"city": "Zürich", "days": 3})] + ([] if family == "gpt_oss" else [("now", {})])
    answer = {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {
                "id": f"functions.{name}:{n}" if family == "kimi" else f"abcdefgh{n}",
                "type": "function",
                "function": {"name": name, "arguments": arguments},
            }
            for n, (name, arguments) in enumerate(calls)
        ],
    }
    prompt = tokenizer.apply_chat_template(asked, tools=TOOLS)
    whole = tokenizer.apply_chat_template([*asked, answer], tools=TOOLS, add_generation_prompt=False)
    same = next(at for at, (a, b) in enumerate(zip([*prompt, -1], whole, strict=False)) if a != b)
    form = format_of(tokenizer.chat_template)
    text = AnswerText(tokenizer, [], form.marks)
    reader = MessageReader(opened_thought(tokenizer, whole[:same]), CallReader(form, TOOLS))
    ends = {tokenizer.end_token, tokenizer.special_token("<|call|>")}
    written = ""
    for token in whole[same:]:
        if token in ends:
            break
        written += text.add(token)
    written += text.finish()
    events = []
    for kind, part in reader.split.add(written) + reader.split.finish():
        events += [(kind, part)] if kind == "thought" else reader.calls.add(part)
    events += reader.calls.finish()
    assert [(one.name, json.loads(one.arguments)) for kind, one in events if kind == "call"] == calls, written
