"""The bundle on disk: the files of NAME.emoe/, opened with every claim of theirs checked.

    config.json, tokenizer files    verbatim from the checkpoint; `copies` has their SHA-256, `copy_bytes` their sizes
    bundle.json                     the table below; its own checksum last
    trunk.safetensors               all weights but the routed experts; one checksum for the file
    mask-routers.safetensors        what learned pruning needs, where it was calibrated; see pruning.py
    experts-0000I-of-0000N.safetensors   one U8 tensor an expert, `layers.L.experts.E`; a checksum for each record
    tables-0000I-of-0000N.safetensors    a table of n-gram embeddings, where the model has them; see row_tables.py

A part of a bundle has those of some layers; see bundle_part.py.

A quantised trunk tensor NAME is NAME.codes (U32, as MLX packs), NAME.scales and NAME.biases (BF16). Writing is in
compressor/writing/writer.py; packed layouts are devices/format.h's. Bundles of format 1 are read, too.

Dropped experts have no record: the table's `dropped` lists their numbers in the checkpoint, by layer with experts. The
remaining experts are renumbered from 0 in the same order, as are the rows and biases of the router. `top_k` lists the
top_k of each such layer; it is missing if all are as in config.json.

Every file that is used must be listed. A bundle made before `copy_bytes` was introduced may contain unlisted files of
COPIED, which have no checksum; Bundle.unlisted names them.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from .. import _core
from .bundle_format_1 import upgraded
from .bundle_part import Part, how_to_run, part_name, parts_in, read_part
from .bundle_records import TRUNK_FILE, Expert, Layout, TrunkTensor, layout_of, read_experts, read_trunk
from .bundle_table import LISTED, REMEDY, TABLE_FILE, Reader, read_table
from .config import ModelConfig
from .config_file import load_config, parse_config, read_json
from .files import pieces, real_path
from .model_path import check_quantised, find_model, quantisation_in, raise_if_other_format
from .pruning import MASK_FILE, Pruning, read_mask_routers, read_pruning
from .row_tables import STEP_ROWS, RowTable, read_tables

COPIED = {  # files that are copied from a checkpoint and used, and the maximum size of each in bytes
    "config.json": 4_000_000,
    "generation_config.json": 4_000_000,
    "tokenizer.json": 64_000_000,  # the largest tokenizers have 35 MB
    "tokenizer_config.json": 64_000_000,
    "special_tokens_map.json": 4_000_000,
    "added_tokens.json": 64_000_000,
    "vocab.json": 64_000_000,
    "merges.txt": 64_000_000,
    "chat_template.jinja": 4_000_000,
}
MOST_COPY_BYTES = 64_000_000
TEMPLATES = "additional_chat_templates"  # a directory of checkpoints; no bundle has it, and it would be used


@dataclass(frozen=True, slots=True)
class Bundle:
    """An opened bundle: headers and tables, no weights."""

    path: Path
    config: ModelConfig
    table: dict  # bundle.json, but for the records
    trunk: tuple[TrunkTensor, ...]
    trunk_bytes: int  # of the file
    trunk_checksum: int
    files: tuple[Path, ...]  # of the experts
    layouts: tuple[Layout, ...]  # of the records
    experts: dict[tuple[int, int], Expert]  # by layer and expert, in that order
    copies: dict[str, int]  # bytes of each copied file
    tables: tuple[RowTable, ...] = ()  # of n-gram embeddings
    unlisted: tuple[str, ...] = ()  # files of COPIED that are used although bundle.json does not list them
    pruning: Pruning | None = None
    part: Part | None = None  # None: a whole bundle

    @classmethod
    def open(cls, path: str | Path, parts: bool = False) -> "Bundle":
        """Read and check a bundle's tables.

        parts: whether it may be a part of a bundle, with the layers `bundle.layers` alone. Raises FileNotFoundError for
        a missing file and ValueError for a damaged, edited or newer bundle.
        """
        path = find_model(path)
        if not path.is_dir():
            raise FileNotFoundError(f"{path}: no such bundle directory; make one with `edge-moe compress MODEL {path}`")
        if not (path / TABLE_FILE).is_file():
            _raise_if_split(path)
            _raise_for_checkpoint(path)
        table, read = read_table(path), Reader(path / TABLE_FILE)
        copies = _check_copies(path, table, read)
        unlisted = _unlisted(path, table)
        config = _without_dropped(load_config(path), table, read)
        if table["version"] == 1:
            table = upgraded(table, config, read)
        if (part := read_part(table, config, read)) and not parts:
            raise ValueError(f"{path}: is {part}, of a bundle; {how_to_run(path.parent, part.count)}")
        trunk, trunk_bytes, trunk_checksum = read_trunk(path, config, table, read, part)
        files, layouts, experts = read_experts(path, config, table, read, part)
        table["experts"].pop("records")  # they are in `experts` now; thousands of dictionaries weigh megabytes
        pruning = read_pruning(path, config, table)
        of_trunk = (trunk, trunk_bytes, trunk_checksum)
        tables = read_tables(path, config, table, read, part)
        return cls(path, config, table, *of_trunk, files, layouts, experts, copies, tables, unlisted, pruning, part)

    @classmethod
    def open_part(cls, path: str | Path, number: int, count: int) -> "Bundle":
        """Open the part `number`, from 0, of a bundle in `count` parts. path: the part, or the directory with all.

        Raises ValueError for a whole bundle, another part and other numbers of parts.
        """
        path, found = Path(path), parts_in(Path(path))
        this = f"rank {number} of the {count} that mlx.launch has started"
        if found and not (path / TABLE_FILE).is_file():
            if (own := path / part_name(number, count)) not in found:
                raise ValueError(f"{path}: has {found[0].name}, but no {own.name} for {this}")
            path = own
        bundle = cls.open(path, parts=True)
        if bundle.part is None:
            raise ValueError(
                f"{bundle.path}: is a whole bundle, but each rank runs a part: `edge-moe split {path} OUT --parts "
                f"{count}`, then give OUT to mlx.launch's {count} ranks"
            )
        if (bundle.part.number, bundle.part.count) != (number, count):
            raise ValueError(f"{bundle.path}: is {bundle.part}, but this is {this}; name the directory with all parts")
        return bundle

    @property
    def layers(self) -> range:
        """The layers that it has."""
        return self.part.layers if self.part else range(self.config.layer_count)

    @property
    def sizes(self) -> ModelConfig:
        """The config, with no layers but its own, for sizes of memory."""
        return self.config.of_layers(self.layers) if self.part else self.config

    @property
    def expert_bytes(self) -> int:
        return sum(expert.nbytes for expert in self.experts.values())

    @property
    def nbytes(self) -> int:
        """Trunk, experts and tables."""
        return self.trunk_bytes + self.expert_bytes + self.table_bytes

    @property
    def table_bytes(self) -> int:
        """The tables, of which single rows are read."""
        return sum(table.nbytes for table in self.tables)

    @property
    def bits_per_weight(self) -> float:
        """Mean bits of an expert weight, with scales, biases and padding."""
        return 8 * self.expert_bytes / (len(self.experts) * self.config.expert_weights)

    def trunk_table(self) -> list[tuple[str, int, int, tuple[str, int, int], tuple[int, ...]]]:
        """The trunk's tensors in the engine's form: (name, rows, cols, encoding, offsets of the parts)."""
        return [(one.name, one.rows, one.cols, one.encoding, one.offsets) for one in self.trunk]

    def record_table(self) -> tuple[list[_core.RecordLayout], np.ndarray, np.ndarray]:
        """The records in the engine's form: layouts, int64 (experts, 5), and frequencies float32 (experts,)."""
        count = len(self.experts)
        records, frequency = np.zeros((count, 5), np.int64), np.zeros(count, np.float32)
        for at, e in enumerate(self.experts.values()):
            records[at] = (e.file, e.offset, e.nbytes, e.checksum, e.layout)
            frequency[at] = e.frequency
        new = [layout_of(self.config, layout.encodings) for layout in self.layouts]
        layouts = [one.placed(layout.parts) for one, layout in zip(new, self.layouts, strict=True)]
        return layouts, records, frequency


def _raise_if_split(path: Path) -> None:
    """Raise ValueError if the directory contains the parts of a bundle."""
    if parts := parts_in(path):
        count = parts[0].name.rpartition("-")[2]
        raise ValueError(f"{path}: has parts of a bundle, such as {parts[0].name}; {how_to_run(path, int(count))}")


def _raise_for_checkpoint(path: Path) -> None:
    """Raise ValueError if the directory contains a model that is not compressed, or that cannot be."""
    config = path / "config.json"
    if not config.is_file():
        raise_if_other_format(path)
        return
    raw = read_json(config)
    check_quantised(quantisation_in(raw), str(config))
    parse_config(raw, str(config))
    raise ValueError(f"{path}: this is not a bundle; make one with `edge-moe compress {path} OUT`")


def verify(bundle: Bundle) -> Iterator[tuple[str, int]]:
    """Read and check every byte of a bundle, in pieces; yields (name of the part checked, its bytes).

    Raises ValueError for the first part that does not match its checksum, and OSError for one that cannot be read.
    """
    for name, nbytes in bundle.copies.items():
        _check_copy(bundle.path / name, bundle.table["copies"][name])
        yield name, nbytes
    trunk = bundle.path / TRUNK_FILE
    if _checksum(trunk, 0, bundle.trunk_bytes) != (bundle.trunk_bytes, bundle.trunk_checksum):
        raise ValueError(f"{trunk}: does not match its checksum; {REMEDY}")
    yield TRUNK_FILE, bundle.trunk_bytes
    if read_mask_routers(bundle.path, bundle.pruning, bundle.table):
        yield MASK_FILE, bundle.table["pruning"]["mask_routers"]["bytes"]
    for expert in bundle.experts.values():
        path = bundle.files[expert.file]
        if _checksum(path, expert.offset, expert.nbytes) != (expert.nbytes, expert.checksum):
            raise ValueError(
                f"{path}: expert {expert.expert} of layer {expert.layer} does not match its checksum; {REMEDY}"
            )
        yield f"layers.{expert.layer}.experts.{expert.expert}", expert.nbytes
    for table in bundle.tables:
        yield from table.verify()


def parts_to_verify(bundle: Bundle) -> int:
    """The number of parts that verify() yields."""
    learned = bundle.pruning is not None and bool(bundle.pruning.learned)
    of_tables = sum(-(-table.rows // STEP_ROWS) for table in bundle.tables)
    return len(bundle.copies) + 1 + learned + len(bundle.experts) + of_tables


def _checksum(path: Path, offset: int, nbytes: int) -> tuple[int, int]:
    """The number of bytes read from a part of a file, and their CRC-32C."""
    got = checksum = 0
    for piece in pieces(path, offset, nbytes):
        got, checksum = got + len(piece), _core.crc32c(piece, checksum)
    return got, checksum


def _check_copies(path: Path, table: dict, read: Reader) -> dict[str, int]:
    """Check the sizes and checksums of config.json and the tokenizer files, and return their sizes.

    They decide what the weights mean, so they must be the files that were copied.
    """
    copies, sizes = read.get(table, "copies", dict), table.get("copy_bytes")
    if "config.json" not in copies:
        raise ValueError(f"{read.path}: 'config.json' is missing from 'copies'; {REMEDY}")
    for name in copies:
        read.file_name([name], 0)
    if sizes is not None and read.get(table, "copy_bytes", dict).keys() != copies.keys():
        raise ValueError(f"{read.path}: 'copies' and 'copy_bytes' do not list the same files; {REMEDY}")
    found = {}
    for name in copies:
        file, found[name] = path / name, _copy_bytes(path, name, LISTED)
        if sizes is not None and (wanted := read.count(sizes, name)) != found[name]:
            raise ValueError(f"{file}: has {found[name]:,} bytes, expected {wanted:,}; {REMEDY}")
        _check_copy(file, copies[name])
    return found


def _copy_bytes(path: Path, name: str, missing: str) -> int:
    """The size of a copied file. Raises ValueError if it is above the maximum for such a file."""
    nbytes, most = real_path(path, name, missing).stat().st_size, COPIED.get(name, MOST_COPY_BYTES)
    if nbytes > most:
        raise ValueError(f"{path / name}: has {nbytes:,} bytes, expected at most {most:,}; {REMEDY}")
    return nbytes


def _check_copy(file: Path, checksum: str) -> None:
    content = hashlib.sha256()
    for piece in pieces(file):
        content.update(piece)
    if content.hexdigest() != checksum:
        raise ValueError(f"{file}: does not match its checksum; {REMEDY}")


def _unlisted(path: Path, table: dict) -> tuple[str, ...]:
    """Names of COPIED that exist and are not in the table. Raises ValueError if the table should list them."""
    found = [name for name in COPIED if name not in table["copies"] and (path / name).exists()]
    for name in found:
        _copy_bytes(path, name, "; remove what has its name")
    if (path / TEMPLATES).exists():
        raise ValueError(f"{path / TEMPLATES}: a bundle has no such directory, and it would be used; remove it")
    if found and table.get("copy_bytes") is not None:
        raise ValueError(
            f"{path / found[0]}: bundle.json does not list this file, which would be used; remove it, or compress the "
            "model again from a directory that has it"
        )
    return tuple(found)


def _without_dropped(config: ModelConfig, table: dict, read: Reader) -> ModelConfig:
    """The config with `kept` and `layer_top_k` from the table's `dropped` and `top_k`."""
    layers, everything = config.moe_layers, set(range(config.experts))

    def by_layer(key: str) -> dict:
        values = read.get(table, key, list)
        if len(values) != len(layers):
            raise ValueError(
                f"{read.path}: {key!r} has {len(values)} layers, config.json has {len(layers)} with experts; {REMEDY}"
            )
        return dict(zip(layers, values, strict=True))

    if read.get(table, "dropped", list):
        kept = [()] * config.layer_count
        for layer, numbers in by_layer("dropped").items():
            whole = isinstance(numbers, list) and all(type(number) is int for number in numbers)
            if not whole or numbers != sorted(everything.intersection(numbers)):
                raise ValueError(
                    f"{read.path}: dropped experts of layer {layer} are not numbers from 0 to {config.experts - 1}, "
                    f"ascending and each once; {REMEDY}"
                )
            kept[layer] = tuple(sorted(everything.difference(numbers)))
        config = replace(config, kept=tuple(kept))
    if table.get("top_k") is not None:
        top_k = by_layer("top_k")
        config = replace(config, layer_top_k=tuple(top_k.get(layer, 0) for layer in range(config.layer_count)))
    for layer in layers:
        top_k, left = config.top_k_of(layer), config.experts_of(layer)
        if type(top_k) is not int or not 1 <= top_k <= min(config.top_k, left):
            raise ValueError(
                f"{read.path}: top_k of layer {layer} is {top_k!r} with {left} experts left, expected 1 to "
                f"{min(config.top_k, left)}; {REMEDY}"
            )
    return config


def dropped_keys(config: ModelConfig) -> dict:
    """The keys of bundle.json about dropped experts, by layer with experts; `top_k` only if a layer's has changed."""
    everything = set(range(config.experts))
    dropped = [sorted(everything.difference(config.kept[layer])) for layer in config.moe_layers if config.kept]
    keys = {"dropped": dropped if any(dropped) else []}
    top_k = [config.top_k_of(layer) for layer in config.moe_layers]
    return keys | ({"top_k": top_k} if any(k != config.top_k for k in top_k) else {})
