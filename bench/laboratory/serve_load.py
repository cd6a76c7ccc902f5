"""Load on a running server: many clients that ask, cancel, read slowly, send garbage and go away; every answer that is
read to its end must be the one that the same request has alone.

    edge-moe serve OUT.emoe --ram 8GB &
    python -m bench.laboratory.serve_load http://127.0.0.1:8080 --clients 64 --minutes 10

prints the counts by kind of client, times to the first token and between tokens, memory and descriptors of the server's
process before and after (on this machine), and the tokens a second of 1, 2, 4 and 8 clients. Ends with an error if an
answer was another, the peak was above the cap, or something was left behind.
"""

import argparse
import asyncio
import json
import random
import re
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np

KINDS = {"whole": 3, "stream": 4, "cancel": 2, "go away": 1, "slow": 1, "garbage": 1, "half": 1}  # by weight
WORDS = ("import", "os", "def", "main", "return", "class", "self", "for", "in", "range", "value", "None", "if", "else")
GARBAGE = (b"", b"{", b"\x00\xff" * 50, b'{"model": 5}', b"[]" * 1000, b'{"prompt": "' + b"a" * 5000)
SLOW_S = 0.02  # between reads of a slow reader
QUIET_S = 0.05  # between looks at a server that is to become idle


@dataclass
class Load:
    """A server's address, a pool of requests with their answers alone, and what was seen."""

    address: str
    model: str
    requests: list[dict]
    alone: list[str] = field(default_factory=list)
    counts: Counter = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    first_s: list[float] = field(default_factory=list)
    between_s: list[float] = field(default_factory=list)


def pool(model: str, count: int, longest: int, rng: random.Random) -> list[dict]:
    """Requests with prompts and answers of random lengths, some sampled, each with a seed."""
    requests = []
    for _ in range(count):
        words = " ".join(rng.choices(WORDS, k=rng.choice((1, 5, 30, longest))))
        asked = {"model": model, "prompt": words, "max_tokens": rng.choice((1, 5, 20, 60)), "seed": rng.randrange(1000)}
        requests.append({**asked, "temperature": rng.choice((0, 0.7, 1.0))})
    return requests


async def answer(client: httpx.AsyncClient, asked: dict) -> str:
    """A whole answer; while the queue is full, tries again."""
    while True:
        got = await client.post("/v1/completions", json=asked)
        if got.status_code != 429:
            got.raise_for_status()
            return got.json()["choices"][0]["text"]
        await asyncio.sleep(float(got.headers["Retry-After"]) / 20)


async def streamed(
    client: httpx.AsyncClient, asked: dict, load: Load, slow: bool = False, most: int | None = None
) -> str | None:
    """A streamed answer; None if it was cancelled after `most` events, or the queue was full."""
    text, began, last, events = "", time.perf_counter(), None, 0
    async with client.stream("POST", "/v1/completions", json={**asked, "stream": True}) as got:
        if got.status_code == 429:
            return None
        got.raise_for_status()
        async for line in got.aiter_lines():
            if not line.startswith("data: {"):
                continue
            now = time.perf_counter()
            if not slow:
                (load.first_s if last is None else load.between_s).append(now - (last or began))
            last, events = now, events + 1
            text += json.loads(line[6:])["choices"][0]["text"]
            if events == most:
                return None
            if slow:
                await asyncio.sleep(SLOW_S)
    return text


async def garbage(load: Load, data: bytes, whole: bool) -> None:
    """Send bytes that are no request, or a part of one, and go away."""
    host, port = load.address.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    writer.write(head + b"Content-Length: %d\r\n\r\n" % (len(data) + (0 if whole else 10)) + data)
    await writer.drain()
    if whole:
        status = (await reader.readline()).split()
        if len(status) < 2 or status[1] != b"400":
            load.wrong.append(f"garbage {data[:20]!r} got {status}")
    writer.close()


async def client(load: Load, rng: random.Random, until: float) -> None:
    async with httpx.AsyncClient(base_url=load.address, timeout=600) as http:
        while time.monotonic() < until:
            (kind,) = rng.choices(list(KINDS), KINDS.values())
            place = rng.randrange(len(load.requests))
            asked, want, got = load.requests[place], load.alone[place], None
            if kind in ("garbage", "half"):
                await garbage(load, rng.choice(GARBAGE), kind == "garbage")
            elif kind == "whole":
                got = await answer(http, asked)
            elif kind == "go away":
                try:
                    await asyncio.wait_for(answer(http, asked), rng.random() / 5)
                except (TimeoutError, asyncio.TimeoutError):
                    load.counts["went away"] += 1
            else:
                most = rng.randrange(1, 10) if kind == "cancel" else None
                got = await streamed(http, asked, load, kind == "slow", most)
            load.counts[kind] += 1
            load.counts["answers"] += got is not None
            if got is not None and got != want:
                load.wrong.append(f"{asked}: {got!r}, alone {want!r}")


async def metrics(http: httpx.AsyncClient) -> dict[str, float]:
    text = (await http.get("/metrics")).text
    return {name: float(value) for name, value in re.findall(r"^edge_moe_(\w+) (\S+)$", text, re.M)}


async def rest(http: httpx.AsyncClient) -> dict[str, float]:
    """The metrics once nothing is running or waiting."""
    while True:
        now = await metrics(http)
        if not now["answers_running"] and not now["answers_waiting"]:
            return now
        await asyncio.sleep(QUIET_S)


def process_of(pid: int | None) -> tuple[float, int]:
    """The memory in MB and the number of open descriptors of a process."""
    if pid is None:
        return 0.0, 0
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * 4096 / 1e6, len(list(Path(f"/proc/{pid}/fd").iterdir()))


async def run(
    address: str, clients: int, seconds: float, seed: int = 0, pid: int | None = None, longest: int = 150
) -> dict:
    """Ask the pool's requests alone, then put load on the server; returns what was seen."""
    rng = random.Random(seed)
    async with httpx.AsyncClient(base_url=address, timeout=600) as http:
        model = (await http.get("/v1/models")).json()["data"][0]["id"]
        load = Load(address, model, pool(model, 24, longest, rng))
        for asked in load.requests:
            load.alone.append(await answer(http, asked))
        before, (memory, descriptors) = await rest(http), process_of(pid)
        until = time.monotonic() + seconds
        await asyncio.gather(*(client(load, random.Random(f"{seed} {n}"), until) for n in range(clients)))
        for place, asked in enumerate(load.requests):
            if await answer(http, asked) != load.alone[place]:
                load.wrong.append(f"{asked}: another answer alone, after the load")
        after, (memory_after, descriptors_after) = await rest(http), process_of(pid)
    return {
        "clients": clients,
        "seconds": seconds,
        "counts": dict(load.counts),
        "wrong": load.wrong,
        "tokens": int(after["generated_tokens_total"] - before["generated_tokens_total"]),
        "ram_bytes": after["ram_bytes"],
        "peak_memory_bytes": after["peak_memory_bytes"],
        "memory_mb": [memory, memory_after],
        "descriptors": [descriptors, descriptors_after],
        "first_token_ms": quantiles(load.first_s),
        "between_tokens_ms": quantiles(load.between_s),
    }


def quantiles(seconds: list[float]) -> dict[str, float]:
    if not seconds:
        return {}
    return {
        name: round(1e3 * float(np.quantile(seconds, q)), 2) for name, q in (("p50", 0.5), ("p95", 0.95), ("max", 1.0))
    }


async def speed(address: str, clients: int, tokens: int) -> float:
    """Tokens a second of all clients together, each with an answer of so many tokens."""
    async with httpx.AsyncClient(base_url=address, timeout=600) as http:
        model = (await http.get("/v1/models")).json()["data"][0]["id"]
        asked = {"model": model, "max_tokens": tokens, "temperature": 0, "logit_bias": {}}
        prompts = [" ".join(random.Random(n).choices(WORDS, k=30)) for n in range(clients)]
        began = time.perf_counter()
        bodies = await asyncio.gather(*(http.post("/v1/completions", json={**asked, "prompt": one}) for one in prompts))
        took = time.perf_counter() - began
        return sum(one.json()["usage"]["completion_tokens"] for one in bodies) / took


def failures(seen: dict) -> list[str]:
    """What is wrong with a run."""
    found = list(seen["wrong"])
    if seen["peak_memory_bytes"] > seen["ram_bytes"]:
        found.append(f"the peak is {seen['peak_memory_bytes']:,.0f} bytes, above the cap of {seen['ram_bytes']:,.0f}")
    before, after = seen["descriptors"]
    if after > before + 2:
        found.append(f"{after} open descriptors, {before} before")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("address")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pid", type=int, help="the server's process, to see its memory and descriptors")
    given = parser.parse_args()
    seen = asyncio.run(run(given.address, given.clients, 60 * given.minutes, given.seed, given.pid))
    seen["tokens_per_second"] = {n: round(asyncio.run(speed(given.address, n, 200)), 1) for n in (1, 2, 4, 8)}
    print(json.dumps({**seen, "wrong": seen["wrong"][:5]}, indent=2))
    if found := failures(seen):
        sys.exit("\n".join(found[:20]))


if __name__ == "__main__":
    main()
