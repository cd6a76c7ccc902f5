"""Where the weights of a bundle lie: the trunk's tensors and the experts' records, as listed in bundle.json.

Everything is compared with the files' headers and with config.json; no weight is read. Each record refers to one of the
table's `layouts`, which records share: the encodings of gate, up and down, and the places of their parts in the record.
"""

from dataclasses import dataclass
from pathlib import Path

from .. import _core
from .bundle_part import Part
from .bundle_table import LISTED, REMEDY, Reader, is_number, shown
from .codecs import Encoding, encoding_of, padded_bytes, record_layout, trunk_parts
from .config import ModelConfig, stays_float, trunk_shapes
from .files import real_path
from .tensorfile import NUMPY_DTYPES, Stored, read_header

HEADER_BYTES, TENSOR_BYTES = 65_536, 512  # upper bounds of a file's header: a constant, and per tensor
TRUNK_FILE = "trunk.safetensors"
MOST_LAYOUTS = 65_536


@dataclass(frozen=True, slots=True)
class Layout:
    """How the records with this layout are packed."""

    encodings: tuple[Encoding, Encoding, Encoding]  # gate, up, down
    parts: dict[str, tuple[int, int]]  # (offset, bytes) in the record by name, like "gate.codes"
    nbytes: int  # padding included


@dataclass(frozen=True, slots=True)
class Expert:
    """One record: its place and its packing."""

    layer: int
    expert: int
    layout: int  # index in the bundle's layouts
    encodings: tuple[Encoding, Encoding, Encoding]  # gate, up, down
    file: int
    offset: int  # bytes
    nbytes: int  # padding included
    checksum: int
    frequency: float  # share of its layer's routed tokens during calibration; 0 without calibration

    @property
    def widths(self) -> tuple[int, int, int]:
        gate, up, down = (encoding.width for encoding in self.encodings)
        return gate, up, down

    @property
    def group(self) -> int:
        """Inputs per scale; 0 if no matrix has scales."""
        return max(encoding.group for encoding in self.encodings)


@dataclass(frozen=True, slots=True)
class TrunkTensor:
    """One trunk tensor; offsets of its parts are bytes from the start of the file."""

    name: str
    rows: int
    cols: int
    encoding: Encoding
    offsets: tuple[int, ...]

    @property
    def width(self) -> int:
        return self.encoding.width

    @property
    def group(self) -> int:
        return self.encoding.group


def read_trunk(
    path: Path, config: ModelConfig, table: dict, read: Reader, part: Part | None = None
) -> tuple[tuple[TrunkTensor, ...], int, int]:
    """Read the trunk's tensors, the bytes of its file and its checksum. part: of a bundle that has only this."""
    entry = read.get(table, "trunk", dict)
    file, shapes, tensors = path / TRUNK_FILE, part_shapes(config, part), []
    stored = header_of(file, read.count(entry, "bytes"), 3 * len(shapes))
    encoded = read.get(entry, "tensors", dict)
    for name, shape in shapes.items():
        rows, cols = shape if len(shape) == 2 else (1, shape[0])
        encoding = read_encoding(read, read.get(encoded, name, dict), name, cols)
        if (encoding.codec == "float32") != stays_float(name, shape):
            raise ValueError(f"{read.path}: codec {encoding.codec} of {name} is not possible; {REMEDY}")
        parts = [part_of(file, stored, name, dtype, of) for _, name, dtype, of in trunk_parts(name, shape, encoding)]
        tensors.append(TrunkTensor(name, rows, cols, encoding, tuple(part.offset for part in parts)))
    return tuple(tensors), read.count(entry, "bytes"), read.checksum(entry)


def part_shapes(config: ModelConfig, part: Part | None) -> dict[str, tuple[int, ...]]:
    """The trunk_shapes() that are in a part of a bundle, or of all of it."""
    shapes = trunk_shapes(config)
    return {name: shape for name, shape in shapes.items() if part is None or part.has(name, config.tied_head)}


def read_experts(path: Path, config: ModelConfig, table: dict, read: Reader, part: Part | None = None):
    """Read the experts' files, the layouts, and the records by layer and expert."""
    layers = [layer for layer in config.moe_layers if part is None or layer in part.layers]
    entry = read.get(table, "experts", dict)
    alignment = read.count(entry, "alignment")
    if alignment not in (_core.SMALL_ALIGNMENT, _core.DATA_ALIGNMENT):
        raise ValueError(f"{read.path}: record alignment {alignment} is not possible; {REMEDY}")
    listed, rows = read.get(entry, "files", list), read.get(entry, "records", list)
    if len(rows) != len(layers):
        whose = "config.json" if part is None else "the part"
        raise ValueError(
            f"{read.path}: records of {len(rows)} layers, {whose} has {len(layers)} with experts; {REMEDY}"
        )
    layouts = _read_layouts(read, config, entry, alignment)
    experts, in_file = {}, [[] for _ in listed]
    for layer, row in zip(layers, rows, strict=True):
        count = config.experts_of(layer)
        if not isinstance(row, list) or len(row) != count:
            raise ValueError(f"{read.path}: layer {layer} needs {count} records; {REMEDY}")
        for index, item in enumerate(row):
            expert = _read_expert(read, layouts, layer, index, item, len(listed), alignment)
            experts[layer, index] = expert
            in_file[expert.file].append(expert)
    files = [path / read.file_name(item, "name") for item in listed]
    if len(set(files)) < len(files):
        raise ValueError(f"{read.path}: 'files' has a name twice; {REMEDY}")
    for file, item, its in zip(files, listed, in_file, strict=True):
        if not its:
            raise ValueError(f"{read.path}: no record is in {file.name}; {REMEDY}")
        header = header_of(file, read.count(item, "bytes"), len(its))
        for expert in its:
            name = f"layers.{expert.layer}.experts.{expert.expert}"
            part = part_of(file, header, name, "U8", (expert.nbytes,))
            if part.offset != expert.offset:
                raise ValueError(
                    f"{file}: {name} starts at byte {part.offset:,}, bundle.json says {expert.offset:,}; {REMEDY}"
                )
    return tuple(files), layouts, experts


def _read_layouts(read: Reader, config: ModelConfig, entry: dict, alignment: int) -> tuple[Layout, ...]:
    listed, layouts = read.get(entry, "layouts", list), []
    if len(listed) > MOST_LAYOUTS:
        raise ValueError(f"{read.path}: has {len(listed):,} layouts, expected at most {MOST_LAYOUTS:,}; {REMEDY}")
    cols = (config.dim, config.dim, config.expert_hidden)
    for number, item in enumerate(listed):
        where = f"layout {number}"
        matrices = read.get(item, "matrices", list)
        if len(matrices) != 3:
            raise ValueError(f"{read.path}: {where} has {len(matrices)} matrices, expected gate, up and down; {REMEDY}")
        encodings = tuple(read_encoding(read, one, where, n) for one, n in zip(matrices, cols, strict=True))
        if any(encoding.width not in _core.WIDTHS for encoding in encodings):
            widths = [encoding.width for encoding in encodings]
            raise ValueError(f"{read.path}: widths {widths} of {where} are not three of {_core.WIDTHS}; {REMEDY}")
        places = _places(read, config, encodings, item, where)
        nbytes, wanted = read.count(item, "bytes"), padded_bytes(places, alignment)
        if nbytes != wanted:
            raise ValueError(f"{read.path}: {where} has {nbytes:,} bytes, expected {wanted:,}; {REMEDY}")
        layouts.append(Layout(encodings, places.parts, nbytes))
    return tuple(layouts)


def _places(read: Reader, config: ModelConfig, encodings: tuple, item: dict, where: str) -> _core.RecordLayout:
    parts = read.get(item, "parts", dict)
    found = {}
    for name in parts:
        place = read.get(parts, name, list)
        if len(place) != 2:
            raise ValueError(f"{read.path}: part {shown(name)} of {where} is not an offset and a size; {REMEDY}")
        found[name] = (read.count(place, 0, 2**40), read.count(place, 1, 2**40))
    layout = layout_of(config, encodings)
    if found == layout.parts:
        return layout
    try:
        return layout.placed(found)
    except ValueError as error:
        raise ValueError(f"{read.path}: {where}: {error}; {REMEDY}") from None


def _read_expert(read: Reader, layouts: tuple[Layout, ...], layer, index, item, files: int, alignment: int) -> Expert:
    where = f"expert {index} of layer {layer}"
    number = read.count(item, "layout", len(layouts) - 1)
    if "widths" in item:
        raise ValueError(f"{read.path}: {where} has 'widths', which format 2 has in its layout; {REMEDY}")
    offset, layout = read.count(item, "offset"), layouts[number]
    if offset % alignment:
        raise ValueError(f"{read.path}: {where} is at {offset:,}, expected a multiple of {alignment:,}; {REMEDY}")
    frequency = item.get("frequency", 0)
    if not is_number(frequency) or not 0 <= frequency <= 1:
        raise ValueError(f"{read.path}: frequency of {where} is not from 0 to 1; {REMEDY}")
    place = (read.count(item, "file", files - 1), offset, layout.nbytes)
    return Expert(layer, index, number, layout.encodings, *place, read.checksum(item), float(frequency))


def read_encoding(read: Reader, item: dict, where: str, cols: int) -> Encoding:
    """Read an encoding from bundle.json, of a matrix with `cols` columns."""
    codec, width = read.get(item, "codec", str), read.count(item, "width", 63)
    if codec not in _core.CODECS:
        raise ValueError(f"{read.path}: codec {shown(codec)} of {where} is not known; upgrade edge-moe")
    if width not in _core.CODECS[codec][0]:
        raise ValueError(f"{read.path}: codec {codec} of {where} has no width {width}; {REMEDY}")
    encoding = Encoding(codec, width, 0)
    if not encoding.grouped:
        return encoding
    group = read.count(item, "group")
    if group not in _core.CODECS[codec][3] or cols % group:
        raise ValueError(f"{read.path}: group {group} of {where} does not divide {cols}; {REMEDY}")
    return encoding._replace(group=group)


def record_bytes(config: ModelConfig, widths: tuple[int, ...], group: int, alignment: int) -> int:
    """Bytes of one expert's record at these widths, with padding."""
    return encoded_bytes(config, tuple(encoding_of(width, group) for width in widths), alignment)


def encoded_bytes(config: ModelConfig, encodings: tuple[Encoding, ...], alignment: int) -> int:
    """Bytes of one expert's record with these encodings, with padding."""
    return padded_bytes(layout_of(config, encodings), alignment)


def layout_of(config: ModelConfig, encodings: tuple[Encoding, ...]) -> _core.RecordLayout:
    """The layout of the records of a model's experts with these encodings in a new bundle."""
    return record_layout(config.dim, config.expert_hidden, encodings, config.expert_bias, config.gated)


def record_alignment(config: ModelConfig) -> int:
    """The alignment of records in new bundles: Apple's page, or 4 KiB if padding to a page would waste over 1 %.

    A record of 4 M weights has at least 750 kB, at 1 bit; half of 16 KiB is about 1 % of that.
    """
    return _core.DATA_ALIGNMENT if config.expert_weights >= 4_000_000 else _core.SMALL_ALIGNMENT


def header_of(path: Path, nbytes: int, tensors: int) -> dict[str, Stored]:
    """Read the header of a listed file, which must have `nbytes` bytes and may have `tensors` tensors."""
    size = real_path(path.parent, path.name, LISTED).stat().st_size
    if size != nbytes:
        raise ValueError(f"{path}: has {size:,} bytes, expected {nbytes:,}; {REMEDY}")
    return read_header(path, REMEDY, HEADER_BYTES + TENSOR_BYTES * tensors)


def part_of(path: Path, stored: dict[str, Stored], name: str, dtype: str, shape: tuple[int, ...]) -> Stored:
    part = stored.get(name)
    if part is None:
        raise ValueError(f"{path}: tensor {name} is missing; {REMEDY}")
    if part.dtype != dtype or part.shape != shape:
        raise ValueError(
            f"{path}: tensor {name} is {part.dtype} {part.shape}, bundle.json makes it {dtype} {shape}; {REMEDY}"
        )
    if part.offset % NUMPY_DTYPES[dtype].itemsize:
        raise ValueError(f"{path}: tensor {name} starts at byte {part.offset:,}, which is not aligned; {REMEDY}")
    return part
