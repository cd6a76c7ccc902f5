"""`edge-moe compress`: a checkpoint into a bundle."""

import os
import signal
import sys
from contextlib import contextmanager, suppress
from enum import Enum
from pathlib import Path

import typer

from ..terminal import show
from . import options
from .options import argument, option
from .output import fail, print_json

_SMALL, _HOW = "How small (one of these; default: --bits 2.5)", "How"


class Method(str, Enum):
    pmq = "pmq"
    mc = "mc"
    mc_release = "mc-release"
    uniform = "uniform"
    rtn = "rtn"


class DropScores(str, Enum):
    mixture = "mixture"
    weight = "weight"
    frequency = "frequency"
    mean_weight = "mean-weight"


class DropCountsBy(str, Enum):
    equal = "equal"
    sensitivity = "sensitivity"


Model = argument(str, "MODEL", "A checkpoint's directory: config.json and safetensors files.")
Out = argument(str, "OUT", "The bundle to write, NAME.emoe.")
Bits = option(
    float | None,
    "--bits",
    metavar="B",
    section=_SMALL,
    help="Mean bits of an expert weight, all included; 16: bfloat16, trunk too.",
)
Width = option(int | None, "--width", metavar="B", section=_SMALL, help="One width for all experts.")
Size = option(str | None, "--size", metavar="SIZE", section=_SMALL, help="Bytes of the whole bundle, as 103GB.")
CompressRam = option(
    str | None, "--ram", metavar="SIZE", section=_SMALL,
    help="Memory to run in, and to compress in; beside another target, to compress in alone.",
)  # fmt: skip
Paged = option(
    bool,
    "--paged",
    section=_SMALL,
    help="With --ram: experts that answer nine uses in ten fit, the others are paged in.",
)
RunContext = option(
    int | None, "--context", metavar="N", section=_SMALL, parser=options.tokens_of,
    help="With --ram: tokens to hold [default: 4096 or the model's own].",
)  # fmt: skip
HowToChoose = option(
    Method | None, "--method", metavar="NAME", section=_HOW,
    help="pmq: each expert its width; mc, mc-release; uniform; rtn: no text [default: pmq; with --width: uniform].",
)  # fmt: skip
Group = option(
    int | None, "--group", metavar="N", section=_HOW,
    help="Inputs that share a scale: 32, 64 or 128 [default: the method's choice].",
)  # fmt: skip
TrunkWidth = option(
    int | None, "--trunk-width", metavar="B", section=_HOW,
    help="Bits of all weights but the experts' [default: pmq: each kind its own, else 8].",
)  # fmt: skip
DropExperts = option(
    float, "--drop-experts", metavar="SHARE", section=_HOW, help="Leave out this share of the experts, as 0.25."
)
DropScore = option(
    DropScores, "--drop-score", metavar="NAME", shown=True, section=_HOW,
    help="Which, with equal counts: lowest mixture, weight, frequency or mean-weight.",
)  # fmt: skip
DropCounts = option(
    DropCountsBy, "--drop-counts", metavar="NAME", shown=True, section=_HOW,
    help="Equal in every layer, or by sensitivity: those missed least in all layers.",
)  # fmt: skip
AdjustTopK = option(
    bool, "--adjust-top-k", section=_HOW, help="With --drop-experts: fewer experts a token, where that is nearer."
)
ActOrder = option(bool, "--act-order", section=_HOW, help="Round the inputs that matter most first.")
NoCertificate = option(bool, "--no-certificate", section=_HOW, help="Do not compare with the source on held-out text.")
Resume = option(
    bool, "--resume/--no-resume", help="Go on with an unfinished run of the same command [default], or refuse to."
)
Force = option(
    bool, "--force", help="Replace OUT if it is a bundle; start anew if an unfinished run had other options."
)


def compress(
    model: Model,
    out: Out,
    bits: Bits = None,
    width: Width = None,
    size: Size = None,
    ram: CompressRam = None,
    paged: Paged = False,
    context: RunContext = None,
    calibration: options.CalibrationFiles = None,
    held_out: options.HeldOutFiles = None,
    tokens: options.CalibrationTokens = 49_152,
    seed: options.CalibrationSeed = 0,
    method: HowToChoose = None,
    group: Group = None,
    trunk_width: TrunkWidth = None,
    drop_experts: DropExperts = 0.0,
    drop_score: DropScore = DropScores.mixture,
    drop_counts: DropCounts = DropCountsBy.sensitivity,
    adjust_top_k: AdjustTopK = False,
    act_order: ActOrder = False,
    no_certificate: NoCertificate = False,
    resume: Resume = True,
    force: Force = False,
    threads: options.Threads = None,
    json_output: options.Json = False,
) -> None:
    """Compress a checkpoint into a bundle.

    What is done stays on disk in OUT.work: after Ctrl-C, a crash or a full disk the same command goes on.
    """
    if context is not None and ram is None:
        raise typer.BadParameter("--context belongs to --ram: it says how much memory running takes")
    from ..compressor import pipeline
    from ..compressor.needs import needs_of
    from ..progress import phases
    from ..report import compressed_text, needs_text
    from ..runtime.describe import describe_bundle
    from ..runtime.model_path import utf8_path

    utf8_path(out)  # before hours of work

    target = {"bits": bits, "width": width, "size": size, "ram": ram, "paged": paged, "context": context}
    source = {"calibration": calibration or (), "held_out": held_out or (), "tokens": tokens, "seed": seed}
    form = {"group": group, "trunk_width": trunk_width, "act_order": act_order, "certificate": not no_certificate}
    drop = {"drop_experts": drop_experts, "drop_score": drop_score.value, "drop_counts": drop_counts.value}
    drop["adjust_top_k"] = adjust_top_k
    chosen = {"method": method.value if method else "pmq" if width is None else "uniform", "threads": threads}
    given, work = {**target, **source, **form, **drop, **chosen}, Path(out).with_name(Path(out).name + ".work")
    if not (json_output or (Path(out).exists() and not force) or work.exists()):
        show(needs_text(needs_of(model, out, given)), sys.stderr)
    try:
        with ended_by_signals(), phases(quiet=json_output) as shown:
            hooks = {"progress": shown.progress, "on_phase": shown.begin}
            about = describe_bundle(pipeline.compress(model, out, resume=resume, force=force, **hooks, **given))
    except KeyboardInterrupt as ended:
        code = ended.args[0] if ended.args else 128 + signal.SIGINT
        with suppress(typer.Exit):
            fail("interrupted; the same command with --resume goes on" if work.exists() else "interrupted", code)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # an expert that another thread is at may take minutes, and nothing of it is kept
    if json_output:
        print_json(about)
    else:
        show(compressed_text(about))


@contextmanager
def ended_by_signals():
    """SIGTERM and SIGHUP end what is inside as Ctrl-C does, unless they are ignored, as under nohup."""

    def end(number: int, _) -> None:
        raise KeyboardInterrupt(128 + number)

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        if before[number] == signal.SIG_DFL:
            signal.signal(number, end)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, before[number])
