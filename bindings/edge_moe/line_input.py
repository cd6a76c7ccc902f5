"""Reading chat messages from a terminal or a pipe, one line each.

A terminal has line editing with a history that is kept between chats, and a paste of several lines is one message if
readline supports bracketed paste (GNU readline does; libedit, on macOS, does not). On both, three quotes begin a
message of several lines and three more end it.
"""

import os
import sys
from contextlib import suppress
from pathlib import Path

from .terminal import styled
from .user_files import state_directory

QUOTES = '"""'
PROMPT, MORE = "> ", "... "
HISTORY_LINES = 1000


class MessageTooLong(ValueError):
    """Raised for a message from a pipe with more characters than the context could hold; all of it has been read."""


class LineInput:
    """Reads messages; those from a pipe may have at most `most` characters.

    keep_history: remember the lines typed on a terminal for the next chat.
    """

    def __init__(self, keep_history: bool = True, most: int = 1 << 62):
        self.most = most
        self.terminal = sys.stdin.isatty() and sys.stdout.isatty()
        self.readline, self.history = None, None
        if not self.terminal:
            sys.stdin.reconfigure(encoding="utf-8", errors="strict")  # the C locale would accept any byte
            return
        with suppress(ImportError):
            import readline

            self.readline = readline  # input() uses readline once it is imported
            if "libedit" in (readline.__doc__ or ""):
                readline.parse_and_bind("bind ^I ed-insert")
            else:
                readline.parse_and_bind("set enable-bracketed-paste on")
                readline.parse_and_bind("tab: self-insert")
            if keep_history:
                with suppress(OSError):  # chat works without a writable home directory
                    self.history = _history_file(readline)

    def half_typed(self) -> bool:
        """Whether the line was not empty when Ctrl-C came."""
        return bool(self.readline and self.readline.get_line_buffer())

    def message(self) -> str | None:
        """The next message, without the newline at its end; None at the end of input.

        Raises KeyboardInterrupt for Ctrl-C, MessageTooLong, and ValueError for a pipe's bytes that are not UTF-8.
        """
        line = self._line(PROMPT)
        if line is None or not line.lstrip().startswith(QUOTES):
            return line
        lines, length = [line.lstrip().removeprefix(QUOTES)], 0
        while not lines[-1].rstrip().endswith(QUOTES):
            if (line := self._line(MORE)) is None:
                break
            length += len(line) + 1
            lines.append(line)
            if length > self.most:
                lines = lines[-1:]
        if length > self.most:
            raise self._too_long()
        lines[-1] = lines[-1].rstrip().removesuffix(QUOTES)
        return "\n".join(lines).strip("\n")

    def _too_long(self) -> MessageTooLong:
        return MessageTooLong(f"stdin: a message of more than {self.most:,} characters, which no context here can hold")

    def _line(self, prompt: str) -> str | None:
        if not self.terminal:
            try:
                line = sys.stdin.readline(self.most + 1)
                if len(line) > self.most and not line.endswith("\n"):
                    while (rest := sys.stdin.readline(1 << 16)) and not rest.endswith("\n"):
                        pass
                    raise self._too_long()
            except UnicodeDecodeError:
                raise ValueError("stdin: not UTF-8 text; convert it first") from None
            return line.rstrip("\n") if line else None
        try:
            # Readline counts the columns of its prompt: \001 and \002 enclose characters without width.
            line = input(styled(sys.stdout, prompt, "bold green", "\001\002" if self.readline else ""))
        except EOFError:
            print(file=sys.stderr, flush=True)
            return None
        if self.history and line.strip():
            with suppress(OSError):
                self.readline.append_history_file(1, self.history)
        return line.rstrip("\n")


def _history_file(readline) -> str:
    """Load the history and return its file, which only its owner can read."""
    path: Path = state_directory() / "chat_history"
    os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o600))
    os.chmod(path, 0o600)
    readline.read_history_file(path)
    readline.set_history_length(HISTORY_LINES)
    if readline.get_current_history_length() >= HISTORY_LINES:
        readline.write_history_file(path)  # truncated to the length
    return str(path)
