"""Formatting a plan as text for str(plan): aligned columns, and bytes in readable units."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .plan import Plan


def plan_text(plan: "Plan") -> str:
    """Format a Plan as a table of bytes by purpose, its floor, and the cap from which every expert is in memory."""
    if plan.ram_bytes < plan.floor_bytes:
        experts = "less than a token needs"
    elif plan.resident:
        experts = "every expert in memory"
    else:
        share = plan.experts_bytes / plan.all_experts_bytes
        experts = f"slots for about {plan.slots:,}: {share:.0%} of {size(plan.all_experts_bytes)}"
    rows = [
        ["purpose", "bytes", ""],
        ["trunk", size(plan.trunk_bytes), "all weights but the routed experts"],
        [
            "KV cache",
            size(plan.kv_cache_bytes),
            f"{plan.context:,} tokens of context" + (f", {plan.sequences} times" if plan.sequences > 1 else ""),
        ],
        *_state_rows(plan),
        ["scratch", size(plan.scratch_bytes), f"prompts in chunks of {plan.chunk}"],
        ["I/O buffers", size(plan.io_buffers_bytes), ""],
        ["interpreter", size(plan.interpreter_bytes), "about: Python and the tokenizer, where there is one"],
        ["experts", size(plan.experts_bytes), experts],
        ["total", size(plan.total_bytes), f"of a cap of {size(plan.ram_bytes)}"],
        *_table_rows(plan),
        ["", "", ""],
        ["floor", size(plan.floor_bytes), "the smallest cap that works, slowly"],
        ["working set", size(plan.working_set_bytes), f"the {plan.working_set_experts:,} experts that one token uses"],
        ["resident from", size(plan.resident_bytes), "the cap from which nothing is paged"],
    ]
    return table(rows, right=(1,)) + _working_set_warning(plan)


def _state_rows(plan: "Plan") -> list[list[str]]:
    if not plan.state_bytes:
        return []
    about = f"in place of {size(plan.state_saves_bytes)} of KV cache; " if plan.state_saves_bytes else ""
    kept = f"{plan.snapshots} to go on from" if plan.snapshots else "none to go on from"
    return [["states", size(plan.state_bytes), f"{about}{kept}; the same for any context"]]


def _table_rows(plan: "Plan") -> list[list[str]]:
    if not plan.table_bytes:
        return []
    return [["on disk", size(plan.table_bytes), f"tables of n-grams, of which a token reads {plan.table_rows} rows"]]


def _working_set_warning(plan: "Plan") -> str:
    if plan.holds_working_set or plan.ram_bytes < plan.floor_bytes:
        return ""
    cap = size(plan.working_set_cap_bytes)
    return (
        f"\n\nwarning: slots for about {plan.slots:,} experts do not hold a token's working set of "
        f"{plan.working_set_experts:,},\nso every token reads from storage; a cap of {cap} holds it"
    )


def size(count: float) -> str:
    """Format bytes in decimal units: 1.10 GB, 61.2 MB, 4.1 kB."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(count) >= scale * 0.9995:
            return f"{count / scale:.{2 if scale >= 1e9 else 1}f} {unit}"
    return f"{count:.0f} B"


def table(rows: list[list[str]], right: tuple[int, ...] = ()) -> str:
    """Format rows of cells as aligned columns, the first row a header. right: indices of right-aligned columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
