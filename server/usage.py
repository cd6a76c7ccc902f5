"""The counts of an answer, in the forms of the APIs; the account of experts is in a field of our own."""

from collections.abc import Sequence

from ..runtime.answer import Generation
from .reader import Told


def openai_usage(tolds: Sequence[Told], n: int) -> dict:
    """The counts of all answers of a request; a prompt counts once for its n answers."""
    lasts = [told.last for told in tolds if told.last is not None]
    prompts = [last for place, last in enumerate(lasts) if place % n == 0]
    prompt, answered = sum(one.prompt_tokens for one in prompts), sum(one.generation_tokens for one in lasts)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answered,
        "total_tokens": prompt + answered,
        "prompt_tokens_details": {"cached_tokens": sum(one.cached_tokens for one in prompts)},
        "completion_tokens_details": {"reasoning_tokens": sum(told.reasoning_tokens for told in tolds)},
        "edge_moe": account_of(lasts),
    }


def account_of(lasts: Sequence[Generation]) -> dict:
    """What the answers took: means over their tokens, sums of what was read."""
    tokens = sum(one.prompt_tokens - one.cached_tokens + one.generation_tokens for one in lasts) or 1

    def mean(name: str) -> float:
        share = sum(
            getattr(one, name) * (one.prompt_tokens - one.cached_tokens + one.generation_tokens) for one in lasts
        )
        return round(share / tokens, 6)

    return {
        "experts_used": mean("experts_used"),
        "top_k": lasts[0].top_k if lasts else 0,
        "dropped_routing_weight": mean("dropped_routing_weight"),
        "expert_hits": sum(one.expert_hits for one in lasts),
        "expert_misses": sum(one.expert_misses for one in lasts),
        "bytes_read": sum(one.bytes_read for one in lasts),
        "prompt_tps": round(max((one.prompt_tps for one in lasts), default=0.0), 3),
        "generation_tps": round(max((one.generation_tps for one in lasts), default=0.0), 3),
        "time_to_first_token": round(min((one.time_to_first_token for one in lasts), default=0.0), 6),
        "ram_bytes": lasts[0].ram_bytes if lasts else 0,
        "peak_memory_bytes": max((one.peak_memory_bytes for one in lasts), default=0),
    }
