"""Answers with thoughts: these are between tags wherever an answer begins, and templates get them as they take them."""

import shutil

import pytest
from bundles import REFERENCE

from edge_moe.conversation import Conversation, Thoughts, Turn, thoughts_in_prompts
from edge_moe.runtime.answer_text import AnswerText
from edge_moe.runtime.channels import GEMMA, MARKS, MISTRAL, TAGS, has_channels, opened_thought, split_thought
from edge_moe.runtime.tokenizer import Tokenizer

OTHERS = ("<|return|>", "<|constrain|>")
BRACKETS = (GEMMA.open, GEMMA.close, "<turn|>")
SQUARE = (MISTRAL.open, MISTRAL.close, "[/INST]")
SPECIAL_TAGS = (TAGS.open, TAGS.close, "<|im_end|>")
IDS = {mark: 0x110000 + at for at, mark in enumerate((*MARKS, *OTHERS, *BRACKETS, *SQUARE, *SPECIAL_TAGS))}


class Letters:
    """A tokenizer whose tokens are letters, and special tokens without a text."""

    def __init__(self, marks=(*MARKS, *OTHERS)):
        self.ids = {mark: IDS[mark] for mark in marks}

    def decode(self, ids) -> str:
        return "".join(chr(one) for one in ids if one < 0x110000)

    def special_token(self, text: str) -> int | None:
        return self.ids.get(text)

    def encode(self, text: str) -> list[int]:
        ids = []
        while text:
            mark = next((mark for mark in self.ids if text.startswith(mark)), text[0])
            ids.append(self.ids.get(mark) or ord(mark))
            text = text[len(mark) :]
        return ids


def shown(text: str, stops=(), marks=(*MARKS, *OTHERS)) -> str:
    tokenizer = Letters(marks)
    answer, out = AnswerText(tokenizer, stops), ""
    for token in tokenizer.encode(text):
        out += answer.add(token)
        if answer.stopped:
            break
    return out + answer.finish()


ANALYSIS = "<|channel|>analysis<|message|>Hm, 2.<|end|>"
FINAL = "<|start|>assistant<|channel|>final<|message|>Two<|return|>"


@pytest.mark.parametrize(
    ("text", "want"),
    [
        (ANALYSIS + FINAL, "<think>Hm, 2.</think>\n\nTwo"),
        ("<|channel|>final<|message|>Two<|return|>", "Two"),
        (ANALYSIS + "<|start|>assistant" + ANALYSIS + FINAL, "<think>Hm, 2.\n\nHm, 2.</think>\n\nTwo"),
        (
            ANALYSIS + "<|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|end|>",
            "<think>Hm, 2.\n\n{}",
        ),
        ("<|channel|>analysis<|message|>Hm, 2", "<think>Hm, 2"),
        ("<|channel|>anal", ""),
        ("<|message|>Two", "Two"),  # without a channel
        ("o<|return|>", "o"),  # continues an answer
        ("m, 2.<|end|>" + FINAL, "m, 2.</think>\n\nTwo"),  # continues a thought
    ],
)
def test_thoughts_are_between_tags(text, want):
    assert shown(text) == want


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("<|channel>thought\nHm, 2.\n<channel|>Two<turn|>", "<think>Hm, 2.\n</think>\n\nTwo"),
        ("<|channel>thought\n<channel|>Two<turn|>", "Two"),
        ("Two<turn|>", "Two"),
        ("<|channel>thought\nHm, 2", "<think>Hm, 2"),
        ("<|channel>thou", ""),
        ("m, 2.\n<channel|>Two", "m, 2.\n</think>\n\nTwo"),  # continues a thought
        (
            "<|channel>thought\na<channel|>b<|channel>thought\nc<channel|>d",
            "<think>a</think>\n\nb<think>c</think>\n\nd",
        ),
    ],
)
def test_thoughts_in_brackets_are_between_tags(text, want):
    assert shown(text, marks=BRACKETS) == want


@pytest.mark.parametrize(
    ("marks", "text", "want"),
    [
        (SQUARE, "[THINK]Hm, 2.[/THINK]Two", "<think>Hm, 2.</think>\n\nTwo"),
        (SQUARE, "Hm, 2.[/THINK]Two", "Hm, 2.</think>\n\nTwo"),  # the prompt opened it
        (SQUARE, "[THINK]Hm\n\n2", "<think>Hm\n\n2"),
        (SQUARE, "[THINK][/THINK]Two", "Two"),
        (SPECIAL_TAGS, "<think>\nHm, 2.\n</think>\n\nTwo<|im_end|>", "<think>\nHm, 2.\n</think>\n\nTwo"),
        (SPECIAL_TAGS, "Hm, 2.\n</think>\n\nTwo<|im_end|>", "Hm, 2.\n</think>\n\nTwo"),
        ((), "<think>Hm, 2.</think>Two", "<think>Hm, 2.</think>Two"),
    ],
)
def test_thoughts_in_other_brackets_are_between_tags(marks, text, want):
    assert shown(text, marks=marks) == want


@pytest.mark.parametrize(
    ("marks", "prompt", "want"),
    [
        ((), "Hi<think>", "<think>"),
        ((), "Hi<think>\n", "<think>\n"),
        ((), "Hi<think>\n</think>\n", ""),
        ((), "Hi<think>\n\n</think>\n\nTwo", ""),
        (SPECIAL_TAGS, "Hi<think>\n", "<think>\n"),
        (SPECIAL_TAGS, "Hi<think></think>", ""),
        (SQUARE, "Hi[/INST][THINK]", "<think>"),
        (SQUARE, "Hi[THINK][/INST]", ""),
        (SQUARE, "Hi[THINK] two[/THINK] three", ""),
        (SQUARE, "Hi[THINK] two", ""),
        (BRACKETS, "Hi<|channel>thought\n", "<think>"),
        (BRACKETS, "Hi<|channel>thought\n<channel|>", ""),
        ((*MARKS, *OTHERS), "<|start|>assistant", ""),
    ],
)
def test_a_prompt_may_open_a_thought(marks, prompt, want):
    tokenizer = Letters(marks)
    assert opened_thought(tokenizer, tokenizer.encode("xxxxxxxxxxxxxxxx" + prompt)) == want


def test_a_stop_string_ends_an_answer_in_any_channel():
    assert shown(ANALYSIS + FINAL, ["wo"]) == "<think>Hm, 2.</think>\n\nT"
    assert shown(ANALYSIS + FINAL, ["2."]) == "<think>Hm, "


def test_models_without_these_tokens_have_no_channels():
    assert has_channels(Letters()) and not has_channels(Letters(MARKS[:3])) and not has_channels(None)
    assert has_channels(Letters(BRACKETS)) and not has_channels(Letters(BRACKETS[1:]))
    assert has_channels(Letters(SQUARE)) and not has_channels(Letters(SPECIAL_TAGS))


def test_an_answer_is_its_thought_and_the_rest():
    for answer, parts in {
        "<think>\nb\n</think>\n\nc": ("b", "c"),
        "\n<think>b</think>c": ("b", "c"),
        "<think>b": ("b", ""),
        "c</think>": ("", "c</think>"),
        "c <think>b</think>": ("", "c <think>b</think>"),
    }.items():
        assert split_thought(answer) == parts


def test_a_chat_hands_on_thoughts_as_its_template_takes_them():
    turns = [Turn("a", "<think>b</think>\n\nc", [], True), Turn("d", "<think>e", [], False), Turn("f", "g", [], True)]

    def said(thoughts: Thoughts):
        messages = Conversation(True, None, turns, thoughts).prompt("h")
        assert [one["content"] for one in messages[::2]] == ["a", "d", "f", "h"]
        return [(one["content"], one.get("reasoning_content")) for one in messages[1::2]]

    assert said(Thoughts.APART) == [("c", "b"), ("", "e"), ("g", None)]
    parts = (
        [{"type": "thinking", "thinking": "b"}, {"type": "text", "text": "c"}],
        [{"type": "thinking", "thinking": "e"}],
    )
    assert said(Thoughts.AS_PARTS) == [(parts[0], None), (parts[1], None), ("g", None)]
    assert said(Thoughts.LEFT_OUT) == [("c", None), ("", None), ("g", None)]
    assert said(Thoughts.IN_TEXT) == [(turns[0].answer, None), ("<think>e", None), ("g", None)]


@pytest.mark.parametrize(
    ("template", "want"),
    [
        ("{% for m in messages %}{{ m.reasoning_content }}{{ m.content }}{% endfor %}", Thoughts.APART),
        ("{% for m in messages %}{{ m['thinking'] }}{{ m.content }}{% endfor %}", Thoughts.APART),
        ("{% for m in messages %}{{ m.get('reasoning', '') }}{{ m.content }}{% endfor %}", Thoughts.APART),
        ("{% for m in messages %}{{ m.content.split('</think>')[-1] }}{% endfor %}{{ thinking }}", Thoughts.IN_TEXT),
        ("{% for m in messages", Thoughts.IN_TEXT),  # which is an error of the first message
    ],
)
def test_templates_tell_how_they_take_thoughts(tmp_path, template, want):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(REFERENCE / name, tmp_path)
    (tmp_path / "chat_template.jinja").write_text(template)
    assert thoughts_in_prompts(Tokenizer(tmp_path)) == want
    if want is Thoughts.IN_TEXT:
        (tmp_path / "added_tokens.json").write_text('{"[THINK]": 4096, "[/THINK]": 4097}')
        (tmp_path / "special_tokens_map.json").write_text('{"extra_special_tokens": ["[THINK]", "[/THINK]"]}')
        (tmp_path / "tokenizer_config.json").unlink()
        assert thoughts_in_prompts(Tokenizer(tmp_path)) == Thoughts.LEFT_OUT


def test_thoughts_are_parts_in_the_format_of_mistral(tmp_path):
    pytest.importorskip("transformers")
    from family_tokenizers import write_tokenizer

    tokenizer = Tokenizer(write_tokenizer("mistral", tmp_path))
    talk = Conversation(True, "s", [Turn("a", "<think>b</think>\n\nc", [], True)], thoughts_in_prompts(tokenizer))
    text = "<s>[SYSTEM_PROMPT]s[/SYSTEM_PROMPT][INST]a[/INST][THINK]b[/THINK]c</s>[INST]h[/INST]"
    assert tokenizer.render_chat(talk.prompt("h")) == text
