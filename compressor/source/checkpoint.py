"""Finding and reading the tensors of a checkpoint: Hugging Face safetensors, one file or shards.

Opening reads only headers and checks that every tensor the model needs is present, of a known type and the right shape.
An unused tensor in one of the model's layers is refused, as results would not be the model's. Tensors are read one at a
time, as float32. No file stays open in between: large checkpoints have more shards than macOS lets a process open.
names.py has the tensor names of each family, formats.py the types and quantised tensors, quantisation.py the methods.
"""

import hashlib
import json
import math
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from ...runtime.codecs import PROJECTIONS, Encoding
from ...runtime.config import ModelConfig
from ...runtime.config_file import family_of, load_config, read_json
from ...runtime.files import real_path
from ...runtime.hub import HubModel
from ...runtime.model_path import find_model, raise_if_other_format
from ...runtime.tensorfile import Stored, read_header
from . import codes, gguf_model
from .formats import MXFP4, Tensor, locate, locate_integers
from .gguf_file import find_gguf
from .hub_files import hub_files
from .names import Names, Source, sources
from .quantisation import MX_BLOCK, Block, quantisation_of, scale_blocks
from .reading import read, read_bytes, read_codes
from .tables import Table

SAMPLE_BYTES = 4096  # of each layer's attention output o, for the fingerprint
MOST_MISSING = 100_000  # missing tensors are counted up to this: a config.json may claim millions
COMPARED_ROWS = 1024  # of embedding and head, at a time
NOT_WEIGHTS = (  # suffixes of tensors that other programs store beside the weights
    ".rotary_emb.inv_freq",
    *(f".{what}_scale" for what in ("input", "output", "input_global", "q", "k", "v", "kv")),
    ".weight_shape",
    *(f".ple_embedding.{what}" for what in ("layer_multipliers", "ngram_heads_vocab_sizes", "ngram_heads_offsets")),
)


class Checkpoint:
    """The tensors of a Hugging Face MoE checkpoint by canonical name, read one at a time.

    Raises FileNotFoundError for a missing file and ValueError for a model that is not supported, a damaged header, or a
    tensor that is missing or whose shape or type does not match config.json.
    """

    def __init__(self, directory: str | Path):
        self._kept, self.remote, gguf = ExitStack(), None, None  # the first has a directory made of another source
        if (model := HubModel.open(directory)) is not None:
            self.remote = self._kept.enter_context(hub_files(model))
            self.directory = self.remote.directory
        else:
            self.directory = find_model(directory, gguf=True)
            if (file := find_gguf(self.directory)) is not None:
                self.directory, gguf = self._kept.enter_context(gguf_model.unpacked(file))
        path = self.directory / "config.json"
        if not path.is_file() and self.directory.is_dir():
            raise_if_other_format(self.directory)
        raw = read_json(path)
        blocks = scale_blocks(quantisation_of(self.directory, raw), str(path))
        self.config: ModelConfig = load_config(self.directory)
        real_path(self.directory, path.name)
        family = family_of(raw, str(path))
        stored = gguf_model.stored(gguf, family) if gguf else _read_headers(self.directory)
        if self.remote:
            self.remote.forget_headers()
        names = Names.of(self.config, family, stored)
        if gguf:
            changes = gguf_model.conversions(gguf, self.config, family)
            names = replace(names, mlx=True, conversions=changes)  # shapes are those of mlx-lm
        if self.config.tied_head and names.head in stored and not self._is_embedding(stored, names, blocks):
            self.config = replace(self.config, tied_head=False)
        self._tensors = _match(self.directory, sources(self.config, names), names.head, stored, blocks)
        self._tables = {
            name: Table.find(name, names.key_of(name), shape, stored, blocks, self.directory)
            for name, shape in self.config.tables.items()
        }
        self.unused = self._unused(stored, names)  # tensors outside the model, such as further layers

    def _is_embedding(self, stored: dict[str, Stored], names: Names, blocks: tuple[Block, ...]) -> bool:
        """Whether the stored output head equals the embedding, as config.json says."""
        shape, key = (self.config.vocab, self.config.dim), f"{names.prefix}{names.of_tensors['embedding']}"
        head, embedding = (locate(one, shape, stored, blocks) for one in (names.head, key))
        if embedding is None:
            return False
        for row in range(0, shape[0], COMPARED_ROWS):
            self._fetch(head)
            self._fetch(embedding)
            part = (min(COMPARED_ROWS, shape[0] - row), shape[1])
            if not np.array_equal(*(read(one, row, part, one.key) for one in (head, embedding))):
                return False
        return True

    def _unused(self, stored: dict[str, Stored], names: Names) -> list[str]:
        """The tensors that are not read. Raises ValueError if one belongs to a part of the model."""
        tensors = [tensor for _, tensor in self._tensors.values()]
        tensors += [tensor for table in self._tables.values() for tensor in table.shards]
        used = {key for tensor in tensors for key, _ in tensor.parts()}
        left = [key for key in stored if key not in used and not key.endswith(NOT_WEIGHTS)]
        left = [key for key in left if key != names.head or not self.config.tied_head]
        own = (names.of_tensors[part].removesuffix("weight") for part in ("embedding", "output_norm"))
        own = tuple(f"{names.prefix}{part}" for part in own)

        def of_the_model(key: str) -> bool:
            if not key.startswith(names.layers):
                return key.startswith((*own, names.head.removesuffix("weight")))
            number = key.removeprefix(names.layers).partition(".")[0]
            return not number.isascii() or not number.isdigit() or int(number[:9]) < self.config.layer_count

        if strangers := [key for key in left if of_the_model(key)]:
            more = f", and {len(strangers) - 1:,} more" if len(strangers) > 1 else ""
            raise ValueError(
                f"{self.directory}: tensor {strangers[0]} is there{more}, which {self.config.architecture} with this "
                "config.json does not use; config.json and the weights do not belong together"
            )
        return left

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Forget the tensors; a later read raises ValueError."""
        self._tensors, self._tables = {}, {}
        self._kept.close()

    def trunk_names(self) -> list[str]:
        """Canonical names of all tensors that are not routed experts, in a fixed order."""
        return [name for name in self._tensors if ".experts." not in name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._find(name)[0].shape

    def dtype(self, name: str) -> str:
        """The type on disk, as Tensor.dtype."""
        return self._find(name)[1].dtype

    def source_bytes(self, name: str) -> int:
        """Bytes on disk that reading one tensor takes, its scales included."""
        source, tensor = self._find(name)
        others = read_bytes(tensor.second, 0, _rows_of(tensor.second)) if tensor.second else 0
        return read_bytes(tensor, source.first_row, source.stored_shape) + others

    def fingerprint(self) -> str:
        """A SHA-256 in hex that identifies a checkpoint: equal for a copy, different for another checkpoint.

        It covers config.json, the name, type, shape and place of every tensor used, the names and sizes of files, and
        the first bytes of each layer's attention output o, as all else is equal in a fine-tuned model. Other weights
        are not read, so a change in them alone is not noticed.
        """
        self._find("embedding")  # raises once closed
        digest = hashlib.sha256((self.directory / "config.json").read_bytes())
        tensors = {tensor.key: tensor for _, tensor in self._tensors.values()}
        parts = [(tensor.key, tensor.values) for tensor in tensors.values()]
        parts += [part for tensor in tensors.values() for part in list(tensor.parts())[1:]]
        paths, known = dict.fromkeys(stored.path for _, stored in parts), self.remote.sizes if self.remote else {}
        sizes = {path: known.get(path.name) or path.stat().st_size for path in paths}
        table = [(key, s.dtype, s.shape, s.offset, s.path.name, sizes[s.path]) for key, s in parts]
        digest.update(json.dumps(table).encode())
        for name, (_, tensor) in self._tensors.items():
            if name.endswith(".o") and self.remote:
                digest.update(self.remote.start_of(tensor.values, SAMPLE_BYTES))
            elif name.endswith(".o"):
                with open(tensor.values.path, "rb", buffering=0) as file:
                    file.seek(tensor.values.offset)
                    digest.update(file.read(min(SAMPLE_BYTES, tensor.values.nbytes)))
        return digest.hexdigest()

    def trunk(self, name: str) -> np.ndarray:
        """Read one tensor as float32. Raises ValueError for NaN or Inf, OSError if the file was truncated meanwhile."""
        source, tensor = self._find(name)
        self._fetch(tensor)
        if source.pieces:
            parts = (read(tensor, first, (count, *source.shape[1:]), name) for first, count in source.pieces)
            values = np.concatenate(list(parts))
        elif source.join:
            both = (read(tensor, 0, source.stored_shape, name), read(tensor.second, 0, _rows_of(tensor.second), name))
            values = source.join(*both)
        else:
            values = read(tensor, source.first_row, source.stored_shape, name)
            values = np.ascontiguousarray((values.T if source.transposed else values)[source.rows])
        return source.convert(values) if source.convert else values

    def _fetch(self, tensor: Tensor) -> None:
        """Download the shards that a tensor is in, if the checkpoint is on the hub."""
        if self.remote:
            for _, stored in tensor.parts():
                self.remote.fetch(stored.path)

    def rows(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Read rows of a table, (len(rows), cols), as float32. Raises like trunk()."""
        return self._table(name).rows(rows, self._fetch)

    def table_part(self, name: str, first: int, count: int) -> np.ndarray:
        """Read consecutive rows of a table, (count, cols), as float32. Raises like trunk()."""
        return self._table(name).read(first, count, self._fetch)

    def expert(self, layer: int, expert: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Read gate, up (expert_hidden, dim) and down (dim, expert_hidden) as float32; raises like trunk().

        A gate that is not there has no rows.
        """
        name = f"layers.{layer}.experts.{expert}"
        gate = self.trunk(f"{name}.gate") if self.config.gated else np.zeros((0, self.config.dim), np.float32)
        return gate, self.trunk(f"{name}.up"), self.trunk(f"{name}.down")

    @property
    def has_codes(self) -> bool:
        """Whether all experts are stored in MXFP4, whose codes a bundle can hold as they are."""
        its = [its for name, (_, its) in self._tensors.items() if ".experts." in name and not name.endswith("_bias")]
        return all(tensor.dtype == MXFP4 for tensor in its)

    @property
    def kept_encodings(self) -> tuple[Encoding, ...] | None:
        """The encodings of gate, up and down in a bundle that keeps the codes of the experts; None if that cannot be.

        Experts must be alike, in MXFP4 or in MLX's affine mode with scales in bfloat16.
        """
        if self.has_codes:
            return (Encoding("mxfp4", 4, MX_BLOCK[1]),) * 3
        found: list[set[Encoding | None]] = [set(), set(), set()]
        for name, (_, tensor) in self._tensors.items():
            if ".experts." in name and (part := name.rpartition(".")[2]) in PROJECTIONS:
                affine = tensor.biases is not None and tensor.scales.dtype == tensor.biases.dtype == "BF16"
                one = Encoding("affine", codes.bits_of(tensor.codes), tensor.block[1]) if affine else None
                found[PROJECTIONS.index(part)].add(one)
        found[0] = found[0] if self.config.gated else found[1]
        kept = tuple(one for of_part in found for one in of_part)
        alike = len(kept) == 3 and None not in kept and len({one.group for one in kept}) == 1
        return kept if alike else None

    def codes(self, layer: int, expert: int) -> list[tuple[np.ndarray, ...]]:
        """Read gate, up and down of an expert as they are stored; see reading.read_codes()."""
        found = []
        for part in PROJECTIONS if self.config.gated else PROJECTIONS[1:]:
            name = f"layers.{layer}.experts.{expert}.{part}"
            source, tensor = self._find(name)
            self._fetch(tensor)
            parts = read_codes(tensor, source.first_row, source.stored_shape[0], name)
            found.append(tuple(np.ascontiguousarray(values[source.rows]) for values in parts))
        return found if self.config.gated else [tuple(values[:0] for values in found[0]), *found]

    def expert_bias(self, layer: int, expert: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What is added to the products of gate, up (expert_hidden,) and down (dim,), of a model that has it."""
        name = f"layers.{layer}.experts.{expert}"
        return self.trunk(f"{name}.gate_bias"), self.trunk(f"{name}.up_bias"), self.trunk(f"{name}.down_bias")

    def _table(self, name: str) -> Table:
        if name not in self._tables:
            raise ValueError(f"{self.directory}: no table {name!r}")
        return self._tables[name]

    def _find(self, name: str) -> tuple[Source, Tensor]:
        if name not in self._tensors:
            raise ValueError(f"{self.directory}: no tensor {name!r}; trunk_names() lists what there is")
        return self._tensors[name]


def _match(
    directory: Path, sources: Iterable[Source], head: str, stored: dict[str, Stored], blocks: tuple[Block, ...]
) -> dict[str, tuple[Source, Tensor]]:
    """Each source and the tensor that contains it, by canonical name. Raises ValueError if a tensor is missing."""
    found, tensors, missing = {}, {}, {}
    for source in sources:
        tensor = tensors.get(source.key)
        if tensor is None and (tensor := _locate(source, stored, blocks)) is None:
            missing[source.key] = None
            if len(missing) > MOST_MISSING:
                break
            continue
        if source.second:
            if (second := locate(*source.second, stored, blocks)) is None:
                missing[source.second[0]] = None
                continue
            tensor = replace(tensor, second=second)
        tensors[source.key] = tensor
        found[source.name] = source, tensor
        if tensor.scales is not None and source.first_row % tensor.shape[-2]:  # up, which is below gate
            _check_boundary(source, tensor)
    if missing:
        first, others = next(iter(missing)), len(missing) - 1
        more = f", and {'over ' * (others >= MOST_MISSING)}{others:,} more" if others else ""
        if list(missing) == [head]:
            raise ValueError(
                f"{directory}: tensor {head} is missing: the checkpoint was saved without its output head; "
                "save the model for causal language modelling"
            )
        raise ValueError(
            f"{directory}: tensor {first} is missing{more}; "
            "config.json and the weights do not belong together, or the download is not complete"
        )
    return found


def _locate(source: Source, stored: dict[str, Stored], blocks: tuple[Block, ...]) -> Tensor | None:
    find = locate_integers if source.integers else partial(locate, blocks=blocks)
    return find(source.key, source.key_shape, stored=stored)


def _rows_of(tensor: Tensor) -> tuple[int, int]:
    """The shape of all rows of a tensor (experts or heads, rows, columns)."""
    return math.prod(tensor.shape[:-1]), tensor.shape[-1]


def _check_boundary(source: Source, tensor: Tensor) -> None:
    """Raise ValueError if a block of scales spans gate and up: writers differ in whether up starts a new block."""
    hidden, height = source.shape[0], tensor.block[0]
    if height < 2 * hidden and hidden % height:
        raise ValueError(
            f"{tensor.values.path}: tensor {tensor.key} has gate and up of {hidden} rows each, which blocks of "
            f"{height} rows do not divide; use a checkpoint whose experts are stored one by one"
        )


def _read_headers(directory: Path) -> dict[str, Stored]:
    """Stored tensors by name, from model.safetensors or from every shard in the index.

    All tensors in the shards count, including those that the index does not list.
    """
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.exists() or single.is_symlink():
        real_path(directory, single.name)
        return read_header(single)
    if not index.is_file():
        raise_if_other_format(directory)
        raise FileNotFoundError(
            f"{directory}: neither {single.name} nor {index.name} is there; "
            "download the checkpoint in safetensors format"
        )
    real_path(directory, index.name)
    shard_of = read_json(index).get("weight_map")
    if not isinstance(shard_of, dict) or not all(_is_file_name(shard) for shard in shard_of.values()):
        raise ValueError(
            f"{index}: weight_map is not an object of tensor names and file names; download the file again"
        )
    shards = sorted(set(shard_of.values()))
    absent = [shard for shard in shards if not (directory / shard).exists()]
    if absent:
        others, all_of_them = len(absent) - 1, f"of the {len(shards)} shards that {index.name} names"
        what = f"and {others} more {all_of_them} are missing; download them"
        raise FileNotFoundError(
            f"{directory / absent[0]}: no such file, "
            + (what if others else f"the only one {all_of_them} that is missing; download it")
        )
    stored = {}
    for shard in shards:
        real_path(directory, shard)
        for key, tensor in read_header(directory / shard).items():
            other = stored[key].path.name if key in stored else None
            if other and shard_of.get(key) not in (shard, other):
                raise ValueError(f"{index}: tensor {key} is in {other} and in {shard}; download both again")
            if other is None or shard_of.get(key) == shard:
                stored[key] = tensor
    return stored


def _is_file_name(value) -> bool:
    return isinstance(value, str) and value not in ("", ".", "..") and not set(value) & set("/\\\0")
