"""Formatting the output of `edge-moe plan`: a model's parts, its memory plan, alternatives, and the expected speed."""

import shutil
import textwrap
from pathlib import Path

from .runtime.plan_table import plan_text, size, table

PART_NAMES = {  # of sizes.Part
    **{name: f"experts, {name}" for name in ("gate", "up", "down", "padding")},
    "shared": "shared expert",
    "dense": "dense MLP",
    "head": "output head",
    "streams": "gates of streams",
    "float32": "norms and routers",
    "tables": "tables of n-grams",
}
LINE = 80  # width of the text below the tables
VERDICTS = ((8, "faster than one reads"), (3, "about as fast as one reads"), (1, "slow"), (0, "too slow to wait for"))
UNKNOWN = "speed: not known; `edge-moe doctor DIR` measures this machine and the disk of DIR once, in some ten seconds"


def parts_text(parts) -> str:
    """Format sizes.Part rows as a table of weights, bits a weight and bytes, with totals."""
    weights, nbytes = (sum(getattr(part, name) for part in parts) for name in ("weights", "nbytes"))
    cells = [(PART_NAMES.get(part.name, part.name), part.weights, part.nbytes) for part in parts]
    rows = [["part", "weights", "bits", "bytes"]]
    for name, count, size_bytes in (*cells, ("total", weights, nbytes)):
        known = [f"{count:,}", f"{8 * size_bytes / count:.3f}"] if count else ["", ""]
        rows.append([name, *known, size(size_bytes)])
    return table(rows, right=(1, 2, 3))


def estimate_text(estimate, speed_of, where: Path) -> str:
    """Format an Estimate as text, from its parts to a verdict.

    speed_of: maps an Estimate to the expected Speed or None. where: the bundle, or where it would be written.
    """
    below = [_speed_text(estimate, speed_of(estimate))]
    if not estimate.parts:
        return "\n\n".join([plan_text(estimate.plan), *map(_filled, below)])
    free = shutil.disk_usage(where).free
    enough = "" if free > estimate.disk_bytes else ", which is not enough"
    disk = f"disk: a bundle of {size(estimate.disk_bytes)}; {size(free)} free in {where.resolve()}{enough}"
    below = [_contexts_text(estimate), estimate.assumed, disk, *below]
    others = [_others_text(estimate, speed_of)] if estimate.others else []
    blocks = [parts_text(estimate.parts), plan_text(estimate.plan), *others, "\n".join(map(_filled, below))]
    return "\n\n".join(blocks)


def _others_text(estimate, speed_of) -> str:
    """The table of what the cap holds at other bits of an expert weight."""
    rows = [["--bits", "bundle", "experts in memory", "all from", "tok/s"]]
    for other in estimate.others:
        plan, speed = other.plan, speed_of(other)
        share = f"{plan.experts_bytes / plan.all_experts_bytes:.0%}"
        held = "below the floor" if plan.ram_bytes < plan.floor_bytes else "100%" if plan.resident else share
        shown = f"{speed.tokens_per_second:.2g}" if speed else ""
        rows.append([f"{other.bits:.1f}", size(other.disk_bytes), held, size(plan.resident_bytes), shown])
    rows = [row[: 5 if any(row[4] for row in rows[1:]) else 4] for row in rows]
    return f"what a cap of {size(estimate.plan.ram_bytes)} holds, by bits of an expert weight:\n" + table(
        rows, right=(0, 1, 2, 3, 4)
    )


def _contexts_text(estimate) -> str:
    most, resident = estimate.largest_context, estimate.largest_resident_context
    if not most:
        return "longest context under this cap: none fits"
    beside = f"{resident:,}" if resident else "none fits"
    return f"longest context under this cap: {most:,} tokens; with every expert in memory: {beside}"


def _speed_text(estimate, speed) -> str:
    plan = estimate.plan
    if plan.ram_bytes < plan.floor_bytes:
        return f"verdict: does not run under {size(plan.ram_bytes)}"
    if speed is None:
        return UNKNOWN
    tps, verdict = speed.tokens_per_second, next(word for least, word in VERDICTS if speed.tokens_per_second >= least)
    seconds = f", {1 / tps:.2g} s a token" if tps < 1 else ""
    about = f"verdict: {verdict}, about {tps:.2g} tok/s ({speed.low:.2g} to {speed.high:.2g}{seconds}): "
    if not speed.read_bytes_per_token:
        return f"{about}every expert is in memory; by what doctor measured on {speed.measured}"
    how = "by calibration's frequencies" if estimate.calibrated else "taking experts to be used evenly: text reads less"
    return (
        f"{about}a token computes with {size(speed.weight_bytes_per_token)} of weights and reads "
        f"{size(speed.read_bytes_per_token)} of them from storage at {speed.disk_gbps:.2g} GB/s ({how}); with every "
        f"expert in memory about {speed.resident_tokens_per_second:.2g} tok/s; by what doctor measured on "
        f"{speed.measured}"
    )


def _filled(text: str) -> str:
    return textwrap.fill(text, LINE, break_long_words=False, break_on_hyphens=False)
