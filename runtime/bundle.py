"""The bundle on disk: what NAME.emoe/ holds, read with every claim checked.

    config.json, tokenizer files    verbatim from the checkpoint; `copies` has their SHA-256, `copy_bytes` their sizes
    bundle.json                     the table below; its own checksum last
    trunk.safetensors               all but the routed experts; one checksum for the file
    mask-routers.safetensors        what learned pruning needs, where it was calibrated; see pruning.py
    experts-0000I-of-0000N.safetensors   one U8 tensor an expert, `layers.L.experts.E`; a checksum for each record

A quantised trunk tensor NAME is NAME.codes (U32, as MLX packs), NAME.scales and NAME.biases (BF16). Writing is in
compressor/writing/writer.py; packed layouts are devices/format.h's.

Experts that were dropped have no record: the table's `dropped` lists their numbers in the checkpoint, by layer with
experts, and those left are numbered from 0 in the same order, as are the router's rows and biases. `top_k` lists each
such layer's own, and is there where one differs from config.json's.

A file that is used must be listed. A bundle made before `copy_bytes` was written may have others of COPIED, which
nothing checks; Bundle.unlisted names them.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from .. import _core
from .bundle_table import LISTED, REMEDY, TABLE_FILE, Reader, is_number, read_table
from .config import ModelConfig, trunk_shapes
from .config_file import load_config, parse_config, read_json
from .files import pieces, real_path
from .model_path import check_quantised, find_model, raise_if_other_format
from .pruning import MASK_FILE, Pruning, read_mask_routers, read_pruning
from .tensorfile import Stored, read_header

COPIED = {  # files of a checkpoint that a bundle has and that are used, and the most bytes of each
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
TEMPLATES = "additional_chat_templates"  # a directory of checkpoints that no bundle has, and that would be used
HEADER_BYTES, TENSOR_BYTES = 65_536, 512  # of a file's header at the most: of all, and of each tensor in it
TRUNK_FILE = "trunk.safetensors"
CODECS = {16: "bfloat16"}  # by width; every other width is affine
PROJECTIONS = ("gate", "up", "down")


@dataclass(frozen=True, slots=True)
class Expert:
    """One record: where it is and how it is packed."""

    layer: int
    expert: int
    widths: tuple[int, int, int]  # bits of gate, up, down
    group: int
    file: int
    offset: int  # bytes
    nbytes: int  # padding included
    checksum: int
    frequency: float  # share of its layer's routed tokens during calibration; 0 when there was none


@dataclass(frozen=True, slots=True)
class TrunkTensor:
    """One trunk tensor; offsets are bytes from the start of the file, scales and biases only below width 16."""

    name: str
    rows: int
    cols: int
    width: int
    group: int
    codes: int
    scales: int
    biases: int


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
    experts: dict[tuple[int, int], Expert]  # by layer and expert, in that order
    copies: dict[str, int]  # bytes of each copied file
    unlisted: tuple[str, ...] = ()  # files of COPIED that are used, though bundle.json does not list them
    pruning: Pruning | None = None

    @classmethod
    def open(cls, path: str | Path) -> "Bundle":
        """Read and check a bundle's tables.

        Raises FileNotFoundError for a missing part and ValueError for a damaged, edited or newer bundle.
        """
        path = find_model(path)
        if not path.is_dir():
            raise FileNotFoundError(f"{path}: no such bundle directory; make one with `edge-moe compress MODEL {path}`")
        if not (path / TABLE_FILE).is_file():
            _raise_for_checkpoint(path)
        table, read = read_table(path), Reader(path / TABLE_FILE)
        copies = _check_copies(path, table, read)
        unlisted = _unlisted(path, table)
        config = _without_dropped(load_config(path), table, read)
        trunk, trunk_bytes, trunk_checksum = _read_trunk(path, config, table, read)
        files, experts = _read_experts(path, config, table, read)
        table["experts"].pop("records")  # they are in `experts` now; thousands of dictionaries weigh megabytes
        pruning = read_pruning(path, config, table)
        of_trunk = (trunk, trunk_bytes, trunk_checksum)
        return cls(path, config, table, *of_trunk, files, experts, copies, unlisted, pruning)

    @property
    def expert_bytes(self) -> int:
        return sum(expert.nbytes for expert in self.experts.values())

    @property
    def nbytes(self) -> int:
        """Trunk and experts."""
        return self.trunk_bytes + self.expert_bytes

    @property
    def bits_per_weight(self) -> float:
        """Mean over the weights of the experts, with scales, biases and padding."""
        return 8 * self.expert_bytes / (len(self.experts) * self.config.expert_weights)

    def record_table(self) -> tuple[np.ndarray, np.ndarray]:
        """What the engine wants, layer by layer: int64 (experts, 8) and frequencies float32 (experts,)."""
        count = len(self.experts)
        records, frequency = np.zeros((count, 8), np.int64), np.zeros(count, np.float32)
        for at, e in enumerate(self.experts.values()):
            records[at] = (e.file, e.offset, e.nbytes, e.checksum, *e.widths, e.group)
            frequency[at] = e.frequency
        return records, frequency


def _raise_for_checkpoint(path: Path) -> None:
    """Raise ValueError for a directory with a model that is not compressed, or that cannot be."""
    config = path / "config.json"
    if not config.is_file():
        raise_if_other_format(path)
        return
    raw = read_json(config)
    check_quantised(raw, str(config))
    parse_config(raw, str(config))
    raise ValueError(f"{path}: this is not a bundle; make one with `edge-moe compress {path} OUT`")


def verify(bundle: Bundle) -> Iterator[tuple[str, int]]:
    """Read every byte of a bundle in pieces and check it; yields (what was checked, its bytes) as it goes.

    Raises ValueError naming the first part that does not match, OSError where one cannot be read.
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


def parts_to_verify(bundle: Bundle) -> int:
    """How many parts verify() yields."""
    learned = bundle.pruning is not None and bool(bundle.pruning.learned)
    return len(bundle.copies) + 1 + learned + len(bundle.experts)


def _checksum(path: Path, offset: int, nbytes: int) -> tuple[int, int]:
    """Bytes that a part of a file has, and their CRC-32C."""
    got = checksum = 0
    for piece in pieces(path, offset, nbytes):
        got, checksum = got + len(piece), _core.crc32c(piece, checksum)
    return got, checksum


def _check_copies(path: Path, table: dict, read: Reader) -> dict[str, int]:
    """config.json and the tokenizer files decide what the numbers mean: they must be the ones that were copied.

    Returns the bytes of each.
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
    """The size of a copied file, which must be one that such a file can have."""
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
    """Names of COPIED that are there and not in the table; a bundle whose table has sizes has none."""
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
    """config.json's model with `kept` and `layer_top_k` by the table's `dropped` and `top_k`."""
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


def _read_trunk(path: Path, config: ModelConfig, table: dict, read: Reader):
    entry = read.get(table, "trunk", dict)
    file, shapes, tensors = path / TRUNK_FILE, trunk_shapes(config), []
    stored = _header_of(file, read.count(entry, "bytes"), 3 * len(shapes))
    widths = read.get(entry, "tensors", dict)
    for name, shape in shapes.items():
        width = read.count(read.get(widths, name, dict), "width", 32)
        rows, cols = shape if len(shape) == 2 else (1, shape[0])
        must_be_float = len(shape) == 1 or name.endswith("router")
        if width not in (*_core.WIDTHS, 32) or (width == 32) != must_be_float:
            raise ValueError(f"{read.path}: width {width} of {name} is not possible; {REMEDY}")
        if width >= 16:
            part = _part(file, stored, name, {16: "BF16", 32: "F32"}[width], shape)
            tensors.append(TrunkTensor(name, rows, cols, width, 0, part.offset, 0, 0))
            continue
        group = _group(read, widths[name], cols)
        codes = _part(file, stored, f"{name}.codes", "U32", (rows, cols * width // 32))
        scales = _part(file, stored, f"{name}.scales", "BF16", (rows, cols // group))
        biases = _part(file, stored, f"{name}.biases", "BF16", (rows, cols // group))
        tensors.append(TrunkTensor(name, rows, cols, width, group, codes.offset, scales.offset, biases.offset))
    return tuple(tensors), read.count(entry, "bytes"), read.checksum(entry)


def _read_experts(path: Path, config: ModelConfig, table: dict, read: Reader):
    entry = read.get(table, "experts", dict)
    alignment = read.count(entry, "alignment")
    if alignment not in (_core.SMALL_ALIGNMENT, _core.DATA_ALIGNMENT):
        raise ValueError(f"{read.path}: record alignment {alignment} is not possible; {REMEDY}")
    listed, rows = read.get(entry, "files", list), read.get(entry, "records", list)
    if len(rows) != len(config.moe_layers):
        raise ValueError(
            f"{read.path}: records of {len(rows)} layers, config.json has {len(config.moe_layers)} with experts; "
            f"{REMEDY}"
        )
    experts, in_file = {}, [[] for _ in listed]
    for layer, row in zip(config.moe_layers, rows, strict=True):
        count = config.experts_of(layer)
        if not isinstance(row, list) or len(row) != count:
            raise ValueError(f"{read.path}: layer {layer} needs {count} records; {REMEDY}")
        for index, item in enumerate(row):
            expert = _read_expert(read, config, layer, index, item, len(listed), alignment)
            experts[layer, index] = expert
            in_file[expert.file].append(expert)
    files = [path / read.file_name(item, "name") for item in listed]
    if len(set(files)) < len(files):
        raise ValueError(f"{read.path}: 'files' has a name twice; {REMEDY}")
    for file, item, its in zip(files, listed, in_file, strict=True):
        if not its:
            raise ValueError(f"{read.path}: no record is in {file.name}; {REMEDY}")
        header = _header_of(file, read.count(item, "bytes"), len(its))
        for expert in its:
            name = f"layers.{expert.layer}.experts.{expert.expert}"
            part = _part(file, header, name, "U8", (expert.nbytes,))
            if part.offset != expert.offset:
                raise ValueError(
                    f"{file}: {name} starts at byte {part.offset:,}, bundle.json says {expert.offset:,}; {REMEDY}"
                )
    return tuple(files), experts


def _read_expert(read: Reader, config: ModelConfig, layer, index, item, files: int, alignment: int) -> Expert:
    where = f"expert {index} of layer {layer}"
    widths = tuple(read.get(item, "widths", list))
    if len(widths) != 3 or any(type(width) is not int or width not in _core.WIDTHS for width in widths):
        raise ValueError(f"{read.path}: widths {list(widths)} of {where} are not three of {_core.WIDTHS}; {REMEDY}")
    codecs = read.get(item, "codecs", list)
    if codecs != [codec_of(width) for width in widths]:
        raise ValueError(f"{read.path}: codecs {codecs} of {where} are not known; upgrade edge-moe")
    quantised = any(width < 16 for width in widths)
    group = _group(read, item, config.dim, config.expert_hidden) if quantised else 64
    offset, nbytes = read.count(item, "offset"), read.count(item, "bytes")
    wanted = record_bytes(config, widths, group, alignment)
    if nbytes != wanted or offset % alignment:
        raise ValueError(
            f"{read.path}: {where} has {nbytes:,} bytes at {offset:,}, expected {wanted:,} "
            f"at a multiple of {alignment:,}; {REMEDY}"
        )
    frequency = item.get("frequency", 0)
    if not is_number(frequency) or not 0 <= frequency <= 1:
        raise ValueError(f"{read.path}: frequency of {where} is not from 0 to 1; {REMEDY}")
    file = read.count(item, "file", files - 1)
    return Expert(layer, index, widths, group, file, offset, nbytes, read.checksum(item), float(frequency))


def dropped_keys(config: ModelConfig) -> dict:
    """bundle.json's keys about dropped experts; lists are by layer with experts, `top_k` is there if it changed."""
    everything = set(range(config.experts))
    dropped = [sorted(everything.difference(config.kept[layer])) for layer in config.moe_layers if config.kept]
    keys = {"dropped": dropped if any(dropped) else []}
    top_k = [config.top_k_of(layer) for layer in config.moe_layers]
    return keys | ({"top_k": top_k} if any(k != config.top_k for k in top_k) else {})


def codec_of(width: int) -> str:
    return CODECS.get(width, "affine")


def record_bytes(config: ModelConfig, widths: tuple[int, int, int], group: int, alignment: int) -> int:
    """Bytes of one expert's record at these widths, padding included."""
    nbytes, _ = _core.record_layout(config.dim, config.expert_hidden, list(widths), group)
    return -(-nbytes // alignment) * alignment


def record_alignment(config: ModelConfig) -> int:
    """What a new bundle's records are padded to: Apple's page, or 4 KiB where that would waste over 1 %.

    Records of 4 M weights have at least 750 kB at 1 bit, of which half of 16 KiB is 1 %.
    """
    return _core.DATA_ALIGNMENT if config.expert_weights >= 4_000_000 else _core.SMALL_ALIGNMENT


def _group(read: Reader, item: dict, *cols: int) -> int:
    group = read.count(item, "group")
    if group not in _core.GROUPS or any(n % group for n in cols):
        raise ValueError(f"{read.path}: group {group} does not divide {' and '.join(map(str, cols))}; {REMEDY}")
    return group


def _header_of(path: Path, nbytes: int, tensors: int) -> dict[str, Stored]:
    """The header of a listed file of so many bytes and tensors."""
    size = real_path(path.parent, path.name, LISTED).stat().st_size
    if size != nbytes:
        raise ValueError(f"{path}: has {size:,} bytes, expected {nbytes:,}; {REMEDY}")
    return read_header(path, REMEDY, HEADER_BYTES + TENSOR_BYTES * tensors)


def _part(path: Path, stored: dict[str, Stored], name: str, dtype: str, shape: tuple[int, ...]) -> Stored:
    part = stored.get(name)
    if part is None:
        raise ValueError(f"{path}: tensor {name} is missing; {REMEDY}")
    if part.dtype != dtype or part.shape != shape:
        raise ValueError(
            f"{path}: tensor {name} is {part.dtype} {part.shape}, bundle.json makes it {dtype} {shape}; {REMEDY}"
        )
    if part.offset % {"F32": 4, "U32": 4, "BF16": 2, "U8": 1}[dtype]:
        raise ValueError(f"{path}: tensor {name} starts at byte {part.offset:,}, which is not aligned; {REMEDY}")
    return part
