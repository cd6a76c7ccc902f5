"""Answers of a given shape: what is sampled is valid JSON by a validator that is not ours, or matches the grammar."""

import json
import random
import re

import numpy as np
import pytest

jsonschema = pytest.importorskip("jsonschema")
openai = pytest.importorskip("openai")
pytest.importorskip("llguidance")
pytest.importorskip("uvicorn")
from serving import serve  # noqa: E402 (needs httpx)

from edge_moe.bench import EMBEDDED  # noqa: E402
from edge_moe.runtime.tokenizer import Tokenizer  # noqa: E402
from edge_moe.server.call_formats import FORMATS, format_of  # noqa: E402
from edge_moe.server.calls import CallReader  # noqa: E402
from edge_moe.server.limits import Limits  # noqa: E402
from edge_moe.server.shapes import Shapes  # noqa: E402
from edge_moe.server.token_texts import TokenTexts  # noqa: E402

TALK = [{"role": "user", "content": "import os"}]
HOT = {"model": "templated", "temperature": 1.5, "max_tokens": 600}  # so that many different texts come
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "of a city",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "maxLength": 12},
                    "days": {"type": "integer", "minimum": 0, "maximum": 9},
                },
                "required": ["city", "days"],
                "additionalProperties": False,
            },
        },
    },
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "additionalProperties": False}}},
]


@pytest.fixture(scope="module")
def served(templated_with_tools, tmp_path_factory):
    with serve(templated_with_tools, tmp_path_factory.mktemp("log") / "log", "--name", "templated") as one:
        yield one


@pytest.fixture(scope="module")
def client(served):
    return openai.OpenAI(base_url=f"{served.address}/v1", api_key="any", max_retries=0)


def by_schema(schema: dict) -> dict:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}}


def random_schema(rng: random.Random, depth: int = 3) -> dict:
    kind = rng.choice(
        ["string", "enum", "integer", "number", "boolean", "const", "null", "object", "array", "anyOf"][
            : None if depth else 7
        ]
    )
    if kind == "string":
        return {"type": "string", "maxLength": rng.randrange(0, 9)} | ({"minLength": 1} if rng.random() < 0.1 else {})
    if kind == "enum":
        return {"enum": rng.sample(["a", "b b", 1, 2.5, None, True, "ü"], 3)}
    if kind == "const":
        return {"const": rng.choice(["x", 7, False, None])}
    if kind in ("integer", "number"):
        low = rng.randrange(-50, 50)
        step = {"multipleOf": 0.25} if kind == "number" else {}  # else it may have any number of digits
        return {"type": kind, "minimum": low, "maximum": low + rng.randrange(1, 90), **step}
    if kind == "array":
        least = rng.randrange(0, 2)
        return {
            "type": "array",
            "items": random_schema(rng, depth - 1),
            "minItems": least,
            "maxItems": least + rng.randrange(1, 3),
        }
    if kind == "object":
        properties = {
            name: random_schema(rng, depth - 1)
            for name in rng.sample(["a", "b", "long name", "ü", "d"], rng.randrange(1, 4))
        }
        required = [name for name in properties if rng.random() < 0.7]
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    if kind == "anyOf":
        return {"anyOf": [random_schema(rng, depth - 1) for _ in range(2)]}
    return {"type": kind}


@pytest.mark.parametrize("seed", range(20))
def test_answers_are_valid_by_a_random_schema(client, seed):
    schema = random_schema(random.Random(seed))
    form = {"type": "json_schema", "json_schema": {"name": "it", "schema": schema, "strict": True}}
    got = client.chat.completions.create(messages=TALK, response_format=form, seed=seed, n=2, **HOT)
    for choice in got.choices:
        assert choice.finish_reason == "stop", choice
        jsonschema.validate(json.loads(choice.message.content), schema)


def test_a_stream_has_the_same_answer(client):
    form = {"type": "json_schema", "json_schema": {"name": "it", "schema": TOOLS[0]["function"]["parameters"]}}
    asked = {"messages": TALK, "response_format": form, "seed": 1, **HOT}
    want = client.chat.completions.create(**asked).choices[0].message.content
    chunks = client.chat.completions.create(**asked, stream=True)
    assert "".join(one.choices[0].delta.content or "" for one in chunks) == want


def test_pydantics_models(client):
    from pydantic import BaseModel, Field

    class Step(BaseModel):
        name: str = Field(max_length=8)
        count: int = Field(ge=0, le=9)

    class Plan(BaseModel):
        steps: list[Step] = Field(max_length=3)
        done: bool

    got = client.chat.completions.parse(messages=TALK, response_format=Plan, seed=4, **HOT)
    assert isinstance(got.choices[0].message.parsed, Plan)


def test_an_object(client):
    for seed in range(3):
        got = client.chat.completions.create(
            messages=TALK, response_format={"type": "json_object"}, seed=seed, **{**HOT, "max_tokens": 900}
        )
        choice = got.choices[0]
        if choice.finish_reason == "stop":  # a random object may go on for long
            assert isinstance(json.loads(choice.message.content), dict)
        else:
            assert choice.message.content.lstrip().startswith("{")


def test_grammars(client):
    asked = {"prompt": "import os", **HOT}
    for seed in range(2):
        for body, pattern in (
            ({"guided_regex": r"[a-f]{3}-[0-9]{2}"}, r"[a-f]{3}-[0-9]{2}"),
            ({"guided_choice": ["yes", 'say "no"', "may\nbe"]}, r'yes|say "no"|may\nbe'),
            ({"grammar": 'start: ("a" | "b")+ "c" x\nx: /[0-9]{1,4}/'}, r"[ab]+c[0-9]{1,4}"),
            ({"guided_grammar": 'root ::= "x" [0-9] [0-9]? "y"'}, r"x[0-9][0-9]?y"),
            (
                {"guided_json": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3}},
                r"\[(\s*(true|false)\s*,?)*\s*\]",
            ),
        ):
            choice = client.completions.create(**asked, seed=seed, extra_body=body).choices[0]
            assert choice.finish_reason == "stop" and re.fullmatch(pattern, choice.text), (body, choice.text)


def test_a_call_that_must_be_made(client):
    names = set()
    for seed in range(5):
        asked = {"messages": TALK, "tools": TOOLS, "tool_choice": "required", "seed": seed, **HOT}
        choice = client.chat.completions.create(**asked).choices[0]
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
        (call,) = choice.message.tool_calls
        names.add(call.function.name)
        schema = next(
            tool["function"]["parameters"] for tool in TOOLS if tool["function"]["name"] == call.function.name
        )
        jsonschema.validate(json.loads(call.function.arguments), schema)
        chunks = list(client.chat.completions.create(**asked, stream=True))
        (streamed,) = (one for chunk in chunks for one in chunk.choices[0].delta.tool_calls or ())
        assert (streamed.function.name, streamed.function.arguments) == (call.function.name, call.function.arguments)
        assert chunks[-1].choices[0].finish_reason == "tool_calls"
        assert not any(chunk.choices[0].delta.content for chunk in chunks)
    assert names == {"weather", "now"}
    chosen = {"type": "function", "function": {"name": "now"}}
    got = client.chat.completions.create(messages=TALK, tools=TOOLS, tool_choice=chosen, seed=0, **HOT)
    assert [call.function.name for call in got.choices[0].message.tool_calls] == ["now"]


def test_the_conversation_goes_on_after_a_call(client):
    called = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "call_1", "type": "function", "function": {"name": "now", "arguments": "{}"}}],
    }
    talk = [*TALK, called, {"role": "tool", "tool_call_id": "call_1", "content": "12:00"}]
    got = client.chat.completions.create(messages=talk, tools=TOOLS, model="templated", max_tokens=4)
    assert got.usage.completion_tokens == 4 and got.choices[0].message.tool_calls is None
    without = client.chat.completions.create(
        messages=talk, tools=TOOLS, tool_choice="none", model="templated", max_tokens=4
    )
    assert without.usage.prompt_tokens < got.usage.prompt_tokens


@pytest.mark.parametrize(
    "body, param, says",
    [
        (by_schema({"type": 5}), "response_format.json_schema", "type must be"),
        (by_schema({"not": {}}), "response_format.json_schema", '["not"]'),
        (by_schema({"$ref": "#/x"}), "response_format.json_schema", "/x"),
        ({"grammar": "start: x"}, "grammar", "unknown name"),
        ({"grammar": "what"}, "grammar", "Expected ::="),
        ({"guided_regex": "("}, "guided_regex", "unclosed group"),
        ({"guided_json": "{"}, "guided_json", "Expecting"),
        ({"guided_choice": []}, "guided_choice", "empty"),
        ({"guided_choice": ["a"], "guided_regex": "a"}, "guided_choice", "exclude each other"),
        ({"guided_regex": "a" * 200_001}, "guided_regex", "more than 200,000 bytes"),
        ({"guided_regex": "((a{1,999}){1,999}){1,999}"}, "guided_regex", "too many expressions"),
    ],
)  # fmt: skip
def test_a_shape_that_is_not_understood(served, body, param, says):
    got = served.post("/v1/chat/completions", {"messages": TALK, **HOT, **body})
    error = got.json()["error"]
    assert (got.status_code, error["param"]) == (400, param), error
    assert says in error["message"] and len(error["message"]) < 500


def test_a_thought_has_no_shape(client, served):
    """The mask begins behind the thought that the prompt opens: here a stop text is written by the thought alone."""
    asked = {"messages": TALK, "model": "templated", "max_tokens": 40, "seed": 1, "temperature": 0}
    thinking = {"guided_regex": "[a-f]{3}", "chat_template_kwargs": {"enable_thinking": True}}
    got = client.chat.completions.create(**asked, extra_body=thinking)
    free = {"chat_template_kwargs": {"enable_thinking": True}}
    same = client.chat.completions.create(**asked, extra_body=free)
    assert got.choices[0].message.reasoning_content == same.choices[0].message.reasoning_content
    assert got.choices[0].message.content == "" and got.usage.completion_tokens_details.reasoning_tokens == 40


def test_the_mask_begins_where_the_thought_ends(templated_with_tools):
    tokenizer = Tokenizer(templated_with_tools)
    shapes = Shapes(tokenizer, 4096, {0}, Limits())
    made = shapes.matcher("regex", "[a-f]{3}", "guided_regex", format_of(""))
    mask = shapes.processor(made, "<think>\n", messages=True)
    tokens, thought = tokenizer.encode("assistant:<think>\n"), tokenizer.encode("so\n</think>")
    for count in range(len(thought)):
        assert np.isfinite(mask(tokens + thought[:count], np.zeros(4096, np.float32))).all()
    tokens += thought
    for _ in range(3):
        allowed = np.flatnonzero(np.isfinite(mask(tokens, np.zeros(4096, np.float32))))
        assert len(allowed) > 0 and all(re.fullmatch("[a-f]{1,3}", tokenizer.decode([one])) for one in allowed)
        tokens = [*tokens, next(one for one in allowed if len(tokenizer.decode([one])) == 1)]
    assert np.flatnonzero(np.isfinite(mask(tokens, np.zeros(4096, np.float32)))).tolist() == [0]


@pytest.mark.parametrize("name", [form.name for form in FORMATS if form.forced])
def test_a_forced_call_is_one_in_each_familys_form(name):
    """Tokens that are drawn from what the grammar allows make a call that is read, with arguments by the schema."""
    form, tokenizer = next(one for one in FORMATS if one.name == name), Tokenizer(EMBEDDED)
    shapes, texts = Shapes(tokenizer, 4096, {0}, Limits()), TokenTexts(tokenizer)
    begins = np.array([texts.bytes_of(token)[:1] for token in range(4096)])
    for seed in range(4):
        tool = TOOLS[seed % 2]["function"]
        made = shapes.matcher("call", [TOOLS[seed % 2]], "tool_choice", form)
        rng, mask, tokens = random.Random(seed), shapes.processor(made, "", messages=True), []
        while not tokens or tokens[-1] != 0:
            allowed = np.isfinite(mask(tokens, np.zeros(4096, np.float32)))
            ends = allowed & np.isin(begins, rng.choice(([b"<"], [b'"', b"}"], [b"\n"])))  # so that texts end soon
            tokens.append(rng.choice(np.flatnonzero(ends if ends.any() else allowed).tolist()))
            assert len(tokens) < 500
        written = b"".join(map(texts.bytes_of, tokens[:-1])).decode()
        reader = CallReader(form, TOOLS)
        events = reader.add(written) + reader.finish()
        ((kind, call),) = events
        assert (kind, call.name) == ("call", tool["name"]), written
        its = json.loads(call.arguments)
        assert set(its) == set(tool["parameters"].get("required", ())), written
        assert isinstance(its.get("city", ""), str) and isinstance(its.get("days", 0), int)
