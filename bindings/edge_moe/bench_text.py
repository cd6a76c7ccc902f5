"""Formatting benchmarks as Markdown, JSON or CSV: llama-bench's table, and the sweep over caps with its knee."""

import csv
import io
import json
import textwrap

from .runtime.plan_table import size

COLUMNS = (  # of the table: the title, and a function from a Measurement to its cell
    ("model", lambda row: f"{row.model} ({row.architecture}, {row.bits_per_weight:.2f} bits)"),
    ("size", lambda row: size(row.size_bytes)),
    ("params", lambda row: f"{row.params / 1e9:.2f} B" if row.params >= 1e9 else f"{row.params / 1e6:.1f} M"),
    ("device", lambda row: row.device),
    ("threads", lambda row: str(row.threads)),
    ("ram cap", lambda row: size(row.ram_bytes)),
    ("test", lambda row: row.test),
    ("prune", lambda row: row.prune),
    ("experts", lambda row: f"{row.experts_used:.2f}"),
    ("t/s", lambda row: f"{row.tps_mean:.2f} ± {row.tps_sd:.2f}"),
    ("hits", lambda row: "resident" if row.resident else f"{row.hit_rate:.1%}"),
    ("MB read/token", lambda row: f"{row.read_bytes_per_token / 1e6:.2f}"),
    ("GB/s", lambda row: "" if row.weights_gbps is None else f"{row.weights_gbps:.2f}"),
    ("peak", lambda row: size(row.peak_memory_bytes)),
)
RIGHT = ("size", "params", "threads", "ram cap", "experts", "t/s", "hits", "MB read/token", "GB/s", "peak")
BAR = 24  # characters of the bar of the fastest cap


SMALL_BYTES = 100_000_000  # a smaller bundle is read too quickly to measure its disk


def bench_text(report, form: str, columns: int | None = None) -> str:
    """Format a Report or a Sweep as md, json or csv. columns: the width that the table should fit into."""
    if form == "json":
        return json.dumps(report.as_dict())
    if form == "csv":
        return bench_csv(report)
    return sweep_markdown(report) if hasattr(report, "knee_bytes") else bench_markdown(report, columns)


def bench_markdown(report, columns: int | None = None) -> str:
    """Format a Report as llama-bench's table, with the machine's own limits below.

    If the table is wider than `columns`, cells that are equal in all rows move to a line above it.
    """
    titles = [title for title, _ in COLUMNS]
    rows = [titles, *([cell(row) for _, cell in COLUMNS] for row in report.rows)]
    disk = "not measured (no unbuffered reads here)" if report.disk_gbps is None else f"{report.disk_gbps:.2f} GB/s"
    first = report.rows[0]
    if first.size_bytes < SMALL_BYTES and report.disk_gbps is not None:
        disk += ", which is too small to measure a disk"
    text = markdown_table(rows, [title in RIGHT for title in titles])
    if columns and columns < text.index("\n"):
        alike = [len(set(cells)) == 1 and title not in ("test", "t/s") for title, *cells in zip(*rows, strict=True)]
        common = ", ".join(f"{titles[at]} {rows[1][at]}" for at in range(1, len(titles)) if alike[at])
        above = "\n".join([rows[1][0], *textwrap.wrap(common, columns)])
        rows = [[cell for cell, same in zip(row, alike, strict=True) if not same] for row in rows]
        text = f"{above}\n\n" + markdown_table(rows, [title in RIGHT for title in rows[0]])
    return (
        f"{text}\n\nthis machine: memory reads {report.memory_gbps:.1f} GB/s on {first.threads} threads,\n"
        f"unbuffered reads of the bundle {disk}"
    )


def cut_text(report, asked: dict[str, int]) -> list[str]:
    """A note for each test that the model's context shortened. asked: the tokens requested, by `pp` and `tg`."""
    found = {row.test.partition(" ")[0]: row.tokens for row in report.rows}
    return [
        f"note: the model's context holds {tokens:,} tokens: {kind}{asked[kind]} was measured as {test}"
        for test, tokens in found.items()
        if tokens < asked[kind := test[:2]]
    ]


def sweep_markdown(sweep) -> str:
    """Format a Sweep as a table, with a row and a speed bar for each cap, and the position of the knee."""
    tests = list(dict.fromkeys((row.test, row.prune) for row in sweep.rows))
    caps = [sweep.rows[at : at + len(tests)] for at in range(0, len(sweep.rows), len(tests))]
    shown = next((at for at, (test, _) in enumerate(tests) if test.startswith("tg")), 0)  # in the bar
    fastest, first = max(rows[shown].tps_mean for rows in caps), sweep.rows[0]
    pruned = len({prune for _, prune in tests}) > 1
    names = [test + (f", prune {prune}" if pruned else "") for test, prune in tests]
    cells = [["ram cap", "slots", "hits", "MB read/token", *(f"{name} t/s" for name in names), "peak", names[shown]]]
    for rows in caps:
        row = rows[shown]
        bar = "█" * max(round(BAR * row.tps_mean / fastest), 1) + ("" if row.holds_working_set else " below the knee")
        cells.append([size(row.ram_bytes), "resident" if row.resident else f"{row.slots:,}", f"{row.hit_rate:.1%}"])
        cells[-1] += [f"{row.read_bytes_per_token / 1e6:.2f}", *(f"{its.tps_mean:.2f}" for its in rows)]
        cells[-1] += [size(row.peak_memory_bytes), bar]
    about = f"{first.model} ({first.architecture}, {first.bits_per_weight:.2f} bits), {first.device}"
    end = (
        f"every expert is in memory from {size(sweep.resident_bytes)} on"
        if caps[-1][0].resident
        else f"every expert would be in memory from {size(sweep.resident_bytes)} on, which is more than --ram"
    )
    return (
        f"{about}, {first.threads} threads; each cap is a process of its own; hits and reads are of {names[shown]}\n\n"
        + markdown_table(cells, [True] * (len(cells[0]) - 1) + [False])
        + f"\n\nknee at {size(sweep.knee_bytes)}: from there on the slots hold the {sweep.working_set_experts:,} "
        f"experts ({size(sweep.working_set_bytes)}) that one token uses;\n"
        f"with less room every token reads from storage\nfloor {size(sweep.floor_bytes)}; {end}"
    )


def markdown_table(rows: list[list[str]], right: list[bool]) -> str:
    """Format rows of cells, the first a header, as an aligned table. right: whether to right-align, by column."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(right))]
    rule = ["-" * (width - 1) + ":" if to else "-" * width for to, width in zip(right, widths, strict=True)]
    lines = []
    for row in (rows[0], rule, *rows[1:]):
        cells = [
            cell.rjust(width) if to else cell.ljust(width) for cell, width, to in zip(row, widths, right, strict=True)
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def bench_csv(report) -> str:
    """The rows of a Report or a Sweep as CSV, with unrounded figures."""
    rows, out = report.as_dict()["rows"], io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().rstrip("\n")
