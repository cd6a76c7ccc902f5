"""Answers of models that think, as text with the thoughts between <think> and </think>.

Most models write these tags themselves, as text or as special tokens. Others are brought to this form:

gpt-oss answers in messages with a channel each (the harmony format). A message of the assistant is <|channel|>, the
name of the channel, <|message|>, its text and <|end|>, and the next one begins with <|start|>assistant. The channel
`final` is the answer. What comes in others before it is a thought.

Gemma 4 puts its thoughts between <|channel> and <channel|>, with the channel's name on a line of its own before them.
Mistral's models put them between [THINK] and [/THINK].

Calls of tools are left out, as parts of them are special tokens, unless these are wanted as text.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass

from .tokenizer import Detokenizer, Tokenizer

START, CHANNEL, MESSAGE, END = MARKS = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>")
FINAL = "final"
THINKING, THOUGHT = "<think>", "</think>"
TO = "to=functions."
RECIPIENT = re.compile(r"to=(functions\.\S+)")  # of a message that is a call, before or after its channel
CALL, END_CALL = f"{CHANNEL}commentary to=", "<|call|>"  # a call's text, between its recipient and {MESSAGE}
TAIL = 16  # tokens at the end of a prompt among which one opens a thought


@dataclass(frozen=True, slots=True)
class Brackets:
    """Two special tokens around a thought."""

    open: str
    close: str
    named: bool = False  # the thought begins with a line that is a channel's name
    apart: str = "\n\n"  # written between the thought and the answer, where the model writes nothing


GEMMA, MISTRAL = Brackets("<|channel>", "<channel|>", named=True), Brackets("[THINK]", "[/THINK]")
TAGS = Brackets(THINKING, THOUGHT, apart="")
BRACKETS = (GEMMA, MISTRAL, TAGS)


def has_channels(tokenizer: Tokenizer | None) -> bool:
    """Whether the text of a model's answers has tags that the model did not write, by its special tokens."""
    return _has(tokenizer, *MARKS) or brackets_of(tokenizer) not in (None, TAGS)


def detokenizer_of(
    tokenizer: Tokenizer, marks: Collection[str] = ()
) -> "Detokenizer | ChannelText | ThoughtText | MarkedText":
    """What converts a model's answers to text. marks: special tokens of calls, which are wanted in the text."""
    if _has(tokenizer, *MARKS):
        return ChannelText(tokenizer, calls=bool(marks))
    brackets = brackets_of(tokenizer)
    text = Detokenizer(tokenizer) if brackets is None else ThoughtText(tokenizer, brackets)
    shown = {token: mark for mark in marks if (token := tokenizer.special_token(mark)) is not None}
    return MarkedText(text, shown) if shown else text


def _has(tokenizer: Tokenizer | None, *marks: str) -> bool:
    return tokenizer is not None and all(tokenizer.special_token(mark) is not None for mark in marks)


def brackets_of(tokenizer: Tokenizer | None) -> Brackets | None:
    """The special tokens that a model writes around its thoughts, if it has such."""
    return next((one for one in BRACKETS if _has(tokenizer, one.open, one.close)), None)


def opened_thought(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The tag of a thought that a prompt opens at its end, with the white space after it; empty without one."""
    tail, brackets = ids[-TAIL:], brackets_of(tokenizer)
    if brackets is not None and (token := tokenizer.special_token(brackets.open)) in tail:
        begun = tail[len(tail) - tail[::-1].index(token) :]
        text = tokenizer.decode(begun)
        text = text.partition("\n")[2] if brackets.named else text
        has_others = not all(map(tokenizer.decode, ([one] for one in begun)))  # special tokens, which have no text
        return "" if has_others or text.strip() else THINKING + text
    text = tokenizer.decode(tail)
    return text[text.rindex(THINKING) :] if text.rstrip().endswith(THINKING) else ""


def split_thought(answer: str) -> tuple[str, str]:
    """The thought that an answer's text begins with, without its tags, and the rest; a thought may have no end."""
    begun = answer.lstrip()
    if not begun.startswith(THINKING):
        return "", answer
    thought, _, rest = begun.removeprefix(THINKING).partition(THOUGHT)
    return thought.strip("\n"), rest.lstrip()


class MarkedText:
    """Converts tokens to text like `text`, and shows some special tokens, by id."""

    def __init__(self, text: "Detokenizer | ThoughtText", shown: dict[int, str]):
        self.text, self.shown = text, shown

    def add(self, token: int) -> str:
        return self.text.finish() + self.shown[token] if token in self.shown else self.text.add(token)

    def finish(self) -> str:
        return self.text.finish()


class ChannelText:
    """Converts tokens to text like Detokenizer. An answer may also begin inside of a message, to continue it.

    calls: show a message to a function with its recipient, as CALL, its name, MESSAGE, the text and END_CALL."""

    def __init__(self, tokenizer: Tokenizer, calls: bool = False):
        self.tokenizer, self.calls = tokenizer, calls
        self.role = ""  # what is between the last start of a message and its channel
        self.calling = False  # whether the message is a call
        self.begun = "" if calls else None  # what the answer begins with, while it may be a recipient
        self.marks = {tokenizer.special_token(mark): mark for mark in MARKS}
        self.text = Detokenizer(tokenizer)  # of the message
        self.header: list[int] | None = None  # tokens between messages since the last mark; None inside of one
        self.tagged = self.thinking = False  # whether a tag was written, and whether it is open

    def add(self, token: int) -> str:
        mark = self.marks.get(token)
        if mark is None and self.header is None:
            return self._begin(self.text.add(token))
        if mark is None:
            self.header.append(token)
            return ""
        begun, self.begun = self.begun, None
        rest = self._end_call(self.text.finish())
        if mark != MESSAGE:
            is_role = mark == CHANNEL and begun and begun.lstrip().startswith(TO)
            rest, begun = ("", begun + rest) if is_role else ((begun or "") + rest, "")
            self.role = begun or (self.tokenizer.decode(self.header or []) if mark == CHANNEL else "")
            if mark == END and self.header is None and not self.tagged:  # of a thought that this answer continues
                self.tagged = self.thinking = True
            self.header = []
            return rest
        channel = self.tokenizer.decode(self.header or []).strip()
        self.text, self.header = Detokenizer(self.tokenizer), None
        if self.calls and (recipient := RECIPIENT.search(f"{self.role} {channel}")):
            self.calling = True
            closed = self._tag(final=True) if self.thinking else ""
            return f"{rest}{closed}{CALL}{recipient[1]}{MESSAGE}"
        return rest + self._tag(final=not channel or channel.startswith(FINAL))

    def finish(self) -> str:
        begun, self.begun = self.begun, None
        return (begun or "") + self._end_call(self.text.finish())

    def _begin(self, text: str) -> str:
        """Hold back what an answer begins with, while it may be the recipient of a call."""
        if self.begun is None:
            return text
        self.begun += text
        begun = self.begun.lstrip()
        if TO.startswith(begun) or begun.startswith(TO):
            return ""
        text, self.begun = self.begun, None
        return text

    def _end_call(self, rest: str) -> str:
        was, self.calling = self.calling, False
        return rest + END_CALL if was else rest

    def _tag(self, final: bool) -> str:
        was, self.thinking = self.thinking, not final
        if was == self.thinking:
            return "\n\n" if was else ""
        self.tagged = True
        return THINKING if self.thinking else f"{THOUGHT}\n\n"


class ThoughtText:
    """The same for an answer whose thoughts are between two special tokens. A thought without a text is left out."""

    def __init__(self, tokenizer: Tokenizer, brackets: Brackets):
        self.tokenizer, self.brackets = tokenizer, brackets
        self.open, self.close = (tokenizer.special_token(mark) for mark in (brackets.open, brackets.close))
        self.text = Detokenizer(tokenizer)
        self.begun: str | None = None  # text since an opening token whose tag is not written yet
        self.tagged = self.thinking = False  # whether there was a thought, and whether its tag is open

    def add(self, token: int) -> str:
        if token not in (self.open, self.close):
            return self._thought(self.text.add(token))
        rest = self._thought(self.text.finish())
        self.text = Detokenizer(self.tokenizer)
        if token == self.open:
            self.begun, self.tagged = "", True
            return rest
        was = self.thinking or not self.tagged  # without an opening token, this answer continues a thought
        self.begun, self.tagged, self.thinking = None, True, False
        return f"{rest}{THOUGHT}{self.brackets.apart}" if was else rest

    def finish(self) -> str:
        return self._thought(self.text.finish())

    def _thought(self, text: str) -> str:
        """The text without a channel's name; the tag is opened at the first text after it."""
        if self.begun is None:
            return text
        self.begun += text
        text = self.begun.partition("\n")[2] if self.brackets.named else self.begun
        if not text:
            return ""
        self.begun, self.thinking = None, True
        return THINKING + text
