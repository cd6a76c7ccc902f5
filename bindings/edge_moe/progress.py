"""Progress on stderr: a bar on a terminal and, for runs of hours, plain lines in files and pipes."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

REFRESH_S = 0.1
LINE_S = 60  # between plain lines of one phase
PHASES = {  # of compress: the displayed name, and an estimated share of the time
    "read text": ("read calibration text", 3),
    "measure": ("measure experts", 40),
    "choose widths": ("choose widths", 3),
    "round": ("round experts", 50),
    "certify": ("compare with the source", 4),
    "quantise": ("round to nearest", 100),
    "tables": ("round tables of n-grams", 20),
}
STEPS = {"adjust top_k": "choose widths"}  # steps of the library that belong to another phase


@contextmanager
def progress_bar(quiet: bool = False):
    """Yields a function (step, done, of) that shows the progress of a step, or None without a terminal or if quiet."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # Refreshed only by calls: a separate thread would disturb the measurements.
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


class Phases:
    """The progress of a run of several phases; `show` is called at each change."""

    def __init__(self, show: Callable[["Phases"], None]):
        self.names: tuple[str, ...] = ()
        self.at = self.done = 0
        self.of = 1
        self._show, self._began = show, time.monotonic()

    def begin(self, name: str, names: tuple[str, ...]) -> None:
        self.names, self.at, self.done, self.of = names, names.index(name), 0, 1
        self._show(self)

    def progress(self, step: str, done: int, of: int) -> None:
        if self.names and STEPS.get(step, step) == self.names[self.at]:
            self.done, self.of = done, of
            self._show(self)

    @property
    def title(self) -> str:
        return f"{self.at + 1} of {len(self.names)} {PHASES[self.names[self.at]][0]}"

    @property
    def count(self) -> str:
        return f"{self.done:,}/{self.of:,}" if self.of > 1 else ""

    @property
    def share(self) -> float:
        """The share of all work that is done."""
        weights = [PHASES[name][1] for name in self.names]
        return (sum(weights[: self.at]) + weights[self.at] * self.done / self.of) / sum(weights)

    @property
    def elapsed(self) -> str:
        return str(timedelta(seconds=int(time.monotonic() - self._began)))


@contextmanager
def phases(quiet: bool = False) -> Iterator[Phases]:
    """Show a bar over all phases of a run with elapsed and remaining time; without a terminal, a line at the start of
    each phase and one a minute."""
    if quiet:
        yield Phases(lambda now: None)
    elif sys.stderr.isatty():
        with _bar() as show:
            yield Phases(show)
    else:
        yield Phases(_Lines())


class _Lines:
    def __init__(self):
        self._told, self._at = 0.0, None

    def __call__(self, now: Phases) -> None:
        if now.names[now.at] == "read text":
            return  # this phase takes seconds, and errors in the options appear in it
        began = now.at != self._at
        if began or time.monotonic() - self._told >= LINE_S:
            self._told, self._at = time.monotonic(), now.at
            count = f" {now.count}" if now.count and not began else ""
            print(f"{now.elapsed} phase {now.title}{count}", file=sys.stderr, flush=True)


@contextmanager
def _bar():
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[count]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=False),
    )
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=2, transient=True) as bar:
        task = bar.add_task("", total=1.0, count="")

        def show(now: Phases) -> None:
            # A phase is drawn when it begins and when it ends, however short it is.
            drawn = now.title != bar.tasks[0].description or now.done == now.of
            bar.update(task, description=now.title, completed=now.share, count=now.count, refresh=drawn)

        yield show
