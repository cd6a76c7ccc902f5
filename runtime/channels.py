"""Answers in channels as text with tagged thoughts.

gpt-oss answers in messages with a channel each (the harmony format). A message of the assistant is <|channel|>, the
name of the channel, <|message|>, its text and <|end|>, and the next one begins with <|start|>assistant. The channel
`final` is the answer. What comes in others before it is put between <think> and </think>, as other models that think
write it themselves.

Gemma 4 puts its thoughts between <|channel> and <channel|>, with the channel's name on a line of its own before them.
"""

from .tokenizer import Detokenizer, Tokenizer

START, CHANNEL, MESSAGE, END = MARKS = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>")
FINAL = "final"
OPEN, CLOSE = "<|channel>", "<channel|>"
THINKING, THOUGHT = "<think>", "</think>"


def has_channels(tokenizer: Tokenizer | None) -> bool:
    """Whether a model's answers are in channels, by the special tokens that it has."""
    return _kind(tokenizer) is not None


def detokenizer_of(tokenizer: Tokenizer) -> "Detokenizer | ChannelText | ThoughtText":
    """What converts a model's answers to text."""
    return (_kind(tokenizer) or Detokenizer)(tokenizer)


def _kind(tokenizer: Tokenizer | None):
    def has(*marks: str) -> bool:
        return tokenizer is not None and all(tokenizer.special_token(mark) is not None for mark in marks)

    return ChannelText if has(*MARKS) else ThoughtText if has(OPEN, CLOSE) else None


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


class ThoughtText:
    """The same for an answer whose thoughts are between two special tokens."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.open, self.close = (tokenizer.special_token(mark) for mark in (OPEN, CLOSE))
        self.text = Detokenizer(tokenizer)
        self.name: str | None = None  # the line with the channel's name as far as it has come; None after it
        self.tagged = self.thinking = False  # whether there was a thought, and whether its tag is open

    def add(self, token: int) -> str:
        if token not in (self.open, self.close):
            return self._thought(self.text.add(token))
        rest = self._thought(self.text.finish())
        self.text = Detokenizer(self.tokenizer)
        if token == self.open:
            self.name, self.tagged = "", True
            return rest
        was = self.thinking or not self.tagged  # without an opening token, this answer continues a thought
        self.name, self.tagged, self.thinking = None, True, False
        return f"{rest}{THOUGHT}\n\n" if was else rest

    def finish(self) -> str:
        return self._thought(self.text.finish())

    def _thought(self, text: str) -> str:
        """The text without a channel's name; the tag is opened at the first text after it."""
        if self.name is None:
            return text
        self.name += text
        text = self.name.partition("\n")[2]
        if not text:
            return ""
        self.name, self.thinking = None, True
        return THINKING + text
