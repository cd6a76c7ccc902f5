"""The model in a GGUF file: its config.json, and its tensors under the names of its family.

What is beside the file, a config.json or a tokenizer.json, replaces what the metadata says.
"""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from ...runtime.bundle import COPIED
from ...runtime.codecs import PROJECTIONS
from ...runtime.config import ModelConfig
from ...runtime.models.family import NAMES, Family, Layout
from ...runtime.tensorfile import Stored
from . import gguf_tokenizer
from .gguf_architectures import ARCHITECTURES, USUAL_KEYS, USUAL_NAMES, USUAL_SHAPES, Architecture, Convert
from .gguf_file import GgufFile, read_gguf
from .gguf_keys import rope_scaling

ROPE_FACTORS = "rope_f"  # begins the names of tensors that divide RoPE's angles
FUSED = "ffn_gate_up_exps"


@contextmanager
def unpacked(path: Path) -> Iterator[tuple[Path, GgufFile]]:
    """A temporary directory with the small files that a checkpoint has, made from the metadata of a GGUF file, or as
    they are beside it."""
    file = read_gguf(path)
    with tempfile.TemporaryDirectory(prefix="edge-moe-gguf-") as name:
        directory = Path(name)
        beside = {name: path.parent / name for name in COPIED if (path.parent / name).is_file()}
        made = {"config.json": lambda: config(file)} if "config.json" not in beside else {}
        if "tokenizer.json" not in beside:
            beside = {name: one for name, one in beside.items() if not name.startswith("tokenizer")}
            made |= gguf_tokenizer.files(file.fields)
        for name, source in beside.items():
            (directory / name).write_bytes(source.read_bytes())
        for name, content in made.items():
            (directory / name).write_text(json.dumps(content()))
        yield directory, file


def architecture(file: GgufFile) -> Architecture:
    """Raises ValueError for one that is not supported."""
    found = ARCHITECTURES.get(file.architecture)
    if found is None or not file.value("expert_count"):
        dense = " without experts" if found else ""
        raise ValueError(
            f"{file.path}: GGUF architecture {file.architecture!r}{dense} is not supported; supported are "
            f"{', '.join(ARCHITECTURES)}; for others use the checkpoint in safetensors format"
        )
    return found


def config(file: GgufFile) -> dict:
    """The model's config.json."""
    its = architecture(file)
    factors = [name for name in file.tensors if name.startswith(ROPE_FACTORS)]
    if factors and not its.rope_factors:
        raise ValueError(f"{file.path}: tensor {factors[0]} (rescaled RoPE frequencies) is not supported")
    found = dict(its.always)
    for key, to in {**USUAL_KEYS, **its.keys}.items():
        if (value := file.value(key)) is not None:
            found[to] = _of_all_layers(value)
    found |= {"model_type": its.model_type, "num_hidden_layers": file.layers, "hidden_act": "silu"}
    if (embedding := file.tensors.get("token_embd.weight")) is not None:
        found["vocab_size"] = embedding.shape[0]
    found["tie_word_embeddings"] = "output.weight" not in file.tensors
    found["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    found["use_qk_norm"] = "blk.0.attn_q_norm.weight" in file.tensors
    experts = next((one for name, one in file.tensors.items() if name.endswith(".ffn_gate_exps.weight")), None)
    if found.get("moe_intermediate_size") is None and experts is not None:  # older files
        found["moe_intermediate_size"] = experts.shape[1]
    of_layers = range(file.layers)
    found["mlp_only_layers"] = [layer for layer in of_layers if f"blk.{layer}.ffn_gate.weight" in file.tensors]
    found["rope_scaling"] = rope_scaling(file, its.rope_scaling)
    found |= {f"{name}_token_id": file.fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
    found |= its.more(file)
    return {key: value for key, value in found.items() if value is not None or key in its.always}


def stored(file: GgufFile, family: Family) -> dict[str, Stored]:
    """The tensors under the names of the family, with the experts of a layer stacked, as mlx-lm has them, or with their
    gates and ups in one tensor, as transformers has them."""
    its, layout = architecture(file), _layout(file, family)
    of_family = {**NAMES, **family.names, **layout.names, **({} if layout.up == "" else family.mlx_names)}
    parts = zip(PROJECTIONS, (layout.gate, layout.up, layout.down), strict=True)
    experts = {f"ffn_{part}_exps": of for part, of in parts if of} | {FUSED: layout.gate}
    prefix, found = family.prefixes[0], {}
    for name, tensor in file.tensors.items():
        if its.rope_factors and name.startswith(ROPE_FACTORS):
            continue
        if name.endswith("attn_kv_b.weight") and name.replace("kv_b", "k_b") in file.tensors:  # the same, in two ways
            continue
        part, _, end = name.rpartition(".")
        at = ""
        if name.startswith("blk.") and name.count(".") > 1:
            _, layer, part = name.split(".", 2)
            at, (part, _, end) = f"{family.layers[0]}.{layer}.", part.rpartition(".")
            part, end = (part, end) if part else (end, "")  # a name without an end
        canonical = _canonical(its, part, end)
        if name == "output.weight":
            key = family.heads[0]
        elif canonical is None and part in experts:
            of = experts[part]
            key = f"{prefix}{at}{of}" if end == "weight" else f"{prefix}{at}{of.removesuffix('weight')}{end}"
        elif canonical is None:
            key = f"{prefix}{at}{part}.{end}" if at else name  # refused where it is in a layer
        else:
            key = f"{prefix}{at}{of_family.get(canonical, canonical)}"
            if (change := {**USUAL_SHAPES, **its.shapes}.get(canonical)) is not None:
                tensor = replace(tensor, shape=change(tensor.shape))
        found[key] = tensor
    return found


def conversions(file: GgufFile, config: ModelConfig, family: Family) -> dict[str, Convert]:
    """What makes the weights of stored values, by canonical name. The weights of norms are stored as they are used."""
    its = architecture(file)
    found = {part: one for part, one in family.conversions.items() if not part.endswith("norm")}
    if its.rows_paired:
        half = config.attention.head_dim // 2

        def unpaired(weights):
            pairs = weights.reshape(-1, half, 2, *weights.shape[1:])
            return pairs.swapaxes(1, 2).reshape(weights.shape)

        found |= dict.fromkeys(("q", "k", "q_bias", "k_bias"), unpaired)
    return found | its.conversions(config)


def _of_all_layers(value):
    """The one number that a list by layer has besides 0, as for layers without the thing, or the value itself."""
    others = set(value) - {0} if isinstance(value, list) else ()
    return others.pop() if len(others) == 1 else value


def _canonical(its: Architecture, part: str, end: str) -> str | None:
    """The canonical name of a tensor, or the family's own of one with several in it; None if it is not known."""
    for names in (its.names, USUAL_NAMES):
        if (found := names.get(f"{part}.{end}")) is not None:
            return found
        if (found := names.get(part)) is not None and end in ("weight", "bias", ""):
            return f"{found}_bias" if end == "bias" else found
    return None


def _layout(file: GgufFile, family: Family) -> Layout:
    """How the experts are stored: stacked, or with gates and ups in one tensor."""
    first = family.layouts[0]
    if any(name.endswith(f".{FUSED}.weight") for name in file.tensors):
        plain = (one for one in family.layouts if not one.up and not one.transposed and not one.interleaved)
        if (fused := next(plain, None)) is None:
            raise ValueError(
                f"{file.path}: tensor {FUSED} (gates and ups in one) is not supported for {family.model_type}"
            )
        return fused
    path = f"{first.first.partition('.')[0]}.switch_mlp"
    parts = ("gate_proj", "up_proj", "down_proj") if first.gate else ("", "fc1", "fc2")
    return replace(first, **dict(zip(PROJECTIONS, (part and f"{path}.{part}.weight" for part in parts), strict=True)))
