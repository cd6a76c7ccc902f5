"""`edge-moe bench`: measure speed."""

import functools
import shutil
import sys
from enum import Enum

import typer

from ..terminal import show
from . import options
from .options import argument, option

SWEEP_CAPS = 6
_TESTS, _RANDOM = "Tests", "Instead of a BUNDLE"


class Format(str, Enum):
    md = "md"
    json = "json"
    csv = "csv"


BundleIfAny = argument(str | None, "BUNDLE", "A bundle's directory, NAME.emoe.")
PromptTest = option(
    int, "-p", "--prompt", metavar="N", shown=True, section=_TESTS, help="Tokens of the prompt test; 0: none."
)
GenerateTest = option(
    int, "-n", "--generate", metavar="N", shown=True, section=_TESTS, help="Tokens of the generation test; 0: none."
)
Depths = option(
    list[str] | None, "-d", "--depth", metavar="N", section=_TESTS,
    help="Tokens in the context before either test; repeatable, or as 0,4096 [default: 0].",
)  # fmt: skip
PruneTests = option(
    list[str] | None, "--prune", metavar="off|bundle|SHARE|RULE", section=_TESTS,
    help="Also measure it pruned; repeatable [default: off, and bundle where it is calibrated].",
)  # fmt: skip
Repeats = option(int, "-r", "--repeats", metavar="N", shown=True, section=_TESTS, help="Timed runs of each test.")
SweepRam = option(
    int | None, "--sweep-ram", metavar="[N]", section=_TESTS,
    help=f"Run the tests at N caps, from the smallest that works to every expert in memory or to --ram, and find the "
    f"knee; N is {SWEEP_CAPS} where it is left out.",
)  # fmt: skip
Synthetic = option(
    str | None, "--synthetic", metavar="CONFIG", section=_RANDOM, help="Random weights of this config.json's shapes."
)
Layers = option(
    int | None, "--layers", metavar="N", section=_RANDOM, help="Layers of the random model [default: the config's]."
)
SyntheticWidth = option(
    int | None, "--width", metavar="B", section=_RANDOM, help="Bits of the random model's experts [default: 4]."
)
Vocabulary = option(
    int | None, "--vocab", metavar="N", section=_RANDOM, help="Tokens of its vocabulary [default: the config's]."
)
KeepSynthetic = option(str | None, "--keep", metavar="OUT", section=_RANDOM, help="Keep the random bundle as OUT.")
Output = option(Format, "-o", "--output", shown=True, help="Table, one JSON object, or exact figures.")


def bench(
    bundle: BundleIfAny = None,
    prompt: PromptTest = 512,
    generate: GenerateTest = 128,
    depth: Depths = None,
    prune: PruneTests = None,
    repeats: Repeats = 5,
    sweep_ram: SweepRam = None,
    synthetic: Synthetic = None,
    layers: Layers = None,
    width: SyntheticWidth = None,
    vocab: Vocabulary = None,
    keep: KeepSynthetic = None,
    ram: options.Ram = "auto",
    device: options.Device = "auto",
    threads: options.Threads = None,
    output: Output = Format.md,
) -> None:
    """Measure speed as llama-bench does.

    Of a BUNDLE, or of random weights with the shapes of any config.json (--synthetic), beside the machine's own
    limits; or at several caps (--sweep-ram).
    """
    if (bundle is None) == (synthetic is None):
        raise typer.BadParameter("give either a BUNDLE or --synthetic CONFIG")
    if bundle and any(value is not None for value in (layers, width, vocab, keep)):
        raise typer.BadParameter("--layers, --width, --vocab and --keep belong to --synthetic")
    from ..bench import bench as benchmark
    from ..bench_text import bench_text, cut_text
    from ..progress import progress_bar

    given = {"ram": ram, "prompt": prompt, "generate": generate, "repeats": repeats}
    given |= {"device": device, "threads": threads}
    given |= {"depths": depths_of(depth), "prune": prune and [options.prune_of(one) for one in prune]}
    run = benchmark.bench
    if sweep_ram is not None:
        from ..bench.sweep import sweep

        run = functools.partial(sweep, caps=sweep_ram)
    if synthetic:
        shapes = {"layers": layers, "width": 4 if width is None else width, "vocab": vocab}
        run, bundle = functools.partial(benchmark.bench_synthetic, run=run, keep=keep, **shapes), synthetic
    with progress_bar() as progress:
        report = run(bundle, progress=progress, **given)
    show(bench_text(report, output.value, shutil.get_terminal_size().columns if sys.stdout.isatty() else None))
    for line in cut_text(report, {"pp": prompt, "tg": generate}):
        print(line, file=sys.stderr)


def depths_of(texts: list[str] | None) -> list[int]:
    """Each text one depth or several with commas between."""
    try:
        return [int(depth) for text in texts or ["0"] for depth in text.split(",")]
    except ValueError:
        raise ValueError(f"depth {','.join(texts)!r} is not a number of tokens, or several as 0,4096") from None
