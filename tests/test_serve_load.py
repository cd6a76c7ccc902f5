"""Many clients at once: none holds the engine, each gets its own answer, and what they leave behind is freed."""

import asyncio
import json
import signal
import socket
import threading
from contextlib import contextmanager

import pytest
from bundles import run_python

httpx = pytest.importorskip("httpx")
pytest.importorskip("uvicorn")
from serving import serve  # noqa: E402 (needs httpx)

from bench.laboratory.serve_load import failures, run  # noqa: E402 (needs httpx)

LONG = {"prompt": "import os", "max_tokens": 1000, "temperature": 0, "logit_bias": {"0": -100}}
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
SHORT = {"prompt": "import sys", "max_tokens": 2, "temperature": 0}


@pytest.fixture
def serving(templated, tmp_path):
    """serving(options) is a running server."""

    def start(*options: str):
        return serve(templated, tmp_path / "log", "--name", "m", *options)

    return start


def ask(one, body: dict, **more):
    return one.post("/v1/completions", {"model": "m", **body, **more})


def raw(one, body: dict) -> socket.socket:
    """A connection on which a request was sent."""
    host, port = one.address.removeprefix("http://").split(":")
    found = socket.socket()
    found.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    found.connect((host, int(port)))
    data = json.dumps({"model": "m", **body}).encode()
    found.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(data) + data)
    return found


def test_under_load_each_client_gets_the_answer_that_it_has_alone(serving):
    with serving("--sequences", "4", "--ram", "400MB", "--queue", "16") as one:
        seen = asyncio.run(run(one.address, clients=16, seconds=3, pid=one.process.pid, longest=60))
        assert failures(seen) == []
        assert seen["counts"]["answers"] > 10 and {"cancel", "go away", "slow", "garbage"} <= seen["counts"].keys()
        assert one.stop() == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_sequence(serving, stream):
    """The others' answers do not wait for the rest of its own, nor for what it had waiting."""
    with serving("--sequences", "1") as one:
        gone = raw(one, {**LONG, "n": 20, "stream": stream})
        while not one.metric("answers_running"):
            pass
        if stream:
            gone.recv(1)
        gone.close()
        assert ask(one, SHORT).status_code == 200
        assert one.metric("generated_tokens_total") < 2000
        assert one.metric("answers_running") == one.metric("answers_waiting") == 0


def test_a_client_that_reads_nothing_does_not_hold_the_engine(serving):
    with serving("--sequences", "1", "--idle-timeout", "1") as one:
        asked = {**LONG, "max_tokens": 600, "stream": True, "logprobs": 20}  # about 1 MB
        alone = ask(one, LONG, max_tokens=600).json()["choices"][0]["text"]
        slow = raw(one, asked)
        while one.metric("answers_total") < 2:  # until all is computed, and waits for the client
            pass
        assert ask(one, SHORT).status_code == 200
        text, got = "", slow.makefile("rb")
        for line in got:  # it reads after all, within its time
            if line.startswith(b"data: {"):
                text += json.loads(line[6:])["choices"][0]["text"]
            if line.startswith(b"data: [DONE]"):
                break
        assert text == alone
        slow.close()
        open_before = one.descriptors()
        stuck = raw(one, asked)
        while one.metric("answers_total") < 4:
            pass
        while one.descriptors() > open_before:  # until it is cut off
            assert ask(one, SHORT).status_code == 200
        received = stuck.makefile("rb").read()
        assert received.startswith(b"HTTP/1.1 200") and b"[DONE]" not in received


def test_a_request_that_does_not_arrive_is_cut_off(serving):
    with serving("--idle-timeout", "0.5") as one:
        host, port = one.address.removeprefix("http://").split(":")
        for sent, says in ((b"", b""), (HEAD, b""), (HEAD + b"Content-Length: 100\r\n\r\n{", b"HTTP/1.1 408")):
            with socket.create_connection((host, int(port))) as late:
                late.sendall(sent)
                try:
                    assert late.recv(12) == says
                except ConnectionResetError:
                    assert says == b""


def test_owners_take_turns(serving):
    with serving("--sequences", "1", "--queue", "128") as one:
        many = threading.Thread(target=ask, args=(one, {**LONG, "max_tokens": 100, "n": 20, "user": "a"}))
        many.start()
        while not one.metric("answers_running"):
            pass
        assert ask(one, SHORT, user="b").status_code == 200
        assert one.metric("answers_waiting") > 0  # of the first
        many.join()
        assert one.metric("answers_total") == 21


def test_a_deadline(serving):
    with serving("--sequences", "1", "--timeout", "0.5", "--queue", "200") as one:
        got = ask(one, LONG, n=100)
        assert got.status_code == 504 and got.headers["x-should-retry"] == "false"
        assert got.json()["error"]["message"] == "the request took more than 0.5 seconds, the server's limit"
        while one.metric("answers_running") or one.metric("answers_waiting"):  # a step was being computed
            assert one.process.poll() is None
        *_, last = (line for line in ask(one, LONG, n=100, stream=True).text.split("\n\n") if line)
        assert json.loads(last[6:])["error"]["code"] == "timeout"
        assert ask(one, SHORT).status_code == 200


@contextmanager
def signalled(one, number: int, says: bytes, **more):
    """Send a signal while an answer is streamed, and wait for a line of the log; gives the lines of the stream."""
    body = {"model": "m", **LONG, "stream": True, **more}
    with one.client.stream("POST", "/v1/completions", json=body) as running:
        lines = running.iter_lines()
        next(lines)
        one.process.send_signal(number)
        while says not in one.process.stderr.readline():
            pass
        yield lines


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_server_when_running_answers_have_ended(serving, number):
    with serving("--sequences", "1") as one:
        with signalled(one, number, b"waits up to 10 s for an answer") as lines:
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert one.process.wait(30) == 0
        with pytest.raises(httpx.ConnectError):
            one.get("/health")


def test_a_second_signal_ends_it_at_once(serving):
    with serving("--sequences", "1") as one, signalled(one, signal.SIGINT, b"once more ends at once", n=50):
        one.process.send_signal(signal.SIGINT)
        assert one.process.wait(10) == 130


def test_without_its_extra_the_command_says_what_to_install(templated):
    code = """import sys
sys.modules["uvicorn"] = None
sys.argv[1:] = ["serve", sys.argv[1]]
from edge_moe.cli import main
try:
    main()
except SystemExit as ended:
    print(ended.code)
"""
    done = run_python(code, templated)
    assert done.stdout == "1\n"
    assert done.stderr == "edge-moe: error: edge-moe serve needs uvicorn: pip install 'edge-moe[serve]'\n"


def test_a_port_that_is_taken(serving, templated):
    from test_cli import error_of

    with serving() as one:
        port = one.address.rpartition(":")[2]
        says = f"127.0.0.1:{port}: Address already in use; choose another --port or --host"
        assert error_of("serve", templated, "--port", port) == says
