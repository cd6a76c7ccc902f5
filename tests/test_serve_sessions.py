"""Conversations with a server go on after it was restarted: what was computed of them is read, not computed again."""

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("httpx")
from serving import serve

TALKS = [[{"role": "user", "content": f"import os, sys, json, re, time, math  # {word * 20}"}] for word in ("a ", "b ")]
MORE = {"role": "user", "content": "and then?"}


def ask(one, messages: list[dict]) -> tuple[str, int]:
    """The answer, and how many tokens of the prompt were cached."""
    body = {"model": one.name, "messages": messages, "max_tokens": 12, "temperature": 0}
    said = one.post("/v1/chat/completions", body).json()
    return said["choices"][0]["message"]["content"], said["usage"]["prompt_tokens_details"]["cached_tokens"]


@pytest.mark.parametrize("sequences", ["1", "2"])
def test_conversations_go_on_after_a_restart(templated, tmp_path, sequences):
    options = ("--sequences", sequences, "--sessions", str(tmp_path / "kept"))
    with serve(templated, tmp_path / "log", *options) as one:
        whole = [[*talk, {"role": "assistant", "content": ask(one, talk)[0]}, MORE] for talk in TALKS]
        assert one.stop() == 0
    with serve(templated, tmp_path / "log", "--sequences", sequences) as one:
        want = [ask(one, messages)[0] for messages in whole]
    with serve(templated, tmp_path / "log", *options) as one:
        got = [ask(one, messages) for messages in whole]
    assert [text for text, _ in got] == want
    assert min(cached for _, cached in got) > 40
