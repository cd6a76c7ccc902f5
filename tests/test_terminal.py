"""What a terminal gets: no control characters, thinking apart from the answer, progress that goes away."""

import io
import os
import pty
import subprocess
import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_moe.terminal import AnswerWriter, printable, text_for


class Screen(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def colours(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)


@given(st.text())
def test_no_control_character_reaches_a_terminal(text):
    assert all(char in "\n\t" or unicodedata.category(char) != "Cc" for char in printable(text))
    harmless = "".join(char for char in text if char in "\n\t" or unicodedata.category(char) != "Cc")
    assert printable(harmless) == harmless


def test_escape_sequences_are_spelled_out_on_a_terminal_and_kept_in_a_file():
    text = "\x1b]0;title\x07 caf\u00e9 \x9b2J \r\n\ttab"
    assert printable(text) == "\\x1b]0;title\\x07 caf\u00e9 \\x9b2J \n\ttab"
    assert text_for(Screen(), text) == printable(text)
    assert text_for(io.StringIO(), text) == text


THOUGHT = ["<thi", "nk>\nIs it 4", "? <b>Yes</", "b>.</th", "ink>\n\nIt is", " 4 <think>."]


def written(pieces: list[str], stream: io.StringIO, thinking: bool = False) -> str:
    writer = AnswerWriter(stream, thinking)
    for piece in pieces:
        writer.write(piece)
    writer.end()
    return stream.getvalue()


def test_thinking_is_dim_and_its_tags_are_gone(colours):
    seen = "\x1b[2m\nIs it 4? <b>Yes</b>.\x1b[0m\n\nIt is 4 <think>.\n"
    assert written(THOUGHT, Screen()) == seen
    assert written(list("".join(THOUGHT)), Screen()) == seen
    assert written(["".join(THOUGHT)], Screen()) == seen


def test_thinking_that_the_prompt_began_is_dim_too(colours):
    assert written(["Is it", " 4?</think>Yes"], Screen(), thinking=True) == "\x1b[2mIs it 4?\x1b[0mYes\n"
    assert written(["Is it </thi"], Screen(), thinking=True) == "\x1b[2mIs it </thi\x1b[0m\n"


@pytest.mark.parametrize(
    "pieces", [["<thin"], ["<", "b>", " bold"], ["no <think>thinking</think>"], ["\n", "<br>"], []]
)
def test_text_that_is_no_thinking_stays_as_it_is(colours, pieces):
    assert written(pieces, Screen()) == "".join(pieces) + "\n"


def test_without_colours_an_answer_stays_as_it_is(monkeypatch):
    assert written(THOUGHT, io.StringIO()) == "".join(THOUGHT) + "\n"
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    assert written(THOUGHT, Screen(), thinking=True) == "".join(THOUGHT) + "\n"


PROGRESS = """
import sys, threading
from edge_moe import terminal
terminal.PROGRESS_AFTER_S = terminal.REFRESH_S = 0
with terminal.PromptProgress() as progress:
    progress("prompt", 0, 1500)
    progress.timer.join()
    progress("prompt", 512, 1500)
    progress("prompt", 1500, 1500)
    print("answer", file=sys.stderr)
"""


def test_progress_of_a_prompt_is_a_line_that_goes_away():
    child, screen = pty.fork()
    if child == 0:
        os.dup2(2, 1)
        os.execv(sys.executable, [sys.executable, "-c", PROGRESS])
    seen = b""
    try:
        while part := os.read(screen, 4096):
            seen += part
    except OSError:  # the other side is closed
        pass
    os.waitpid(child, 0)
    lines = seen.decode().split("\r")
    assert lines[1] == "prompt 0 of 1,500 tokens"
    assert lines[2].startswith("prompt 512 of 1,500 tokens, ") and lines[2].endswith(" tok/s")
    assert lines[3].strip() == "" and len(lines[3]) >= len(lines[2])
    assert lines[4] == "answer"


def test_progress_of_a_prompt_is_for_terminals_alone():
    done = subprocess.run(
        [sys.executable, "-c", PROGRESS.replace("    progress.timer.join()\n", "")], capture_output=True
    )
    assert done.stderr == b"answer\n" and done.returncode == 0
