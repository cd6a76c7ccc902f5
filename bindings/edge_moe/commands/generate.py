"""`edge-moe generate`: complete one text."""

import sys
from dataclasses import asdict, replace

import typer

from edge_moe.commands import options
from edge_moe.commands.options import option
from edge_moe.commands.output import print_json

Prompt = option(str | None, "-p", "--prompt", metavar="TEXT", help="The text to go on from; - reads stdin.")
TokenIds = option(str | None, "--tokens", metavar="1,2,3", help="Instead of a text: token ids; prints ids.")
Temperature = option(float, "--temp", metavar="T", shown=True, help="Sampling temperature; 0: the likeliest token.")
TopP = option(
    float, "--top-p", metavar="P", shown=True, help="Sample from the likeliest tokens up to this probability."
)
Stop = option(list[str] | None, "--stop", metavar="TEXT", help="End before this text; repeatable.")


def generate(
    bundle: options.Bundle,
    prompt: Prompt = None,
    tokens: TokenIds = None,
    max_tokens: options.MaxTokens = 64,
    ram: options.Ram = "auto",
    context: options.Context = None,
    kv: options.Kv = options.KvType.float16,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: options.SamplingSeed = None,
    device: options.Device = "auto",
    threads: options.Threads = None,
    prune: options.Prune = None,
    stop: Stop = None,
    json_output: options.Json = False,
) -> None:
    """Complete a text."""
    if (prompt is None) == (tokens is None):
        raise typer.BadParameter("give either -p TEXT or --tokens 1,2,3")
    from edge_moe.report import statistics_text
    from edge_moe.runtime.runtime import Runtime

    start = token_ids_of(tokens) if prompt is None else sys.stdin.read() if prompt == "-" else prompt
    given = {"device": device, "threads": threads, "kv": kv.value}
    with Runtime(bundle, ram, context, prune=options.prune_of(prune), **given) as runtime:
        pieces = runtime.stream(start, max_tokens, temperature=temperature, top_p=top_p, seed=seed, stop=stop)
        generation = _print_pieces(pieces, ids=prompt is None, quiet=json_output)
    if json_output:
        print_json(asdict(generation))
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


def token_ids_of(text: str) -> list[int]:
    try:
        return [int(token) for token in text.replace(",", " ").split()]
    except ValueError:
        raise ValueError(f"tokens {text!r} are not whole numbers with commas between them") from None
