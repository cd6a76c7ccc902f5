"""Printing the result of a subcommand as one JSON object on stdout, or an error as one line on stderr."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

import typer

from ..terminal import printable, show, wrapped


def print_json(value: dict) -> None:
    show(json.dumps(value, ensure_ascii=False))


@contextmanager
def only_first(rank: int) -> Iterator[None]:
    """Print nothing in the block, but on the first of the processes that mlx.launch has started to run a model."""
    if rank == 0:
        yield
        return
    with open(os.devnull, "w") as nothing, redirect_stdout(nothing), redirect_stderr(nothing):
        yield


def fail(error: Exception | str, code: int = 1) -> None:
    """Print one line on stderr and exit with `code`."""
    message = str(error) or ("out of memory" if isinstance(error, MemoryError) else type(error).__name__)
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        message = f"{error.filename}: {error.strerror}"
    line = f"edge-moe: error: {printable(' '.join(message.split()))}"
    print(wrapped(line) if sys.stderr.isatty() else line, file=sys.stderr)
    raise typer.Exit(code)
