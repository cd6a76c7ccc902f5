"""A server in a process of its own, for tests with real clients."""

import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx


@dataclass
class Served:
    """process: reads nothing, and writes its log to `log`."""

    process: subprocess.Popen
    address: str
    name: str
    log: Path

    def __post_init__(self) -> None:
        self.client = httpx.Client(base_url=self.address, timeout=60)

    def post(self, path: str, body: object, **options) -> httpx.Response:
        return self.client.post(path, json=body, **options)

    def get(self, path: str, **options) -> httpx.Response:
        return self.client.get(path, **options)

    def metric(self, name: str) -> float:
        return float(re.search(rf"^edge_moe_{name} (\S+)$", self.get("/metrics").text, re.M)[1])

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def stop(self, number: int = signal.SIGINT) -> int:
        self.process.send_signal(number)
        return self.process.wait(60)


@contextmanager
def serve(bundle: Path, log: Path, *options: str):
    """Start `edge-moe serve` on a free port; it is ended with the block, if it has not ended before."""
    command = [sys.executable, "-m", "edge_moe", "serve", str(bundle), "--port", "0", "--threads", "1", *options]
    environment = {key: value for key, value in os.environ.items() if key != "EDGE_MOE_API_KEY"}
    with open(log, "wb") as file:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.PIPE, env=environment
        )
    try:
        first = process.stderr.readline().decode()
        found = re.match(r"(\S+) on (http://\S+): cap ", first)
        assert found, first + process.stderr.read().decode()
        yield Served(process, found[2], found[1], log)
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
