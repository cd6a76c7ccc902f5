"""The supported families of models, one file each; FAMILIES maps `model_type` to them.

A family converts its config.json to a ModelConfig and names the tensors of its checkpoints. No other file refers to a
family by name.
"""

from importlib import import_module
from pkgutil import iter_modules

from .family import Family

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for name in sorted(module.name for module in iter_modules(__path__))
    if (family := getattr(import_module(f".{name}", __name__), "FAMILY", None))
}
