"""Strings of a bundle and names of files on a terminal: no control sequence gets there; a pipe has them as they are."""

import json
import os
import pty
import shutil
import subprocess

import pytest
from bundles import edit_table

SEQUENCES = "\x1b]0;title\x07 \x1b[2J \x9b2J \x7f \r over"
HARM = ("\x1b]", "\x07", "\x1b[2J", "\x9b", "\x7f", "\r over")  # of these; a progress bar has sequences of its own
SHOWN = "\\x1b]0;title\\x07 \\x1b[2J \\x9b2J \\x7f  over"


def found_in(shown: str) -> list[str]:
    return [harm for harm in HARM if harm in shown]


def on_terminal(*command) -> str:
    """What a command writes to a terminal, both streams."""
    ours, its = pty.openpty()
    child = subprocess.Popen(["edge-moe", *command], stdout=its, stderr=its, stdin=subprocess.DEVNULL)
    os.close(its)
    shown = b""
    try:
        while part := os.read(ours, 65536):
            shown += part
    except OSError:  # the other end is closed
        pass
    os.close(ours)
    child.wait()
    return shown.decode().replace("\r\n", "\n")


@pytest.fixture
def bundle(copy_of, tmp_path):
    path = shutil.move(copy_of("olmoe", width=4), tmp_path / f"{SEQUENCES}.emoe")
    edit_table(path, lambda table: table.update(tool=SEQUENCES))
    return path


@pytest.mark.parametrize("command", [["inspect"], ["verify"], ["plan", "--ram", "1GB"], ["inspect", "--json"]])
def test_no_control_sequence_of_a_bundle_reaches_a_terminal(bundle, command):
    shown = on_terminal(*command, bundle)
    assert "--json" in command or "plan" in command or SHOWN in shown
    assert not found_in(shown)


@pytest.mark.parametrize("command", [["inspect"], ["generate", "-p", "x"], ["chat"], ["plan"], ["eval", "--text", "x"]])
def test_no_control_sequence_of_a_name_reaches_a_terminal_in_an_error(tmp_path, command):
    (tmp_path / SEQUENCES).mkdir()
    shown = on_terminal(*command, tmp_path / SEQUENCES)
    assert "edge-moe: error:" in shown and not found_in(shown)


def test_a_pipe_has_the_strings_as_they_are(bundle):
    def piped(*more) -> str:
        return subprocess.run(["edge-moe", "inspect", bundle, *more], capture_output=True, check=True).stdout.decode()

    assert f"written by {SEQUENCES}" in piped()
    assert json.loads(piped("--json"))["tool"] == SEQUENCES
