"""`edge-moe chat`: the options of a conversation; edge_moe.chat holds it."""

from edge_moe.commands import options
from edge_moe.commands.options import option

TemperatureIfAny = option(float | None, "--temp", metavar="T", help="Sampling temperature [default: the model's].")
TopPIfAny = option(float | None, "--top-p", metavar="P", help="Likeliest tokens to sample from [default: the model's].")


def chat(
    bundle: options.Bundle,
    max_tokens: options.MaxTokens = 512,
    ram: options.Ram = "auto",
    context: options.Context = None,
    kv: options.Kv = options.KvType.float16,
    temperature: TemperatureIfAny = None,
    top_p: TopPIfAny = None,
    seed: options.SamplingSeed = None,
    device: options.Device = "auto",
    threads: options.Threads = None,
    prune: options.Prune = None,
) -> None:
    """Talk with a model.

    Ctrl-C stops an answer and keeps the chat. A model without a chat template continues the text of the conversation.
    """
    import signal

    from edge_moe import chat
    from edge_moe.runtime.runtime import Runtime
    from edge_moe.runtime.sampling import sampling_defaults

    given = {"device": device, "threads": threads, "kv": kv.value}
    with Runtime(bundle, ram, context, prune=options.prune_of(prune), **given) as runtime:
        given = {"temperature": temperature, "top_p": top_p, "seed": seed, "max_tokens": max_tokens}
        given = {key: value for key, value in given.items() if value is not None}
        chat.chat(runtime, {**sampling_defaults(runtime.bundle.path), **given})
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # one Ctrl-C more while the process ends is no error
