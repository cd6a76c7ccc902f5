"""`edge-moe chat`: the options of a conversation; edge_moe.chat conducts it."""

import sys
from functools import partial

from ..terminal import show
from . import options
from .options import option
from .sampling import takes_sampling

MaxTokens = option(
    int | None, "-n", "--max-tokens", metavar="N", parser=options.tokens_of,
    help="Maximum tokens of an answer [default: until the context is full].",
)  # fmt: skip
DropOldest = option(
    bool, "--drop-oldest", help="If the context is full, drop the oldest messages, with a note, instead of refusing."
)
Session = option(
    str | None, "--session", metavar="NAME",
    help="Keep the chat under this name and go on from it the next time, also after a crash.",
)  # fmt: skip
NoHistory = option(bool, "--no-history", help="Neither read nor store the history of typed lines.")


@takes_sampling
def chat(
    bundle: options.Bundle,
    system: options.System = None,
    thinking: options.Thinking = None,
    chat_template_kwargs: options.TemplateKwargs = None,
    max_tokens: MaxTokens = None,
    drop_oldest: DropOldest = False,
    session: Session = None,
    no_history: NoHistory = False,
    *,
    sampling: dict,
    ram: options.Ram = "auto",
    ram_share: options.RamShare = None,
    context: options.Context = None,
    kv: options.Kv = options.KvType.float16,
    device: options.Device = "auto",
    threads: options.Threads = None,
    prune: options.Prune = None,
) -> None:
    """Chat with a model.

    Ctrl-C stops an answer and keeps the chat; /help lists the commands. A model without a chat template continues the
    text of the conversation.
    """
    import signal

    from .. import chat
    from ..capped import capped
    from ..named_session import NamedSession
    from ..report import default_pruning_text
    from ..runtime.runtime import Runtime
    from ..runtime.sampling import sampling_defaults
    from .output import only_first

    named = None if session is None else NamedSession(session)
    told = options.template_kwargs(thinking, chat_template_kwargs)
    sampling["max_tokens"] = None if max_tokens == -1 else max_tokens
    said_later: list[str] = []
    run = {"device": device, "threads": threads, "kv": kv.value}
    make = partial(Runtime, bundle, context=context, prune=options.prune_of(prune), **run)
    with capped(ram, ram_share, make, said_later.append) as runtime, only_first(runtime.rank):
        if named and runtime.rank_count > 1:
            raise ValueError("--session keeps a chat on one machine; leave it out where mlx.launch starts several")
        sampling = {**sampling_defaults(runtime.bundle.path), **sampling}
        if said := default_pruning_text(runtime.bundle.pruning, prune):
            show(said, sys.stderr)
        if said := options.thinking_note(runtime.tokenizer, thinking):
            show(said, sys.stderr)
        chat.chat(runtime, sampling, told, system=system, drop_oldest=drop_oldest, session=named,
                  keep_history=not no_history and runtime.rank_count == 1, said_later=said_later)  # fmt: skip
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # another Ctrl-C while the process ends is not an error
