"""`edge-moe split`: divides a bundle for several machines that run it together."""

import typer

from ..terminal import show
from . import options
from .options import argument, option
from .output import print_json

Out = argument(str, "OUT", "The directory to write, with a directory for each part.")
Parts = option(int | None, "--parts", metavar="N", help="Number of parts, one for each machine.")
Shares = option(
    str | None, "--shares", metavar="SIZE,SIZE,...",
    help="The memory of each machine, such as 24GB,64GB, to divide by [default: equal bytes].",
)  # fmt: skip


def split(
    bundle: options.Bundle,
    out: Out,
    parts: Parts = None,
    shares: Shares = None,
    json_output: options.Json = False,
) -> None:
    """Divide a bundle for several machines.

    Each part has the layers that one of them runs. Copy OUT/part-N-of-M to machine N, to the same path on each, and run
    `mlx.launch --backend ring --hostfile HOSTS -- edge-moe generate OUT --device mlx`.
    """
    from ..compressor.writing import parts as writing
    from ..progress import progress_bar
    from ..runtime.bundle import Bundle
    from ..runtime.bundle_part import how_to_run
    from ..runtime.describe import describe_bundle
    from ..runtime.plan_table import size, table

    divided = shares_of(parts, shares)
    with progress_bar(quiet=json_output) as progress:
        names = writing.split(bundle, out, divided, progress)
    found = [describe_bundle(Bundle.open(f"{out}/{name}", parts=True)) for name in names]
    if json_output:
        return print_json({"out": out, "parts": found})
    rows = [["part", "layers", "bytes", "experts", "trunk"]]
    for (name, part), its in zip(names.items(), found, strict=True):
        sizes = (size(its[key]) for key in ("bundle_bytes", "expert_bytes", "trunk_bytes"))
        rows.append([f"{out}/{name}", f"{part.layers[0]} to {part.layers[-1]}", *sizes])
    show(table(rows, right=(2, 3, 4)))
    show(how_to_run(out, len(names)))


def shares_of(parts: int | None, text: str | None) -> list[float]:
    """The shares of parts: those of --shares, or equal ones."""
    from ..runtime.plan import parse_bytes

    if parts is None and text is None:
        raise typer.BadParameter("give --parts N, or --shares SIZE,SIZE,...")
    if text is None:
        return [1.0] * parts
    shares = [float(parse_bytes(one)) for one in text.split(",")]
    if parts not in (None, len(shares)):
        raise typer.BadParameter(f"--parts is {parts}, but --shares has {len(shares)} sizes")
    return shares
