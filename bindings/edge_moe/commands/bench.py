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
    help="Tokens in the context before each test; repeatable, or a list such as 0,4096 [default: 0].",
)  # fmt: skip
PruneTests = option(
    list[str] | None, "--prune", metavar="off|bundle|SHARE|RULE", section=_TESTS,
    help="Pruning to measure; repeatable [default: off, and also bundle if the bundle has a calibration].",
)  # fmt: skip
Repeats = option(int, "-r", "--repeats", metavar="N", shown=True, section=_TESTS, help="Timed runs of each test.")
SweepRam = option(
    int | None, "--sweep-ram", metavar="[N]", section=_TESTS,
    help=f"Run the tests at N caps [default: {SWEEP_CAPS}], from the smallest that works to all experts in memory or "
    "to --ram, and find the knee.",
)  # fmt: skip
Synthetic = option(
    str | None,
    "--synthetic",
    metavar="CONFIG",
    section=_RANDOM,
    help="Random weights with the shapes of this config.json.",
)
Layers = option(
    int | None, "--layers", metavar="N", section=_RANDOM, help="Layers of the random model [default: the config's]."
)
SyntheticWidth = option(
    int | None, "--width", metavar="B", section=_RANDOM, help="Bits of the random model's experts [default: 4]."
)
Vocabulary = option(
    int | None,
    "--vocab",
    metavar="N",
    section=_RANDOM,
    help="Size of the random model's vocabulary [default: the config's].",
)
KeepSynthetic = option(str | None, "--keep", metavar="OUT", section=_RANDOM, help="Keep the random bundle as OUT.")
Output = option(Format, "-o", "--output", shown=True, help="Output as a table, one JSON object, or CSV.")


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

    Measures a BUNDLE, or random weights with the shapes of any config.json (--synthetic), beside the machine's own
    limits; with --sweep-ram at several caps.
    """
    if (bundle is None) == (synthetic is None):
        raise typer.BadParameter("give either a BUNDLE or --synthetic CONFIG")
    if bundle and any(value is not None for value in (layers, width, vocab, keep)):
        raise typer.BadParameter("--layers, --width, --vocab and --keep need --synthetic")
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
    """The depths in texts of one number or several, separated by commas."""
    try:
        return [int(depth) for text in texts or ["0"] for depth in text.split(",")]
    except ValueError:
        raise ValueError(f"depth {','.join(texts)!r} is not a number of tokens or a list such as 0,4096") from None
