"""What the command line shows: sizes, tables, the plan, a bundle, statistics and benchmark rows as plain text.

Imports nothing heavy: `edge-moe generate` uses it, and its memory counts under the cap.
"""

import json
from collections import Counter

BENCH_COLUMNS = (  # of a benchmark's table: title, and the cell of a Measurement
    ("model", lambda row: f"{row.model} ({row.architecture}, {row.bits_per_weight:.2f} bits)"),
    ("size", lambda row: size(row.size_bytes)),
    ("params", lambda row: f"{row.params / 1e9:.2f} B" if row.params >= 1e9 else f"{row.params / 1e6:.1f} M"),
    ("device", lambda row: row.device),
    ("threads", lambda row: str(row.threads)),
    ("ram cap", lambda row: size(row.ram_bytes)),
    ("test", lambda row: row.test),
    ("t/s", lambda row: f"{row.tps_mean:.2f} ± {row.tps_sd:.2f}"),
    ("hits", lambda row: "resident" if row.resident else f"{row.hit_rate:.1%}"),
    ("MB read/token", lambda row: f"{row.read_bytes_per_token / 1e6:.2f}"),
    ("GB/s", lambda row: "" if row.weights_gbps is None else f"{row.weights_gbps:.2f}"),
    ("peak", lambda row: size(row.peak_memory_bytes)),
)
STDLIB_NOTE = "calibrated on Python source, which is on every machine; for other text pass --calibration FILE"
PART_NAMES = {  # of sizes.Part
    **{name: f"experts, {name}" for name in ("gate", "up", "down", "padding")},
    "shared": "shared expert",
    "dense": "dense MLP",
    "head": "output head",
    "float32": "norms and routers",
}
NUMERIC = ("size", "params", "threads", "ram cap", "t/s", "hits", "MB read/token", "GB/s", "peak")


def size(count: float) -> str:
    """Bytes in decimal units: 1.10 GB, 61.2 MB, 4.1 kB."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(count) >= scale * 0.9995:
            return f"{count / scale:.{2 if scale >= 1e9 else 1}f} {unit}"
    return f"{count:.0f} B"


def table(rows: list[list[str]], right: tuple[int, ...] = ()) -> str:
    """Rows of cells as aligned columns, the first row a header; `right` numbers the columns aligned to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def parts_text(parts) -> str:
    """sizes.Part rows as a table: weights, bits a weight and bytes, and their sums."""
    weights, nbytes = (sum(getattr(part, name) for part in parts) for name in ("weights", "nbytes"))
    cells = [(PART_NAMES.get(part.name, part.name), part.weights, part.nbytes) for part in parts]
    rows = [["part", "weights", "bits", "bytes"]]
    for name, count, size_bytes in (*cells, ("total", weights, nbytes)):
        known = [f"{count:,}", f"{8 * size_bytes / count:.3f}"] if count else ["", ""]
        rows.append([name, *known, size(size_bytes)])
    return table(rows, right=(1, 2, 3))


def estimate_text(estimate) -> str:
    """An Estimate: the parts if it has them, the plan, the largest contexts and what was assumed."""
    if not estimate.parts:
        return plan_text(estimate.plan)
    most, resident = estimate.largest_context, estimate.largest_resident_context
    fits = (
        f"the cap holds a context of at most {most:,} tokens"
        + (f", or {resident:,} with every expert in memory" if resident else ", never every expert")
        if most
        else "the cap holds no context"
    )
    return f"{parts_text(estimate.parts)}\n\n{plan_text(estimate.plan)}\n\n{fits}\n{estimate.assumed}"


def plan_text(plan) -> str:
    """A Plan as a table of bytes by purpose, its floor, and from where on every expert is in memory."""
    if plan.ram_bytes < plan.floor_bytes:
        experts = "less than a token needs"
    elif plan.resident:
        experts = "every expert in memory"
    else:
        share = plan.experts_bytes / plan.all_experts_bytes
        experts = f"{plan.slots} slots of {size(plan.slot_bytes)}: {share:.0%} of {size(plan.all_experts_bytes)}"
    rows = [
        ["purpose", "bytes", ""],
        ["trunk", size(plan.trunk_bytes), "all weights but the routed experts"],
        ["KV cache", size(plan.kv_cache_bytes), f"{plan.context:,} tokens of context"],
        ["scratch", size(plan.scratch_bytes), f"prompts in chunks of {plan.chunk}"],
        ["I/O buffers", size(plan.io_buffers_bytes), ""],
        ["interpreter", size(plan.interpreter_bytes), "about: Python and the tokenizer, where there is one"],
        ["experts", size(plan.experts_bytes), experts],
        ["total", size(plan.total_bytes), f"of a cap of {size(plan.ram_bytes)}"],
        ["", "", ""],
        ["floor", size(plan.floor_bytes), "the smallest cap that works"],
        ["resident from", size(plan.resident_bytes), "the cap from which nothing is paged"],
    ]
    return table(rows, right=(1,))


def widths_name(widths: tuple[int, int, int]) -> str:
    """ "2" where gate, up and down agree, else "2/2/3"."""
    return str(widths[0]) if len(set(widths)) == 1 else "/".join(map(str, widths))


def describe_bundle(bundle) -> dict:
    """What `inspect` shows of a Bundle, as one JSON object."""
    config, extra = bundle.config, bundle.table
    per_layer = {layer: Counter() for layer in config.moe_layers}
    for expert in bundle.experts.values():
        per_layer[expert.layer][expert.widths] += 1
    total = sum(per_layer.values(), Counter())
    return {
        "path": str(bundle.path),
        "tool": extra.get("tool"),
        "architecture": config.architecture,
        "layers": config.layers,
        "dim": config.dim,
        "heads": config.heads,
        "kv_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "vocab": config.vocab,
        "context": config.context,
        "experts": config.experts,
        "top_k": config.top_k,
        "expert_hidden": config.expert_hidden,
        "shared_hidden": config.shared_hidden,
        "bundle_bytes": bundle.nbytes,
        "trunk_bytes": bundle.trunk_bytes,
        "expert_bytes": bundle.expert_bytes,
        "bits_per_weight": bundle.bits_per_weight,
        "groups": sorted({expert.group for expert in bundle.experts.values()}),
        "widths": {widths_name(widths): total[widths] for widths in sorted(total)},
        "widths_by_layer": {
            str(layer): {widths_name(widths): counts[widths] for widths in sorted(counts)}
            for layer, counts in per_layer.items()
        },
        "dropped": sum(map(len, extra["dropped"])),
        "method": extra.get("method"),
        "calibration": extra.get("calibration"),
        "certificate": extra.get("certificate"),
    }


def bundle_text(about: dict) -> str:
    """describe_bundle()'s object for reading."""
    widths = list(about["widths"])
    histogram = [["layer", *widths]] + [
        [layer, *(str(counts.get(name, "")) for name in widths)] for layer, counts in about["widths_by_layer"].items()
    ]
    shared = f", shared expert of {about['shared_hidden']}" if about["shared_hidden"] else ""
    calibration = about["calibration"]
    facts = [
        [
            "model",
            f"{about['architecture']}, {about['layers']} layers of {about['dim']}, vocabulary {about['vocab']:,}, "
            f"context {about['context']:,}",
        ],
        ["experts", f"{about['experts']} a layer of {about['expert_hidden']}, top {about['top_k']}{shared}"],
        [
            "bytes",
            f"{size(about['bundle_bytes'])}: experts {size(about['expert_bytes'])}, trunk {size(about['trunk_bytes'])}",
        ],
        ["bits", f"{about['bits_per_weight']:.3f} per expert weight, scales, biases and padding included"],
        ["method", (about["method"] or {}).get("name", "not recorded") + f", written by {about['tool']}"],
        [
            "calibration",
            "none"
            if not calibration
            else f"{calibration['tokens']:,} tokens of {calibration['source']}, seed {calibration.get('seed')}",
        ],
        [
            "certificate",
            "none"
            if not about["certificate"]
            else ", ".join(f"{key} {value}" for key, value in about["certificate"].items()),
        ],
    ]
    return (
        table([["bundle", about["path"]], *facts])
        + "\n\nexperts by width in bits (gate/up/down where they differ)\n"
        + table(histogram, right=tuple(range(1, len(widths) + 1)))
    )


def compressed_text(about: dict) -> str:
    """What compress made, and what to know about it."""
    from edge_moe.compressor.calibrate import STDLIB

    widths = ", ".join(f"{count:,} of {name}" for name, count in about["widths"].items())
    return (
        f"{about['path']}: {size(about['bundle_bytes'])} (experts {size(about['expert_bytes'])}, "
        f"trunk {size(about['trunk_bytes'])})\n"
        f"{about['bits_per_weight']:.3f} bits per expert weight, scales, biases and padding included\n"
        f"experts by width in bits: {widths}"
        + (f"\n{STDLIB_NOTE}" if (about["calibration"] or {}).get("source") == STDLIB else "")
    )


def evaluation_text(result: dict, context: int) -> str:
    """evaluate_texts()'s result as a table, and what its figures mean."""
    texts = list(result["texts"].items())
    rows = [*texts, *([("together", result)] if len(texts) > 1 else [])]
    columns = [("tokens", ",d"), ("perplexity", ".4f"), ("experts_used", ".3f")]
    columns += [(key, ".4f") for key in ("kld_mean", "kld_p99", "top1_agreement") if key in result]
    cells = [["text", *(key for key, _ in columns)]]
    cells += [[name, *(format(values[key], form) for key, form in columns)] for name, values in rows]
    return (
        table(cells, right=tuple(range(1, len(columns) + 1)))
        + f"\nper token, windows of {context} tokens without overlap, the first of each not scored; KLD in nats\n"
        f"{result['bits_per_weight']:.3f} bits per expert weight, bundle {size(result['bundle_bytes'])}, "
        f"experts {size(result['expert_bytes'])}"
    )


def statistics_text(g) -> str:
    """A Generation's account in three lines."""
    lookups = g.expert_hits + g.expert_misses
    return (
        f"prompt {g.prompt_tokens:,} tokens at {g.prompt_tps:,.1f} tok/s, "
        f"generated {g.generation_tokens:,} at {g.generation_tps:,.1f} tok/s ({g.finish_reason})\n"
        f"experts {g.experts_used:.2f} of {g.top_k} per token and layer; hits {g.expert_hits:,}, misses "
        f"{g.expert_misses:,} ({g.expert_hits / max(lookups, 1):.1%} hits), {g.bytes_read / 1e6:,.1f} MB read\n"
        f"memory {size(g.peak_memory_bytes)} peak, cap {size(g.ram_bytes)}; device {g.device}"
    )


def bench_text(report, form: str) -> str:
    """A benchmark's Report as md, json or csv."""
    if form == "json":
        return json.dumps(report.as_dict())
    return bench_csv(report) if form == "csv" else bench_markdown(report)


def bench_markdown(report) -> str:
    """A benchmark's Report as llama-bench prints it, and the machine's own limits below."""
    titles = [title for title, _ in BENCH_COLUMNS]
    rows = [titles, *([cell(row) for _, cell in BENCH_COLUMNS] for row in report.rows)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(titles))]
    rule = [
        "-" * (width - 1) + ":" if title in NUMERIC else "-" * width
        for title, width in zip(titles, widths, strict=True)
    ]
    lines = []
    for row in (rows[0], rule, *rows[1:]):
        cells = [
            cell.rjust(width) if title in NUMERIC else cell.ljust(width)
            for title, cell, width in zip(titles, row, widths, strict=True)
        ]
        lines.append("| " + " | ".join(cells) + " |")
    disk = "not measured (no unbuffered reads here)" if report.disk_gbps is None else f"{report.disk_gbps:.2f} GB/s"
    threads = report.rows[0].threads
    return (
        "\n".join(lines)
        + f"\n\nthis machine: memory reads {report.memory_gbps:.1f} GB/s on {threads} threads, unbuffered reads of the "
        f"bundle {disk}"
    )


def bench_csv(report) -> str:
    """A benchmark's rows in exact figures."""
    import csv
    import io

    rows, out = report.as_dict()["rows"], io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().rstrip("\n")
