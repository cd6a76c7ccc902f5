"""A server that speaks what huggingface_hub asks of the hub, for directories given as models."""

import json
import os
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

COMMIT = "a1" * 20


class Hub(ThreadingHTTPServer):
    """models: directories by ORG/NAME. log: (method, file or "api", first and last byte or None) of every request."""

    daemon_threads = True

    def __init__(self, models: dict[str, Path], gated: tuple[str, ...] = ()):
        super().__init__(("127.0.0.1", 0), Handler)
        self.models, self.gated, self.log = models, gated, []

    def environment(self, home: Path) -> dict[str, str]:
        """What makes huggingface_hub of another process use this server, and an empty cache in `home`."""
        own = {"HF_ENDPOINT": f"http://127.0.0.1:{self.server_port}", "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        return {**os.environ, **own, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}

    def whole(self) -> list[str]:
        """The files that were downloaded whole."""
        return [file for method, file, span in self.log if method == "GET" and file != "api" and span is None]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        parts = unquote(self.path.partition("?")[0]).strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        name = "/".join(parts[2:4] if api else parts[:2])
        rest = parts[4:] if api else parts[2:]
        revision = rest[1] if len(rest) > 1 else "main"
        span = self.headers.get("range")
        span = tuple(map(int, span.removeprefix("bytes=").split("-"))) if span else None
        self.server.log.append((self.command, "api" if api else "/".join(rest[2:]), span))
        if name not in self.server.models:
            return self.send(401 if name.startswith("private") else 404, b"", {"X-Error-Code": "RepoNotFound"})
        if name in self.server.gated:
            return self.send(403, b"", {"X-Error-Code": "GatedRepo"})
        if revision not in ("main", "v2", COMMIT):
            return self.send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        directory = self.server.models[name]
        files = sorted(str(file.relative_to(directory)) for file in directory.rglob("*") if file.is_file())
        if api and rest[:1] == ["tree"]:
            found = [{"type": "file", "path": file, **self.about(directory / file)} for file in files]
            return self.send(200, json.dumps(found).encode(), {"Content-Type": "application/json"}, body)
        if api:
            siblings = [{"rfilename": file} for file in files]
            about = {"id": name, "modelId": name, "sha": COMMIT, "private": False, "tags": [], "downloads": 0}
            about |= {"siblings": siblings, "likes": 0}
            return self.send(200, json.dumps(about).encode(), {"Content-Type": "application/json"}, body)
        file = directory / "/".join(rest[2:])
        if not file.is_file():
            return self.send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, body)
        data, headers = file.read_bytes(), {"ETag": f'"{self.about(file)["oid"]}"', "X-Repo-Commit": COMMIT}
        headers["Accept-Ranges"] = "bytes"
        if span:
            first, last = span[0], min(span[1], len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            return self.send(206, data[first : last + 1], headers, body)
        return self.send(200, data, headers, body)

    def about(self, file: Path) -> dict:
        return {"oid": f"{hash(str(file)) & (1 << 64) - 1:040x}", "size": file.stat().st_size}

    def send(self, status: int, data: bytes, headers: dict, body: bool = True) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if body and self.command != "HEAD":
            self.wfile.write(data)


@contextmanager
def serving(models: dict[str, Path], gated: tuple[str, ...] = ()):
    hub = Hub(models, gated)
    thread = threading.Thread(target=hub.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()
