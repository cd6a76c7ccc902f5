"""Output that differs on a terminal: escaped control characters, the progress of a prompt, colours and dim thinking."""

import os
import shutil
import sys
import textwrap
import threading
import time

from .runtime.channels import THINKING, THOUGHT

PROGRESS_AFTER_S = 0.5  # a shorter prompt shows no progress
REFRESH_S = 0.1
HARMLESS = "\n\t"  # control characters that are not escaped: others can move the cursor, retitle the window and more
VISIBLE = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in HARMLESS}
VISIBLE[ord("\r")] = ""  # part of a line's end; alone it would overwrite the line


def printable(text: str) -> str:
    """The text with control characters spelled out, such as \\x1b, so that a terminal can show it safely."""
    return text.translate(VISIBLE)


def text_for(stream, text: str) -> str:
    """The text to write to a stream: printable() on a terminal, else unchanged."""
    return printable(text) if stream.isatty() else text


def show(text: str, stream=None) -> None:
    """Print text that may contain strings from untrusted files, on stdout or another stream."""
    stream = stream or sys.stdout
    print(text_for(stream, text), file=stream, flush=True)


def wrapped(text: str) -> str:
    """The text broken at spaces to fit the terminal's width."""
    width = max(shutil.get_terminal_size().columns, 40)
    return "\n".join(textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False))


class PromptProgress:
    """A context manager that shows the progress of prefill in a line on stderr, after half a second.

    Called as progress("prompt", tokens read, tokens of the prompt); the line is erased when these are equal, or at the
    end of the context. Shows nothing if stderr is not a terminal or `quiet` is set.
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
                self.timer = threading.Timer(PROGRESS_AFTER_S, self._begin)  # one step may take longer
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
            sys.stderr.write(f"\r{' ' * (len(self.line) + len('^C'))}\r")  # erases the echo of Ctrl-C too
            sys.stderr.flush()
            self.line = ""


# Colours and thinking

STYLES = {"bold green": "\x1b[1;32m", "dim": "\x1b[2m"}
PLAIN = "\x1b[0m"


def has_colours(stream) -> bool:
    """Whether to colour text: on a terminal that is not dumb, unless NO_COLOR is set (no-color.org)."""
    return stream.isatty() and os.environ.get("TERM") != "dumb" and not os.environ.get("NO_COLOR")


def styled(stream, text: str, style: str, invisible: str = "") -> str:
    """The text in a style of STYLES if the stream has colours. invisible: two characters that enclose escape codes."""
    if not has_colours(stream):
        return text
    left, right = invisible[:1], invisible[1:]
    return f"{left}{STYLES[style]}{right}{text}{left}{PLAIN}{right}"


class AnswerWriter:
    """Writes an answer to a stream piece by piece.

    With colours, the thinking of a reasoning model is dim and its tags are omitted; without, the text is unchanged.
    thinking: the prompt has already opened the tag. apart: whether to look for tags at all.
    """

    def __init__(self, stream, thinking: bool = False, apart: bool = True):
        self.stream, self.thinking = stream, thinking
        self.apart = apart and has_colours(stream)
        self.held, self.begun = "", thinking  # held: text that may become a tag
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
        """Write the text held back, and a newline."""
        self.stream.write(text_for(self.stream, self.held) + (PLAIN if self.apart and self.thinking else "") + "\n")
        self.held, self.thinking = "", False
        self.stream.flush()

    def _release(self) -> None:
        """Write the text held back if it cannot be a tag. Thinking only starts an answer: a later tag is text."""
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
