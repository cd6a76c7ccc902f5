"""`edge-moe eval`: score a bundle on text."""

from edge_moe.commands import options
from edge_moe.commands.options import option
from edge_moe.commands.output import print_json
from edge_moe.terminal import show

Texts = option(list[str], "--text", metavar="FILE", help="Text to score; repeatable.")
Against = option(str | None, "--against", metavar="MODEL|BUNDLE", help="Compare predictions with this model's.")
Window = option(int, "--context", metavar="N", shown=True, help="Tokens of a window; windows do not overlap.")
TextTokens = option(int | None, "--tokens", metavar="N", help="Score the first N tokens of each text [default: all].")


def evaluate(
    bundle: options.Bundle,
    text: Texts,
    against: Against = None,
    context: Window = 256,
    tokens: TextTokens = None,
    prune: options.Prune = None,
    ram: options.Ram = "auto",
    device: options.Device = "auto",
    threads: options.Threads = None,
    json_output: options.Json = False,
) -> None:
    """Score a bundle on text.

    Perplexity per token, and with --against the divergence from another model's predictions. Several texts are
    scored alone and together: geometric mean of perplexity, mean of the rest.
    """
    from contextlib import nullcontext

    from edge_moe.bench import texts
    from edge_moe.bench.reference_process import shares
    from edge_moe.progress import progress_bar
    from edge_moe.report import evaluation_text
    from edge_moe.runtime.model_path import find_model
    from edge_moe.runtime.runtime import Runtime
    from edge_moe.runtime.score import LOGITS_ROWS

    mine, its = ram, "auto"
    if against:  # both are under the one cap
        against = find_model(against)
        mine, its = shares(bundle, against, ram, context)
    sizes = {"context": context, "device": device, "threads": threads, "logits_rows": LOGITS_ROWS}
    with (
        progress_bar(quiet=json_output) as progress,
        Runtime(bundle, mine, prune=options.prune_of(prune), **sizes) as runtime,
        texts.reference_logits(against, runtime, context, its, threads) if against else nullcontext() as logits,
    ):
        result = texts.evaluate_texts(runtime, text, context=context, tokens=tokens, against=logits, progress=progress)
    if json_output:
        print_json(result)
    else:
        show(evaluation_text(result, context))
