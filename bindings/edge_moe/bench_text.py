"""Benchmarks as text: llama-bench's table, and the sweep over caps with its knee; as Markdown, JSON or CSV."""

import csv
import io
import json
import textwrap

from .runtime.plan_table import size

COLUMNS = (  # of the table: title, and the cell of a Measurement
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
BAR = 24  # characters of the fastest cap's


SMALL_BYTES = 100_000_000  # a bundle that is read in a moment says little of its disk


def bench_text(report, form: str, columns: int | None = None) -> str:
    """A benchmark's Report or a Sweep as md, json or csv. columns: that the table should fit into."""
    if form == "json":
        return json.dumps(report.as_dict())
    if form == "csv":
        return bench_csv(report)
    return sweep_markdown(report) if hasattr(report, "knee_bytes") else bench_markdown(report, columns)


def bench_markdown(report, columns: int | None = None) -> str:
    """A benchmark's Report as llama-bench prints it, and the machine's own limits below.

    Where the table is wider than `columns`, what all rows have in common is in a line above it.
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
    """A line for each test that the model's context made shorter. asked: tokens by pp and tg."""
    found = {row.test.partition(" ")[0]: row.tokens for row in report.rows}
    return [
        f"note: the model's context holds {tokens:,} tokens: {kind}{asked[kind]} was measured as {test}"
        for test, tokens in found.items()
        if tokens < asked[kind := test[:2]]
    ]


def sweep_markdown(sweep) -> str:
    """A Sweep with a line for each cap, a bar for its speed, and where the knee is."""
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
    """Rows of cells, the first a header, with aligned columns; `right`: by column, whether to the right."""
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
    """A benchmark's or sweep's rows in exact figures."""
    rows, out = report.as_dict()["rows"], io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().rstrip("\n")
