"""`edge-moe serve`: the options of a server; edge_moe.server answers its requests."""

import os
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import typer

from ..terminal import show
from . import options
from .options import option

SEQUENCES = (4, 2, 1)  # the first of these that the cap has room for is the default

_DOOR, _LIMITS = "Where and to whom", "Limits"
Host = option(str, "--host", metavar="ADDRESS", shown=True, section=_DOOR, help="Address to listen on; 0.0.0.0: all.")
Port = option(int, "--port", metavar="N", shown=True, section=_DOOR, help="Port to listen on; 0: a free one.")
ApiKey = option(
    str | None, "--api-key", metavar="KEY", section=_DOOR,
    help="Key that clients must give [default: EDGE_MOE_API_KEY of the environment; without one, any will do].",
)  # fmt: skip
Name = option(
    list[str] | None, "--name", metavar="NAME", section=_DOOR,
    help="Name of the model for clients; repeatable [default: the bundle's, without .emoe].",
)  # fmt: skip
SequencesOption = option(
    int | None, "--sequences", metavar="N",
    help="Answers that are computed at once, each with a KV cache [default: 4, or fewer where the cap is small].",
)  # fmt: skip
ScoreRows = option(
    int | None, "--score-rows", metavar="N",
    help="Tokens of a prompt that are scored in one step, for echo with logprobs [default: as --sequences].",
)  # fmt: skip
Sessions = option(
    Path | None, "--sessions", metavar="DIR",
    help="Keep what was computed of conversations in this directory, for them to go on after a restart at once.",
)  # fmt: skip
SessionsLimit = option(str, "--sessions-limit", metavar="SIZE", shown=True, help="Of the files in --sessions together.")
Queue = option(int, "--queue", metavar="N", shown=True, section=_LIMITS, help="Answers that may wait; more get 429.")
Timeout = option(
    float, "--timeout", metavar="SECONDS", shown=True, section=_LIMITS, help="For an answer, with the time it waits."
)
Idle = option(
    float, "--idle-timeout", metavar="SECONDS", shown=True, section=_LIMITS,
    help="For a client that sends or reads nothing in the middle of a request.",
)  # fmt: skip
BodyLimit = option(
    str, "--body-limit", metavar="SIZE", shown=True, section=_LIMITS, help="Of a request; larger ones get 413."
)


def serve(
    bundle: options.Bundle,
    host: Host = "127.0.0.1",
    port: Port = 8080,
    api_key: ApiKey = None,
    name: Name = None,
    sequences: SequencesOption = None,
    score_rows: ScoreRows = None,
    sessions: Sessions = None,
    sessions_limit: SessionsLimit = "10GB",
    queue: Queue = 64,
    timeout: Timeout = 600.0,
    idle_timeout: Idle = 30.0,
    body_limit: BodyLimit = "4MB",
    ram: options.Ram = "auto",
    ram_share: options.RamShare = None,
    context: options.Context = None,
    kv: options.Kv = options.KvType.float16,
    device: options.Device = "auto",
    threads: options.Threads = None,
    prune: options.Prune = None,
) -> None:
    """Serve a model to programs that know OpenAI's or Anthropic's API.

    Ctrl-C lets running answers end, and a second one stops at once. Without --api-key only programs on this machine
    should reach the port.
    """
    from ..runtime.plan import parse_bytes

    try:  # before the Runtime is planned, as their memory counts
        from ..server.limits import Limits
        from ..server.run import address_of, is_loopback, listen, run
        from ..server.service import Service
    except ImportError as error:
        raise ValueError(f"edge-moe serve needs {error.name}: pip install 'edge-moe[serve]'") from None
    from ..capped import capped
    from ..runtime.bundle import Bundle
    from ..runtime.device import begin_ranks
    from ..runtime.runtime import Runtime

    if begin_ranks(device):
        raise ValueError("serve runs on one machine; what mlx.launch starts on several is generate, chat or a program")
    if not 0 <= port < 65536:
        raise typer.BadParameter(f"--port is {port}, expected 0 to 65535")
    if queue < 0 or timeout <= 0 or idle_timeout <= 0:
        raise typer.BadParameter("--queue is 0 or more, --timeout and --idle-timeout are above 0")
    api_key = api_key or os.environ.get("EDGE_MOE_API_KEY") or None
    most = parse_bytes(body_limit)
    limits = Limits(queue, body_bytes=most, timeout_s=timeout, read_s=idle_timeout, stall_s=idle_timeout)
    found = listen(host, port)
    vocab, shapes = Bundle.open(bundle).config.vocab, find_spec("llguidance") is not None
    run_options = {"device": device, "threads": threads, "kv": kv.value, "prune": options.prune_of(prune)}
    for count in SEQUENCES if sequences is None else (sequences,):
        try:
            rows, reserve = score_rows or 1, limits.reserve_bytes(vocab, count, shapes)
            sizes = {"context": context, "sequences": count, "logits_rows": rows, "reserve_bytes": reserve}
            make = partial(Runtime, bundle, **run_options, **sizes)
            runtime = capped(ram, ram_share, make, lambda line: show(line, sys.stderr))
            break
        except MemoryError:
            if sequences is not None or count == SEQUENCES[-1]:
                raise
    with runtime:
        names = tuple(name or [runtime.bundle.path.name.removesuffix(".emoe")])
        service = Service(runtime, names, limits)
        if sessions:
            runtime.keep_sessions(sessions, sessions_limit)
        show(_about(service, address_of(found, host)), sys.stderr)
        if api_key is None and not is_loopback(found):
            show("anybody who reaches this port may use it: give --api-key", sys.stderr)
        sys.stderr.flush()
        run(service, found, api_key)
        if sessions:
            runtime.save_sessions()


def _about(service, address: str) -> str:
    from ..plan_text import size

    plan = service.runtime.plan
    experts = (
        "every expert in memory"
        if plan.resident
        else f"{plan.experts_bytes / plan.all_experts_bytes:.0%} of the experts in memory"
    )
    answers = "one answer" if plan.sequences == 1 else f"{plan.sequences} answers"
    return (
        f"{service.name} on {address}: cap {size(plan.ram_bytes)}, {experts}, {answers} at once of up to "
        f"{plan.context:,} tokens; Ctrl-C ends it\n"
        f"A browser has a chat at {address}\n"
        f"OpenAI's clients: OPENAI_BASE_URL={address}/v1 OPENAI_API_KEY=any, model {service.name}\n"
        f"Anthropic's: ANTHROPIC_BASE_URL={address} ANTHROPIC_API_KEY=any"
    )
