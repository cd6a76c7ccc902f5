"""The bytes of every part of a model, from its shapes alone.

packed_sizes(): in a bundle, with codes, a scale and a bias per group, and padded records. sizes_by_bits(): in another
format, from the bits that a weight of each tensor takes there; RECIPES has the published mixes.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from ... import _core
from ...runtime.bundle_records import record_alignment, record_bytes
from ...runtime.config import TRUNK_KINDS, ModelConfig, trunk_kind, trunk_shapes, without_layer
from ..rounding.quantise import largest_group, trunk_packing
from ..writing.writer import Packing
from .targets import packed_bytes, row_table_bytes

GROUP = 64
DEFAULT_WIDTH, TRUNK_WIDTH = 4, 8
WIDEST = 8  # maximum bits of an expert that is quantised
PROJECTIONS = ("gate", "up", "down")  # of the routed experts
EDGES = tuple(f"edge_{name}" for name in PROJECTIONS)  # the same in the first and last eighth of the MoE layers
# float32: norms, biases and routers; tables: of n-gram embeddings, of which single rows are read
PARTS = (*PROJECTIONS, "padding", *TRUNK_KINDS, "float32", "tables")


@dataclass(frozen=True, slots=True)
class Part:
    """All tensors of one kind, or `padding`, which aligns records and has no weights."""

    name: str  # one of PARTS
    weights: int
    nbytes: int

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.weights if self.weights else 0.0

    def as_dict(self) -> dict:
        bits = self.bits_per_weight
        return {"name": self.name, "weights": self.weights, "bits_per_weight": bits, "bytes": self.nbytes}


@dataclass(frozen=True, slots=True)
class Sizes:
    """The bytes of a model: its parts, and the sums that a plan needs."""

    parts: tuple[Part, ...]
    trunk_bytes: int
    all_experts_bytes: int
    slot_bytes: int  # of the largest record
    table_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor and its position: the `at`-th of the `of` layers that have a tensor of its name."""

    kind: str  # one of PARTS
    name: str  # canonical, without the layer
    shape: tuple[int, ...]
    at: int
    of: int

    @property
    def weights(self) -> int:
        return math.prod(self.shape)


def widths_by_kind(
    width: int | None = None, trunk_width: int | None = None, changes: dict[str, int] | None = None
) -> dict[str, int]:
    """Bits of each projection, each kind of trunk tensor and each of EDGES.

    width: for the routed experts (default 4). trunk_width: for the rest (default 8, or 16 with width 16). changes: by
    name, overriding both; an edge that is not given is as wide as its projection. Raises ValueError for other names or
    widths.
    """
    width = DEFAULT_WIDTH if width is None else width
    trunk_width = trunk_width if trunk_width is not None else 16 if width == 16 else TRUNK_WIDTH
    changes = changes or {}
    known = (*PROJECTIONS, *EDGES, *TRUNK_KINDS)
    if unknown := [name for name in changes if name not in known]:
        raise ValueError(f"widths has {unknown[0]!r}, expected some of {', '.join(known)}")
    given = {"width": width, "trunk_width": trunk_width, **{f"width of {name}": bits for name, bits in changes.items()}}
    for name, bits in given.items():
        if bits not in _core.WIDTHS:
            raise ValueError(f"{name} is {bits}, expected one of {', '.join(map(str, _core.WIDTHS))}")
    widths = dict.fromkeys(PROJECTIONS, width) | dict.fromkeys(TRUNK_KINDS, trunk_width) | changes
    return widths | {edge: changes.get(edge, widths[name]) for edge, name in zip(EDGES, PROJECTIONS, strict=True)}


def packed_sizes(config: ModelConfig, widths: dict[str, int], where: str = "config.json") -> Sizes:
    """The sizes of a bundle with these widths (see widths_by_kind), without its headers and tables.

    Raises ValueError if the experts' shapes are not multiples of a group.
    """
    group = largest_group(GROUP, config.dim, config.expert_hidden)
    if group is None and any(widths[name] < 16 for name in (*PROJECTIONS, *EDGES)):
        raise ValueError(
            f"{where}: experts are {config.expert_hidden} x {config.dim}, not multiples of 32; use width 16"
        )

    def width_of(tensor: Tensor) -> int:
        edge = tensor.kind in PROJECTIONS and at_edge(tensor.at, tensor.of)
        return widths[f"edge_{tensor.kind}" if edge else tensor.kind]

    def nbytes(tensor: Tensor) -> int:
        if tensor.kind in PROJECTIONS:
            return packed_bytes(tensor.shape, Packing((width_of(tensor),), group or GROUP))
        width = TRUNK_WIDTH if tensor.kind == "float32" else width_of(tensor)  # trunk_packing keeps float32 as it is
        return packed_bytes(tensor.shape, trunk_packing({tensor.name: tensor.shape}, width, GROUP)[tensor.name])

    def record(tensors: tuple[Tensor, ...]) -> int:
        chosen = tuple(width_of(tensor) for tensor in tensors if tensor.kind in PROJECTIONS)
        return record_bytes(config, chosen, group or GROUP, record_alignment(config))

    return _with_tables(config, _sizes(config, nbytes, record), widths["embedding"])


def mixed_sizes(config: ModelConfig, bits: float, trunk_width: int) -> Sizes:
    """The sizes of a bundle whose experts' widths are chosen for a mean of `bits` bits a weight, padding included.

    Which expert gets which width is not known yet: the largest record is assumed to have 8 bits.
    """

    def nbytes(tensor: Tensor) -> int:
        if tensor.kind in PROJECTIONS:
            return math.ceil(tensor.weights * bits / 8)
        return packed_bytes(tensor.shape, trunk_packing({tensor.name: tensor.shape}, trunk_width, GROUP)[tensor.name])

    sizes = _with_tables(config, _sizes(config, nbytes, lambda tensors: sum(map(nbytes, tensors))), trunk_width)
    group = largest_group(GROUP, config.dim, config.expert_hidden) or GROUP
    largest = record_bytes(config, (WIDEST,) * 3, group, record_alignment(config))
    return replace(sizes, slot_bytes=max(sizes.slot_bytes, largest))


def _with_tables(config: ModelConfig, sizes: Sizes, width: int) -> Sizes:
    """The sizes with those of the tables. width: of the embedding, whose packing tables have."""
    if not config.tables:
        return sizes
    nbytes = row_table_bytes(config, trunk_packing({"embedding": (1, config.dim)}, width, GROUP)["embedding"])
    part = Part("tables", sum(math.prod(shape) for shape in config.tables.values()), nbytes)
    return replace(sizes, parts=(*sizes.parts, part), table_bytes=nbytes)


def sizes_by_bits(config: ModelConfig, bits_of: Callable[[Tensor], float]) -> Sizes:
    """The sizes of a file in which a weight of each tensor takes bits_of(tensor) bits, everything included."""

    def nbytes(tensor: Tensor) -> int:
        return math.ceil(tensor.weights * bits_of(tensor) / 8)

    return _sizes(config, nbytes, lambda tensors: sum(map(nbytes, tensors)))


def at_edge(at: int, of: int) -> bool:
    """Whether layer `at` is in the first or last eighth of `of` layers."""
    return at < of // 8 or at >= of - of // 8


# ---- published mixes

# Bits a weight of the types of llama.cpp that occur below, scales included.
Q8_0, Q6_K, Q5_K, Q4_K, Q2_K = 8.5, 6.5625, 5.5, 4.5, 2.625
IQ4_XS, IQ3_S, IQ2_XXS, IQ1_M, IQ1_S = 4.25, 3.4375, 2.0625, 1.75, 1.5625


def collaborative_bits(tensor: Tensor) -> float:
    """Bits a weight in Collaborative Compression's file of DeepSeek-V3 (arXiv 2509.25689).

    The rule is that of the quantiser published with the paper (moe-quant/llama-quant.cpp of
    github.com/moxin-org/CC-MoE). We assume that the file type is IQ1_S, as the rule's comments say, and that kv_b is
    one matrix, as in the checkpoint; split in two, as newer converters write it, the file is 0.3 % larger. With 192 of
    256 experts it has 111.39e9 bytes = 103.74 GiB, 1.756 bits a weight; the paper says 103 GB.
    """
    more = _uses_more_bits(tensor.at, tensor.of)
    edge = at_edge(tensor.at, tensor.of)
    bits = {
        "gate": IQ1_M if edge else IQ1_S,
        "up": IQ1_M if edge else IQ1_S,
        "down": IQ2_XXS if edge else IQ1_M,
        "embedding": Q2_K,
        "head": Q5_K,
        "q_a": Q4_K,
        "q_b": Q2_K,
        "kv_a": Q4_K,
        "kv_b": Q4_K if tensor.at < tensor.of // 8 else Q2_K if more else IQ1_S,
        "o": IQ4_XS if more else IQ3_S,
        "dense.gate": Q4_K,
        "dense.up": Q4_K,
        "dense.down": Q6_K,
        "shared.gate": IQ4_XS if more else IQ3_S,
        "shared.up": IQ4_XS if more else IQ3_S,
        "shared.down": Q5_K if more else IQ4_XS,
    }
    if tensor.kind == "float32":
        return 32.0
    return bits.get(tensor.name, IQ1_S) if tensor.shape[-1] % 256 == 0 else Q8_0  # all but Q8_0 have blocks of 256


def _uses_more_bits(at: int, of: int) -> bool:
    """llama.cpp's choice of layers: the first and last eighth, and every third in between."""
    return at < of // 8 or at >= 7 * of // 8 or (at - of // 8) % 3 == 2


RECIPES = {"collaborative": ("deepseek_v3", collaborative_bits)}  # the architecture a mix is for, and its bits


# ---- the iteration over tensors that both share


def _sizes(config: ModelConfig, nbytes: Callable[[Tensor], int], record: Callable[[tuple[Tensor, ...]], int]) -> Sizes:
    weights, sums, slot_bytes, experts_bytes = Counter(), Counter(), 0, 0
    for tensor in _trunk_tensors(config):
        weights[tensor.kind] += tensor.weights
        sums[tensor.kind] += nbytes(tensor)
    trunk_bytes = sums.total()
    for at, layer in enumerate(config.moe_layers):
        place = (at, len(config.moe_layers))
        tensors = tuple(
            Tensor(name, name, shape, *place) for name, shape in zip(PROJECTIONS, config.expert_shapes, strict=True)
        )
        if config.expert_bias:
            tensors += (Tensor("float32", "output_bias", (sum(rows for rows, _ in config.expert_shapes),), *place),)
        experts, whole = config.experts_of(layer), record(tensors)
        for tensor in tensors:
            weights[tensor.kind] += experts * tensor.weights
            sums[tensor.kind] += experts * nbytes(tensor)
        sums["padding"] += experts * (whole - sum(map(nbytes, tensors)))
        slot_bytes, experts_bytes = max(slot_bytes, whole), experts_bytes + experts * whole
    parts = tuple(Part(name, weights[name], sums[name]) for name in PARTS if sums[name])
    return Sizes(parts, trunk_bytes, experts_bytes, slot_bytes)


def _trunk_tensors(config: ModelConfig) -> Iterator[Tensor]:
    shapes = trunk_shapes(config)
    names = [without_layer(name) for name in shapes]
    of, at = Counter(names), Counter()
    for name, shape in zip(names, shapes.values(), strict=True):
        yield Tensor(kind_of(name, shape), name, shape, at[name], of[name])
        at[name] += 1


def kind_of(name: str, shape: tuple[int, ...]) -> str:
    """Which of TRUNK_KINDS a tensor is, or `float32`. name: canonical, with or without its layer."""
    name = without_layer(name)
    return "float32" if trunk_packing({name: shape}, TRUNK_WIDTH, GROUP)[name].widths == (32,) else trunk_kind(name)
