"""Where a checkpoint's tensors are and how to read one: Hugging Face safetensors, one file or shards.

Opening reads headers only and checks every tensor the model needs: there, of a known type, the right shape.
Reading takes one tensor from disk as float32, so memory is one tensor's. No file stays open in between: large
checkpoints have more shards than macOS lets a process open. Shapes and rules are in runtime/config.py.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from edge_moe.runtime.config import ModelConfig, load_config, read_json

DTYPES = {"BF16": np.dtype("<u2"), "F16": np.dtype("<f2"), "F32": np.dtype("<f4")}  # as read from disk
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of a safetensors file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int  # bytes, from the start of the file


@dataclass(frozen=True, slots=True)
class Source:
    """Where a canonical tensor comes from: all of a checkpoint's tensor, or one expert's part of it."""

    name: str  # canonical: layers.3.q
    key: str  # the checkpoint's: model.layers.3.self_attn.q_proj.weight
    shape: tuple[int, ...]
    key_shape: tuple[int, ...]
    skip: int = 0  # elements of the checkpoint's tensor before this one's first


class Checkpoint:
    """The tensors of a Hugging Face MoE checkpoint by canonical name, read one at a time.

    Raises FileNotFoundError for a missing file and ValueError for a model that is not supported, a damaged
    header, or a tensor that is missing, of another shape or of another type than config.json makes it.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self.config: ModelConfig = load_config(self.directory)
        stored = _read_headers(self.directory)
        fused = any(key.endswith(".mlp.experts.gate_up_proj") for key in stored)
        sources = list(_sources(self.config, fused))
        _check(self.directory, sources, stored)
        self._tensors = {source.name: (source, stored[source.key]) for source in sources}

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
        """The type on disk: BF16, F16 or F32."""
        return self._find(name)[1].dtype

    def trunk(self, name: str) -> np.ndarray:
        """Read one tensor as float32. Raises ValueError for NaN or Inf, OSError for a file cut meanwhile."""
        return _read(*self._find(name))

    def expert(self, layer: int, expert: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Read gate, up (expert_hidden, dim) and down (dim, expert_hidden) as float32; raises as trunk()."""
        name = f"layers.{layer}.experts.{expert}"
        return self.trunk(f"{name}.gate"), self.trunk(f"{name}.up"), self.trunk(f"{name}.down")

    def _find(self, name: str) -> tuple[Source, Stored]:
        if name not in self._tensors:
            raise ValueError(f"{self.directory}: no tensor {name!r}; trunk_names() lists what there is")
        return self._tensors[name]


def _sources(config: ModelConfig, fused: bool) -> Iterator[Source]:
    """Every tensor of the model: this function alone knows the checkpoint's names.

    The hub keeps an expert's three matrices apart. transformers 5 has them `fused` in memory, and writes them
    so on request: (experts, gate rows then up rows, dim) and (experts, dim, expert_hidden).
    """
    dim, hidden = config.dim, config.expert_hidden
    q_rows, kv_rows = config.heads * config.head_dim, config.kv_heads * config.head_dim
    norm_rows = {"none": (), "head": (config.head_dim,) * 2, "full": (q_rows, kv_rows)}[config.qk_norm]

    def whole(name: str, key: str, *shape: int) -> Source:
        return Source(name, key, shape, shape)

    def mlp(name: str, key: str, inner: int) -> Iterator[Source]:
        yield whole(f"{name}.gate", f"{key}.gate_proj.weight", inner, dim)
        yield whole(f"{name}.up", f"{key}.up_proj.weight", inner, dim)
        yield whole(f"{name}.down", f"{key}.down_proj.weight", dim, inner)

    yield whole("embedding", "model.embed_tokens.weight", config.vocab, dim)
    yield whole("output_norm", "model.norm.weight", dim)
    if not config.tied_head:
        yield whole("head", "lm_head.weight", config.vocab, dim)

    for layer in range(config.layers):
        name, key = f"layers.{layer}", f"model.layers.{layer}"
        yield whole(f"{name}.attention_norm", f"{key}.input_layernorm.weight", dim)
        for part, rows in (("q", q_rows), ("k", kv_rows), ("v", kv_rows)):
            yield whole(f"{name}.{part}", f"{key}.self_attn.{part}_proj.weight", rows, dim)
            if config.qkv_bias:
                yield whole(f"{name}.{part}_bias", f"{key}.self_attn.{part}_proj.bias", rows)
        for part, rows in zip("qk", norm_rows, strict=False):
            yield whole(f"{name}.{part}_norm", f"{key}.self_attn.{part}_norm.weight", rows)
        yield whole(f"{name}.o", f"{key}.self_attn.o_proj.weight", dim, q_rows)
        yield whole(f"{name}.mlp_norm", f"{key}.post_attention_layernorm.weight", dim)

        if layer in config.dense_layers:
            yield from mlp(f"{name}.dense", f"{key}.mlp", config.dense_hidden)
            continue
        moe, gate_key, up_key, down_key = f"{key}.mlp", "gate_proj", "up_proj", "down_proj"
        if config.architecture == "mixtral" and not fused:
            moe, gate_key, up_key, down_key = f"{key}.block_sparse_moe", "w1", "w3", "w2"
        yield whole(f"{name}.router", f"{moe}.gate.weight", config.experts, dim)
        if config.shared_hidden:
            yield from mlp(f"{name}.shared", f"{moe}.shared_expert", config.shared_hidden)
            yield whole(f"{name}.shared_router", f"{moe}.shared_expert_gate.weight", 1, dim)

        for expert in range(config.experts):
            to, at = f"{name}.experts.{expert}", f"{moe}.experts.{expert}"
            if fused:
                gate_up, gate_up_shape = f"{moe}.experts.gate_up_proj", (config.experts, 2 * hidden, dim)
                down, down_shape = f"{moe}.experts.down_proj", (config.experts, dim, hidden)
                first = expert * hidden * dim
                yield Source(f"{to}.gate", gate_up, (hidden, dim), gate_up_shape, skip=2 * first)
                yield Source(f"{to}.up", gate_up, (hidden, dim), gate_up_shape, skip=2 * first + hidden * dim)
                yield Source(f"{to}.down", down, (dim, hidden), down_shape, skip=first)
            else:
                yield whole(f"{to}.gate", f"{at}.{gate_key}.weight", hidden, dim)
                yield whole(f"{to}.up", f"{at}.{up_key}.weight", hidden, dim)
                yield whole(f"{to}.down", f"{at}.{down_key}.weight", dim, hidden)


def _check(directory: Path, sources: list[Source], stored: dict[str, Stored]) -> None:
    missing = list(dict.fromkeys(source.key for source in sources if source.key not in stored))
    if missing:
        raise ValueError(
            f"{directory}: tensor {missing[0]} is missing, and {len(missing) - 1:,} more; "
            "config.json and the weights do not belong together, or the download is not complete"
        )
    for source in sources:
        found = stored[source.key]
        if found.shape != source.key_shape:
            raise ValueError(
                f"{found.path}: tensor {source.key} has shape {found.shape}, config.json makes it "
                f"{source.key_shape}; config.json and the weights do not belong together"
            )
        if found.dtype not in DTYPES:
            raise ValueError(
                f"{found.path}: tensor {source.key} is {found.dtype}, supported are {', '.join(DTYPES)}; "
                "use the checkpoint that is not quantised"
            )


def _read(source: Source, stored: Stored) -> np.ndarray:
    dtype, count = DTYPES[stored.dtype], math.prod(source.shape)
    values = np.fromfile(stored.path, dtype, count, offset=stored.offset + source.skip * dtype.itemsize)
    if values.size < count:
        raise OSError(
            f"{stored.path}: tensor {source.key} has {values.size:,} of {count:,} values; "
            "the file changed while in use, start again"
        )
    if stored.dtype == "BF16":  # the upper half of a float32
        values = values.astype(np.uint32)
        values <<= 16
        values = values.view(np.float32)
    values = values.astype(np.float32, copy=False).reshape(source.shape)
    if not np.isfinite(values).all():
        raise ValueError(
            f"{stored.path}: tensor {source.key} has NaN or Inf (read for {source.name}); "
            "the checkpoint is damaged, download it again"
        )
    return values


def _read_headers(directory: Path) -> dict[str, Stored]:
    """Tensors by the checkpoint's names, from model.safetensors or the shards that the index names."""
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.is_file():
        return _read_header(single)
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
    headers = {shard: _read_header(directory / shard) for shard in shards}
    return {key: headers[shard][key] for key, shard in shard_of.items() if key in headers[shard]}


def _is_file_name(value) -> bool:
    return isinstance(value, str) and value not in ("", ".", "..") and not set(value) & set("/\\\0")


def _read_header(path: Path) -> dict[str, Stored]:
    """Read a safetensors header: 8 bytes of length, that much JSON; offsets count from the end of it."""
    with open(path, "rb") as file:
        file_bytes = file.seek(0, 2)
        file.seek(0)
        header_bytes = int.from_bytes(file.read(8), "little")
        if not 2 <= header_bytes <= min(MAX_HEADER_BYTES, file_bytes - 8):
            raise ValueError(
                f"{path}: the header claims {header_bytes:,} bytes, the file has {file_bytes:,}; "
                "it is cut short or not a safetensors file, download it again"
            )
        text = file.read(header_bytes)
    try:
        header = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError):
        raise ValueError(f"{path}: the header is not valid JSON; download the file again") from None
    if not isinstance(header, dict):
        raise ValueError(f"{path}: the header is not a JSON object; download the file again")
    start, data_bytes = 8 + header_bytes, file_bytes - 8 - header_bytes
    tensors, spans = {}, []
    for key, entry in header.items():
        if key == "__metadata__":
            continue
        dtype, shape, first, last = _parse_entry(path, key, entry)
        if last > data_bytes:
            raise ValueError(
                f"{path}: tensor {key} ends at byte {start + last:,}, the file has {file_bytes:,}; "
                "it was cut short, download it again"
            )
        tensors[key] = Stored(path, dtype, shape, start + first)
        spans.append((first, last, key))
    spans.sort()
    for (_, end, key), (begin, _, after) in zip(spans, spans[1:], strict=False):
        if begin < end:
            raise ValueError(f"{path}: tensors {key} and {after} overlap; download the file again")
    return tensors


def _parse_entry(path: Path, key: str, entry) -> tuple[str, tuple[int, ...], int, int]:
    """One tensor's (dtype, shape, first byte, byte after the last). Raises ValueError if they disagree."""
    try:
        dtype, shape, (first, last) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        good = isinstance(dtype, str) and all(type(x) is int and x >= 0 for x in (*shape, first, last))
        if good and dtype in DTYPES:
            good = last - first == math.prod(shape) * DTYPES[dtype].itemsize
        good = good and first <= last
    except (KeyError, TypeError, ValueError):
        good = False
    if not good:
        raise ValueError(
            f"{path}: type, shape and offsets of tensor {key} do not agree; download the file again"
        )
    return dtype, shape, first, last
