"""edge_moe: run Mixture-of-Experts models larger than memory, inside a hard RAM cap.

    with Runtime("model.emoe", ram="8GB") as runtime:
        print(runtime.generate("Once upon a time", max_tokens=64).text)

Importing this package imports nothing heavy: the interpreter's own memory counts under the cap.
"""

from importlib import import_module

__version__ = "0.1.0"

_HOMES = {
    "Runtime": "edge_moe.runtime.runtime",
    "Generation": "edge_moe.runtime.runtime",
    "Plan": "edge_moe.runtime.plan",
    "Bundle": "edge_moe.runtime.bundle",
    "ModelConfig": "edge_moe.runtime.config",
    "compress": "edge_moe.compressor.pipeline",
}
__all__ = [*sorted(_HOMES), "__version__"]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'edge_moe' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__():
    return __all__
