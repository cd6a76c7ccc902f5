"""The chat as a person meets it: a terminal, streamed answers, Ctrl-C, and what a pipe gets."""

import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest
from bundles import edit_copy

from edge_moe.conversation import Conversation, Turn
from edge_moe.runtime.runtime import Runtime

DEADLINE_S = 60


@pytest.fixture(scope="module")
def bundle(bundle_of):
    return bundle_of("reference", width=8)


def piped(bundle, lines: str, *arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "edge_moe", "chat", str(bundle), "--temp", "0", *arguments]
    return subprocess.run(command, input=lines, capture_output=True, text=True, timeout=DEADLINE_S)


class Terminal:
    """A chat on a pseudo-terminal: what is typed goes in, what is seen comes out."""

    def __init__(self, home, *arguments, term: str = "dumb"):
        """home: where the history of chats is kept."""
        self.seen = ""
        self.pid, self.handle = pty.fork()
        if self.pid == 0:
            os.environ |= {"TERM": term, "XDG_STATE_HOME": str(home)}
            os.environ.pop("NO_COLOR", None)
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


def test_ctrl_c_stops_the_answer_and_keeps_the_chat(bundle, tmp_path):
    chat = Terminal(tmp_path, bundle, "--temp", "0", "-n", "900", "--threads", "1")
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
    second = chat.wait_for(" tokens")
    assert int(second.split("prompt ")[1].replace(",", "")) >= used - 2  # the conversation, encoded again
    chat.wait_for("> ")
    chat.type("\x04")
    assert chat.exit_code() == 0


def test_ctrl_c_twice_at_the_prompt_leaves(bundle, tmp_path):
    chat = Terminal(tmp_path, bundle)
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
    assert "stopped after 3 tokens; /continue goes on, -n raises that" in done.stderr
    assert "hits" in done.stderr and "/clear          start a new conversation" in done.stderr
    assert "no command /what; /help lists them, and a space before it makes it a message" in done.stderr


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
    assert "; this message was not kept: /drop N forgets the oldest messages, /clear all" in done.stderr
    assert done.returncode == 0
    assert "of 32 tokens" in done.stderr  # the third message was answered


def test_an_answer_that_fills_the_context_says_so(bundle):
    done = piped(bundle, "import os\n", "-n", "100", "--context", "32")
    assert (
        "the context of 32 tokens is full and the answer was cut: /drop N forgets the oldest messages, /clear all"
        in done.stderr
    )


def test_what_is_asked_is_all_that_was_said():
    turns = [Turn("a", "b", [], True), Turn("c", "d", [], True)]
    assert Conversation(False, None, turns).prompt("e") == "ab\ncd\ne"
    assert Conversation(False, None, turns).prompt("e", dropped=1) == "cd\ne"
    assert Conversation(True, "s", turns[:1]).prompt("c") == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    assert Conversation(True, None, turns).prompt("e", dropped=2) == [{"role": "user", "content": "e"}]


def saved(bundle, lines: str, tmp_path, *arguments) -> list[tuple[str, str]]:
    """The conversation that these lines lead to: roles and contents."""
    file = tmp_path / "saved.json"
    file.unlink(missing_ok=True)
    done = piped(bundle, f"{lines}/save {file}\n", *arguments)
    assert done.returncode == 0, done.stderr
    return [(message["role"], message["content"]) for message in json.loads(file.read_text())]


def test_a_thought_that_the_prompt_opens_is_handed_on_apart(templated, tmp_path):
    thinker = tmp_path / "thinker.emoe"
    shutil.copytree(templated, thinker)
    template = "{% for m in messages %}{{ m.role }} {{ m.content }}{{ m.reasoning_content }};{% endfor %}<think>\n "
    edit_copy(thinker, "chat_template.jinja", template.encode())
    file = tmp_path / "saved.json"
    done = piped(thinker, f"one\ntwo\n/stats\n/save {file}\n", "-n", "4")
    assert done.returncode == 0, done.stderr
    messages = json.loads(file.read_text())
    assert messages[1]["content"].startswith("<think>\n")
    thought = messages[1]["content"].removeprefix("<think>").strip("\n")
    messages[1] = {"role": "assistant", "content": "", "reasoning_content": thought}
    with Runtime(thinker) as runtime:
        tokens = len(runtime.tokenizer.apply_chat_template(messages[:3]))
    assert f"prompt {tokens} " in done.stderr, (thought, done.stderr)


def test_turns_can_be_taken_back_dropped_and_asked_again(templated, tmp_path):
    one, two = saved(templated, "one\ntwo\n", tmp_path, "-n", "4")[::2]
    assert (one, two) == (("user", "one"), ("user", "two"))

    def asked(lines: str) -> list[str]:
        return [content for role, content in saved(templated, lines, tmp_path, "-n", "4") if role == "user"]

    assert asked("one\ntwo\n/undo\n") == ["one"]
    assert asked("one\ntwo\nthree\n/drop\n") == ["two", "three"]
    assert asked("one\ntwo\nthree\n/drop 2\n/drop 9\n/drop x\n") == ["three"]
    assert asked("one\ntwo\n/retry\n") == ["one", "two"]
    assert asked("one\n/clear\n/undo\n/retry\n/drop\n/continue\n") == []


def test_an_answer_that_was_cut_goes_on_as_if_it_had_not_been(templated, bundle, tmp_path):
    for path in (templated, bundle):
        whole = saved(path, "def f(x):\n", tmp_path, "-n", "24")
        parts = saved(path, "def f(x):\n/continue\n/continue\n", tmp_path, "-n", "8")
        assert parts == whole and len(whole) == 2
        with Runtime(path) as runtime:
            prompt = [{"role": "user", "content": "def f(x):"}] if path == templated else "def f(x):"
            assert whole[1][1] == runtime.generate(prompt, 24).text


def test_a_system_prompt_comes_first_and_stays(templated, bundle, tmp_path):
    given = saved(templated, "hello\n", tmp_path, "-n", "2", "--system", "be brief")
    assert given[0] == ("system", "be brief") and given[1] == ("user", "hello")
    typed = saved(templated, "/system be brief\nhello\n/clear\nhello\n", tmp_path, "-n", "2")
    assert typed == given
    done = piped(bundle, "/system x\n")
    assert "this model has no chat template and takes no system prompt" in done.stderr
    refused = piped(bundle, "", "--system", "x")
    assert refused.returncode == 1 and refused.stderr.endswith("this model has no chat template; --system needs one\n")


def test_the_temperature_can_be_changed(bundle):
    done = piped(bundle, "/temp\n/temp 0.7\n/temp hot\n/temp -1\n/temp\n")
    assert done.stderr.splitlines()[2:] == [
        "temperature 0",
        "temperature 0.7",
        "temperature is 'hot', expected 0 or more",
        "temperature is '-1', expected 0 or more",
        "temperature 0.7",
    ]


def test_the_cap_can_be_changed_between_two_answers(bundle):
    lines = "import os\n/retry\n/ram\n/ram 1MB\n/ram much\n/ram 300MB\n/retry\n/ram\n"
    done = piped(bundle, lines, "-n", "12", "--ram", "2GB", "--context", "64")
    assert done.stdout == 3 * done.stdout[: len(done.stdout) // 3] != ""
    said = [line for line in done.stderr.splitlines() if "cap" in line or "size" in line]
    assert said[0] == "cap 2.00 GB, with memory for 100% of the experts"
    assert said[1].startswith("a cap of 1 MB is below the floor of ")
    assert said[2].startswith("size 'much' is not understood")
    assert said[3:] == ["cap 300.0 MB, with memory for 100% of the experts"] * 2


def test_a_file_that_exists_is_never_written_over(bundle, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    done = piped(bundle, f"a\n/save {tmp_path}/mine.txt\n/save {tmp_path}/no/a.txt\n/save\n", "-n", "1")
    assert f"{tmp_path}/mine.txt exists already; choose another name" in done.stderr
    assert f"{tmp_path}/no/a.txt: No such file or directory" in done.stderr
    assert "name a file: /save FILE" in done.stderr
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_a_path_is_a_message_and_no_command(templated, tmp_path):
    told = saved(templated, "/usr/bin/foo: not found, why?\n /clear\n", tmp_path, "-n", "2")
    assert [content for role, content in told if role == "user"] == ["/usr/bin/foo: not found, why?", " /clear"]


def test_three_quotes_hold_a_message_of_several_lines(templated, tmp_path):
    lines = '"""one\ntwo\n\n  three\n"""\n"""four"""\n'
    told = saved(templated, lines, tmp_path, "-n", "2")
    assert [content for role, content in told if role == "user"] == ["one\ntwo\n\n  three", "four"]


def test_the_oldest_messages_are_dropped_on_request_alone(templated, tmp_path):
    lines = "".join(f"message {number} of several\n" for number in range(8))
    options = ("-n", "4", "--context", "64")
    kept = [content for role, content in saved(templated, lines, tmp_path, *options) if role == "user"]
    assert kept == [f"message {number} of several" for number in range(len(kept))] and len(kept) < 8
    kept = [content for role, content in saved(templated, lines, tmp_path, *options, "--drop-oldest") if role == "user"]
    assert kept == [f"message {number} of several" for number in range(8 - len(kept), 8)] and 0 < len(kept) < 8
    assert (
        "the context was full; dropped from the conversation: the oldest "
        in piped(templated, lines, *options, "--drop-oldest").stderr
    )


def test_bytes_that_are_no_text_are_one_line(bundle):
    command = [sys.executable, "-m", "edge_moe", "chat", str(bundle)]
    done = subprocess.run(command, input=b"\xff\xfe\n", capture_output=True, timeout=DEADLINE_S)
    assert done.returncode == 1
    assert done.stderr.endswith(b"edge-moe: error: stdin: not UTF-8 text; convert it first\n")


needs_readline = pytest.mark.skipif(
    "libedit" in (pytest.importorskip("readline").__doc__ or ""), reason="libedit has no bracketed paste"
)


@needs_readline
def test_lines_that_are_pasted_are_one_message(templated, tmp_path):
    chat, file = Terminal(tmp_path, templated, "--temp", "0", "-n", "2", term="xterm"), tmp_path / "pasted.json"
    chat.wait_for("> ")
    chat.type("\x1b[200~one\n\ttwo\nthree\x1b[201~\n")
    chat.wait_for("stopped after 2 tokens")
    chat.wait_for("> ")
    chat.type(f"/save {file}\n")
    chat.wait_for("1 message and what was answered")
    chat.wait_for("> ")  # a Ctrl-D that is typed before is lost when line editing takes the terminal over
    chat.type("\x04")
    assert chat.exit_code() == 0
    assert json.loads(file.read_text())[0] == {"role": "user", "content": "one\n\ttwo\nthree"}


@needs_readline
def test_lines_of_an_earlier_chat_are_remembered_for_their_owner_alone(templated, tmp_path):
    for keys, seen in (("a line of the first chat\n", "the first chat"), ("\x1b[A\n", "a line of the first chat")):
        chat = Terminal(tmp_path, templated, "-n", "2", term="xterm")
        chat.wait_for("> ")
        chat.type(keys)
        chat.wait_for(seen)
        chat.wait_for("stopped after 2 tokens")
        chat.wait_for("> ")
        chat.type("\x04")
        assert chat.exit_code() == 0
    file = tmp_path / "edge-moe" / "chat_history"
    assert file.read_text().splitlines() == ["a line of the first chat"] * 2
    assert file.stat().st_mode & 0o777 == 0o600 and file.parent.stat().st_mode & 0o777 == 0o700
    chat = Terminal(tmp_path, templated, "-n", "2", "--no-history", term="xterm")
    chat.wait_for("> ")
    chat.type("secret\n")
    chat.wait_for("stopped after 2 tokens")
    chat.wait_for("> ")
    chat.type("\x04")
    assert chat.exit_code() == 0
    assert "secret" not in file.read_text()


@needs_readline
def test_ctrl_c_on_a_half_typed_line_never_leaves(bundle, tmp_path):
    chat = Terminal(tmp_path, bundle, "-n", "2")
    chat.wait_for("> ")
    chat.type("\x03")
    chat.wait_for("Ctrl-C again, Ctrl-D or /exit leaves", again="\x03")
    chat.wait_for("> ")
    chat.type("half a line")
    chat.wait_for("half a line")
    chat.type("\x03")
    chat.wait_for("> ", again="\x03")
    chat.type("import os\n")
    chat.wait_for("stopped after 2 tokens")
    chat.wait_for("> ")
    chat.type("\x04")
    assert chat.exit_code() == 0


def test_colours_are_for_terminals_that_want_them(bundle, tmp_path, monkeypatch):
    for term, colourful in (("xterm", True), ("dumb", False)):
        chat = Terminal(tmp_path, bundle, term=term)
        assert ("\x1b[1;32m" in chat.wait_for("> ")) == colourful
        chat.type("\x04")
        assert chat.exit_code() == 0


def test_a_line_longer_than_any_context_is_left_out_and_the_chat_goes_on(bundle):
    lines = ["a b " * 250_000, "", '"""', *["x y"] * 100_000, '"""', "def f("]
    child = piped(bundle, "\n".join(lines) + "\n", "-n", "3")
    assert child.returncode == 0
    said = "stdin: a message of more than 65,536 characters, which no context here can hold; this message was not kept"
    assert child.stderr.count(said) == 2
    assert child.stdout.strip()  # the last one was answered
