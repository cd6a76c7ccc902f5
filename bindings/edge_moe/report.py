"""Formatting bundles, certificates and statistics as plain text for the command line; plan_text.py formats plans.

Imports nothing heavy: `edge-moe generate` uses this module, and its memory counts under the cap.
"""

from .runtime.plan_table import size, table

STDLIB_NOTE = "calibrated on Python source; for other kinds of text pass --calibration FILE"
DROP_COUNTS = {"equal": "the same number in every layer", "sensitivity": "more in layers where it costs less"}


def bundle_text(about: dict) -> str:
    """Format the object of describe_bundle() as text."""
    shared = f", shared expert of {about['shared_hidden']}" if about["shared_hidden"] else ""
    experts, top_k = (_range(about[key].values()) for key in ("experts_by_layer", "top_k_by_layer"))
    of, dropped, method = f" of {about['experts']}" if about["dropped"] else "", "", about["method"] or {}
    if about["dropped"]:
        how = ""
        if "drop_score" in method:
            counts = method.get("drop_counts")
            how = f", lowest {method['drop_score']} first, {DROP_COUNTS.get(counts, counts)}"
        elif "drop_counts" in method:
            how = ", those that cost least, chosen together with the widths"
        dropped = f"{about['dropped']:,} of {about['experts'] * len(about['experts_by_layer']):,}{how}"
    calibration = about["calibration"]
    facts = {
        "bundle": about["path"],
        **({"part": about["part"]["text"]} if about["part"] else {}),
        "model": f"{about['architecture']}, {about['layers']} layers of {about['dim']}, vocabulary {about['vocab']:,}, "
        f"context {about['context']:,}",
        "experts": f"{experts}{of} a layer of {about['expert_hidden']}, top {top_k}{shared}",
        "dropped": dropped or "none",
        "bytes": f"{size(about['bundle_bytes'])}: experts {size(about['expert_bytes'])}, trunk "
        f"{size(about['trunk_bytes'])}" + (f", tables {size(about['table_bytes'])}" if about["table_bytes"] else ""),
        "trunk": ", ".join(f"{kind} {_range(widths)} bits" for kind, widths in about["trunk_widths"].items()),
        "bits": f"{about['bits_per_weight']:.3f} per expert weight, scales, biases and padding included",
        "method": method.get("name", "not recorded") + f", written by {about['tool']}",
        "calibration": "none"
        if not calibration
        else f"{calibration['tokens']:,} tokens of {calibration['source']}, seed {calibration.get('seed')}",
    }
    parts = [table([[name, fact] for name, fact in facts.items()])]
    if "spread" in method:
        parts.append(spread_text(method, about["widths"]))
    parts += [certificate_text(about["certificate"]), pruning_text(about["pruning"])]
    if about["unlisted_files"]:
        parts.append(unlisted_text(about["unlisted_files"]))
    return "\n\n".join([*parts, *_widths_tables(about)])


def unlisted_text(names) -> str:
    """The message about files of a bundle that no checksum covers."""
    return f"unchecked, because bundle.json does not list them: {', '.join(names)}"


def _range(counts) -> str:
    least, most = min(counts), max(counts)
    return str(most) if least == most else f"{least} to {most}"


def _widths_tables(about: dict) -> list[str]:
    """The tables of experts by width and group, and by width and layer."""
    widths, groups, layers = list(about["widths"]), about["widths_by_group"], about["widths_by_layer"]
    by_group = [["width", *(f"group {group}" if group != "0" else "no group" for group in groups)]]
    by_group += [[name, *(str(counts.get(name, "")) for counts in groups.values())] for name in widths]
    by_layer = [["layer", *widths, *(["dropped"] if about["dropped"] else [])]]
    for layer, counts in layers.items():
        gone = [str(len(about["dropped_by_layer"][layer]))] if about["dropped"] else []
        by_layer.append([layer, *(str(counts.get(name, "")) for name in widths), *gone])
    return [
        f"experts by {what}\n" + table(rows, right=tuple(range(1, len(rows[0]))))
        for what, rows in (
            ("width in bits (gate/up/down, or up/down, where they differ)", by_group),
            ("layer", by_layer),
        )
    ]


def compressed_text(about: dict) -> str:
    """The result of compress: the bundle's sizes and widths, its certificate, and notes."""
    from .compressor.passes.calibrate import STDLIB

    widths = ", ".join(f"{count:,} of {name}" for name, count in about["widths"].items())
    calibrated, method = about["calibration"] or {}, about["method"]
    lines = [
        f"{about['path']}: {size(about['bundle_bytes'])} (experts {size(about['expert_bytes'])}, "
        f"trunk {size(about['trunk_bytes'])})",
        f"{about['bits_per_weight']:.3f} bits per expert weight, scales, biases and padding included",
        f"experts by width in bits: {widths}",
        *([f"experts dropped: {about['dropped']:,}"] if about["dropped"] else []),
        *([spread_text(method, about["widths"])] if "spread" in method else []),
        *([STDLIB_NOTE] if calibrated.get("source") == STDLIB else []),
        *(["", certificate_text(about["certificate"])] if about["certificate"] else []),
    ]
    return "\n".join(lines)


def spread_text(method: dict, widths: dict) -> str:
    """How much the experts differ in sensitivity, and the widths that pmq chose, from bundle.json's `method`."""
    from .compressor.choosing.allocate import FLAT

    found = f"sensitivity spread {method['spread']:.3g} (90th over 10th percentile of experts)"
    if method.get("flat"):
        return f"{found}: flat,\nso all experts have one width; below {FLAT:g} a mix of widths gains nothing"
    return found + (": widths are mixed" if len(widths) > 1 else "")


def certificate_text(certificate: dict | None) -> str:
    """The certificate as a table: source, bundle, and a uniform width in as many bytes."""
    if not certificate:
        return "certificate: none"
    held_out = certificate["held_out"]
    rows = [["certificate", "bits/weight", "perplexity", "ratio", "KLD mean", "KLD p99", "same top token"]]
    rows.append(["source", "", f"{certificate['source_perplexity']:.3f}", "1.000", "", "", ""])
    changed = []
    for name, key in (("this bundle", "bundle"), ("one width", "uniform")):
        if its := certificate.get(key):
            kld = [f"{its['kld_mean']:.4f}", f"{its['kld_p99']:.3f}", f"{its['top1_agreement']:.1%}"]
            bits = f"{its['bits_per_weight']:.3f}"
            rows.append([name, bits, f"{its['perplexity']:.3f}", f"{its['perplexity_ratio']:.3f}", *kld])
            if its.get("routing_changed") is not None:  # bundles of earlier releases do not have it
                changed.append(f"{its['routing_changed']:.2%} in {name}")
    choices = f"\nchoices of experts that changed: {', '.join(changed)}" if changed else ""
    return (
        table(rows, right=(1, 2, 3, 4, 5, 6))
        + f"{choices}\non {held_out['tokens']:,} tokens of {held_out['source']},\n"
        f"in windows of {certificate['context']}; none of it was fitted to; KLD in nats a token"
    )


def pruning_text(pruning: dict | None) -> str:
    """The calibration for pruning and its certificate: each cut compared with the unpruned bundle."""
    if not pruning:
        return "pruning: not calibrated"
    reach = ", ".join(f"{name} {cuts[0]:.2f} to {cuts[-1]:.2f}" for name, cuts in pruning["rules"].items())
    rows = [["pruning", "share cut", "perplexity", "KLD mean", "KLD p99", "same top token"]]
    for its in pruning["certificate"]:
        shown = (f"{its['reached']:.3f}", f"{its['perplexity_ratio'] - 1:+.2%}", f"{its['kld_mean']:.4f}")
        rows.append(
            [f"{pruning['default']}:{its['cut']:g}", *shown, f"{its['kld_p99']:.3f}", f"{its['top1_agreement']:.1%}"]
        )
    tokens = f" on {pruning['certificate'][0]['tokens']:,} held-out tokens" if pruning["certificate"] else ""
    default = pruning["default_cut"]
    unasked = "runs all experts" if default is None else f"leaves out {default:g}"
    return (
        f"{table(rows, right=(1, 2, 3, 4, 5))}\nshare of expert uses left out and what it costs against the bundle "
        f"unpruned{tokens}\nrules and their cuts: {reach}; a run without --prune {unasked}"
    )


def default_pruning_text(pruning, asked) -> str | None:
    """A note if a run prunes by the bundle's default. pruning: of the bundle; asked: the run's --prune."""
    if asked is not None or pruning is None or pruning.default_cut is None:
        return None
    return (
        f"this bundle leaves out {pruning.default_cut:g} of expert uses where --prune is not given; --prune off: none"
    )


def needs_text(needs) -> str:
    """Format a Needs as text."""
    cores = f"{needs.threads} thread{'s' * (needs.threads > 1)}"
    return "\n".join(
        [
            f"needs up to {size(needs.memory_bytes)} of memory, {size(needs.bundle_bytes + needs.work_bytes)} of disk "
            f"({size(needs.free_bytes)} free); bundle {size(needs.bundle_bytes)}",
            f"takes about {duration_text(needs.seconds)} on {cores}, by rounding a piece of one expert",
            *(f"note: {note}" for note in needs.notes),
        ]
    )


def duration_text(seconds: float) -> str:
    """Format a time, rounded to one unit: 40 s, 12 min, 9 h, 29 days."""
    for unit, size_s in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size_s:
            return f"{seconds / size_s:,.0f} {unit}"
    return f"{max(seconds, 1):.0f} s"


def evaluation_text(result: dict, context: int) -> str:
    """Format the result of evaluate_texts() as a table, with an explanation of its figures."""
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
    """Format the statistics of a Generation in three lines."""
    lookups, weight = g.expert_hits + g.expert_misses, g.dropped_routing_weight
    cached = f", {g.cached_tokens:,} cached, the others" if g.cached_tokens else ""
    pruned = f", {weight:.1%} of routing weight dropped" if weight else ""
    return (
        f"prompt {g.prompt_tokens:,} tokens{cached} at {g.prompt_tps:,.1f} tok/s, "
        f"generated {g.generation_tokens:,} at {g.generation_tps:,.1f} tok/s ({g.finish_reason or 'stopped'})\n"
        f"experts {g.experts_used:.2f} of {g.top_k} per token and layer{pruned}; hits {g.expert_hits:,}, misses "
        f"{g.expert_misses:,} ({g.expert_hits / max(lookups, 1):.1%} hits), {g.bytes_read / 1e6:,.1f} MB read\n"
        f"memory {size(g.peak_memory_bytes)} peak, cap {size(g.ram_bytes)}; device {g.device}"
    )
