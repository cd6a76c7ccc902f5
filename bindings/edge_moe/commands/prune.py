"""`edge-moe prune`: calibrate a bundle for leaving out experts."""

import sys

from edge_moe.commands import options
from edge_moe.commands.options import option
from edge_moe.commands.output import print_json

Cut = option(float, "--cut", metavar="SHARE", shown=True, help="Expert uses that a run without --prune leaves out.")
Rules = option(
    list[str] | None, "--rule", metavar="NAME",
    help="loss, otp, share or odp; repeatable, the first for plain cuts [default: all, loss first].",
)  # fmt: skip
PruneRam = option(str, "--ram", metavar="SIZE", shown=True, help="Memory of hidden states and of runs, as 8GB.")


def prune(
    bundle: options.Bundle,
    cut: Cut = 0.2,
    rule: Rules = None,
    calibration: options.CalibrationFiles = None,
    held_out: options.HeldOutFiles = None,
    tokens: options.CalibrationTokens = 32_768,
    seed: options.CalibrationSeed = 0,
    ram: PruneRam = "auto",
    threads: options.Threads = None,
    json_output: options.Json = False,
) -> None:
    """Calibrate a bundle for leaving out experts.

    It learns which of its experts a token hardly needs; these are then neither read nor computed. The weights stay as
    they are, and --prune off runs them all.
    """
    from edge_moe.bench.conditions import timed
    from edge_moe.compressor.prune import DEFAULT_RULES, calibrate_pruning
    from edge_moe.progress import progress_bar
    from edge_moe.report import pruning_text

    source = {"calibration": calibration or (), "held_out": held_out or (), "tokens": tokens, "seed": seed}
    rules = tuple(rule or DEFAULT_RULES)
    took = {}
    with progress_bar(quiet=json_output) as progress:
        given = {"cut": cut, "rules": rules, "ram": ram, "threads": threads, **source}
        made = calibrate_pruning(bundle, progress=timed(progress, took), **given)
    if json_output:
        print_json(made.pruning.about())
    else:
        print(pruning_text(made.pruning.about()))
        steps = ", ".join(f"{step} {seconds:.0f} s" for step, seconds in took.items())
        print(f"took {sum(took.values()):.0f} s: {steps}", file=sys.stderr)
