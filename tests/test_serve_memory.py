"""The peak of a server's memory stays below its cap, whatever clients send and however they read."""

import asyncio
import json
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
from test_cli import error_of

httpx = pytest.importorskip("httpx")
pytest.importorskip("uvicorn")
from serving import serve  # noqa: E402 (needs httpx)
from test_serve_load import raw  # noqa: E402

from edge_moe.runtime.runtime import Runtime  # noqa: E402
from edge_moe.server import openai_completions  # noqa: E402
from edge_moe.server.asked import Asked  # noqa: E402
from edge_moe.server.errors import ApiError, openai_error  # noqa: E402
from edge_moe.server.events import EventStream  # noqa: E402
from edge_moe.server.limits import Limits  # noqa: E402
from edge_moe.server.memory import Backlogs, Budget, Full, parsed_bytes  # noqa: E402
from edge_moe.server.scheduler import Inbox  # noqa: E402
from edge_moe.server.service import Service  # noqa: E402

TALK = [{"role": "user", "content": "import os"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
LONG = {"prompt": "import os", "max_tokens": 300, "logit_bias": {"0": -100}}


def hostile(scale: int = 1) -> list[bytes]:
    """Bodies whose parsed form, text, answer or grammar is many times their size. scale: by which they are smaller."""
    text = {"model": "m", "max_tokens": 4}
    words = " ".join(f"word{n}" for n in range(400_000 // scale))
    return [
        b'{"model": "m", "prompt": [' + b"[]," * (1_300_000 // scale) + b"1]}",
        b'{"model": "m", "prompt": [' + b'{"":0},' * (500_000 // scale) + b"1]}",
        b'{"model": "m", "prompt": [' + b"1.5," * (900_000 // scale) + b"1]}",
        json.dumps({**text, "prompt": "\N{GRINNING FACE}" * (300_000 // scale)}).encode(),
        json.dumps({**text, "prompt": "\N{GRINNING FACE}" * (900_000 // scale)}, ensure_ascii=False).encode(),
        json.dumps({**text, "prompt": words[:3_900_000]}).encode(),
        json.dumps({**text, "messages": [{"role": "user", "content": ""}] * (60_000 // scale)}).encode(),
        json.dumps({**text, "messages": TALK, "tools": [TOOL] * 128}).encode(),
        json.dumps({**text, **LONG, "n": 9, "logprobs": 20}).encode(),
        json.dumps({**text, "prompt": "import " * 400, "n": 6, "echo": True, "logprobs": 20}).encode(),
        json.dumps({**text, "prompt": "a", "guided_regex": "([a-z]{0,90}[0-9]{0,90}){0,90}"}).encode(),
        json.dumps({**text, "prompt": "a", "guided_choice": [f"{n:05}" * 4 for n in range(7_000)]}).encode(),
    ]


def test_the_peak_stays_below_the_cap(templated_with_tools, tmp_path):
    options = ("--name", "m", "--sequences", "2", "--context", "1024", "--threads", "1")
    refused = error_of("serve", templated_with_tools, "--port", "0", "--ram", "1MB", *options)
    floor = int(re.search(r"below the floor of (\d+) MB", refused)[1])
    with serve(templated_with_tools, tmp_path / "log", *options, "--ram", f"{floor + 4}MB") as one:
        want = one.post(
            "/v1/completions", {"model": "m", "prompt": "import os", "max_tokens": 20, "temperature": 0}
        ).json()
        stuck = [raw(one, {**LONG, "model": "m", "stream": True, "logprobs": 20}) for _ in range(3)]

        def send(body: bytes) -> int:
            path = "/v1/chat/completions" if b'"messages"' in body else "/v1/completions"
            headers = {"Content-Type": "application/json"}
            try:
                return one.client.post(path, content=body, headers=headers).status_code
            except httpx.TransportError:  # the server answers before it has read the body, and closes
                return 413

        with ThreadPoolExecutor(12) as pool:
            statuses = list(pool.map(send, hostile()))
        assert set(statuses) <= {200, 400, 413, 429}, statuses
        for slow in stuck:
            slow.close()
        again = one.post(
            "/v1/completions", {"model": "m", "prompt": "import os", "max_tokens": 20, "temperature": 0}
        ).json()
        assert again["choices"] == want["choices"]
        assert one.metric("peak_memory_bytes") <= one.metric("ram_bytes")


def test_a_body_takes_no_more_memory_than_is_counted():
    import tracemalloc

    for body in hostile(20)[:8]:
        tracemalloc.start()
        value = json.loads(body)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert value and len(body) + peak <= parsed_bytes(body)


def test_budgets():
    budget = Budget(100)
    with budget.hold() as first, budget.hold() as second:
        first.resize(60)
        with pytest.raises(Full) as refused:
            second.resize(50)
        assert not refused.value.ever and budget.taken == 60
        with pytest.raises(Full) as refused:
            second.resize(101)
        assert refused.value.ever
        first.resize(20)
        second.resize(80)
    assert budget.taken == 0


def test_the_largest_backlog_is_ended():
    ended = []
    backlogs = Backlogs(100)
    for name, count in (("a", 40), ("b", 50), ("a", 5)):
        backlogs.add(name, count, lambda name=name: (ended.append(name), backlogs.remove(name)))
    assert ended == []
    backlogs.add("c", 10, lambda: ended.append("c"))
    assert ended == ["b"] and backlogs.taken == 55
    backlogs.remove("a", 20)
    backlogs.remove("a")
    backlogs.remove("a")
    assert backlogs.taken == 10 and set(backlogs.of) == {"c"}


def test_what_waits_for_a_client_is_bounded(templated_with_tools):
    """A stream that nobody reads ends with an error, and frees what waited and its sequence."""
    limits = Limits(answers_bytes=100_000)

    async def unread() -> None:
        inbox = Inbox(service.backlogs, None)
        asked = Asked(["import os"], {"temperature": 0}, messages=False, max_tokens=400, stream=True)
        reading = service.prepare(asked, "somebody", inbox)
        reading.submit()
        while not inbox._closed:
            await asyncio.sleep(0)
        with pytest.raises(ApiError) as ended:
            await reading.next()
        assert (ended.value.status, ended.value.code) == (503, "backlog_full")
        assert service.backlogs.taken == 0 and reading.answers[0].request.wanted.is_over()

    with Runtime(templated_with_tools, "8GB", threads=1) as runtime:
        service = Service(runtime, ("m",), limits)
        asyncio.run(unread())
        service.close()


def test_an_answer_that_the_servers_end_cuts_is_an_error(templated_with_tools):
    async def cut() -> None:
        asked = Asked(["import os"], {"temperature": 0, "logit_bias": {0: -100.0}}, messages=False)
        reading = service.prepare(asked, "somebody", Inbox(service.backlogs, None))
        reading.submit()
        assert await reading.next()
        service.begin_close()
        service.scheduler.cancel_all()
        with pytest.raises(ApiError) as ended:
            while await reading.next():
                pass
        assert (ended.value.status, ended.value.code) == (503, "shutting_down")
        with pytest.raises(ApiError) as refused:
            service.prepare(asked, "somebody", Inbox(service.backlogs, None)).submit()
        assert refused.value.status == 503

    with Runtime(templated_with_tools, "8GB", threads=1) as runtime:
        service = Service(runtime, ("m",))
        asyncio.run(cut())
        service.close()


def test_many_log_probabilities_need_a_stream(templated_with_tools, tmp_path):
    with serve(templated_with_tools, tmp_path / "log", "--name", "m", "--sequences", "4") as one:
        refused = one.post("/v1/completions", {**LONG, "model": "m", "logprobs": 20, "n": 4})
        assert refused.status_code == 400 and "stream the answer" in refused.json()["error"]["message"]


def test_a_stream_that_its_client_leaves_leaves_nothing_behind(templated_with_tools):
    """Also where the client goes away in the moment that a token comes."""

    async def left(turns: int) -> None:
        """The client goes away so many turns of the event loop after a token has come."""

        async def send(message: dict) -> None: ...

        async def receive() -> dict:
            for _ in range(5):
                await asyncio.sleep(0)
            (one,) = reading.answers
            reading.inbox.put(one, one.request.account.piece("import", [5], None))
            for _ in range(turns):
                await asyncio.sleep(0)
            return {"type": "http.disconnect"}

        asked = Asked(["import os"], {}, messages=False, stream=True)
        answer = openai_completions.Answer(asked, service, "1")
        reading = service.prepare(asked, "somebody", Inbox(service.backlogs, None))
        await EventStream(reading, answer, service.bodies.hold(), openai_error)({}, receive, send)

    async def all_of_them() -> None:
        for turns in range(8):
            await left(turns)
        for _ in range(10):
            await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert service.backlogs.taken == 0 and not service.backlogs.of

    with Runtime(templated_with_tools, "8GB", threads=1) as runtime:
        service = Service(runtime, ("m",))
        asyncio.run(all_of_them())
        service.close()
