"""The families of models that are run, a file each; FAMILIES has them by `model_type`.

A family says how its config.json becomes a ModelConfig, and what its checkpoints call their tensors. Nothing outside
its file knows its name.
"""

from importlib import import_module
from pkgutil import iter_modules

from .family import Family

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for name in sorted(module.name for module in iter_modules(__path__))
    if (family := getattr(import_module(f".{name}", __name__), "FAMILY", None))
}
