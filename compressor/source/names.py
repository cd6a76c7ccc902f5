"""Mapping each canonical tensor to the checkpoint's tensor that contains it, by the naming of the model's family."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ...runtime.config import ModelConfig, trunk_shapes
from ...runtime.models.family import NAMES, Family, Layout
from ...runtime.tensorfile import Stored


@dataclass(frozen=True, slots=True)
class Source:
    """The source of a canonical tensor: a tensor of the checkpoint, or one expert's part of it."""

    name: str  # canonical: layers.3.q
    key: str  # the checkpoint's: model.layers.3.self_attn.q_proj.weight
    shape: tuple[int, ...]
    key_shape: tuple[int, ...]
    stored_shape: tuple[int, ...]  # the part that is read
    first_row: int = 0  # in the checkpoint's tensor, with the rows of all experts numbered consecutively
    first_column: int = 0  # in the part that is read, if it is transposed
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class Names:
    """The names of the tensors in one checkpoint."""

    prefix: str  # model. or, if it was saved without the part that has the head, nothing
    layers: str  # precedes a layer's number, prefix included: model.layers.
    head: str
    layout: Layout
    of_layer: Mapping[str, str]  # by canonical name within a layer
    stored_as: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, config: ModelConfig, family: Family, stored: Mapping[str, Stored]) -> "Names":
        """Find which of the family's spellings the stored tensors have."""
        prefixes = [prefix for prefix in family.prefixes if f"{prefix}embed_tokens.weight" in stored]
        prefix = prefixes[0] if prefixes else family.prefixes[0]
        head = next((name for name in family.heads if name in stored), family.heads[0])
        norm = f"0.{NAMES['attention_norm']}"
        lists = [f"{prefix}{name}." for name in family.layers]
        layers = next((name for name in lists if name + norm in stored), lists[0])
        layout = _layout(config, family.layouts, f"{layers}{config.moe_layers[0]}.", stored)
        return cls(prefix, layers, head, layout, {**NAMES, **family.names, **layout.names}, family.stored_as)


def sources(config: ModelConfig, names: Names) -> Iterator[Source]:
    """Yield the source of every tensor of the model."""
    outside = {"embedding": f"{names.prefix}embed_tokens.weight", "output_norm": f"{names.prefix}norm.weight"}
    outside |= {"output_norm_bias": f"{names.prefix}norm.bias", "head": names.head}
    outside["head_bias"] = f"{names.head.removesuffix('weight')}bias"
    for name, shape in trunk_shapes(config).items():
        _, layer, part = name.split(".", 2) if name.startswith("layers.") else ("", "", name)
        key = f"{names.layers}{layer}.{names.of_layer[part]}" if layer else outside[name]
        yield Source(name, key, shape, (*names.stored_as.get(part, ()), *shape), shape)
    for layer in config.moe_layers:
        for expert in range(config.experts):
            to, at = f"layers.{layer}.experts.{expert}", f"{names.layers}{layer}."
            yield from (_fused if not names.layout.up else _separate)(config, names.layout, to, at, expert)


def _separate(config: ModelConfig, layout: Layout, to: str, at: str, expert: int) -> Iterator[Source]:
    dim, hidden = config.dim, config.expert_hidden
    for part, name, shape in (
        ("gate", layout.gate, (hidden, dim)),
        ("up", layout.up, (hidden, dim)),
        ("down", layout.down, (dim, hidden)),
    ):
        yield Source(f"{to}.{part}", at + name.format(expert), shape, shape, shape)


def _fused(config: ModelConfig, layout: Layout, to: str, at: str, expert: int) -> Iterator[Source]:
    dim, hidden = config.dim, config.expert_hidden
    gate_up, down = _fused_shapes(config, layout)
    for part, key, key_shape, shape, first in (
        ("gate", layout.gate, gate_up, (hidden, dim), 0),
        ("up", layout.gate, gate_up, (hidden, dim), hidden),
        ("down", layout.down, down, (dim, hidden), 0),
    ):
        if layout.transposed:
            rows = expert * key_shape[1]
            yield Source(f"{to}.{part}", at + key, shape, key_shape, key_shape[1:], rows, first, transposed=True)
        else:
            yield Source(f"{to}.{part}", at + key, shape, key_shape, shape, expert * key_shape[1] + first)


def _fused_shapes(config: ModelConfig, layout: Layout) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of the tensor with all experts' gate and up matrices, and of the tensor with their down matrices."""
    experts, dim, hidden = config.experts, config.dim, config.expert_hidden
    if layout.transposed:
        return (experts, dim, 2 * hidden), (experts, hidden, dim)
    return (experts, 2 * hidden, dim), (experts, dim, hidden)


def _layout(config: ModelConfig, layouts: tuple[Layout, ...], layer: str, stored: Mapping[str, Stored]) -> Layout:
    """The first layout that matches a layer's tensors by name and, if layouts share names, by shape."""
    named = []
    for layout in layouts:
        key = layer + layout.gate.format(0)
        found = stored.get(key) or stored.get(f"{key}_packed")
        if found is None:
            continue
        if layout.up or found.shape == _fused_shapes(config, layout)[0]:
            return layout
        named.append(layout)
    return named[0] if named else layouts[0]
