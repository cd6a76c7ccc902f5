"""The chat page at `/`: files that need no build step and ask no other host for anything."""

from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

FOLDER = Path(__file__).with_name("page")
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
FILES = ("index.html", "page.css", "page.js", "markdown.js", "plots.js")
# Scripts and styles of this server alone; nothing is embedded anywhere, and nothing else is asked.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


def page_routes() -> list[Route]:
    """The page and its parts, which need no key: it asks for one itself."""
    return [_route("/" if name == "index.html" else f"/page/{name}", FOLDER / name) for name in FILES]


def _route(path: str, file: Path) -> Route:
    content, headers = file.read_bytes(), {**HEADERS, "Content-Type": f"{TYPES[file.suffix]}; charset=utf-8"}

    async def answer(request: Request) -> Response:
        return Response(content, headers=headers)

    return Route(path, answer, methods=["GET"])
