"""edge_moe: run Mixture-of-Experts models larger than memory, inside a hard RAM cap.

    with Runtime("model.emoe", ram="8GB") as runtime:
        print(runtime.generate("Once upon a time", max_tokens=64).text)

Importing this package imports nothing heavy: the interpreter's own memory counts under the cap.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the same names for editors and type checkers; at run time they are loaded from _HOMES on first use
    from .bench.bench import Report
    from .bench.bench import bench as benchmark
    from .bench.texts import evaluate_bundle as evaluate
    from .compressor.choosing.estimate import Estimate
    from .compressor.choosing.estimate import estimate as plan
    from .compressor.pipeline import compress
    from .doctor import examine
    from .runtime.answer import Generation
    from .runtime.bundle import Bundle
    from .runtime.config import ModelConfig
    from .runtime.plan import BelowFloor, EdgeMoeError, Plan
    from .runtime.runtime import Runtime
    from .runtime.sampling import TokenLogprobs
    from .runtime.turns import AsyncStream, Stream

__version__ = "0.1.0"

_HOMES = {  # name: (module, name in the module); `edge_moe.bench` and `edge_moe.doctor` are modules
    "AsyncStream": ("edge_moe.runtime.turns", "AsyncStream"),
    "BelowFloor": ("edge_moe.runtime.plan", "BelowFloor"),
    "Bundle": ("edge_moe.runtime.bundle", "Bundle"),
    "EdgeMoeError": ("edge_moe.runtime.plan", "EdgeMoeError"),
    "Estimate": ("edge_moe.compressor.choosing.estimate", "Estimate"),
    "Generation": ("edge_moe.runtime.answer", "Generation"),
    "ModelConfig": ("edge_moe.runtime.config", "ModelConfig"),
    "Plan": ("edge_moe.runtime.plan", "Plan"),
    "Report": ("edge_moe.bench.bench", "Report"),
    "Runtime": ("edge_moe.runtime.runtime", "Runtime"),
    "Stream": ("edge_moe.runtime.turns", "Stream"),
    "TokenLogprobs": ("edge_moe.runtime.sampling", "TokenLogprobs"),
    "benchmark": ("edge_moe.bench.bench", "bench"),
    "compress": ("edge_moe.compressor.pipeline", "compress"),
    "evaluate": ("edge_moe.bench.texts", "evaluate_bundle"),
    "examine": ("edge_moe.doctor", "examine"),
    "plan": ("edge_moe.compressor.choosing.estimate", "estimate"),
}
__all__ = [
    "AsyncStream",
    "BelowFloor",
    "Bundle",
    "EdgeMoeError",
    "Estimate",
    "Generation",
    "ModelConfig",
    "Plan",
    "Report",
    "Runtime",
    "Stream",
    "TokenLogprobs",
    "benchmark",
    "compress",
    "evaluate",
    "examine",
    "plan",
    "__version__",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'edge_moe' has no attribute {name!r}")
    module, there = _HOMES[name]
    return getattr(import_module(module), there)


def __dir__() -> list[str]:
    return __all__
