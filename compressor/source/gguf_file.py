"""Reading GGUF files: a model's config.json from their metadata, and their tensors under the names of its family.

The package gguf reads headers and decodes blocks. llama.cpp's graphs have some choices that the metadata lacks, such as
whether routing weights are renormalised: those are in ARCHITECTURES. What is beside the file, a config.json or a
tokenizer.json, replaces what the metadata says.
"""

import json
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ...runtime.bundle import COPIED
from ...runtime.config import ModelConfig
from ...runtime.model_path import gguf_in, is_gguf
from ...runtime.models.family import NAMES, Family
from ...runtime.tensorfile import Stored
from . import codes, gguf_tokenizer

SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
OUTSIDE = {"token_embd": "embed_tokens.weight", "output_norm": "norm.weight"}  # output is the family's head
IN_LAYER = {  # canonical names of a layer's tensors, by GGUF's
    "attn_norm": "attention_norm",
    "ffn_norm": "mlp_norm",
    "post_attention_norm": "mlp_norm",
    **{f"attn_{part}": part for part in "qkv"},
    "attn_output": "o",
    "attn_sinks": "sinks",
    **{f"attn_{part}_norm": f"{part}_norm" for part in "qk"},
    "ffn_gate_inp": "router",
    "exp_probs_b": "router",
    **{f"ffn_{part}": f"dense.{part}" for part in ("gate", "up", "down")},
    **{f"ffn_{part}_shexp": f"shared.{part}" for part in ("gate", "up", "down")},
    "ffn_gate_inp_shexp": "shared_router",
}
USUAL_KEYS = {  # of config.json, by those of the metadata
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.clamp_kqv": "clip_qkv",
    "rope.freq_base": "rope_theta",
    "context_length": "max_position_embeddings",
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}


@dataclass(frozen=True, slots=True)
class Architecture:
    """One `general.architecture`: the model_type, keys of config.json that are always the same, and further ones."""

    model_type: str
    always: dict[str, object]
    keys: dict[str, str] = field(default_factory=dict)
    rope_scaling: dict[str, object] = field(default_factory=dict)  # what YaRN's parameters always are
    rows_paired: bool = False  # the two rows of each pair that RoPE rotates are next to each other in attn_q and attn_k


ALL_OF_ONE_SIZE = {"expert_count": "num_local_experts", "expert_feed_forward_length": "intermediate_size"}
ARCHITECTURES = {
    "qwen3moe": Architecture("qwen3_moe", {"norm_topk_prob": True, "decoder_sparse_step": 1}),
    "qwen2moe": Architecture("qwen2_moe", {"norm_topk_prob": False, "decoder_sparse_step": 1, "qkv_bias": True}),
    "olmoe": Architecture("olmoe", {"norm_topk_prob": False}),
    "llama": Architecture("mixtral", {}, {"expert_count": "num_local_experts"}, rows_paired=True),
    "glm4moe": Architecture(
        "glm4_moe",
        {"n_group": 1, "topk_group": 1, "partial_rotary_factor": 0.5},
        {
            "expert_count": "n_routed_experts",
            "expert_shared_count": "n_shared_experts",
            "leading_dense_block_count": "first_k_dense_replace",
            "expert_weights_scale": "routed_scaling_factor",
            "expert_weights_norm": "norm_topk_prob",
        },
    ),
    "minimax-m2": Architecture("minimax_m2", {}, {**ALL_OF_ONE_SIZE, "rope.dimension_count": "rotary_dim"}),
    "gpt-oss": Architecture(
        *("gpt_oss", {}, {**ALL_OF_ONE_SIZE, "attention.sliding_window": "sliding_window"}),
        rope_scaling={"beta_fast": 32.0, "beta_slow": 1.0, "truncate": False},
    ),
}


@dataclass(frozen=True, slots=True)
class GgufFile:
    """The metadata and the tensors of a GGUF file, or of all files of a split one."""

    path: Path
    fields: dict[str, object]
    tensors: dict[str, Stored]  # by GGUF's names

    @property
    def architecture(self) -> Architecture:
        """Raises ValueError for one that is not supported."""
        name = self.fields.get("general.architecture")
        found = ARCHITECTURES.get(name) if isinstance(name, str) else None
        if found is None or (name == "llama" and not self._value("expert_count")):
            dense = " without experts" if found else ""
            raise ValueError(
                f"{self.path}: GGUF architecture {name!r}{dense} is not supported; supported are "
                f"{', '.join(ARCHITECTURES)}; for others use the checkpoint in safetensors format"
            )
        return found

    def _value(self, key: str):
        return self.fields.get(f"{self.fields['general.architecture']}.{key}")

    def config(self) -> dict:
        """The model's config.json."""
        its = self.architecture
        if scaled := [name for name in self.tensors if name.startswith("rope_f")]:
            raise ValueError(f"{self.path}: tensor {scaled[0]} (rescaled RoPE frequencies) is not supported")
        found = {}
        for key, to in {**USUAL_KEYS, **its.keys}.items():
            if (value := self._value(key)) is not None:
                found[to] = value
        found |= {key: float(f"{value:.7g}") for key, value in found.items() if isinstance(value, float)}  # was float32
        layers = (self._value("block_count") or 0) - (self._value("nextn_predict_layers") or 0)
        found |= its.always | {"model_type": its.model_type, "num_hidden_layers": layers, "hidden_act": "silu"}
        if (embedding := self.tensors.get("token_embd.weight")) is not None:
            found["vocab_size"] = embedding.shape[0]
        found["tie_word_embeddings"] = "output.weight" not in self.tensors
        found["attention_bias"] = "blk.0.attn_q.bias" in self.tensors
        found["use_qk_norm"] = "blk.0.attn_q_norm.weight" in self.tensors
        experts = next((one for name, one in self.tensors.items() if name.endswith(".ffn_gate_exps.weight")), None)
        if found.get("moe_intermediate_size") is None and experts is not None:  # older files
            found["moe_intermediate_size"] = experts.shape[1]
        found["mlp_only_layers"] = [layer for layer in range(layers) if f"blk.{layer}.ffn_gate.weight" in self.tensors]
        found["rope_scaling"] = self._rope_scaling()
        found |= {f"{name}_token_id": self.fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
        return {key: value for key, value in found.items() if value is not None}

    def _rope_scaling(self) -> dict | None:
        kind, factor = self._value("rope.scaling.type"), self._value("rope.scaling.factor")
        if kind in (None, "none") or factor is None:
            return None
        original = self._value("rope.scaling.original_context_length")
        scaling = {"rope_type": kind, "factor": factor, "original_max_position_embeddings": original}
        scaling |= self.architecture.rope_scaling
        return {key: value for key, value in scaling.items() if value is not None}

    def stored(self, family: Family) -> dict[str, Stored]:
        """The tensors under the names of the family, with the experts of a layer stacked, as mlx-lm has them."""
        layout, prefix = family.layouts[0], family.prefixes[0]
        of_layer = {**NAMES, **family.names, **layout.names}
        experts = f"{layout.gate.partition('.')[0]}.switch_mlp"
        found = {}
        for name, tensor in self.tensors.items():
            part, _, end = name.rpartition(".")
            key = f"{prefix}{OUTSIDE[part]}" if part in OUTSIDE else family.heads[0] if part == "output" else name
            if name.startswith("blk."):
                _, layer, part = part.split(".", 2)
                if part.endswith("_exps"):
                    inner = f"{experts}.{part.removeprefix('ffn_').removesuffix('_exps')}_proj.{end}"
                else:
                    canonical = IN_LAYER.get(part, part) + ("_bias" if end == "bias" else "")
                    if part == "ffn_gate_inp" and end == "bias":  # exp_probs_b is the bias that chooses
                        canonical = "router_logit_bias"
                    inner = of_layer.get(canonical, f"{part}.{end}")
                    if canonical == "shared_router" and len(tensor.shape) == 1:
                        tensor = Stored(tensor.path, tensor.dtype, (1, *tensor.shape), tensor.offset, tensor.nbytes)
                key = f"{prefix}{family.layers[0]}.{layer}.{inner}"
            found[key] = tensor
        return found

    def conversions(self, config: ModelConfig) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
        """What makes the weights of stored values, by canonical name, for those that the format orders otherwise."""
        if not self.architecture.rows_paired:
            return {}
        half = config.attention.head_dim // 2

        def unpaired(weights: np.ndarray) -> np.ndarray:
            pairs = weights.reshape(-1, half, 2, weights.shape[1])
            return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(weights.shape)

        return {"q": unpaired, "k": unpaired}


def read_gguf(path: Path) -> GgufFile:
    """Read the header of a GGUF file, and of the other files of a split one.

    Raises FileNotFoundError for a file that is missing, ValueError for one that is damaged, and another OSError without
    the package gguf.
    """
    fields: dict[str, object] = {}
    tensors: dict[str, Stored] = {}
    for number, file in enumerate(_files(path)):
        reader = _reader(file)
        if number == 0:
            fields = {name: its.contents() for name, its in reader.fields.items()}
        for tensor in reader.tensors:
            kind, shape = tensor.tensor_type.name, tuple(int(size) for size in reversed(tensor.shape))
            if tensor.data_offset + tensor.n_bytes > file.stat().st_size:
                raise ValueError(f"{file}: tensor {tensor.name} goes beyond the end; download it again")
            dtype = kind if kind in ("F32", "F16", "BF16") else codes.GGML + kind
            tensors[tensor.name] = Stored(file, dtype, shape, int(tensor.data_offset), int(tensor.n_bytes))
    return GgufFile(path, fields, tensors)


@contextmanager
def unpacked(path: Path) -> Iterator[tuple[Path, GgufFile]]:
    """A temporary directory with the small files that a checkpoint has, made from the metadata of a GGUF file, or as
    they are beside it."""
    file = read_gguf(path)
    with tempfile.TemporaryDirectory(prefix="edge-moe-gguf-") as name:
        directory = Path(name)
        beside = {name: path.parent / name for name in COPIED if (path.parent / name).is_file()}
        made = {"config.json": lambda: file.config()} if "config.json" not in beside else {}
        if "tokenizer.json" not in beside:
            beside = {name: one for name, one in beside.items() if not name.startswith("tokenizer")}
            made |= gguf_tokenizer.files(file.fields)
        for name, source in beside.items():
            (directory / name).write_bytes(source.read_bytes())
        for name, content in made.items():
            (directory / name).write_text(json.dumps(content()))
        yield directory, file


def find_gguf(path: Path) -> Path | None:
    """The GGUF file that a path names: the file itself, or the only model of a directory without safetensors."""
    return path if is_gguf(path) else gguf_in(path) if path.is_dir() else None


def _files(path: Path) -> list[Path]:
    """All files of a split model, of which `path` is one, or the file itself."""
    if not (name := SHARD.fullmatch(path.name)):
        return [path]
    count = int(name[3])
    files = [path.with_name(f"{name[1]}-{number:05d}-of-{name[3]}.gguf") for number in range(1, count + 1)]
    if absent := [file for file in files if not file.is_file()]:
        raise FileNotFoundError(f"{absent[0]}: no such file, one of the {count} of {path}; download it")
    return files


def _reader(path: Path):
    try:
        from gguf import GGUFReader
    except ImportError:
        raise OSError(f"{path}: reading GGUF files needs the package gguf; pip install 'edge-moe[gguf]'") from None
    try:
        return GGUFReader(path)
    except (ValueError, KeyError, IndexError, OverflowError, MemoryError) as error:
        raise ValueError(f"{path}: is not a GGUF file, or is cut short ({error}); download it again") from None
