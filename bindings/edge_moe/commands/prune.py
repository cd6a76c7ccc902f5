"""`edge-moe prune`: calibrates a bundle for leaving out experts."""

import sys

from ..terminal import show
from . import options
from .options import option
from .output import print_json

Default = option(
    str | None, "--default", metavar="SHARE|off",
    help="Share of expert uses that a run without --prune leaves out [default: off]; if the bundle is calibrated "
    "already, only this changes.",
)  # fmt: skip
Force = option(bool, "--force", help="Calibrate again if the bundle is calibrated already.")
Rules = option(
    list[str] | None, "--rule", metavar="NAME",
    help="loss, otp, share or odp; repeatable; --prune SHARE uses the first [default: all, loss first].",
)  # fmt: skip
PruneRam = option(str, "--ram", metavar="SIZE", shown=True, help="Memory for hidden states and for runs, such as 8GB.")


def prune(
    bundle: options.Bundle,
    default: Default = None,
    force: Force = False,
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

    The bundle learns which experts a token hardly needs; a run with --prune neither reads nor computes these. The
    weights do not change, and a run without --prune uses all experts unless --default says otherwise.
    """
    from ..bench.conditions import timed
    from ..compressor.pruning.prune import DEFAULT_RULES, calibrate_pruning, set_default
    from ..progress import progress_bar
    from ..report import pruning_text
    from ..runtime.bundle import Bundle
    from ..runtime.hub import hub_id

    source = {"calibration": calibration or (), "held_out": held_out or (), "tokens": tokens, "seed": seed}
    rules = tuple(rule or DEFAULT_RULES)
    took, cut = {}, share_of(default)
    if default is not None and not force and hub_id(bundle) is None and Bundle.open(bundle).pruning:
        made = set_default(bundle, cut)
    else:
        with progress_bar(quiet=json_output) as progress:
            given = {"default": cut, "force": force, "rules": rules, "ram": ram, "threads": threads, **source}
            made = calibrate_pruning(bundle, progress=timed(progress, took), **given)
    if json_output:
        print_json(made.pruning.about())
        return
    show(pruning_text(made.pruning.about()))
    if took:
        steps = ", ".join(f"{step} {seconds:.0f} s" for step, seconds in took.items())
        show(f"took {sum(took.values()):.0f} s: {steps}", sys.stderr)


def share_of(text: str | None) -> float | None:
    """Parse --default: a share, or None for off."""
    try:
        return None if text in (None, "off") else float(text)
    except ValueError:
        raise ValueError(f"default is {text!r}, expected off or a share of expert uses such as 0.2") from None
