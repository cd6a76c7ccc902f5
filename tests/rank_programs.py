"""Programs that mlx.launch starts in tests: each is a function of its name, and writes OUT.RANK.json.

python rank_programs.py NAME OUT ARGUMENTS, these as JSON. Also called in the test's own process, as a single rank.
"""

import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np

from edge_moe.runtime.runtime import Runtime

COUNTED = ("expert_hits", "expert_misses", "bytes_read", "experts_used", "dropped_routing_weight", "cached_tokens")
RUN = {"ram": "2GB", "device": "mlx", "kv": "float32", "threads": 1}


def answers(paths: dict[str, str], ids: dict[str, list[int]], prune: dict[str, str], batches: list[str]) -> dict:
    """What models say, by name: logits of ids, answers that begin alike, also from slots for one layer.

    batches: the models that answer without a seed, and several prompts at once.
    """
    return {name: _answers(paths[name], ids[name], prune.get(name), name in batches) for name in paths}


def _answers(path: str, ids: list[int], prune: str | None, batches: bool) -> dict:
    with Runtime(path, context=64, logits_rows=32, sequences=1 + batches, **RUN) as runtime:
        found = {"logits": runtime.logits(ids).view(np.uint32).tolist()}
        given = {"max_tokens": 3, "temperature": 0.8, "prune": prune}
        found["whole"] = [_said(runtime.generate(ids[:count], seed=count, **given)) for count in (20, 24)]
        ram_bytes = runtime.set_ram(runtime.plan.floor_bytes).ram_bytes
        runtime.reset()
        found["paged"] = [_said(runtime.generate(ids[:24], seed=24, **given))]
        found["below_cap"] = runtime.stats["peak_memory_bytes"] <= ram_bytes
        found["all_held"] = runtime.plan.resident
        if batches:
            for rule in ("odp:0.2", "share:0.3") if prune else ():
                found["paged"].append(_said(runtime.generate(ids[5:25], seed=25, **{**given, "prune": rule})))
            found["unseeded"] = runtime.generate(ids[:5], 2, temperature=1.0).tokens
            batch = runtime.batch([ids[:20], {"prompt": ids[:7], "prune": prune}, ids[3:9]], max_tokens=2)
            found["batch"] = [answer.tokens for answer in batch]
    return found


def _said(answer) -> dict:
    return {"tokens": answer.tokens, **{name: getattr(answer, name) for name in COUNTED}}


def errors(parts: list[str], other: str, damaged: str, small: int) -> dict:
    """The errors of ranks that differ, by what differs. parts, other, damaged: directories with two parts."""
    found: dict[str, str] = {}
    rank = _rank()

    def told(name: str, call: Callable[[], object]) -> None:
        try:
            found[name] = repr(call())
        except (Exception, KeyboardInterrupt) as error:
            found[name] = f"{type(error).__name__}: {error}"

    told("whole bundle", lambda: Runtime(parts[0], **RUN))
    told("part of the other rank", lambda: Runtime(f"{parts[1]}/part-1-of-2", **RUN))
    told("part of another bundle", lambda: Runtime(other if rank else parts[1], **RUN))
    told("context", lambda: Runtime(parts[1], context=32 + rank, **RUN))
    told("cap", lambda: Runtime(parts[1], **{**RUN, "ram": small if rank else "2GB"}))
    with Runtime(damaged, context=64, **RUN) as runtime:
        told("damaged record", lambda: runtime.generate([1, 2, 3], 4))
    with Runtime(parts[1], context=64, **RUN) as runtime:
        want = runtime.generate([1, 2, 3], 4).tokens
        told("prompt", lambda: runtime.generate([1, 2, 3 + rank], 4))
        told("lower cap", lambda: runtime.set_ram(small if rank else "1GB"))
        found["cap then"] = str(runtime.plan.ram_bytes)
        told("too long", lambda: runtime.generate([1] * (65 if rank else 64), 4))
        told("stopped", lambda: _stopped(runtime, rank))
        told("interrupted", lambda: _interrupted(runtime, rank))
        found["then"] = repr(runtime.generate([1, 2, 3], 4).tokens == want)
        if rank:
            return found
        told("ended", lambda: runtime.generate([1, 2, 3], 60))
    return found


def _rank() -> int:
    from edge_moe.runtime.mlx.ranks import find_ranks

    ranks = find_ranks()
    assert ranks
    return ranks.rank


def _stopped(runtime: Runtime, rank: int) -> tuple[int, str | None]:
    """The tokens of an answer that the first rank alone stops after two, and why it ended."""
    event = threading.Event()
    pieces = []
    for piece in runtime.stream([4, 5, 6], 20, stop_event=event):
        pieces.append(piece)
        if len(pieces) == 2 and rank == 0:
            event.set()
    return sum(len(piece.tokens) for piece in pieces), pieces[-1].finish_reason


def _interrupted(runtime: Runtime, rank: int) -> list[int]:
    """Ctrl-C on the first rank, while it reads an expert."""
    runtime.set_ram(runtime.plan.floor_bytes)
    engine = runtime._engine
    before = engine.faults_met
    if rank == 0:
        engine.inject("slow", value=20)

        def press() -> None:
            while engine.faults_met == before:
                pass
            os.kill(os.getpid(), signal.SIGINT)

        threading.Thread(target=press, daemon=True).start()
    try:
        return runtime.generate([7, 8, 9, 10], 50).tokens
    finally:
        engine.clear_faults()


def written(program: Callable[..., dict], out: str, arguments: dict) -> None:
    Path(f"{out}.{_rank()}.json").write_text(json.dumps(program(**arguments)))


if __name__ == "__main__":
    written({"answers": answers, "errors": errors}[sys.argv[1]], sys.argv[2], json.loads(sys.argv[3]))
