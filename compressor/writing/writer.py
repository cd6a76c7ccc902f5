"""Writing a bundle: layer by layer under a temporary name, renamed when it is complete.

All sizes are known before the first byte is written, so every header comes first and nothing is moved later. The
directory gets its real name only when every file is on disk; after any error the temporary one is removed. A bundle
that is replaced is there until the new one is whole.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

import numpy as np

from ... import __version__, _core
from ...runtime.bundle import dropped_keys
from ...runtime.bundle_records import TRUNK_FILE, encoded_bytes, layout_of, record_alignment
from ...runtime.bundle_table import table_checksum
from ...runtime.codecs import (
    PROJECTIONS,
    Encoding,
    as_table,
    encoding_of,
    layout_table,
    padded_bytes,
    trunk_parts,
)
from ...runtime.config import ModelConfig, trunk_shapes
from ...runtime.row_tables import RowTable, as_listed, row_bytes
from ...runtime.tensorfile import bytes_of, make_header
from ..files import named, sync
from ..source.copied_files import contents
from . import own

BLOCK_BYTES = 1 << 24  # of a file that are read at once
SHARD_BYTES = 4_000_000_000  # an expert file ends with the record that passes this size


@dataclass(frozen=True, slots=True)
class Packing:
    """How a matrix or an expert is packed: widths in bits (one, or gate, up, down), and inputs per scale."""

    widths: tuple[int, ...]
    group: int
    codec: str = ""  # empty: the one that each width implies

    @property
    def encodings(self) -> tuple[Encoding, ...]:
        if self.codec:
            return tuple(Encoding(self.codec, width, self.group) for width in self.widths)
        return tuple(encoding_of(width, self.group) for width in self.widths)


def table_packing(embedding: Packing, cols: int) -> Packing:
    """How the rows of a table are packed: as the embedding, in groups that divide a row."""
    fitting = max((group for group in _core.GROUPS if group <= embedding.group and not cols % group), default=None)
    return Packing(embedding.widths, fitting, embedding.codec) if fitting else Packing((16,), 0)


KEPT = Packing((4, 4, 4), 32, "mxfp4")  # of an expert whose codes are those of the checkpoint


@dataclass(slots=True)
class Quantised:
    """The parts of a packed matrix: codes, uint8 (rows, bytes); scales and biases, bfloat16 bits (rows, groups), or
    scales that are exponents, uint8 (rows, groups), without biases."""

    codes: np.ndarray
    scales: np.ndarray | None = None
    biases: np.ndarray | None = None


@dataclass(slots=True)
class BundleWriter:
    """A bundle being written; a context manager after which OUT is complete or does not exist.

    config: with `kept` and `layer_top_k` as the bundle is to have them; routers come sliced to the experts kept.
    trunk: packing of each trunk tensor by name; experts: packing of each expert by (layer, index among those kept).
    Raises FileExistsError when OUT is there already and OSError when the disk is too small or fills up.
    """

    out: Path
    source: Path  # the checkpoint's directory, for the copied files
    config: ModelConfig
    trunk: dict[str, Packing]
    experts: dict[tuple[int, int], Packing]
    frequency: dict[tuple[int, int], float] = field(default_factory=dict)
    extra: dict = field(default_factory=dict)  # further keys of bundle.json: calibration, certificate
    resumable: bool = False  # keep files of an earlier run, and leave them there after an error
    begun: bool = False  # an earlier run has written files, which must be there
    replace: bool = False  # replace an existing bundle `out`
    trunk_written: dict[str, int] = field(default_factory=dict)  # CRC-32C by name
    _partial: Path = None
    _trunk_parts: dict = field(default_factory=dict)
    _alignment: int = 0
    _files: list = field(default_factory=list)
    _records: dict = field(default_factory=dict)  # (layer, index) -> (file, offset, bytes)
    _checksums: dict = field(default_factory=dict)
    _trunk_checksum: int = 0
    _trunk_bytes: int = 0
    _trunk_header: bytes = b""
    tables: tuple[RowTable, ...] = ()  # of n-gram embeddings
    _table_headers: list[bytes] = field(default_factory=list)
    tables_written: set[str] = field(default_factory=set)  # by name
    _handles: dict = field(default_factory=dict)
    _writing: Lock = field(default_factory=Lock)  # for seek and write together

    def __enter__(self) -> "BundleWriter":
        self.out = Path(self.out)
        own.check_name(self.out)
        if self.out.exists() or self.out.is_symlink():
            if not self.replace:
                raise FileExistsError(f"{self.out}: exists already; choose another name or remove it")
            own.check_bundle(self.out)
            own.check(self._old)
        self._partial = self.out.with_name(self.out.name + ".partial")
        if self.resumable:
            own.check(self._partial)
        else:
            own.discard(self._partial)  # of a run that was killed
        self._lay_out()
        if self.begun:
            self._check_what_is_there()
        own.make(self._partial)
        try:
            self._reserve()
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(self, kind, error, trace) -> None:
        for handle in self._handles.values():
            with suppress(OSError):  # of a full disk; finish() has flushed what counts
                handle.close()
        self._handles.clear()
        if kind is not None and not self.resumable:
            own.discard(self._partial)
        if isinstance(error, OSError):
            with named(self.out):
                raise error

    def write_trunk(self, name: str, tensor: Quantised) -> None:
        """Write one trunk tensor, in any order, from any thread."""
        handle, checksum = self._handle(TRUNK_FILE), 0
        for part, offset, nbytes in self._trunk_parts[name]:
            data = np.ascontiguousarray(getattr(tensor, part)).view(np.uint8).reshape(-1)
            if data.nbytes != nbytes:
                raise AssertionError(f"{name}.{part} has {data.nbytes} bytes, planned {nbytes}")
            self._write(handle, offset, data)
            checksum = _core.crc32c_array(data, checksum)
        self.trunk_written[name] = checksum

    def write_rows(self, table: RowTable, first: int, packed: Quantised) -> None:
        """Write some rows of a table, from row `first` on."""
        size, parts = _core.row_layout(table.encoding, table.cols)
        rows = np.zeros((packed.codes.nbytes // parts["codes"][1], size), np.uint8)
        for part, (offset, nbytes) in parts.items():
            its = np.ascontiguousarray(getattr(packed, part))
            rows[:, offset : offset + nbytes] = its.view(np.uint8).reshape(len(rows), nbytes)
        sums = _core.row_checksums(rows, first)
        rows[:, size - _core.ROW_CHECKSUM :] = sums[:, None].view(np.uint8)
        self._write(self._handle(table.path.name), table.offset + first * size, rows.reshape(-1))

    def finish_table(self, table: RowTable) -> None:
        """Sync a table whose rows were all written."""
        self.flush()
        self.tables_written.add(table.name)

    def flush(self) -> None:
        """Sync what was written to disk."""
        for handle in self._handles.values():
            handle.flush()
            os.fsync(handle.fileno())

    def checksums(self, layer: int) -> dict[int, int]:
        """The checksums of a layer's records that were written, by expert."""
        return {index: checksum for (at, index), checksum in self._checksums.items() if at == layer}

    def restore(self, layer: int, checksums: dict[int, int], trunk: dict[str, int]) -> None:
        """Accept a layer's records and trunk tensors of an earlier run, after reading and checking them.

        Raises ValueError where one is not what that run wrote.
        """
        for index, checksum in checksums.items():
            file, offset, nbytes = self._records[layer, index]
            self._check(self._files[file][0], [(offset, nbytes)], checksum, f"expert {index} of layer {layer}")
            self._checksums[layer, index] = checksum
        for name in trunk.keys() - self.trunk_written.keys():
            parts = [(offset, nbytes) for _, offset, nbytes in self._trunk_parts[name]]
            self._check(TRUNK_FILE, parts, trunk[name], f"tensor {name}")
            self.trunk_written[name] = trunk[name]

    def _check(self, name: str, parts: list[tuple[int, int]], wanted: int, what: str) -> None:
        handle, checksum = self._handle(name), 0
        for offset, nbytes in parts:
            handle.seek(offset)
            for done in range(0, nbytes, BLOCK_BYTES):
                block = np.frombuffer(handle.read(min(BLOCK_BYTES, nbytes - done)), np.uint8)
                checksum = _core.crc32c_array(block, checksum)
        if checksum != wanted:
            raise ValueError(
                f"{self._partial / name}: {what} is not what the unfinished run wrote; remove its .work to start anew"
            )

    def write_expert(
        self, layer: int, index: int, matrices: list[Quantised], output_bias: Sequence[np.ndarray | None] = ()
    ) -> None:
        """Write an expert's record: gate, up, down, and the float32 output bias (rows,) of each if the model has it."""
        file, offset, nbytes = self._records[layer, index]
        record = np.zeros(nbytes, np.uint8)
        for name, (at, part_bytes) in self._layout_of(self.experts[layer, index]).parts.items():
            projection, part = name.split(".")
            which = PROJECTIONS.index(projection)
            values = output_bias[which] if part == "output_bias" else getattr(matrices[which], part)
            record[at : at + part_bytes] = np.ascontiguousarray(values).view(np.uint8).reshape(-1)
        self._checksums[layer, index] = _core.crc32c_array(record)
        handle = self._handle(self._files[file][0])
        self._write(handle, offset, record)

    def _layout_of(self, packing: Packing) -> _core.RecordLayout:
        return layout_of(self.config, packing.encodings)

    def _write(self, handle, offset: int, data: np.ndarray) -> None:
        with self._writing:
            handle.seek(offset)
            handle.write(data.data)

    def finish(self, publish: Callable[[str], None] | None = None) -> None:
        """Write bundle.json, sync everything to disk and give the directory its final name.

        publish: called with the checksum that bundle.json has when nothing but the name is missing. Raises ValueError
        where the temporary directory has a file that is not of this bundle.
        """
        missing = self.experts.keys() - self._checksums.keys()
        if missing:
            raise AssertionError(f"{len(missing)} experts were not written")
        if missing := self.trunk.keys() - self.trunk_written:
            raise AssertionError(f"{len(missing)} trunk tensors were not written, {min(missing)} among them")
        if missing := {table.name for table in self.tables} - self.tables_written:
            raise AssertionError(f"{len(missing)} tables were not written, {min(missing)} among them")
        copies = {}
        for name, content in contents(self.source, self.config.tied_head).items():
            (self._partial / name).write_bytes(content)
            copies[name] = hashlib.sha256(content).hexdigest()
        self._handle(TRUNK_FILE).flush()
        self._trunk_checksum = _file_checksum(self._partial / TRUNK_FILE)
        table = self._table(copies)
        (self._partial / "bundle.json").write_bytes(table_bytes(table))
        self.flush()
        names = {*copies, "bundle.json", TRUNK_FILE, own.MARK, *(name for name, _, _ in self._headers())}
        if strangers := sorted(set(os.listdir(self._partial)) - names):
            raise ValueError(f"{self._partial / strangers[0]}: edge-moe did not write this; move it away and go on")
        for path in (*(self._partial / name for name in (*copies, "bundle.json")), self._partial):
            sync(path)
        if publish:
            publish(table_checksum(table))
        self._rename()

    @property
    def _old(self) -> Path:
        """The name of a bundle while it is being replaced."""
        return self.out.with_name(self.out.name + ".old")

    def _rename(self) -> None:
        if self.out.exists():
            own.check_bundle(self.out)
            own.mark(self.out)
            os.rename(self.out, self._old)
        os.rename(self._partial, self.out)
        own.unmark(self.out)
        sync(self.out.parent)
        if self.replace:
            own.discard(self._old)

    def _lay_out(self) -> None:
        """Choose the files, and the position of each record."""
        expected = {(layer, e) for layer in self.config.moe_layers for e in range(self.config.experts_of(layer))}
        if self.experts.keys() != expected:
            raise AssertionError(f"{len(self.experts)} experts to write, config has {len(expected)}")
        self._alignment = record_alignment(self.config)
        sizes = {key: padded_bytes(self._layout_of(packing), self._alignment) for key, packing in self.experts.items()}
        shards, filled = [[]], 0
        for key, size in sizes.items():
            if filled > SHARD_BYTES:
                shards.append([])
                filled = 0
            shards[-1].append(key)
            filled += size
        for number, keys in enumerate(shards):
            name = f"experts-{number + 1:05d}-of-{len(shards):05d}.safetensors"
            tensors = [(f"layers.{layer}.experts.{e}", "U8", (sizes[layer, e],), sizes[layer, e]) for layer, e in keys]
            header = make_header(tensors, _core.DATA_ALIGNMENT)
            at = len(header)
            for key in keys:
                self._records[key] = (number, at, sizes[key])
                at += sizes[key]
            self._files.append((name, header, at))
        self._lay_out_trunk()
        self._lay_out_tables()

    def _lay_out_tables(self) -> None:
        found, shapes, packing = [], self.config.tables, self.trunk["embedding"]
        for number, (name, (rows, cols)) in enumerate(shapes.items(), start=1):
            (encoding,) = table_packing(packing, cols).encodings
            size = row_bytes(encoding, cols)
            file = self._partial / f"tables-{number:05d}-of-{len(shapes):05d}.safetensors"
            header = make_header([(name, "U8", (rows, size), rows * size)], _core.SMALL_ALIGNMENT)
            self._table_headers.append(header)
            found.append(RowTable(name, file, len(header), rows, cols, encoding, len(header) + rows * size))
        self.tables = tuple(found)

    def _check_what_is_there(self) -> None:
        """Raise ValueError if a file of the earlier run is missing or has another length."""
        for name, _, size in self._headers():
            file = self._partial / name
            if not file.is_file() or file.stat().st_size != size:
                raise ValueError(f"{file}: what the unfinished run wrote is gone; remove its .work to start anew")

    def _reserve(self) -> None:
        """Write the headers and give each file its full length, so that a full disk is noticed now."""
        needed = sum(size for _, _, size in self._headers())
        there = sum(file.stat().st_size for file in self._partial.iterdir())
        free = shutil.disk_usage(self._partial).free
        if needed > free + there:
            raise OSError(
                f"{self.out}: needs {math.ceil(needed / 1e6):,} MB, the disk has {free // 1_000_000:,} MB free; "
                "make room or choose another disk"
            )
        for name, header, size in self._headers():
            handle = self._handle(name)
            handle.write(header)
            handle.truncate(size)

    def _headers(self) -> list[tuple[str, bytes, int]]:
        """Name, header and bytes of each file with weights."""
        tables = [(t.path.name, header, t.nbytes) for t, header in zip(self.tables, self._table_headers, strict=True)]
        return [(TRUNK_FILE, self._trunk_header, self._trunk_bytes), *self._files, *tables]

    def _lay_out_trunk(self) -> None:
        shapes = trunk_shapes(self.config)
        # Each part is aligned to its type, and codes to 64 bytes, which a GPU reads at once: codes come first, and of
        # these the ones whose length is a multiple of 64 bytes.
        tensors = []
        for name, shape in shapes.items():
            (encoding,) = self.trunk[name].encodings
            for part, stored_as, dtype, its in trunk_parts(name, shape, encoding):
                tensors.append((name, part, stored_as, dtype, its, bytes_of(dtype, its)))
        tensors.sort(
            key=lambda tensor: (("U32", "F32", "BF16", "U8").index(tensor[3]), tensor[5] % _core.PART_ALIGNMENT > 0)
        )
        header = make_header([tensor[2:] for tensor in tensors], _core.PART_ALIGNMENT)
        at, self._trunk_parts = len(header), {name: [] for name in shapes}
        for name, part, _, _, _, nbytes in tensors:
            self._trunk_parts[name].append((part, at, nbytes))
            at += nbytes
        self._trunk_header, self._trunk_bytes = header, at

    def _table(self, copies: dict) -> dict:
        packings = {packing: number for number, packing in enumerate(dict.fromkeys(self.experts.values()))}
        rows = []
        for layer in self.config.moe_layers:
            row = []
            for index in range(self.config.experts_of(layer)):
                file, offset, _ = self._records[layer, index]
                row.append(
                    {
                        "layout": packings[self.experts[layer, index]],
                        "file": file,
                        "offset": offset,
                        "crc32c": f"{self._checksums[layer, index]:08x}",
                        "frequency": round(self.frequency.get((layer, index), 0.0), 6),
                    }
                )
            rows.append(row)
        layouts = [layout_table(packing.encodings, self._layout_of(packing), self._alignment) for packing in packings]
        return {
            "format": "emoe",
            "version": _core.FORMAT_VERSION,
            "tool": f"edge-moe {__version__}",
            "copies": copies,
            "copy_bytes": {name: (self._partial / name).stat().st_size for name in copies},
            "trunk": {
                "bytes": self._trunk_bytes,
                "crc32c": f"{self._trunk_checksum:08x}",
                "tensors": {name: as_table(packing.encodings[0]) for name, packing in self.trunk.items()},
            },
            "experts": {
                "alignment": self._alignment,
                "files": [{"name": name, "bytes": size} for name, _, size in self._files],
                "layouts": layouts,
                "records": rows,
            },
            **({"tables": as_listed(self.tables)} if self.tables else {}),
            **dropped_keys(self.config),
            "pruning": None,
            **self.extra,
        }

    def _handle(self, name: str):
        if name not in self._handles:
            fresh = 0 if self.resumable else os.O_TRUNC
            handle = os.open(self._partial / name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | fresh, 0o666)
            self._handles[name] = open(handle, "rb+")  # noqa: SIM115 (closed by __exit__)
        return self._handles[name]


def table_bytes(table: dict) -> bytes:
    """The content of bundle.json, with its checksum."""
    return (json.dumps({**table, "checksum": table_checksum(table)}, indent=1) + "\n").encode()


def _file_checksum(path: Path) -> int:
    checksum = 0
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            checksum = _core.crc32c(block, checksum)
    return checksum


def record_bytes_of(config: ModelConfig, packing: Packing) -> int:
    """Bytes of an expert's record in a new bundle, with padding."""
    return encoded_bytes(config, packing.encodings, record_alignment(config))
