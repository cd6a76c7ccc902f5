"""The command line: every subcommand parses, calls the library and prints.

Text goes to stdout, everything about it to stderr; `--json` prints one object on stdout and nothing else. An expected
error is one line on stderr. Imports sit in the subcommands: what `generate` does not need would count under its cap.
"""

import functools
import json
import os
import sys
from dataclasses import asdict, replace
from enum import Enum
from typing import Annotated

import typer

from edge_moe import __version__

app = typer.Typer(
    name="edge-moe",
    help="Compress Mixture-of-Experts models and run them inside a hard RAM cap.",
    epilog="Start with `edge-moe demo`: it needs no download.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # rich would be imported, and counted, in every command
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


class Method(str, Enum):
    pmq = "pmq"
    mc = "mc"
    uniform = "uniform"
    rtn = "rtn"


class Format(str, Enum):
    md = "md"
    json = "json"
    csv = "csv"


Option = typer.Option
BundleArgument = Annotated[str, typer.Argument(metavar="BUNDLE", help="A bundle's directory, NAME.emoe.", show_default=False)]
Ram = Annotated[str, Option("--ram", metavar="SIZE", help="Cap on the process's memory: 8GB, 8GiB, 500MB; auto is 80 % of what is free.")]
Context = Annotated[int | None, Option("--context", metavar="N", help="Tokens the KV cache holds [default: 4096, or the model's own].", show_default=False)]
Threads = Annotated[int | None, Option("--threads", metavar="N", help="Threads of computation [default: all cores].", show_default=False)]
Temperature = Annotated[float | None, Option("--temp", help="Sampling temperature; 0 takes the likeliest token.", show_default=False)]
TopP = Annotated[float | None, Option("--top-p", help="Sample from the likeliest tokens that reach this probability.", show_default=False)]
Seed = Annotated[int | None, Option("--seed", help="Seed of sampling; the same seed gives the same text.", show_default=False)]
Prune = Annotated[str, Option("--prune", metavar="off|bundle", help="Leave out experts a token hardly needs, as the bundle was calibrated to.")]
MaxTokens = Annotated[int, Option("-n", "--max-tokens", metavar="N", help="Most tokens of an answer.")]
Json = Annotated[bool, Option("--json", help="Print one JSON object and nothing else.")]


def main() -> None:
    """The entry point of `edge-moe` and `python -m edge_moe`."""
    try:
        app(prog_name="edge-moe")
    except KeyboardInterrupt:
        sys.exit(130)


def command(name: str):
    """Register a subcommand whose expected errors become one line and an exit code."""

    def register(function):
        @app.command(name)
        @functools.wraps(function)
        def run(*args, **options):
            try:
                function(*args, **options)
                sys.stdout.flush()
            except BrokenPipeError:  # the reader left: nothing to tell, and nothing left to flush
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                raise typer.Exit(1) from None
            except KeyboardInterrupt:
                _fail("interrupted", 130)
            except (ValueError, OSError, MemoryError) as error:
                _fail(error)

        return run

    return register


def _fail(error, code: int = 1) -> None:
    message = str(error)
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        message = f"{error.filename}: {error.strerror}"
    message = " ".join(message.split()) or {MemoryError: "out of memory"}.get(type(error), type(error).__name__)
    print(f"edge-moe: error: {message}", file=sys.stderr)
    raise typer.Exit(code)


def _print_json(value: dict) -> None:
    print(json.dumps(value, ensure_ascii=False))


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"edge-moe {__version__}")
        raise typer.Exit()


@app.callback()
def options(
    version: Annotated[
        bool, Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@command("demo")
def demo_command(
    keep: Annotated[str | None, Option("--keep", metavar="DIR", help="Keep the bundles in DIR.", show_default=False)] = None,
    json_output: Json = False,
) -> None:
    """Compress the embedded model, compare methods, run it under a cap; under a minute."""
    from edge_moe.demo import report_text, run_demo
    from edge_moe.progress import progress_bar

    with progress_bar(quiet=json_output) as progress:
        report = run_demo(keep, progress)
    if json_output:
        _print_json(report)
    else:
        print(report_text(report))


@command("compress")
def compress_command(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint's directory (safetensors).", show_default=False)],
    out: Annotated[str, typer.Argument(metavar="OUT", help="The bundle to write, NAME.emoe.", show_default=False)],
    bits: Annotated[float | None, Option("--bits", metavar="B", help="Mean bits of an expert weight, all included; 16 changes nothing [default: 2.5].", show_default=False)] = None,
    width: Annotated[int | None, Option("--width", metavar="B", help="Instead: one width for every expert (method uniform).", show_default=False)] = None,
    size: Annotated[str | None, Option("--size", metavar="SIZE", help="Instead: bytes of the whole bundle, as 103GB.", show_default=False)] = None,
    method: Annotated[Method | None, Option("--method", help="How widths are chosen: pmq one program over the model, mc one a layer, uniform all alike, rtn plain rounding [default: pmq].", show_default=False)] = None,
    calibration: Annotated[list[str] | None, Option("--calibration", metavar="FILE", help="Text to calibrate on, or .npy of token ids; repeatable [default: Python's standard library].", show_default=False)] = None,
    tokens: Annotated[int, Option("--tokens", metavar="N", help="Calibration tokens.")] = 32_768,
    group: Annotated[int, Option("--group", help="Inputs that share a scale: 32, 64 or 128.")] = 64,
    trunk_width: Annotated[int, Option("--trunk-width", metavar="B", help="Bits of all weights but the experts'.")] = 8,
    seed: Annotated[int, Option("--seed", help="Draws the calibration text.")] = 0,
    threads: Threads = None,
    json_output: Json = False,
) -> None:
    """Compress a checkpoint into a bundle."""
    from edge_moe.compressor.pipeline import compress
    from edge_moe.progress import progress_bar
    from edge_moe.report import compressed_text, describe_bundle
    from edge_moe.runtime.plan import parse_bytes

    chosen = method.value if method else "pmq" if width is None else "uniform"
    with progress_bar(quiet=json_output) as progress:
        bundle = compress(
            model, out, progress=progress, bits=bits, width=width, size=None if size is None else parse_bytes(size),
            method=chosen, calibration=tuple(calibration or ()), tokens=tokens, group=group, trunk_width=trunk_width,
            seed=seed, threads=threads,
        )  # fmt: skip
    about = describe_bundle(bundle)
    if json_output:
        _print_json(about)
    else:
        print(compressed_text(about))


@command("plan")
def plan_command(
    model: Annotated[str, typer.Argument(metavar="MODEL|BUNDLE", help="A bundle, a model's directory or its config.json alone.", show_default=False)],
    ram: Ram = "auto",
    context: Context = None,
    width: Annotated[int | None, Option("--width", metavar="B", help="Bits of the experts of a model not compressed yet [default: 4].", show_default=False)] = None,
    threads: Threads = None,
    json_output: Json = False,
) -> None:
    """Say where the memory would go under a cap, before anything is loaded or downloaded."""
    from edge_moe.compressor.estimate import plan_for
    from edge_moe.report import plan_text
    from edge_moe.runtime.plan import refusal

    plan = plan_for(model, ram, context=context, width=width, threads=threads)
    if json_output:
        _print_json(plan.as_dict())
    else:
        print(plan_text(plan))
    if plan.ram_bytes < plan.floor_bytes:
        raise MemoryError(refusal(plan))


@command("inspect")
def inspect_command(bundle: BundleArgument, json_output: Json = False) -> None:
    """Show what a bundle holds: shapes, bytes, widths, calibration."""
    from edge_moe.report import bundle_text, describe_bundle
    from edge_moe.runtime.bundle import Bundle

    about = describe_bundle(Bundle.open(bundle))
    if json_output:
        _print_json(about)
    else:
        print(bundle_text(about))


@command("verify")
def verify_command(bundle: BundleArgument) -> None:
    """Read every byte of a bundle and check it against its checksums."""
    import time

    from edge_moe.progress import progress_bar
    from edge_moe.report import size
    from edge_moe.runtime.bundle import Bundle, verify

    opened, done, began = Bundle.open(bundle), 0, time.perf_counter()
    with progress_bar() as progress:
        for part, (_, count) in enumerate(verify(opened), start=1):
            done += count
            if progress:
                progress("verify", part, len(opened.experts) + 1)
    print(f"{bundle}: OK, {size(done)} at {done / (time.perf_counter() - began) / 1e9:.2f} GB/s")


@command("generate")
def generate_command(
    bundle: BundleArgument,
    prompt: Annotated[str | None, Option("-p", "--prompt", metavar="TEXT", help="The text to go on from; - reads stdin.", show_default=False)] = None,
    tokens: Annotated[str | None, Option("--tokens", metavar="1,2,3", help="Instead: token ids; the answer then is ids too.", show_default=False)] = None,
    max_tokens: MaxTokens = 64,
    ram: Ram = "auto",
    context: Context = None,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    threads: Threads = None,
    prune: Prune = "bundle",
    stop: Annotated[list[str] | None, Option("--stop", metavar="TEXT", help="End before this text; repeatable.", show_default=False)] = None,
    json_output: Json = False,
) -> None:
    """Complete a text."""
    if (prompt is None) == (tokens is None):
        raise typer.BadParameter("give either -p TEXT or --tokens 1,2,3")
    from edge_moe.report import statistics_text
    from edge_moe.runtime.runtime import Runtime

    start = _token_ids(tokens) if prompt is None else sys.stdin.read() if prompt == "-" else prompt
    with Runtime(bundle, ram, context, threads=threads, prune=_prune(prune)) as runtime:
        pieces = runtime.stream(start, max_tokens, temperature=temperature, top_p=top_p, seed=seed, stop=stop)
        generation = _print_pieces(pieces, ids=prompt is None, quiet=json_output)
    if json_output:
        _print_json(asdict(generation))
    else:
        print(statistics_text(generation), file=sys.stderr)


def _print_pieces(pieces, ids: bool, quiet: bool):
    """Write pieces as they come and return them as one Generation."""
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


def _token_ids(text: str) -> list[int]:
    try:
        return [int(token) for token in text.replace(",", " ").split()]
    except ValueError:
        raise ValueError(f"tokens {text!r} are not whole numbers with commas between them") from None


def _prune(text: str) -> float | str:
    """off, bundle or a share of routing weight."""
    try:
        return float(text)
    except ValueError:
        return text


@command("chat")
def chat_command(
    bundle: BundleArgument,
    max_tokens: MaxTokens = 512,
    ram: Ram = "auto",
    context: Context = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    threads: Threads = None,
    prune: Prune = "bundle",
) -> None:
    """Talk with a model. Sampling is as its makers advise unless --temp or --top-p say else."""
    from edge_moe.chat import chat, sampling_defaults
    from edge_moe.runtime.runtime import Runtime

    with Runtime(bundle, ram, context, threads=threads, prune=_prune(prune)) as runtime:
        sampling = sampling_defaults(runtime.bundle.path)
        given = {"temperature": temperature, "top_p": top_p, "seed": seed, "max_tokens": max_tokens}
        chat(runtime, {**sampling, **{key: value for key, value in given.items() if value is not None}})


@command("eval")
def eval_command(
    bundle: BundleArgument,
    text: Annotated[list[str], Option("--text", metavar="FILE", help="Text to score; repeatable: each alone and all together.", show_default=False)],
    against: Annotated[str | None, Option("--against", metavar="MODEL|BUNDLE", help="Compare predictions with this model's.", show_default=False)] = None,
    context: Annotated[int, Option("--context", metavar="N", help="Tokens of a window; windows do not overlap.")] = 256,
    tokens: Annotated[int | None, Option("--tokens", metavar="N", help="Tokens of each text [default: all].", show_default=False)] = None,
    prune: Prune = "bundle",
    ram: Ram = "auto",
    threads: Threads = None,
    json_output: Json = False,
) -> None:
    """Score a bundle on text: perplexity per token, and divergence from another model."""
    from contextlib import nullcontext

    from edge_moe.bench.evaluate import LOGITS_ROWS
    from edge_moe.bench.texts import evaluate_texts, reference_logits
    from edge_moe.progress import progress_bar
    from edge_moe.report import evaluation_text
    from edge_moe.runtime.runtime import Runtime

    with (
        progress_bar(quiet=json_output) as progress,
        Runtime(bundle, ram, context, threads=threads, prune=_prune(prune), logits_rows=LOGITS_ROWS) as runtime,
        reference_logits(against, runtime, context) if against else nullcontext() as logits,
    ):
        result = evaluate_texts(runtime, text, context=context, tokens=tokens, against=logits, progress=progress)
    if json_output:
        _print_json(result)
    else:
        print(evaluation_text(result, context))


@command("bench")
def bench_command(
    bundle: Annotated[str | None, typer.Argument(metavar="[BUNDLE]", help="A bundle's directory, NAME.emoe.", show_default=False)] = None,
    synthetic: Annotated[str | None, Option("--synthetic", metavar="CONFIG", help="Instead: random weights of this config.json's shapes.", show_default=False)] = None,
    layers: Annotated[int | None, Option("--layers", metavar="N", help="Of the random model [default: the config's].", show_default=False)] = None,
    width: Annotated[int | None, Option("--width", metavar="B", help="Of the random model's experts [default: 4].", show_default=False)] = None,
    vocab: Annotated[int | None, Option("--vocab", metavar="N", help="Of the random model [default: the config's].", show_default=False)] = None,
    keep: Annotated[str | None, Option("--keep", metavar="OUT", help="Keep the random bundle here.", show_default=False)] = None,
    ram: Ram = "auto",
    prompt: Annotated[int, Option("-p", "--prompt", metavar="N", help="Tokens of the prompt test; 0 leaves it out.")] = 512,
    generate: Annotated[int, Option("-n", "--generate", metavar="N", help="Tokens of the generation test; 0 leaves it out.")] = 128,
    repeats: Annotated[int, Option("-r", "--repeats", metavar="N", help="Timed runs of each test.")] = 5,
    threads: Threads = None,
    output: Annotated[Format, Option("-o", "--output", help="Table, one JSON object, or exact figures.")] = Format.md,
) -> None:
    """Measure speed as llama-bench does, under a cap, beside what the machine can do."""
    if (bundle is None) == (synthetic is None):
        raise typer.BadParameter("give either a BUNDLE or --synthetic CONFIG")
    if bundle and any(value is not None for value in (layers, width, vocab, keep)):
        raise typer.BadParameter("--layers, --width, --vocab and --keep are of --synthetic")
    from edge_moe.bench.bench import bench, bench_synthetic
    from edge_moe.progress import progress_bar
    from edge_moe.report import bench_csv, bench_markdown

    shapes = {"layers": layers, "width": 4 if width is None else width, "vocab": vocab, "keep": keep}
    run = functools.partial(bench_synthetic, synthetic, **shapes) if synthetic else functools.partial(bench, bundle)
    with progress_bar(quiet=output is not Format.md) as progress:
        report = run(
            ram=ram, prompt=prompt, generate=generate, repeats=repeats, threads=threads, progress=progress
        )
    if output is Format.json:
        _print_json(report.as_dict())
    else:
        print(bench_csv(report) if output is Format.csv else bench_markdown(report))
