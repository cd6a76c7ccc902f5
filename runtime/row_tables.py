"""Tables of n-gram embeddings in a bundle: files of which single rows are read, each with a checksum of its own.

A table has a file, tables-0000I-of-0000N.safetensors, with one U8 tensor (rows, bytes of a row); devices/format.h has a
row's layout. bundle.json lists under `tables` the file, its bytes and how the rows are encoded, table by table.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .. import _core
from .bundle_part import Part
from .bundle_records import header_of, part_of, read_encoding
from .bundle_table import REMEDY, Reader
from .codecs import Encoding, as_table
from .config import ModelConfig
from .files import pieces

STEP_ROWS = 1 << 16  # read or written at a time


@dataclass(frozen=True, slots=True)
class RowTable:
    """One table of a bundle."""

    name: str  # canonical: layers.1.ngrams.table
    path: Path
    offset: int  # of the first row, in bytes
    rows: int
    cols: int
    encoding: Encoding
    nbytes: int  # of the file

    @property
    def row_bytes(self) -> int:
        return row_bytes(self.encoding, self.cols)

    def as_row(self) -> tuple:
        """The table in the engine's form."""
        return str(self.path), self.offset, self.rows, self.cols, self.encoding

    def read(self, first: int, count: int) -> np.ndarray:
        """Rows as they are stored, uint8 (count, row_bytes), checked. Raises ValueError for a damaged one."""
        size = self.row_bytes
        data = b"".join(pieces(self.path, self.offset + first * size, count * size))
        rows = np.frombuffer(data[: len(data) // size * size], np.uint8).reshape(-1, size)
        sums = rows[:, size - _core.ROW_CHECKSUM :].copy().view(np.uint32)[:, 0]
        wrong = np.flatnonzero(_core.row_checksums(rows, first) != sums)
        if len(rows) < count or wrong.size:
            row = first + (int(wrong[0]) if wrong.size else len(rows))
            raise ValueError(f"{self.path}: row {row:,} does not match its checksum; {REMEDY}")
        return rows

    def verify(self) -> Iterator[tuple[str, int]]:
        """Read and check all rows; yields (name, bytes) of the parts checked."""
        for first in range(0, self.rows, STEP_ROWS):
            yield self.name, self.read(first, min(STEP_ROWS, self.rows - first)).nbytes


def row_bytes(encoding: Encoding, cols: int) -> int:
    """The bytes of one row of a table, its checksum included."""
    return _core.row_layout(encoding, cols)[0]


def read_tables(
    path: Path, config: ModelConfig, table: dict, read: Reader, part: Part | None = None
) -> tuple[RowTable, ...]:
    """Read the tables that bundle.json lists, which must be those of the model, or of the layers of a part."""
    shapes = {name: it for name, it in config.tables.items() if part is None or part.has(name, config.tied_head)}
    listed = read.get(table, "tables", list) if shapes or "tables" in table else []
    if len(listed) != len(shapes):
        whose = "config.json" if part is None else "the part"
        raise ValueError(f"{read.path}: has {len(listed)} tables, {whose} has {len(shapes)}; {REMEDY}")
    found = []
    for item, (name, (rows, cols)) in zip(listed, shapes.items(), strict=True):
        encoding = read_encoding(read, item, name, cols)
        file, nbytes = path / read.file_name(item, "name"), read.count(item, "bytes")
        part = part_of(file, header_of(file, nbytes, 1), name, "U8", (rows, row_bytes(encoding, cols)))
        found.append(RowTable(name, file, part.offset, rows, cols, encoding, nbytes))
    if len({one.path for one in found}) < len(found):
        raise ValueError(f"{read.path}: 'tables' has a name twice; {REMEDY}")
    return tuple(found)


def as_listed(tables: tuple[RowTable, ...]) -> list[dict]:
    """The tables as written in bundle.json."""
    return [{"name": one.path.name, "bytes": one.nbytes, **as_table(one.encoding)} for one in tables]
