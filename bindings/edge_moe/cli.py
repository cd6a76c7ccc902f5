"""The command line: every subcommand parses, calls the library and prints.

Text goes to stdout, everything about it to stderr; `--json` prints one object on stdout and nothing else. An expected
error is one line on stderr. Imports sit in the subcommands: what `generate` does not need would count under its cap.
"""

import functools
import json
import os
import sys
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from edge_moe import __version__, options

app = typer.Typer(
    name="edge-moe",
    help="Compress Mixture-of-Experts models and run them inside a hard RAM cap.",
    epilog="Start with `edge-moe demo`: it needs no download. `edge-moe COMMAND -h` explains a command.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # else every command imports rich
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


def main() -> None:
    """The entry point of `edge-moe` and `python -m edge_moe`."""
    with suppress(AttributeError, ValueError):  # a stdout that is not a text file, as some hosts have
        sys.stdout.reconfigure(errors="replace")
    try:
        app(prog_name="edge-moe")
    except KeyboardInterrupt:
        sys.exit(130)


def command(name: str):
    """Register a subcommand whose expected errors become one line and an exit code."""

    def register(function):
        @app.command(name, cls=options.SectionedCommand)
        @functools.wraps(function)
        def run(*args, **given):
            try:
                function(*args, **given)
                sys.stdout.flush()
            except BrokenPipeError:  # the reader left: nothing to tell, and what is left to flush goes nowhere
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                raise typer.Exit(1) from None
            except KeyboardInterrupt:
                _fail("interrupted", 130)
            except (ValueError, OSError, MemoryError) as error:
                _fail(error)

        return run

    return register


def _fail(error, code: int = 1) -> None:
    message = str(error) or ("out of memory" if isinstance(error, MemoryError) else type(error).__name__)
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        message = f"{error.filename}: {error.strerror}"
    print(f"edge-moe: error: {' '.join(message.split())}", file=sys.stderr)
    raise typer.Exit(code)


def _print_json(value: dict) -> None:
    print(json.dumps(value, ensure_ascii=False))


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"edge-moe {__version__}")
        raise typer.Exit()


@app.callback()
def global_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@command("demo")
def demo(keep: options.KeepBundles = None, json_output: options.Json = False) -> None:
    """Compress the embedded model and run it under a cap.

    The model is compressed four ways, each is scored on text against the original, and one then runs in a process
    with less memory than its experts need.
    """
    from edge_moe.demo import report_text, run_demo
    from edge_moe.progress import progress_bar

    with progress_bar(quiet=json_output) as progress:
        report = run_demo(keep, progress)
    if json_output:
        _print_json(report)
    else:
        print(report_text(report))


@command("compress")
def compress(
    model: options.Model,
    out: options.Out,
    bits: options.Bits = None,
    width: options.Width = None,
    size: options.Size = None,
    ram: options.CompressRam = None,
    paged: options.Paged = False,
    context: options.RunContext = None,
    calibration: options.CalibrationFiles = None,
    held_out: options.HeldOutFiles = None,
    tokens: options.CalibrationTokens = 49_152,
    seed: options.CalibrationSeed = 0,
    method: options.HowToChoose = None,
    group: options.Group = None,
    trunk_width: options.TrunkWidth = None,
    drop_experts: options.DropExperts = 0.0,
    drop_score: options.DropScore = options.DropScores.mixture,
    drop_counts: options.DropCounts = options.DropCountsBy.sensitivity,
    adjust_top_k: options.AdjustTopK = False,
    act_order: options.ActOrder = False,
    no_certificate: options.NoCertificate = False,
    resume: options.Resume = False,
    threads: options.Threads = None,
    json_output: options.Json = False,
) -> None:
    """Compress a checkpoint into a bundle.

    What is done stays on disk in OUT.work: after Ctrl-C, a crash or a full disk the same command with --resume goes on.
    """
    if context is not None and ram is None:
        raise typer.BadParameter("--context belongs to --ram: it says how much memory running takes")
    from edge_moe.compressor import pipeline
    from edge_moe.needs import needs_of
    from edge_moe.progress import progress_bar
    from edge_moe.report import compressed_text, describe_bundle, needs_text

    target = {"bits": bits, "width": width, "size": size, "ram": ram, "paged": paged, "context": context}
    source = {"calibration": calibration or (), "held_out": held_out or (), "tokens": tokens, "seed": seed}
    form = {"group": group, "trunk_width": trunk_width, "act_order": act_order, "certificate": not no_certificate}
    drop = {"drop_experts": drop_experts, "drop_score": drop_score.value, "drop_counts": drop_counts.value}
    drop["adjust_top_k"] = adjust_top_k
    chosen = {"method": method.value if method else "pmq" if width is None else "uniform", "threads": threads}
    given, work = {**target, **source, **form, **drop, **chosen}, Path(out).with_name(Path(out).name + ".work")
    if not (json_output or Path(out).exists() or work.exists()):
        print(needs_text(needs_of(model, out, given)), file=sys.stderr)
    try:
        with progress_bar(quiet=json_output) as progress:
            about = describe_bundle(pipeline.compress(model, out, progress=progress, resume=resume, **given))
    except KeyboardInterrupt:
        _fail("interrupted; the same command with --resume goes on" if work.exists() else "interrupted", 130)
    if json_output:
        _print_json(about)
    else:
        print(compressed_text(about))


@command("prune")
def prune(
    bundle: options.Bundle,
    cut: options.Cut = 0.2,
    rule: options.Rules = None,
    calibration: options.CalibrationFiles = None,
    held_out: options.HeldOutFiles = None,
    tokens: options.CalibrationTokens = 32_768,
    seed: options.CalibrationSeed = 0,
    ram: options.PruneRam = "auto",
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
        _print_json(made.pruning.about())
    else:
        print(pruning_text(made.pruning.about()))
        steps = ", ".join(f"{step} {seconds:.0f} s" for step, seconds in took.items())
        print(f"took {sum(took.values()):.0f} s: {steps}", file=sys.stderr)


@command("plan")
def plan(
    model: options.ModelOrBundle,
    ram: options.Ram = "auto",
    context: options.Context = None,
    kv: options.Kv = options.KvType.float16,
    width: options.PlanWidth = None,
    widths: options.PlanWidths = None,
    trunk_width: options.PlanTrunkWidth = None,
    keep_experts: options.KeepExperts = None,
    recipe: options.PlanRecipe = None,
    device: options.PlanDevice = options.DeviceName.cpu,
    threads: options.Threads = None,
    json_output: options.Json = False,
) -> None:
    """Show where memory would go under a cap.

    Nothing is loaded: a bundle's tables are enough, or a config.json before any download; then also what each part
    would take at given widths, and the largest context. Fails when the cap is below the floor.
    """
    from edge_moe.compressor.estimate import estimate
    from edge_moe.report import estimate_text
    from edge_moe.runtime.plan import BelowFloor

    bits = {"width": width, "widths": options.widths_of(widths), "trunk_width": trunk_width}
    model_as = {"keep_experts": options.keep_experts_of(keep_experts), "recipe": recipe and recipe.value}
    run = {"context": context, "device": device.value, "threads": threads, "kv": kv.value}
    result = estimate(model, ram, **run, **bits, **model_as)
    if json_output:
        _print_json(result.as_dict())
    else:
        print(estimate_text(result))
    if result.plan.ram_bytes < result.plan.floor_bytes:
        raise BelowFloor(result.plan)


@command("inspect")
def inspect(bundle: options.Bundle, json_output: options.Json = False) -> None:
    """Show a bundle's shapes, bytes and widths."""
    from edge_moe.report import bundle_text, describe_bundle
    from edge_moe.runtime.bundle import Bundle

    about = describe_bundle(Bundle.open(bundle))
    if json_output:
        _print_json(about)
    else:
        print(bundle_text(about))


@command("verify")
def verify(bundle: options.Bundle) -> None:
    """Read all of a bundle and check it."""
    import time

    from edge_moe.progress import progress_bar
    from edge_moe.report import size
    from edge_moe.runtime import bundle as bundles

    opened, checked, began = bundles.Bundle.open(bundle), 0, time.perf_counter()
    with progress_bar() as progress:
        for part, (_, count) in enumerate(bundles.verify(opened), start=1):
            checked += count
            if progress:
                progress("verify", part, len(opened.experts) + 1)
    print(f"{bundle}: OK, {size(checked)} at {checked / (time.perf_counter() - began) / 1e9:.2f} GB/s")


@command("generate")
def generate(
    bundle: options.Bundle,
    prompt: options.Prompt = None,
    tokens: options.TokenIds = None,
    max_tokens: options.MaxTokens = 64,
    ram: options.Ram = "auto",
    context: options.Context = None,
    kv: options.Kv = options.KvType.float16,
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = 1.0,
    seed: options.SamplingSeed = None,
    device: options.Device = options.DeviceName.auto,
    threads: options.Threads = None,
    prune: options.Prune = None,
    stop: options.Stop = None,
    json_output: options.Json = False,
) -> None:
    """Complete a text."""
    if (prompt is None) == (tokens is None):
        raise typer.BadParameter("give either -p TEXT or --tokens 1,2,3")
    from edge_moe.report import statistics_text
    from edge_moe.runtime.runtime import Runtime

    start = options.token_ids_of(tokens) if prompt is None else sys.stdin.read() if prompt == "-" else prompt
    given = {"device": device.value, "threads": threads, "kv": kv.value}
    with Runtime(bundle, ram, context, prune=options.prune_of(prune), **given) as runtime:
        pieces = runtime.stream(start, max_tokens, temperature=temperature, top_p=top_p, seed=seed, stop=stop)
        generation = _print_pieces(pieces, ids=prompt is None, quiet=json_output)
    if json_output:
        _print_json(asdict(generation))
    else:
        print(statistics_text(generation), file=sys.stderr)


def _print_pieces(pieces, ids: bool, quiet: bool):
    """Write pieces as they come, and return them as one Generation."""
    texts, tokens, last = [], [], None
    for last in pieces:
        texts.append(last.text)
        tokens += last.tokens
        if not quiet:
            sys.stdout.write("".join(f"{token} " for token in last.tokens) if ids else last.text)
            sys.stdout.flush()
    if not quiet:
        print(flush=True)
    return replace(last, text="".join(texts), tokens=tokens)


@command("chat")
def chat(
    bundle: options.Bundle,
    max_tokens: options.MaxTokens = 512,
    ram: options.Ram = "auto",
    context: options.Context = None,
    kv: options.Kv = options.KvType.float16,
    temperature: options.TemperatureIfAny = None,
    top_p: options.TopPIfAny = None,
    seed: options.SamplingSeed = None,
    device: options.Device = options.DeviceName.auto,
    threads: options.Threads = None,
    prune: options.Prune = None,
) -> None:
    """Talk with a model.

    Ctrl-C stops an answer and keeps the chat. A model without a chat template continues the text of the conversation.
    """
    import signal

    from edge_moe import chat
    from edge_moe.runtime.runtime import Runtime

    given = {"device": device.value, "threads": threads, "kv": kv.value}
    with Runtime(bundle, ram, context, prune=options.prune_of(prune), **given) as runtime:
        given = {"temperature": temperature, "top_p": top_p, "seed": seed, "max_tokens": max_tokens}
        given = {key: value for key, value in given.items() if value is not None}
        chat.chat(runtime, {**chat.sampling_defaults(runtime.bundle.path), **given})
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # one Ctrl-C more while the process ends is no error


@command("eval")
def evaluate(
    bundle: options.Bundle,
    text: options.Texts,
    against: options.Against = None,
    context: options.Window = 256,
    tokens: options.TextTokens = None,
    prune: options.Prune = None,
    ram: options.Ram = "auto",
    device: options.Device = options.DeviceName.auto,
    threads: options.Threads = None,
    json_output: options.Json = False,
) -> None:
    """Score a bundle on text.

    Perplexity per token, and with --against the divergence from another model's predictions. Several texts are
    scored alone and together: geometric mean of perplexity, mean of the rest.
    """
    from contextlib import nullcontext

    from edge_moe.bench import texts
    from edge_moe.progress import progress_bar
    from edge_moe.report import evaluation_text
    from edge_moe.runtime.runtime import Runtime
    from edge_moe.runtime.score import LOGITS_ROWS

    sizes = {"context": context, "device": device.value, "threads": threads, "logits_rows": LOGITS_ROWS}
    with (
        progress_bar(quiet=json_output) as progress,
        Runtime(bundle, ram, prune=options.prune_of(prune), **sizes) as runtime,
        texts.reference_logits(against, runtime, context) if against else nullcontext() as logits,
    ):
        result = texts.evaluate_texts(runtime, text, context=context, tokens=tokens, against=logits, progress=progress)
    if json_output:
        _print_json(result)
    else:
        print(evaluation_text(result, context))


@command("bench")
def bench(
    bundle: options.BundleIfAny = None,
    prompt: options.PromptTest = 512,
    generate: options.GenerateTest = 128,
    depth: options.Depths = None,
    prune: options.PruneTests = None,
    repeats: options.Repeats = 5,
    sweep_ram: options.SweepRam = None,
    synthetic: options.Synthetic = None,
    layers: options.Layers = None,
    width: options.SyntheticWidth = None,
    vocab: options.Vocabulary = None,
    keep: options.KeepSynthetic = None,
    ram: options.Ram = "auto",
    device: options.Device = options.DeviceName.auto,
    threads: options.Threads = None,
    output: options.Output = options.Format.md,
) -> None:
    """Measure speed as llama-bench does.

    Of a BUNDLE, or of random weights with the shapes of any config.json (--synthetic), beside the machine's own
    limits; or at several caps (--sweep-ram).
    """
    if (bundle is None) == (synthetic is None):
        raise typer.BadParameter("give either a BUNDLE or --synthetic CONFIG")
    if bundle and any(value is not None for value in (layers, width, vocab, keep)):
        raise typer.BadParameter("--layers, --width, --vocab and --keep belong to --synthetic")
    from edge_moe.bench import bench as benchmark
    from edge_moe.bench_text import bench_text
    from edge_moe.progress import progress_bar

    given = {"ram": ram, "prompt": prompt, "generate": generate, "repeats": repeats}
    given |= {"device": device.value, "threads": threads}
    given |= {"depths": options.depths_of(depth), "prune": prune and [options.prune_of(one) for one in prune]}
    run = benchmark.bench
    if sweep_ram is not None:
        from edge_moe.bench.sweep import sweep

        run = functools.partial(sweep, caps=sweep_ram)
    if synthetic:
        shapes = {"layers": layers, "width": 4 if width is None else width, "vocab": vocab}
        run, bundle = functools.partial(benchmark.bench_synthetic, run=run, keep=keep, **shapes), synthetic
    with progress_bar() as progress:
        report = run(bundle, progress=progress, **given)
    print(bench_text(report, output.value))


@command("doctor")
def doctor(where: options.Where = ".", json_output: options.Json = False) -> None:
    """Show what this machine has and how fast it is.

    For a directory that is no bundle a file of 268 MB is written there, read and removed.
    """
    from edge_moe.doctor import examination_text, examine

    found = examine(Path(where))
    if json_output:
        _print_json(found)
    else:
        print(examination_text(found))
