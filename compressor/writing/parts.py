"""Splitting a bundle: a directory for each of several machines, with the layers that it is to run.

Nothing is computed: tensors and records are copied, and compared with their checksums. Rows of tables have checksums of
their own, and are copied as they are. OUT gets its name when all parts are on disk.
"""

import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ... import _core
from ...runtime.bundle import Bundle, verify
from ...runtime.bundle_part import Part, part_name
from ...runtime.bundle_records import TRUNK_FILE, Expert, part_shapes
from ...runtime.bundle_table import REMEDY, TABLE_FILE
from ...runtime.codecs import as_table, layout_table, trunk_parts
from ...runtime.files import pieces
from ...runtime.pruning import MASK_FILE
from ...runtime.row_tables import as_listed
from ...runtime.tensorfile import make_header, read_header
from ..files import named, sync
from . import own
from .layer_cuts import first_layers, layer_bytes
from .writer import SHARD_BYTES, table_bytes

Progress = Callable[[str, int, int], None]  # (phase, done, total)


def split(
    bundle: str | Path, out: str | Path, shares: Sequence[float], progress: Progress | None = None
) -> dict[str, Part]:
    """Split a bundle and return the parts by the names of their directories in `out`.

    shares: of each part, relative to the others, in what is kept in memory. Raises FileExistsError if `out` is there,
    ValueError for a damaged bundle or more parts than it has layers with experts, and OSError for a full disk.
    """
    bundle, out = Bundle.open(bundle), Path(out)
    own.check_name(out)
    if out.exists() or out.is_symlink():
        raise FileExistsError(f"{out}: exists already; choose another name or remove it")
    firsts = tuple(first_layers(bundle, shares))
    whole = bundle.table["checksum"]
    parts = [Part(number, firsts, bundle.config.layer_count, whole) for number in range(len(firsts))]
    _check_room(bundle, out, len(parts))
    next(name for name, _ in verify(bundle) if name == TRUNK_FILE)  # checks the copied files and the trunk
    partial, done = out.with_name(out.name + ".partial"), 0
    own.discard(partial)
    own.make(partial)
    try:
        for part in parts:
            for nbytes in _write_part(bundle, part, partial / part_name(part.number, part.count)):
                done += nbytes
                if progress:
                    progress("split", min(done, bundle.nbytes), bundle.nbytes)
        sync(partial)
        os.rename(partial, out)
    except BaseException:
        own.discard(partial)
        raise
    own.unmark(out)
    sync(out.parent)
    return {part_name(part.number, part.count): part for part in parts}


def _check_room(bundle: Bundle, out: Path, parts: int) -> None:
    directory = next(one for one in out.absolute().parents if one.is_dir())
    begin, _, _ = layer_bytes(bundle)
    copies = sum(bundle.copies.values()) + (bundle.path / TABLE_FILE).stat().st_size
    needed = bundle.nbytes + begin * bundle.config.tied_head + parts * copies
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise OSError(
            f"{out}: needs {math.ceil(needed / 1e6):,} MB, the disk has {free // 1_000_000:,} MB free; make room or "
            "choose another disk"
        )


@contextmanager
def _synced(path: Path) -> Iterator[BinaryIO]:
    """A new file, which is on disk afterwards."""
    with named(path), open(path, "xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _write_part(bundle: Bundle, part: Part, directory: Path) -> Iterator[int]:
    """Write one part; yields bytes of weights as they are written."""
    directory.mkdir()
    trunk = yield from _write_trunk(bundle, part, directory)
    experts = yield from _write_experts(bundle, part, directory)
    tables = tuple(table for table in bundle.tables if part.has(table.name, bundle.config.tied_head))
    for table in tables:
        yield _copied(table.path, directory / table.path.name)
    for name in (*bundle.copies, *([MASK_FILE] if bundle.pruning and bundle.pruning.learned else [])):
        _copied(bundle.path / name, directory / name)
    content = {
        **{key: value for key, value in bundle.table.items() if key != "checksum"},
        "version": _core.FORMAT_VERSION,
        "part": {"number": part.number, "first_layers": list(part.first_layers), "bundle": part.bundle},
        "trunk": trunk,
        "experts": experts,
        **({"tables": as_listed(tables)} if bundle.tables else {}),
    }
    with _synced(directory / TABLE_FILE) as file:
        file.write(table_bytes(content))
    sync(directory)


def _write_trunk(bundle: Bundle, part: Part, directory: Path) -> Iterator[int]:
    """Write the trunk's tensors that a part has, in the order of the whole file, and return its entry in the table."""
    source, shapes = bundle.path / TRUNK_FILE, part_shapes(bundle.config, part)
    encodings = {one.name: one.encoding for one in bundle.trunk}
    own_names = {its[1] for name, shape in shapes.items() for its in trunk_parts(name, shape, encodings[name])}
    stored = {name: its for name, its in read_header(source, REMEDY).items() if name in own_names}
    ordered = sorted(stored.items(), key=lambda item: item[1].offset)
    header = make_header([(name, its.dtype, its.shape, its.nbytes) for name, its in ordered], _core.PART_ALIGNMENT)
    checksum, nbytes = _core.crc32c(header, 0), len(header)
    with _synced(directory / TRUNK_FILE) as file:
        file.write(header)
        for _, its in ordered:
            for piece in pieces(source, its.offset, its.nbytes):
                file.write(piece)
                checksum, nbytes = _core.crc32c(piece, checksum), nbytes + len(piece)
    yield nbytes
    tensors = {name: as_table(encodings[name]) for name in shapes}
    return {"bytes": nbytes, "crc32c": f"{checksum:08x}", "tensors": tensors}


def _write_experts(bundle: Bundle, part: Part, directory: Path) -> Iterator[int]:
    """Write the records of a part's experts, and return their entry in the table."""
    own_layers = [layer for layer in bundle.config.moe_layers if layer in part.layers]
    shards: list[list[Expert]] = [[]]
    for expert in bundle.experts.values():
        if expert.layer in part.layers:
            if sum(its.nbytes for its in shards[-1]) > SHARD_BYTES:
                shards.append([])
            shards[-1].append(expert)
    files, rows = [], {layer: [] for layer in own_layers}
    for number, shard in enumerate(shards):
        path = directory / f"experts-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors = [(f"layers.{its.layer}.experts.{its.expert}", "U8", (its.nbytes,), its.nbytes) for its in shard]
        header = make_header(tensors, _core.DATA_ALIGNMENT)
        at = len(header)
        with _synced(path) as file:
            file.write(header)
            for expert in shard:
                _copy_record(bundle, expert, file)
                rows[expert.layer].append(
                    {
                        "layout": expert.layout,
                        "file": number,
                        "offset": at,
                        "crc32c": f"{expert.checksum:08x}",
                        "frequency": expert.frequency,
                    }
                )
                at += expert.nbytes
                yield expert.nbytes
        files.append({"name": path.name, "bytes": at})
    layouts, _, _ = bundle.record_table()
    alignment = bundle.table["experts"]["alignment"]
    listed = [
        layout_table(its.encodings, places, alignment) for its, places in zip(bundle.layouts, layouts, strict=True)
    ]
    return {"alignment": alignment, "files": files, "layouts": listed, "records": list(rows.values())}


def _copy_record(bundle: Bundle, expert: Expert, file: BinaryIO) -> None:
    path, checksum, nbytes = bundle.files[expert.file], 0, 0
    for piece in pieces(path, expert.offset, expert.nbytes):
        file.write(piece)
        checksum, nbytes = _core.crc32c(piece, checksum), nbytes + len(piece)
    if (nbytes, checksum) != (expert.nbytes, expert.checksum):
        raise ValueError(
            f"{path}: expert {expert.expert} of layer {expert.layer} does not match its checksum; {REMEDY}"
        )


def _copied(source: Path, target: Path) -> int:
    """Copy a file and return its bytes."""
    nbytes = 0
    with _synced(target) as file:
        for piece in pieces(source):
            file.write(piece)
            nbytes += len(piece)
    return nbytes
