"""Parts of a bundle: what each of several machines has that run its layers one after another.

A part is a directory with a bundle.json of its own, whose `part` says which layers it has: the first has the embedding,
the last the final norm and the head, or the embedding again where that is the head. config.json, the tokenizer and the
mask routers are in all of them. `part` is

    number          of this part, from 0
    first_layers    the first layer of each part
    bundle          the checksum of the bundle.json that was split

`edge-moe split BUNDLE OUT` writes the parts as OUT/part-1-of-2, OUT/part-2-of-2; see compressor/writing/parts.py.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from .bundle_table import REMEDY, Reader, shown
from .config import ModelConfig

MOST_PARTS = 256
NAME = re.compile(r"part-([1-9][0-9]*)-of-([1-9][0-9]*)")


@dataclass(frozen=True, slots=True)
class Part:
    """Which part of a bundle a directory is."""

    number: int  # from 0
    first_layers: tuple[int, ...]  # of each part
    layer_count: int  # of the model
    bundle: str  # checksum of the bundle.json that was split

    @property
    def count(self) -> int:
        return len(self.first_layers)

    @property
    def is_first(self) -> bool:
        return self.number == 0

    @property
    def is_last(self) -> bool:
        return self.number == self.count - 1

    @property
    def layers(self) -> range:
        return range(*(*self.first_layers, self.layer_count)[self.number : self.number + 2])

    def has(self, name: str, tied_head: bool) -> bool:
        """Whether a tensor of the trunk, or a table, is in this part. name: canonical."""
        if name.startswith("layers."):
            return int(name.split(".")[1]) in self.layers
        if name == "embedding":
            return self.is_first or (self.is_last and tied_head)
        return self.is_last

    def __str__(self) -> str:
        first, last = self.layers[0], self.layers[-1]
        return f"part {self.number + 1} of {self.count}, layers {first} to {last} of {self.layer_count}"


def part_name(number: int, count: int) -> str:
    """The name of a part's directory. number: from 0."""
    return f"part-{number + 1}-of-{count}"


def parts_in(path: Path) -> list[Path]:
    """The parts in a directory that `edge-moe split` has written, or some of them; none of any other directory."""
    if not path.is_dir():
        return []
    found = [(NAME.fullmatch(one.name), one) for one in path.iterdir() if one.is_dir()]
    return [one for _, one in sorted((int(name[1]), one) for name, one in found if name)]


def how_to_run(path: Path, count: int) -> str:
    """What runs the parts of a bundle, for messages. path: the directory that has them."""
    return f"`mlx.launch -n {count} --backend ring -- edge-moe generate {path} --device mlx` runs the parts together"


def read_part(table: dict, config: ModelConfig, read: Reader) -> Part | None:
    """Read bundle.json's `part`. Raises ValueError for one that cannot be."""
    if table.get("part") is None:
        return None
    entry = read.get(table, "part", dict)
    firsts, bundle = read.get(entry, "first_layers", list), read.get(entry, "bundle", str)
    whole = all(type(layer) is int for layer in firsts)
    if not whole or not 2 <= len(firsts) <= MOST_PARTS or firsts[0] != 0 or sorted(set(firsts)) != firsts:
        raise ValueError(f"{read.path}: first_layers of the parts are {shown(firsts)}, expected them to rise; {REMEDY}")
    if firsts[-1] >= config.layer_count:
        raise ValueError(
            f"{read.path}: a part begins at layer {firsts[-1]}, config.json has {config.layer_count}; {REMEDY}"
        )
    if not re.fullmatch("[0-9a-f]{64}", bundle):
        raise ValueError(f"{read.path}: the bundle of a part is {shown(bundle)}, expected a checksum; {REMEDY}")
    part = Part(read.count(entry, "number", len(firsts) - 1), tuple(firsts), config.layer_count, bundle)
    if not any(config.has_experts(layer) for layer in part.layers):
        raise ValueError(f"{read.path}: {part}, has no layer with experts; {REMEDY}")
    return part
