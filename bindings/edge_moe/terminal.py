"""What a terminal gets that a pipe or file does not: text without control characters, and how far a prompt is read."""

import os
import shutil
import sys
import textwrap
import threading
import time

PROGRESS_AFTER_S = 0.5  # a prompt that takes less shows nothing
REFRESH_S = 0.1
HARMLESS = "\n\t"  # of all control characters: escape sequences can move the cursor, retitle the window and more
VISIBLE = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in HARMLESS}
VISIBLE[ord("\r")] = ""  # of a line's end; alone it would overwrite the line


def printable(text: str) -> str:
    """The text as a terminal may show it: control characters are spelled out, as \\x1b."""
    return text.translate(VISIBLE)


def text_for(stream, text: str) -> str:
    """What to write to a stream: printable() on a terminal, else the text as it is."""
    return printable(text) if stream.isatty() else text


def show(text: str, stream=None) -> None:
    """Print text in which names and strings of other people's files may be, on stdout or another stream."""
    stream = stream or sys.stdout
    print(text_for(stream, text), file=stream, flush=True)


def wrapped(text: str) -> str:
    """The text broken at spaces to fit the terminal's width."""
    width = max(shutil.get_terminal_size().columns, 40)
    return "\n".join(textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False))


class PromptProgress:
    """A line on stderr that says how much of a prompt is read, from half a second on; a context manager.

    Called as progress("prompt", tokens read, tokens of the prompt); the line is gone when these are equal, or at the
    end of the context. Shows nothing where stderr is no terminal or `quiet` is set.
    """

    def __init__(self, quiet: bool = False):
        self.shows = not quiet and sys.stderr is not None and sys.stderr.isatty()
        self.lock, self.timer = threading.Lock(), None
        self.line, self.tokens = "", (0, 0)
        self.began = self.shown = 0.0

    def __enter__(self) -> "PromptProgress":
        return self

    def __exit__(self, *_) -> None:
        with self.lock:
            self._end()

    def __call__(self, step: str, done: int, of: int) -> None:
        if not self.shows:
            return
        with self.lock:
            if done >= of:
                self._end()
            elif self.timer is None:
                self.began, self.first = time.monotonic(), done
                self.tokens = (done, of)
                self.timer = threading.Timer(PROGRESS_AFTER_S, self._begin)  # one step may take longer than that
                self.timer.daemon = True
                self.timer.start()
            else:
                self.tokens = (done, of)
                if self.line and time.monotonic() - self.shown >= REFRESH_S:
                    self._show()

    def _begin(self) -> None:
        with self.lock:
            if self.timer is not None:
                self._show()

    def _show(self) -> None:
        self.shown = time.monotonic()
        done, of = self.tokens
        speed = f", {(done - self.first) / (self.shown - self.began):,.1f} tok/s" if done > self.first else ""
        line = f"prompt {done:,} of {of:,} tokens{speed}"
        sys.stderr.write(f"\r{line.ljust(len(self.line))}")
        sys.stderr.flush()
        self.line = line

    def _end(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        if self.line:
            sys.stderr.write(f"\r{' ' * (len(self.line) + len('^C'))}\r")  # the echo of Ctrl-C too
            sys.stderr.flush()
            self.line = ""


# Colours and thinking

STYLES = {"bold green": "\x1b[1;32m", "dim": "\x1b[2m"}
PLAIN = "\x1b[0m"
THINKING, THOUGHT = "<think>", "</think>"


def has_colours(stream) -> bool:
    """Whether to colour text: on a terminal that is not dumb, unless the environment has NO_COLOR (no-color.org)."""
    return stream.isatty() and os.environ.get("TERM") != "dumb" and not os.environ.get("NO_COLOR")


def styled(stream, text: str, style: str, invisible: str = "") -> str:
    """The text in a style of STYLES, where the stream has colours; `invisible` goes left and right of sequences."""
    if not has_colours(stream):
        return text
    left, right = invisible[:1], invisible[1:]
    return f"{left}{STYLES[style]}{right}{text}{left}{PLAIN}{right}"


def opens_thinking(tokenizer, ids: list[int]) -> bool:
    """Whether a prompt ends in an open tag, as some chat templates leave it."""
    return tokenizer.decode(ids[-8:]).rstrip().endswith(THINKING)


class AnswerWriter:
    """Writes an answer's pieces to stdout as they come.

    Where there are colours, what a reasoning model thinks before it answers is dim and its tags are left out; elsewhere
    the text stays as it is. thinking: the prompt has opened the tag already. apart: off, a tag is text anyway.
    """

    def __init__(self, stream, thinking: bool = False, apart: bool = True):
        self.stream, self.thinking = stream, thinking
        self.apart = apart and has_colours(stream)
        self.held, self.begun = "", thinking  # held: what may turn out to be a tag
        if self.apart and thinking:
            stream.write(STYLES["dim"])

    def write(self, text: str) -> None:
        if not self.apart:
            self.stream.write(text_for(self.stream, text))
        else:
            self.held += text
            self._release()
        self.stream.flush()

    def end(self) -> None:
        """Write what was held back, and a newline."""
        self.stream.write(text_for(self.stream, self.held) + (PLAIN if self.apart and self.thinking else "") + "\n")
        self.held, self.thinking = "", False
        self.stream.flush()

    def _release(self) -> None:
        """Thinking comes first or not at all: a tag later in an answer is text."""
        if not self.begun and (start := self.held.lstrip()):
            if start.startswith(THINKING):
                self.thinking, self.held = True, start.removeprefix(THINKING)
                self.stream.write(STYLES["dim"])
            self.begun = self.thinking or not THINKING.startswith(start)
        if not self.begun:
            return
        if self.thinking:
            thought, tag, answer = self.held.partition(THOUGHT)
            if tag:
                self.stream.write(printable(thought) + PLAIN)
                self.thinking, self.held = False, answer
            else:
                keep = next((n for n in range(len(THOUGHT) - 1, 0, -1) if thought.endswith(THOUGHT[:n])), 0)
                self.stream.write(printable(thought[: len(thought) - keep]))
                self.held = thought[len(thought) - keep :]
                return
        self.stream.write(printable(self.held))
        self.held = ""
