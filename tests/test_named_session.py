"""A chat with a name goes on in another process from where it was."""

import json
import os
import signal
import subprocess
import sys

import pytest

from edge_moe.named_session import NamedSession


@pytest.fixture(scope="module")
def bundle(bundle_of):
    return bundle_of("reference", width=8)


@pytest.fixture
def talk(bundle, tmp_path):
    """talk(lines, arguments...) is what a chat named `one` printed, with state below tmp_path."""

    def run(lines: str, *arguments: str, name: str = "one", code: int = 0) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "edge_moe", "chat", str(bundle), "--temp", "0", "-n", "24", "--session", name]
        environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path)}
        ran = subprocess.run([*command, *arguments], input=lines, capture_output=True, text=True, env=environment)
        assert ran.returncode == code, ran.stderr
        return ran

    run.directory = tmp_path / "edge-moe" / "sessions" / "one"
    return run


FIRST, SECOND = "import os, sys, json, re, time, math\ndef main(argv):\n", "def other(x, y):\n"


def test_the_second_process_says_what_one_would_have_said(talk, bundle):
    command = [sys.executable, "-m", "edge_moe", "chat", str(bundle), "--temp", "0", "-n", "24"]
    want = subprocess.run(command, input=FIRST + SECOND, capture_output=True, text=True, check=True).stdout
    first = talk(FIRST)
    assert f"a new session, kept in {talk.directory}" in first.stderr
    second = talk(SECOND + "/stats\n")
    assert first.stdout + second.stdout == want
    assert "goes on from 2 messages of before, " in second.stderr and "of them computed" in second.stderr
    (cached,) = (int(part.split()[-1]) for part in second.stderr.split(" cached")[:1])
    assert cached > 40
    assert [its["message"] for its in json.loads((talk.directory / "chat.json").read_text())["turns"]] == [
        *FIRST.splitlines(), SECOND.strip(),
    ]  # fmt: skip


def test_commands_change_what_is_kept(talk):
    talk(FIRST + "/undo\n")
    assert "goes on from 1 message of before" in talk("/clear\n").stderr
    assert "goes on from 0 messages of before" in talk("").stderr


def test_a_killed_chat_loses_no_answer(talk, bundle, tmp_path):
    command = [sys.executable, "-m", "edge_moe", "chat", str(bundle), "--temp", "0", "-n", "8", "--session", "one"]
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    child = subprocess.Popen(command, text=True, env=environment, **pipes)
    child.stdin.write(FIRST)
    child.stdin.flush()
    turns = talk.directory / "chat.json"
    while not turns.exists() or len(json.loads(turns.read_text())["turns"]) < 2:
        assert child.poll() is None
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdin.close()
    assert "goes on from 2 messages of before\n" in talk("").stderr


@pytest.mark.parametrize("name", ["../one", "a/b", ".one", "", "x" * 65, "ä"])
def test_names_stay_in_their_directory(name, tmp_path, talk):
    with pytest.raises(ValueError, match="expected a name of up to 64 letters"):
        NamedSession(name, tmp_path)
    assert not list(tmp_path.iterdir())
    assert "--session is " in talk("", name=name, code=1).stderr


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"turns": [{"message": 1}], "system": null}', '{"turns": 5'])
def test_a_file_of_something_else_is_refused_and_kept(talk, content):
    talk.directory.mkdir(parents=True)
    (talk.directory / "chat.json").write_text(content)
    assert f"choose another name, or remove {talk.directory}" in talk(FIRST, code=1).stderr.replace("\n", " ")
    assert (talk.directory / "chat.json").read_text() == content
