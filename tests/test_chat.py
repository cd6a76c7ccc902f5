"""The chat as a person meets it: a terminal, streamed answers, Ctrl-C, and what a pipe gets."""

import os
import pty
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest
from bundles import REFERENCE

from edge_moe.chat import Conversation
from edge_moe.compressor.pipeline import compress

DEADLINE_S = 60


@pytest.fixture(scope="module")
def bundle(bundle_of):
    return bundle_of("reference", width=8)


@pytest.fixture(scope="module")
def templated(tmp_path_factory):
    """The same model with a chat template."""
    directory = tmp_path_factory.mktemp("templated")
    for file in REFERENCE.iterdir():
        (directory / file.name).symlink_to(file)
    (directory / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    )
    return compress(directory, directory / "templated.emoe", width=8, method="rtn").path


def piped(bundle, lines: str, *arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "edge_moe", "chat", str(bundle), "--temp", "0", *arguments]
    return subprocess.run(command, input=lines, capture_output=True, text=True, timeout=DEADLINE_S)


class Terminal:
    """A chat on a pseudo-terminal: what is typed goes in, what is seen comes out."""

    def __init__(self, *arguments):
        self.seen = ""
        self.pid, self.handle = pty.fork()
        if self.pid == 0:
            os.environ["TERM"] = "dumb"
            os.execv(sys.executable, [sys.executable, "-m", "edge_moe", "chat", *map(str, arguments)])

    def wait_for(self, text: str, again: str = "") -> str:
        """Read until `text` is seen; what came before it is consumed and returned. `again` is typed after silence."""
        deadline = time.monotonic() + DEADLINE_S
        while text not in self.seen:
            assert time.monotonic() < deadline, f"no {text!r} in {self.seen!r}"
            if select.select([self.handle], [], [], 1)[0]:
                self.seen += os.read(self.handle, 4096).decode(errors="replace")
            else:
                self.type(again)
        before, self.seen = self.seen.split(text, 1)
        return before

    def type(self, keys: str) -> None:
        os.write(self.handle, keys.encode())

    def exit_code(self, again: str = "") -> int:
        """Wait for the end, typing `again` while there is silence."""
        deadline = time.monotonic() + DEADLINE_S
        while (ended := os.waitpid(self.pid, os.WNOHANG))[0] == 0:
            assert time.monotonic() < deadline, f"still there after {self.seen!r}"
            with suppress(OSError):  # the other side is closed
                if select.select([self.handle], [], [], 1)[0]:
                    self.seen += os.read(self.handle, 4096).decode(errors="replace")
                else:
                    self.type(again)
        os.close(self.handle)
        return os.waitstatus_to_exitcode(ended[1])


def test_ctrl_c_stops_the_answer_and_keeps_the_chat(bundle):
    chat = Terminal(bundle, "--temp", "0", "-n", "900", "--threads", "1")
    chat.wait_for("no chat template")
    chat.wait_for("> ")
    chat.type("def main(argv):\n")
    chat.wait_for("main(argv):\r\n")  # the echo
    chat.wait_for("    ")  # of the answer
    chat.type("\x03")
    chat.wait_for("stopped\r\n")
    chat.wait_for("> ")
    chat.type("/stats\n")
    first = chat.wait_for("of 1,024 tokens")
    assert int(first.split("generated ")[1].split(" ")[0]) < 900
    used = int(first.split("context ")[1].replace(",", ""))
    chat.wait_for("> ")
    chat.type("x\n")
    chat.wait_for("x\r\n")
    chat.wait_for("> ")
    chat.type("/stats\n")
    second = chat.wait_for(" tokens at ")
    assert int(second.split("prompt ")[1].replace(",", "")) >= used - 2  # the conversation, encoded again
    chat.wait_for("> ")
    chat.type("\x04")
    assert chat.exit_code() == 0


def test_ctrl_c_twice_at_the_prompt_leaves(bundle):
    chat = Terminal(bundle)
    chat.wait_for("> ")
    chat.type("\x03")
    # CPython loses a signal that comes between showing the prompt and waiting for a key.
    chat.wait_for("Ctrl-C again, Ctrl-D or /exit leaves", again="\x03")
    chat.wait_for("> ")
    chat.type("\x03")
    assert chat.exit_code(again="\x03") == 0


def test_a_signal_during_an_answer_keeps_a_piped_chat_too(bundle):
    command = [sys.executable, "-m", "edge_moe", "chat", str(bundle), "--temp", "0", "-n", "900", "--threads", "1"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as chat:
        chat.stdin.write(b"def main(argv):\n")
        chat.stdin.flush()
        assert chat.stdout.read(1)
        chat.send_signal(signal.SIGINT)
        out, err = chat.communicate(b"/stats\n", timeout=DEADLINE_S)
    assert chat.returncode == 0
    assert b"\nstopped\n" in err
    assert b"generated 900" not in err


def test_the_answer_is_all_that_stdout_gets(bundle):
    done = piped(bundle, "import os\n/stats\n/help\n/what\n/exit\nnot read\n", "-n", "3")
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) <= 3 and "import" in done.stdout
    assert "this model has no chat template: it continues the text of the whole conversation" in done.stderr
    assert "stopped after 3 tokens; -n raises that" in done.stderr
    assert "hits" in done.stderr and "/reset   start a new conversation" in done.stderr
    assert "no command /what; /help lists them" in done.stderr


def test_a_conversation_goes_on_and_reset_forgets_it(bundle):
    once = piped(bundle, "import os\n/stats\n", "-n", "4").stderr
    twice = piped(bundle, "import os\nimport re\n/stats\n", "-n", "4").stderr
    reset = piped(bundle, "import re\n/reset\nimport os\n/stats\n", "-n", "4")
    tokens = [int(text.split("prompt ")[1].split()[0]) for text in (once, twice, reset.stderr)]
    assert tokens[1] > tokens[0] == tokens[2]
    assert "a new conversation" in reset.stderr


def test_a_chat_template_wraps_every_turn(templated):
    done = piped(templated, "hello\nagain\n/stats\n", "-n", "4")
    assert "no chat template" not in done.stderr
    assert done.returncode == 0
    assert int(done.stderr.split("prompt ")[1].split()[0]) > 12


def test_a_full_context_is_said_and_the_message_is_not_kept(bundle):
    done = piped(bundle, "import os\n" + "a b c d e f g h " * 8 + "\nimport os\n/stats\n", "-n", "4", "--context", "32")
    assert "the context 32; shorten it or raise context; this message was not kept" in done.stderr
    assert done.returncode == 0
    assert "of 32 tokens" in done.stderr  # the third message was answered


def test_an_answer_that_fills_the_context_says_so(bundle):
    done = piped(bundle, "import os\n", "-n", "100", "--context", "32")
    assert "the context of 32 tokens is full and the answer was cut; /reset starts a new one" in done.stderr


def test_a_conversation_changes_only_when_it_was_answered():
    text, chat = Conversation(templated=False), Conversation(templated=True)
    text.asked("never answered"), chat.asked("never answered")
    text.answered("a", "b")
    chat.answered("a", "b")
    assert text.asked("c") == "ab\nc"
    assert chat.asked("c") == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
