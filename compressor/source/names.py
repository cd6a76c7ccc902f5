"""Mapping each canonical tensor to the checkpoint's tensor that contains it, by the naming of the model's family."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from ...runtime.codecs import PROJECTIONS
from ...runtime.config import ModelConfig, trunk_shapes, without_layer
from ...runtime.layers.latent import LatentAttention
from ...runtime.models.family import NAMES, Family, Layout, Packed, Rows
from ...runtime.tensorfile import Stored

KEYS_OF_LATENT, VALUES_OF_LATENT = "self_attn.embed_q.weight", "self_attn.unembed_out.weight"  # mlx-lm's kv_b


@dataclass(frozen=True, slots=True)
class Source:
    """The source of a canonical tensor: a tensor of the checkpoint, or one expert's part of it."""

    name: str  # canonical: layers.3.q
    key: str  # the checkpoint's: model.layers.3.self_attn.q_proj.weight
    shape: tuple[int, ...]
    key_shape: tuple[int, ...]
    stored_shape: tuple[int, ...]  # the part that is read
    first_row: int = 0  # in the checkpoint's tensor, with the rows of all experts numbered consecutively
    transposed: bool = False  # the part that is read has the rows as columns
    rows: slice = field(default_factory=lambda: slice(None))  # of the part that is read, once it is transposed
    pieces: Rows = ()  # the runs of rows that it consists of, if it is not one
    convert: Callable[[np.ndarray], np.ndarray] | None = None  # what is stored -> what is used
    second: tuple[str, tuple[int, ...]] | None = None  # name and shape of another tensor that has a part of it
    join: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None  # the rows of both -> what is used
    integers: bool = False  # stored as whole numbers


@dataclass(frozen=True, slots=True)
class Names:
    """The names of the tensors in one checkpoint."""

    prefix: str  # model. or, if it was saved without the part that has the head, nothing
    layers: str  # precedes a layer's number, prefix included: model.layers.
    head: str
    layout: Layout
    of_tensors: Mapping[str, str]  # by canonical name, within a layer or outside of layers
    family: Family
    packed: tuple[Packed, ...]  # of the family's, those that the checkpoint has
    mlx: bool  # mlx-lm saved it
    splits_latent: bool  # kv_b is in two tensors, as mlx-lm has it
    conversions: Mapping[str, Callable[[np.ndarray], np.ndarray]]  # of stored values, by canonical name

    @classmethod
    def of(cls, config: ModelConfig, family: Family, stored: Mapping[str, Stored]) -> "Names":
        """Find which of the family's spellings the stored tensors have, or whether they have mlx-lm's."""
        inner = ("language_model.",) if family.text else ()
        prefixes = (*family.prefixes, *(f"{one}model." for one in inner))
        its_names = {**NAMES, **family.names}
        spellings = (its_names, *({**its_names, **layout.names} for layout in family.layouts))

        def has(start: str, part: str) -> bool:
            return any(f"{start}{spelling[part]}" in stored for spelling in spellings)

        prefixes = [prefix for prefix in prefixes if has(prefix, "embedding")]
        prefix = prefixes[0] if prefixes else family.prefixes[0]
        heads = (*family.heads, *(f"{one}lm_head.weight" for one in inner))
        head = next((name for name in heads if name in stored), heads[0])
        lists = [f"{prefix}{name}." for name in family.layers]
        layers = next((name for name in lists if has(f"{name}0.", "attention_norm")), lists[0])
        fits = [one for one in family.layouts if f"{prefix}{(its_names | one.names)['embedding']}" in stored]
        stacked = tuple(_stacked_layouts(family.layouts))
        layout = _layout(config, (*(fits or family.layouts), *stacked), f"{layers}{config.moe_layers[0]}.", stored)
        packed = tuple(one for one in family.packed if _has(one, layers, config, stored))
        mlx = layout in stacked
        its_names |= {**layout.names, **(family.mlx_names if mlx else {})}
        # mlx-lm stores the weights of norms that are used.
        changes = {part: its for part, its in family.conversions.items() if not (mlx and part.endswith("norm"))}
        splits_latent = f"{layers}0.{KEYS_OF_LATENT}" in stored
        return cls(prefix, layers, head, layout, its_names, family, packed, mlx, splits_latent, changes)

    def key_of(self, name: str) -> str:
        """The checkpoint's name of a tensor of a layer that is stored by itself. name: canonical."""
        return f"{self.layers}{name.split('.')[1]}.{self.of_tensors[without_layer(name)]}"

    def packed_at(self, config: ModelConfig, layer: int) -> dict[str, tuple[str, Rows, int]]:
        """The matrices of a layer that are stored together: the tensor's name, their rows, and all its rows."""
        found = {}
        for one in self.packed:
            rows = one.rows(config.layers[layer].attention)
            total = sum(count for runs in rows.values() for _, count in runs)
            found |= {part: (one.name, runs, total) for part, runs in rows.items()}
        return found


def sources(config: ModelConfig, names: Names) -> Iterator[Source]:
    """Yield the source of every tensor of the model."""
    heads = {"head": names.head, "head_bias": f"{names.head.removesuffix('weight')}bias"}
    packed = [names.packed_at(config, layer) for layer in range(config.layer_count)]
    for name, shape in trunk_shapes(config).items():
        layer, part = (int(name.split(".")[1]), without_layer(name)) if name.startswith("layers.") else (None, name)
        key_shape, stored_shape, rows, convert = shape, shape, (), names.conversions.get(part)
        if part == "kv_b" and names.splits_latent:
            yield _halves(name, f"{names.layers}{layer}.", config.layers[layer].attention)
            continue
        if layer is None:
            key = heads.get(name) or f"{names.prefix}{names.of_tensors[name]}"
        elif part in packed[layer]:
            its, rows, total = packed[layer][part]
            key, key_shape = f"{names.layers}{layer}.{its}", (total, *shape[1:])
        else:
            key = f"{names.layers}{layer}.{names.of_tensors[part]}"
        if change := names.family.stored_as.get(part):
            key_shape = change(shape)
            if names.mlx:  # has a convolution's inputs last
                key_shape = (key_shape[0], *key_shape[2:], key_shape[1])
            stored_shape = tuple(size for size in key_shape if size > 1)
        integers = part == "router_table"
        convert = partial(_checked, key, config.experts) if integers else convert
        yield Source(name, key, shape, key_shape, stored_shape, pieces=rows, convert=convert, integers=integers)
    for layer in config.moe_layers:
        for expert in range(config.experts):
            to, at = f"layers.{layer}.experts.{expert}", f"{names.layers}{layer}."
            yield from _of_expert(names.layout)(config, names.layout, to, at, expert)
            if any(names.layout.biases):
                yield from _biases(config, names.layout, to, at, expert)


def _checked(key: str, experts: int, table: np.ndarray) -> np.ndarray:
    """A table of the experts of each token, (vocab, top_k). Raises ValueError unless a row has different experts."""
    ordered = np.sort(table, axis=-1)
    if not (ordered[:, 0].min() >= 0 and ordered[:, -1].max() < experts):
        raise ValueError(f"tensor {key} has experts outside 0 to {experts - 1}; download the checkpoint again")
    if (twice := np.flatnonzero((np.diff(ordered, axis=-1) == 0).any(axis=-1))).size:
        raise ValueError(f"tensor {key} has an expert twice for token {twice[0]}; download the checkpoint again")
    return table


def _halves(name: str, at: str, its: LatentAttention) -> Source:
    """What makes keys of the latent, transposed, is one tensor, and what makes values of it another."""
    keys, values = (its.heads, its.kv_rank, its.nope_dim), (its.heads, its.value_dim, its.kv_rank)

    def join(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        parts = [first.reshape(keys).swapaxes(1, 2), second.reshape(values)]
        return np.concatenate(parts, axis=1).reshape(-1, its.kv_rank)

    shape, rows = (its.heads * (its.nope_dim + its.value_dim), its.kv_rank), (its.heads * its.kv_rank, its.nope_dim)
    return Source(name, at + KEYS_OF_LATENT, shape, keys, rows, second=(at + VALUES_OF_LATENT, values), join=join)


def _of_expert(layout: Layout) -> Callable[..., Iterator[Source]]:
    """The function that yields the sources of one expert."""
    return _fused if not layout.up else _separate if "{}" in layout.up else _stacked


def _separate(config: ModelConfig, layout: Layout, to: str, at: str, expert: int) -> Iterator[Source]:
    for part, name, shape in _parts(config, layout):
        yield Source(f"{to}.{part}", at + name.format(expert), shape, shape, shape)


def _stacked(config: ModelConfig, layout: Layout, to: str, at: str, expert: int) -> Iterator[Source]:
    for part, name, shape in _parts(config, layout):
        yield Source(f"{to}.{part}", at + name, shape, (config.experts, *shape), shape, expert * shape[0])


def _parts(config: ModelConfig, layout: Layout) -> tuple[tuple[str, str, tuple[int, int]], ...]:
    """An expert's matrices: part, name and shape."""
    names = (layout.gate, layout.up, layout.down)
    parts = tuple(zip(PROJECTIONS, names, config.expert_shapes, strict=True))
    return parts if config.gated else parts[1:]


def _fused(config: ModelConfig, layout: Layout, to: str, at: str, expert: int) -> Iterator[Source]:
    dim, hidden = config.dim, config.expert_hidden
    (gate_up, down), gate_rows, up_rows = _fused_shapes(config, layout), *_shares(hidden, layout)
    for part, key, key_shape, shape, rows in (
        ("gate", layout.gate, gate_up, (hidden, dim), gate_rows),
        ("up", layout.gate, gate_up, (hidden, dim), up_rows),
        ("down", layout.down, down, (dim, hidden), slice(0, dim)),
    ):
        name, first = f"{to}.{part}", expert * key_shape[1]
        if layout.transposed or rows.step:  # all of the expert is read
            yield Source(name, at + key, shape, key_shape, key_shape[1:], first, layout.transposed, rows)
        else:
            yield Source(name, at + key, shape, key_shape, shape, first + rows.start)


def _biases(config: ModelConfig, layout: Layout, to: str, at: str, expert: int) -> Iterator[Source]:
    dim, hidden = config.dim, config.expert_hidden
    if layout.up:
        for part, name, (count, _) in _parts(config, layout):
            key = f"{at}{name.removesuffix('weight')}bias"
            yield Source(f"{to}.{part}_bias", key, (count,), (config.experts, count), (count,), expert)
        return
    gate_rows, up_rows = _shares(hidden, layout)
    gate_up, down = layout.biases
    for part, key, count, of, rows in (
        ("gate", gate_up, hidden, 2 * hidden, gate_rows),
        ("up", gate_up, hidden, 2 * hidden, up_rows),
        ("down", down, dim, dim, slice(0, dim)),
    ):
        yield Source(f"{to}.{part}_bias", at + key, (count,), (config.experts, of), (of,), expert, rows=rows)


def _shares(hidden: int, layout: Layout) -> tuple[slice, slice]:
    """The rows of gate and of up in an expert's fused matrix."""
    if layout.interleaved:
        return slice(0, 2 * hidden, 2), slice(1, 2 * hidden, 2)
    return slice(0, hidden), slice(hidden, 2 * hidden)


def _fused_shapes(config: ModelConfig, layout: Layout) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of the tensor with all experts' gate and up matrices, and of the tensor with their down matrices."""
    experts, dim, hidden = config.experts, config.dim, config.expert_hidden
    if layout.transposed:
        return (experts, dim, 2 * hidden), (experts, hidden, dim)
    return (experts, 2 * hidden, dim), (experts, dim, hidden)


def _has(packed: Packed, layers: str, config: ModelConfig, stored: Mapping[str, Stored]) -> bool:
    """Whether the first layer that could have a packed tensor has it."""
    of = (layer for layer in range(config.layer_count) if packed.rows(config.layers[layer].attention))
    key = f"{layers}{next(of, 0)}.{packed.name}"
    return key in stored or f"{key}_packed" in stored


def _stacked_layouts(layouts: tuple[Layout, ...]) -> Iterator[Layout]:
    """The layouts of mlx-lm, which has a tensor for the gates of all experts of a layer, one for ups, one for downs."""
    for layout in layouts:
        block = layout.first.partition(".")[0]
        if not layout.gate:
            up, down = (f"{block}.switch_mlp.{part}.weight" for part in ("fc1", "fc2"))
            yield replace(layout, up=up, down=down)
            continue
        for path in (f"{block}.switch_mlp", f"{block}.switch_glu", f"{block}.experts"):
            gate, up, down = (f"{path}.{part}_proj.weight" for part in PROJECTIONS)
            yield replace(layout, gate=gate, up=up, down=down, transposed=False, interleaved=False)


def _layout(config: ModelConfig, layouts: tuple[Layout, ...], layer: str, stored: Mapping[str, Stored]) -> Layout:
    """The first layout that matches a layer's tensors by name and, if layouts share names, by shape."""
    named = []
    for layout in layouts:
        key = layer + layout.first.format(0)
        found = stored.get(key) or stored.get(f"{key}_packed")
        if found is None:
            continue
        if layout.up or found.shape == _fused_shapes(config, layout)[0]:
            return layout
        named.append(layout)
    return named[0] if named else layouts[0]
