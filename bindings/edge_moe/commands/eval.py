"""`edge-moe eval`: scores a bundle on text."""

from ..terminal import show
from . import options
from .options import option
from .output import print_json

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

    Prints perplexity per token and, with --against, the KL divergence from another model's predictions. Several texts
    are scored separately and together: geometric mean of perplexity, arithmetic mean of the rest.
    """
    from ..bench.texts import evaluate_bundle
    from ..progress import progress_bar
    from ..report import evaluation_text

    given = {"context": context, "tokens": tokens, "prune": options.prune_of(prune)}
    given |= {"ram": ram, "device": device, "threads": threads}
    with progress_bar(quiet=json_output) as progress:
        result = evaluate_bundle(bundle, text, against=against, progress=progress, **given)
    if json_output:
        print_json(result)
    else:
        show(evaluation_text(result, context))
