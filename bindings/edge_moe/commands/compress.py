"""`edge-moe compress`: compresses a checkpoint into a bundle."""

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
    keep = "keep"


class DropScores(str, Enum):
    mixture = "mixture"
    weight = "weight"
    frequency = "frequency"
    mean_weight = "mean-weight"


class DropCountsBy(str, Enum):
    equal = "equal"
    sensitivity = "sensitivity"


Model = argument(
    str, "MODEL", "A directory of safetensors, a GGUF file, or the name of a model on the hub: ORG/NAME[@REVISION]."
)
Out = argument(str, "OUT", "The bundle to write, NAME.emoe.")
Bits = option(
    float | None,
    "--bits",
    metavar="B",
    section=_SMALL,
    help="Mean bits of an expert weight, scales included; 16: all weights in bfloat16.",
)
Width = option(int | None, "--width", metavar="B", section=_SMALL, help="One width for all experts.")
Size = option(str | None, "--size", metavar="SIZE", section=_SMALL, help="Bytes of the whole bundle, such as 103GB.")
CompressRam = option(
    str | None, "--ram", metavar="SIZE", section=_SMALL,
    help="Memory in which the bundle shall run, and to compress in; with another target, only to compress in.",
)  # fmt: skip
Paged = option(
    bool,
    "--paged",
    section=_SMALL,
    help="With --ram: keep the experts for nine uses in ten in memory, and page in the others.",
)
RunContext = option(
    int | None, "--context", metavar="N", section=_SMALL, parser=options.tokens_of,
    help="With --ram: tokens of context [default: 4096, or the model's own if smaller].",
)  # fmt: skip
HowToChoose = option(
    Method | None, "--method", metavar="NAME", section=_HOW,
    help="pmq: a measured width for each expert; mc, mc-release: the Mixture Compressor's; uniform: one width; rtn: "
    "one width, round to nearest, without calibration; keep: experts in MXFP4, or as MLX "
    "quantised them, as they are, without loss "
    "[default: pmq; with --width: uniform].",
)  # fmt: skip
Group = option(
    int | None, "--group", metavar="N", section=_HOW,
    help="Group size, the inputs that share a scale: 32, 64 or 128 [default: the method's choice].",
)  # fmt: skip
TrunkWidth = option(
    int | None, "--trunk-width", metavar="B", section=_HOW,
    help="Bits of all weights but the experts' [default: chosen by kind with pmq, else 8].",
)  # fmt: skip
DropExperts = option(
    float, "--drop-experts", metavar="SHARE", section=_HOW, help="Leave out this share of the experts, such as 0.25."
)
DropScore = option(
    DropScores, "--drop-score", metavar="NAME", shown=True, section=_HOW,
    help="With equal counts, drop experts by lowest mixture, weight, frequency or mean-weight.",
)  # fmt: skip
DropCounts = option(
    DropCountsBy, "--drop-counts", metavar="NAME", shown=True, section=_HOW,
    help="Drop an equal number in every layer, or by sensitivity those that cost least over all layers.",
)  # fmt: skip
AdjustTopK = option(
    bool, "--adjust-top-k", section=_HOW, help="With --drop-experts: lower top-k in layers where that is more accurate."
)
ActOrder = option(bool, "--act-order", section=_HOW, help="GPTQ in activation order: round the largest inputs first.")
NoCertificate = option(bool, "--no-certificate", section=_HOW, help="Do not compare with the source on held-out text.")
Resume = option(
    bool, "--resume/--no-resume", help="Continue an unfinished run of the same command [default], or refuse to."
)
Force = option(
    bool, "--force", help="Replace OUT if it is a bundle; start over if an unfinished run had other options."
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

    Progress is kept on disk in OUT.work: after Ctrl-C, a crash or a full disk, the same command continues the run.
    """
    if context is not None and ram is None:
        raise typer.BadParameter("--context needs --ram: it says how much memory running takes")
    from ..compressor import pipeline
    from ..compressor.needs import needs_of
    from ..progress import phases
    from ..report import compressed_text, needs_text
    from ..runtime.describe import describe_bundle
    from ..runtime.model_path import utf8_path

    utf8_path(out)  # raises before hours of work

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
        os._exit(code)  # a thread may need minutes to finish its expert, whose result would not be kept
    if json_output:
        print_json(about)
    else:
        show(compressed_text(about))


@contextmanager
def ended_by_signals():
    """Make SIGTERM and SIGHUP raise KeyboardInterrupt inside, unless they are ignored, as SIGHUP is under nohup."""

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
