"""Where a checkpoint's tensors are and how to read one: Hugging Face safetensors, one file or shards.

Opening reads headers only and checks every tensor the model needs: there, of a known type, the right shape.
Reading takes one tensor from disk as float32, so memory is one tensor's. No file stays open in between: large
checkpoints have more shards than macOS lets a process open. Shapes and rules are in runtime/config.py, types and
quantised tensors in source_formats.py.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge_moe.compressor.source_formats import Block, Tensor, locate, read, read_bytes, scale_blocks
from edge_moe.runtime.config import ModelConfig, load_config, read_json, trunk_shapes
from edge_moe.runtime.tensorfile import Stored, read_header

SAMPLE_BYTES = 4096  # of each layer's o that the fingerprint reads


@dataclass(frozen=True, slots=True)
class Source:
    """Where a canonical tensor comes from: all of a checkpoint's tensor, or one expert's part of it."""

    name: str  # canonical: layers.3.q
    key: str  # the checkpoint's: model.layers.3.self_attn.q_proj.weight
    shape: tuple[int, ...]
    key_shape: tuple[int, ...]
    first_row: int = 0  # rows of the checkpoint's tensor before this one's first, all experts' counted


class Checkpoint:
    """The tensors of a Hugging Face MoE checkpoint by canonical name, read one at a time.

    Raises FileNotFoundError for a missing file and ValueError for a model that is not supported, a damaged
    header, or a tensor that is missing, of another shape or of another type than config.json makes it.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self.config: ModelConfig = load_config(self.directory)
        path = self.directory / "config.json"
        blocks = scale_blocks(read_json(path).get("quantization_config"), str(path))
        stored = _read_headers(self.directory)
        fused = any(key.endswith(".mlp.experts.gate_up_proj") for key in stored)
        self._tensors = _match(self.directory, list(_sources(self.config, fused)), stored, blocks)

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Forget the tensors; a later read raises ValueError."""
        self._tensors = {}

    def trunk_names(self) -> list[str]:
        """Canonical names of all tensors that are not routed experts, in a fixed order."""
        return [name for name in self._tensors if ".experts." not in name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._find(name)[0].shape

    def dtype(self, name: str) -> str:
        """The type on disk: BF16, F16, F32, F8_E4M3 or MXFP4."""
        return self._find(name)[1].dtype

    def source_bytes(self, name: str) -> int:
        """Bytes on disk that reading one tensor takes, its scales included."""
        source, tensor = self._find(name)
        return read_bytes(tensor, source.first_row, source.shape)

    def fingerprint(self) -> str:
        """SHA-256 in hex by which a checkpoint is known again: equal for a copy, another for another checkpoint.

        It is of config.json, of the name, type, shape and place of every tensor used, of the files' names and sizes,
        and of the first bytes of each layer's o: the rest is the same for a model and one fine-tuned from it. Other
        weights are not read, so a change of theirs is not seen.
        """
        self._find("embedding")  # raises once closed
        digest = hashlib.sha256((self.directory / "config.json").read_bytes())
        tensors = {tensor.key: tensor for _, tensor in self._tensors.values()}
        parts = [(tensor.key, tensor.values) for tensor in tensors.values()]
        parts += [(tensor.scale_key, tensor.scales) for tensor in tensors.values() if tensor.scales]
        sizes = {path: path.stat().st_size for path in dict.fromkeys(stored.path for _, stored in parts)}
        table = [(key, s.dtype, s.shape, s.offset, s.path.name, sizes[s.path]) for key, s in parts]
        digest.update(json.dumps(table).encode())
        for name, (_, tensor) in self._tensors.items():
            if name.endswith(".o"):
                with open(tensor.values.path, "rb", buffering=0) as file:
                    file.seek(tensor.values.offset)
                    digest.update(file.read(min(SAMPLE_BYTES, tensor.values.nbytes)))
        return digest.hexdigest()

    def trunk(self, name: str) -> np.ndarray:
        """Read one tensor as float32. Raises ValueError for NaN or Inf, OSError for a file cut meanwhile."""
        source, tensor = self._find(name)
        return read(tensor, source.first_row, source.shape, name)

    def expert(self, layer: int, expert: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Read gate, up (expert_hidden, dim) and down (dim, expert_hidden) as float32; raises as trunk()."""
        name = f"layers.{layer}.experts.{expert}"
        return self.trunk(f"{name}.gate"), self.trunk(f"{name}.up"), self.trunk(f"{name}.down")

    def _find(self, name: str) -> tuple[Source, Tensor]:
        if name not in self._tensors:
            raise ValueError(f"{self.directory}: no tensor {name!r}; trunk_names() lists what there is")
        return self._tensors[name]


def _sources(config: ModelConfig, fused: bool) -> Iterator[Source]:
    """Every tensor of the model: this function alone knows the checkpoint's names.

    The hub keeps an expert's three matrices apart. transformers 5 has them `fused` in memory, and writes them
    so on request: (experts, gate rows then up rows, dim) and (experts, dim, expert_hidden).
    """
    dim, hidden = config.dim, config.expert_hidden
    mixtral = config.architecture == "mixtral" and not fused
    moe = "block_sparse_moe" if mixtral else "mlp"
    gate_key, up_key, down_key = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    shared = "shared_experts" if config.architecture == "deepseek_v3" else "shared_expert"
    key_of = {
        "embedding": "embed_tokens.weight",
        "output_norm": "norm.weight",
        "attention_norm": "input_layernorm.weight",
        "mlp_norm": "post_attention_layernorm.weight",
        **{part: f"self_attn.{part}_proj.weight" for part in "qkvo"},
        **{f"{part}_bias": f"self_attn.{part}_proj.bias" for part in "qkv"},
        **{f"{part}_norm": f"self_attn.{part}_norm.weight" for part in "qk"},
        **{part: f"self_attn.{part}_proj.weight" for part in ("q_a", "q_b", "kv_b")},
        "kv_a": "self_attn.kv_a_proj_with_mqa.weight",
        **{f"{part}_norm": f"self_attn.{part}_layernorm.weight" for part in ("q_a", "kv_a")},
        **{f"dense.{part}": f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")},
        "router": f"{moe}.gate.weight",
        "router_bias": f"{moe}.gate.e_score_correction_bias",
        **{f"shared.{part}": f"{moe}.{shared}.{part}_proj.weight" for part in ("gate", "up", "down")},
        "shared_router": f"{moe}.shared_expert_gate.weight",
    }

    def whole(name: str, key: str, shape: tuple[int, ...]) -> Source:
        return Source(name, key, shape, shape)

    for name, shape in trunk_shapes(config).items():
        if name == "head":
            yield whole(name, "lm_head.weight", shape)
            continue
        layer, part = name.split(".", 2)[1:] if name.startswith("layers.") else ("", name)
        yield whole(name, f"model.{f'layers.{layer}.' if layer else ''}{key_of[part]}", shape)

    for layer in config.moe_layers:
        for expert in range(config.experts):
            to, at = f"layers.{layer}.experts.{expert}", f"model.layers.{layer}.{moe}.experts"
            if fused:
                gate_up, gate_up_shape = f"{at}.gate_up_proj", (config.experts, 2 * hidden, dim)
                down, down_shape = f"{at}.down_proj", (config.experts, dim, hidden)
                yield Source(f"{to}.gate", gate_up, (hidden, dim), gate_up_shape, 2 * expert * hidden)
                yield Source(f"{to}.up", gate_up, (hidden, dim), gate_up_shape, (2 * expert + 1) * hidden)
                yield Source(f"{to}.down", down, (dim, hidden), down_shape, expert * dim)
            else:
                yield whole(f"{to}.gate", f"{at}.{expert}.{gate_key}.weight", (hidden, dim))
                yield whole(f"{to}.up", f"{at}.{expert}.{up_key}.weight", (hidden, dim))
                yield whole(f"{to}.down", f"{at}.{expert}.{down_key}.weight", (dim, hidden))


def _match(
    directory: Path, sources: list[Source], stored: dict[str, Stored], blocks: tuple[Block, ...]
) -> dict[str, tuple[Source, Tensor]]:
    """Each source with the tensor that it is in, by canonical name; all of them, or a ValueError."""
    wanted = {source.key: source.key_shape for source in sources}
    found = {key: locate(key, shape, stored, blocks) for key, shape in wanted.items()}
    missing = [key for key, tensor in found.items() if tensor is None]
    if missing:
        raise ValueError(
            f"{directory}: tensor {missing[0]} is missing, and {len(missing) - 1:,} more; "
            "config.json and the weights do not belong together, or the download is not complete"
        )
    for source in sources:
        tensor = found[source.key]
        if tensor.scales is not None and source.first_row % tensor.shape[-2]:  # up, which is below gate
            _check_boundary(source, tensor)
    return {source.name: (source, found[source.key]) for source in sources}


def _check_boundary(source: Source, tensor: Tensor) -> None:
    """Refuse blocks of scales that go over from gate to up: writers differ in whether up then starts a new one."""
    hidden, height = source.shape[0], tensor.block[0]
    if height < 2 * hidden and hidden % height:
        raise ValueError(
            f"{tensor.values.path}: tensor {tensor.key} has gate and up of {hidden} rows each, which blocks of "
            f"{height} rows do not divide; use a checkpoint whose experts are stored one by one"
        )


def _read_headers(directory: Path) -> dict[str, Stored]:
    """Tensors by the checkpoint's names, from model.safetensors or the shards that the index names."""
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.is_file():
        return read_header(single)
    if not index.is_file():
        raise FileNotFoundError(
            f"{directory}: neither {single.name} nor {index.name} is there; "
            "download the checkpoint in safetensors format"
        )
    shard_of = read_json(index).get("weight_map")
    if not isinstance(shard_of, dict) or not all(_is_file_name(shard) for shard in shard_of.values()):
        raise ValueError(
            f"{index}: weight_map is not an object of tensor names and file names; download the file again"
        )
    shards = sorted(set(shard_of.values()))
    absent = [shard for shard in shards if not (directory / shard).is_file()]
    if absent:
        raise FileNotFoundError(
            f"{directory / absent[0]}: no such file, and {len(absent) - 1} more of the {len(shards)} shards "
            f"that {index.name} names are missing; download them"
        )
    headers = {shard: read_header(directory / shard) for shard in shards}
    return {key: headers[shard][key] for key, shard in shard_of.items() if key in headers[shard]}


def _is_file_name(value) -> bool:
    return isinstance(value, str) and value not in ("", ".", "..") and not set(value) & set("/\\\0")
