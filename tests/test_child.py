"""Work in a child process: its answer comes back, and its errors are raised here as they were there."""

import pytest

from edge_moe.runtime.child import call

MODULE = """
import os, signal
from edge_moe.runtime.child import answer

def work(what, **values):
    if what == "refuse":
        raise ValueError("1 is not 2;\\nuse 2")
    if what == "deny":
        raise PermissionError("not yours")
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    return {"values": values, "there": os.environ["THERE"], "wrong": what + 1 if what == "fail" else None}

answer(work)
"""


@pytest.fixture
def ask(tmp_path):
    (tmp_path / "worker.py").write_text(MODULE)
    return lambda **arguments: call("worker", arguments, "it was killed", PYTHONPATH=str(tmp_path), THERE="yes")


def test_an_answer_is_what_the_function_returned(ask):
    assert ask(what="", a=[1, None], b="ü") == {"values": {"a": [1, None], "b": "ü"}, "there": "yes", "wrong": None}


@pytest.mark.parametrize(
    "what, kind, message",
    [
        ("refuse", ValueError, "1 is not 2;\nuse 2"),
        ("deny", OSError, "not yours"),
        ("die", OSError, "it was killed"),
        ("fail", OSError, 'TypeError: can only concatenate str (not "int") to str'),
    ],
)
def test_an_error_is_raised_with_its_message(ask, what, kind, message):
    with pytest.raises(kind) as error:
        ask(what=what)
    assert str(error.value) == message
