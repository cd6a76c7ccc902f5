"""Describing a bundle as one JSON object."""

from collections import Counter

from .bundle_table import PROVENANCE, TABLE_FILE, Reader
from .config import trunk_kind


def widths_name(widths: tuple[int, ...]) -> str:
    """The name of an expert's widths, of gate, if it has one, up and down: "2" if they agree, else "2/2/3"."""
    return str(widths[0]) if len(set(widths)) == 1 else "/".join(map(str, widths))


def describe_bundle(bundle) -> dict:
    """The JSON object that `inspect` shows for a Bundle.

    Raises ValueError if bundle.json's entries about calibration, method or certificate are malformed.
    """
    config, extra = bundle.config, bundle.table
    moe_layers = [layer for layer in config.moe_layers if layer in bundle.layers]
    Reader(bundle.path / TABLE_FILE).check(extra, PROVENANCE, "")
    per_layer, per_group = {layer: Counter() for layer in moe_layers}, {}
    for expert in bundle.experts.values():
        per_layer[expert.layer][expert.widths] += 1
        per_group.setdefault(expert.group, Counter())[expert.widths] += 1
    total = sum(per_layer.values(), Counter())
    every = range(config.experts)
    trunk_widths = {}
    for tensor in bundle.trunk:
        if tensor.encoding.codec != "float32":
            trunk_widths.setdefault(trunk_kind(tensor.name), set()).add(tensor.width)
    trunk_widths = {kind: sorted(widths) for kind, widths in trunk_widths.items()}

    def named(counts: Counter) -> dict[str, int]:
        return {widths_name(widths[not config.gated :]): counts[widths] for widths in sorted(counts)}

    return {
        "path": str(bundle.path),
        "part": bundle.part and {"number": bundle.part.number + 1, "of": bundle.part.count, "text": str(bundle.part)},
        "tool": extra.get("tool"),
        "architecture": config.architecture,
        "layers": config.layer_count,
        "dim": config.dim,
        "heads": config.attention.heads,
        "kv_heads": config.attention.kv_heads,
        "head_dim": config.attention.head_dim,
        "vocab": config.vocab,
        "context": config.context,
        "experts": config.experts,
        "top_k": config.top_k,
        "expert_hidden": config.expert_hidden,
        "shared_hidden": config.shared_hidden,
        "bundle_bytes": bundle.nbytes,
        "trunk_bytes": bundle.trunk_bytes,
        "expert_bytes": bundle.expert_bytes,
        "table_bytes": bundle.table_bytes,
        "bits_per_weight": bundle.bits_per_weight,
        "trunk_widths": trunk_widths,
        "groups": sorted(filter(None, per_group)),
        "widths": named(total),
        "widths_by_group": {str(group): named(per_group[group]) for group in sorted(per_group)},
        "widths_by_layer": {str(layer): named(counts) for layer, counts in per_layer.items()},
        "experts_by_layer": {str(layer): config.experts_of(layer) for layer in moe_layers},
        "top_k_by_layer": {str(layer): config.top_k_of(layer) for layer in moe_layers},
        "dropped": sum(config.experts - config.experts_of(layer) for layer in moe_layers),
        "dropped_by_layer": {
            str(layer): sorted(set(every) - set(config.kept[layer])) if config.kept else [] for layer in moe_layers
        },
        "method": extra.get("method"),
        "calibration": extra.get("calibration"),
        "certificate": extra.get("certificate"),
        "pruning": bundle.pruning and bundle.pruning.about(),
        "unlisted_files": list(bundle.unlisted),
    }
