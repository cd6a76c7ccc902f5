"""Thoughts are told from answers as a whole text's are, wherever it is cut; tokens have their own bytes."""

import pytest

from edge_moe.bench import EMBEDDED
from edge_moe.runtime.channels import split_thought
from edge_moe.runtime.tokenizer import Tokenizer
from edge_moe.server.thoughts import ThoughtSplit
from edge_moe.server.token_texts import TokenTexts

TEXTS = [
    "an answer", "", " \n", "\n\n an answer\n", "<think>\nwhy\n\nso\n</think>\n\nan answer \n", "<think></think>yes",
    "<think>no end\n", "<think>\n\n", "<think>", "<thin", "  <think>a</think> b", "a <think>b</think> c",
    "<think>a </thin b</think>c</think>d", "<think>a</thi", "<think>\n\n\nb\n", "<<think>a</think>",
    "<think>a</think>  ",
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_a_stream_is_split_as_the_whole(text):
    want = split_thought(text)
    cuts = [[text[:at], text[at:]] for at in range(len(text) + 1)]
    cuts += [[text[:a], text[a:b], text[b:]] for b in range(len(text) + 1) for a in range(b + 1)]
    for parts in (*cuts, list(text)):
        split = ThoughtSplit()
        events = [event for part in parts for event in split.add(part)] + split.finish()
        got = tuple("".join(its for kind, its in events if kind == wanted) for wanted in ("thought", "text"))
        assert got == want, parts


def test_a_call_may_end_a_thought():
    text = "<think>\nso <|call\n<|calls|> f </think>"
    for at in range(len(text) + 1):
        split = ThoughtSplit(begins_call="<|calls|>")
        events = split.add(text[:at]) + split.add(text[at:]) + split.finish()
        got = tuple("".join(its for kind, its in events if kind == wanted) for wanted in ("thought", "text"))
        assert got == ("so <|call", "<|calls|> f </think>")
    split = ThoughtSplit(begins_call="<|calls|>")
    assert split.add("<think>a</think>b<|calls|>c") + split.finish() == [("thought", "a"), ("text", "b<|calls|>c")]


def test_a_prompt_may_open_the_thought():
    split = ThoughtSplit("<think>\n")
    assert split.thinking
    events = split.add("so") + split.add("\n</think>") + split.add("\n\nyes") + split.finish()
    assert events == [("thought", "so"), ("text", "yes")] and split.answering


def test_bytes_of_tokens_join_to_the_text():
    tokenizer = Tokenizer(EMBEDDED)
    texts = TokenTexts(tokenizer)
    text = "naïve Ελλάδα слово 漢字\n\t def f(x):  🙂"
    ids = tokenizer.encode(text)
    assert b"".join(map(texts.bytes_of, ids)).decode() == text
    assert any(texts.key_of(token).startswith("bytes:\\x") for token in ids)  # parts of characters
    keys = [texts.key_of(token) for token in range(4096)]
    assert len(set(keys)) == 4096
    assert texts.bytes_of(5000) == b"" and TokenTexts(None).key_of(7) == "<7>"
