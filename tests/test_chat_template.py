"""Chat templates: the ids of transformers for whatever they use, and an end for those that would take too much."""

import json
import shutil
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import numpy as np
import pytest
from bundles import REFERENCE, run_python

from edge_moe.runtime.chat_template import ChatTemplate, render
from edge_moe.runtime.tokenizer import Tokenizer

PLAIN = [{"role": "system", "content": " Be brief.\n"}, {"role": "user", "content": "naïve 😀 <|im_end|> {{ 7 }}"}]
TALK = [
    *PLAIN,
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"x": [1, 2.5]}}}]},
    {"role": "tool", "content": '{"a": "é"}', "name": None},
    {"role": "assistant", "reasoning_content": "so", "content": "<think>\nhm\n</think>\n\nyes"},
    {
        "role": "user",
        "content": [{"type": "text", "text": "and "}, {"type": "image"}, {"type": "text", "text": "now?"}],
    },
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"x": {}}}}}]
DOCUMENTS = [{"title": "t", "text": "some text"}]
FOLDER = Path(__file__).parent / "chat_templates"  # in the manner of the models' own, and what Jinja has besides
TEMPLATES = {file.stem: file.read_text(encoding="utf-8") for file in sorted(FOLDER.glob("*.jinja"))}
BOMBS = (FOLDER / "bombs.txt").read_text(encoding="utf-8").splitlines()  # one a line


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """pair(template, ...) is ours and transformers' tokenizer with that template."""
    transformers = pytest.importorskip("transformers")
    made = {}

    def make(template: str):
        if template not in made:
            directory = tmp_path_factory.mktemp("pair")
            for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
                shutil.copy(REFERENCE / name, directory)
            (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
            made[template] = Tokenizer(directory), transformers.AutoTokenizer.from_pretrained(directory)
        return made[template]

    return make


def both(pair, messages, **options):
    ours, theirs = pair
    options = {"add_generation_prompt": True, **options}
    own = dict(options)
    extra = {key: own.pop(key) for key in list(own) if key not in OURS}
    ids = ours.apply_chat_template(messages, **own, chat_template_kwargs=extra)
    return ids, list(theirs.apply_chat_template(messages, tokenize=True, return_dict=False, **options))


OURS = ("tools", "documents", "add_generation_prompt", "continue_final_message")


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("messages", [PLAIN, TALK], ids=["plain", "talk"])
@pytest.mark.parametrize(
    "options",
    [{}, {"tools": TOOLS}, {"documents": DOCUMENTS}, {"add_generation_prompt": False}, {"enable_thinking": False}],
    ids=lambda options: "-".join(options) or "none",
)
def test_ids_are_those_of_transformers(pair, name, messages, options):
    ours, theirs = both(pair(TEMPLATES[name]), messages, **options)
    assert ours == theirs


@pytest.mark.parametrize("last", ["  so I said ", "", [{"type": "text", "text": "a "}, {"type": "text", "text": "b "}]])
@pytest.mark.parametrize("trim", ["", " | trim"])
def test_a_last_message_left_open_is_continued_as_in_transformers(pair, last, trim):
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content" + trim + " }}"
        "{% else %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    )
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": last}]
    options = {"add_generation_prompt": False, "continue_final_message": True}
    ours, theirs = both(pair(template), messages, **options)
    assert ours == theirs
    assert messages[1]["content"] == last


def test_a_reasoning_field_is_continued_by_any_of_its_names(pair):
    template = "{% for m in messages %}{{ m.role }}<think>{{ m.reasoning_content }}</think>{{ m.content }}{% endfor %}"
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "thinking": "I think "}]
    options = {"add_generation_prompt": False, "continue_final_message": "thinking"}
    ours, theirs = both(pair(template), messages, **options)
    assert ours == theirs


@dataclass
class Message:
    role: str
    content: str
    name: str | None = None


class Role(str, Enum):
    USER = "user"


class Dumps:
    def model_dump(self):
        return {"role": "assistant", "content": "from a model"}


def test_messages_may_be_objects(pair):
    messages = [Message("system", "x"), {"role": Role.USER, "content": "y", "n": np.int64(3)}, Dumps()]
    template = "{% for m in messages %}{{ m.role }}{{ m.content }}{{ m.name }}{{ m.n }}{% endfor %}"
    ours, theirs = both(pair(template), messages)
    assert ours == theirs


def test_a_template_meets_no_methods_of_the_callers_objects(pair):
    class Evil(str):
        def leak(self):
            return "leaked"

    ours, _ = pair("{{ messages[0].content.leak() }}")
    with pytest.raises(ValueError, match="'str object' has no attribute 'leak'"):
        ours.apply_chat_template([{"role": "user", "content": Evil("x")}])


def test_templates_are_found_where_transformers_finds_them(tmp_path):
    transformers = pytest.importorskip("transformers")
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(REFERENCE / name, tmp_path)
    config = json.loads((REFERENCE / "tokenizer_config.json").read_text())
    named = [{"name": "default", "template": "config"}, {"name": "tool_use", "template": "config tools"}]
    folder = tmp_path / "additional_chat_templates"

    def check():
        ours, theirs = Tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
        for tools in (None, TOOLS):
            want = theirs.apply_chat_template(PLAIN, tools=tools, tokenize=False)
            assert ours.decode(ours.apply_chat_template(PLAIN, tools=tools)) == want

    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": named}))
    check()
    folder.mkdir()
    (folder / "default.jinja").write_text("folder")
    check()
    (folder / "tool_use.jinja").write_text("folder tools")
    check()
    (tmp_path / "chat_template.jinja").write_text("file")
    check()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"messages": []}, "there are no messages; give at least one"),
        ({"messages": ["hi"]}, "a message is 'hi', expected a dictionary with 'role' and 'content'"),
        (
            {"messages": [{"content": "x"}]},
            "a message has no 'role'; give 'user', 'assistant', 'system' or what the model",
        ),
        ({"messages": [{"role": "user"}]}, "the message of 'user' has no 'content'"),
        ({"tools": {"name": "f"}}, "tools are expected as a list of dictionaries"),
        ({"documents": ["x"]}, "documents are expected as a list of dictionaries"),
        (
            {"add_generation_prompt": True, "continue_final_message": True},
            "add_generation_prompt and continue_final_message exclude each other; give one of them",
        ),
        (
            {"continue_final_message": "thought"},
            "continue_final_message: the last message has no 'thought' to continue",
        ),
    ],
)
def test_wrong_arguments_are_refused(pair, arguments, message):
    ours, _ = pair(TEMPLATES["chatml"])
    with pytest.raises((TypeError, ValueError)) as caught:
        ours.apply_chat_template(**{"messages": PLAIN, **arguments})
    assert str(caught.value).startswith(message)


# ---- limits

ROOM = 6_000_000
DEFUSE = """
import json, sys
from edge_moe import _core
from edge_moe.runtime.chat_template import ChatTemplate
ChatTemplate("{{ 'x' }}{% for m in messages %}{% endfor %}").render(ROOM := 6_000_000, messages=[])
before, took = _core.resident_bytes(), []
for bomb in json.loads(sys.stdin.read()):
    try:
        text = ChatTemplate(bomb).render(ROOM, messages=[{"role": "user", "content": "x"}])
        took.append([f"rendered {len(text)} characters", _core.peak_bytes() - before])
    except ValueError as error:
        took.append([str(error), _core.peak_bytes() - before])
print(json.dumps(took))
"""


def test_no_template_takes_more_memory_than_its_room():
    """All in one process, so that its peak, which only grows, is below the room in the end; those that take longest
    are limited by steps, not by a clock."""
    took = json.loads(run_python(DEFUSE, stdin=json.dumps(BOMBS)).stdout)
    for bomb, (said, grown) in zip(BOMBS, took, strict=True):
        assert grown < ROOM + 3_000_000, bomb  # what freed pages the allocator keeps
        assert said.startswith("the chat template cannot render these messages: "), (bomb, said)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ 'a' * 10**7 }}", "it takes more than 6 MB of memory, what the cap leaves it"),
        ("{{ 'a' * 10**8 }}", "it repeats, pads or counts by more than 10,000,000"),
        ("{% for i in range(10**7) %}{% endfor %}", "Range too big. The sandbox blocks ranges larger than MAX_RANGE"),
        (
            "{% for i in range(9**5) %}{% for j in range(99) %}{% endfor %}{% endfor %}",
            "it takes more than 1,000,000 steps",
        ),
        ("{{ 9 ** 9999 }}", "it computes with whole numbers of more than 4,096 bits"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    ],
)
def test_an_error_of_a_template_says_what_is_wrong(template, message):
    with pytest.raises(ValueError) as caught:
        ChatTemplate(template).render(ROOM, messages=[])
    assert str(caught.value).startswith(f"the chat template cannot render these messages: {message}")


def test_a_template_too_large_to_compile_is_refused():
    for source, room, fault in (
        ("x" * 200_001, None, "the chat template has 200,001 characters, expected at most 200,000"),
        ("{{ a }}" * 11_000, None, "it has more than 10,000 parts"),
        ("{{ a }}" * 4000, ROOM, "it takes more than 6 MB of memory, what the cap leaves it"),
    ):
        with pytest.raises(ValueError, match=fault):
            ChatTemplate(source, room)


def test_a_long_conversation_renders_within_its_room(pair):
    ours, _ = pair(TEMPLATES["chatml"])
    messages = [{"role": "user" if i % 2 else "assistant", "content": "some words " * 90} for i in range(500)]
    render(  # 500 kB of text in 6 MB
        ours._template("default", None), messages, tools=None, documents=None, add_generation_prompt=True,
        continue_final_message=False, variables={}, room_bytes=ROOM,
    )  # fmt: skip
