"""Answers in channels: thoughts are between tags wherever an answer begins, and a chat leaves them out of prompts."""

import pytest

from edge_moe.conversation import Conversation, Turn
from edge_moe.runtime.answer_text import AnswerText
from edge_moe.runtime.channels import CLOSE, MARKS, OPEN, has_channels, without_thoughts

OTHERS = ("<|return|>", "<|constrain|>")
BRACKETS = (OPEN, CLOSE, "<turn|>")
IDS = {mark: 0x110000 + at for at, mark in enumerate((*MARKS, *OTHERS, *BRACKETS))}


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


def test_a_stop_string_ends_an_answer_in_any_channel():
    assert shown(ANALYSIS + FINAL, ["wo"]) == "<think>Hm, 2.</think>\n\nT"
    assert shown(ANALYSIS + FINAL, ["2."]) == "<think>Hm, "


def test_models_without_these_tokens_have_no_channels():
    assert has_channels(Letters()) and not has_channels(Letters(MARKS[:3])) and not has_channels(None)
    assert has_channels(Letters(BRACKETS)) and not has_channels(Letters(BRACKETS[1:]))


def test_a_chat_leaves_thoughts_out_of_its_prompts():
    turns = [Turn("a", "<think>b</think>\n\nc", [], True), Turn("d", "<think>e", [], False), Turn("f", "g", [], True)]
    contents = [one["content"] for one in Conversation(True, None, turns, channels=True).prompt("h")]
    assert contents == ["a", "c", "d", "", "f", "g", "h"]
    assert Conversation(True, None, turns).prompt("h")[1]["content"] == turns[0].answer
    assert without_thoughts("c</think>") == "c</think>"
