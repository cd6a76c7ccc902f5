"""Answers in messages with a channel each, as gpt-oss gives them (the harmony format), as text with tagged thoughts.

A message of the assistant is <|channel|>, the name of the channel, <|message|>, its text and <|end|>, and the next one
begins with <|start|>assistant. The channel `final` is the answer. What comes in others before it is put between <think>
and </think>, as other models that think write it themselves.
"""

from .tokenizer import Detokenizer, Tokenizer

START, CHANNEL, MESSAGE, END = MARKS = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>")
FINAL = "final"
THINKING, THOUGHT = "<think>", "</think>"


def has_channels(tokenizer: Tokenizer | None) -> bool:
    """Whether a model's answers are in channels, by the special tokens that it has."""
    return tokenizer is not None and all(tokenizer.special_token(mark) is not None for mark in MARKS)


def without_thoughts(answer: str) -> str:
    """The text of the channel `final` in an answer's text."""
    if not answer.startswith(THINKING):
        return answer
    return answer.partition(THOUGHT)[2].lstrip()


class ChannelText:
    """Converts tokens to text like Detokenizer. An answer may also begin inside of a message, to continue it."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.marks = {tokenizer.special_token(mark): mark for mark in MARKS}
        self.text = Detokenizer(tokenizer)  # of the message
        self.header: list[int] | None = None  # tokens between messages since the last mark; None inside of one
        self.tagged = self.thinking = False  # whether a tag was written, and whether it is open

    def add(self, token: int) -> str:
        mark = self.marks.get(token)
        if mark is None and self.header is None:
            return self.text.add(token)
        if mark is None:
            self.header.append(token)
            return ""
        rest = self.text.finish()
        if mark != MESSAGE:
            if mark == END and self.header is None and not self.tagged:  # of a thought that this answer continues
                self.tagged = self.thinking = True
            self.header = []
            return rest
        channel = self.tokenizer.decode(self.header or []).strip()
        self.text, self.header = Detokenizer(self.tokenizer), None
        return rest + self._tag(final=not channel or channel.startswith(FINAL))

    def finish(self) -> str:
        return self.text.finish()

    def _tag(self, final: bool) -> str:
        was, self.thinking = self.thinking, not final
        if was == self.thinking:
            return "\n\n" if was else ""
        self.tagged = True
        return THINKING if self.thinking else f"{THOUGHT}\n\n"
