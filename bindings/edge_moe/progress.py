"""A progress bar on stderr, for people: there is none when stderr is not a terminal."""

import sys
import time
from contextlib import contextmanager

REFRESH_S = 0.1


@contextmanager
def progress_bar(quiet: bool = False):
    """Yields a function (step, done, of) that shows how far a step is, or None when nobody would see it."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # Refreshed by the calls alone: a thread of its own would disturb what is being measured.
    with Progress(*columns, console=Console(stderr=True), auto_refresh=False, transient=True) as bar:
        tasks, shown = {}, 0.0

        def show(step: str, done: int, of: int) -> None:
            nonlocal shown
            if step not in tasks:
                tasks[step] = bar.add_task(step, total=of)
            now = time.monotonic()
            refresh = done >= of or now - shown >= REFRESH_S
            shown = now if refresh else shown
            bar.update(tasks[step], completed=done, total=of, refresh=refresh)

        yield show
