"""Streams: the hidden states of calibration text between layers, in memory or, if they do not fit, in a file.

A stream is (rows, dim) float32, one row per token, one sequence after another. Layers read it in blocks of whole
sequences, experts by scattered rows. Files are read and written, not mapped: mapped pages would count as memory.
"""

import os
from pathlib import Path

import numpy as np

from ... import _core
from ..files import named, write_whole

BLOCK_ROWS = 2048  # of one block in a pass over all rows


class Stream:
    """Hidden states, (rows, dim) float32, in `file`, which is overwritten, or in memory if it is None."""

    def __init__(self, rows: int, dim: int, file: Path | None = None):
        self.rows, self.dim, self.file = rows, dim, file
        self._values = np.zeros((rows, dim), np.float32) if file is None else None
        self._handle = None if file is None else open(file, "wb+", buffering=0)  # noqa: SIM115 (closed by close)
        if file is not None:
            self._handle.truncate(rows * dim * 4)

    @classmethod
    def load(cls, saved: Path, rows: int, dim: int, file: Path | None = None, checksum: int | None = None) -> "Stream":
        """Load what save() wrote. Raises ValueError if the size or the checksum, as save() returned it, differs."""
        if saved.stat().st_size != rows * dim * 4:
            raise ValueError(f"{saved}: has {saved.stat().st_size:,} bytes, expected {rows * dim * 4:,}; start again")
        stream, found = cls(rows, dim, file), 0
        with open(saved, "rb") as handle:
            for start, stop in stream.blocks():
                values = np.fromfile(handle, np.float32, (stop - start) * dim)
                found = _core.crc32c_array(values.view(np.uint8), found)
                stream.write(start, values.reshape(-1, dim))
        if checksum not in (None, found):
            stream.close()
            raise ValueError(f"{saved}: does not match its checksum; start again")
        return stream

    def blocks(self, of: int = 1):
        """Yield (start, stop) of blocks of about BLOCK_ROWS rows, each a multiple of `of` rows."""
        step = max(BLOCK_ROWS // of, 1) * of
        return ((start, min(start + step, self.rows)) for start in range(0, self.rows, step))

    def read(self, start: int, stop: int) -> np.ndarray:
        """A copy of rows start..stop."""
        if self._values is not None:
            return self._values[start:stop].copy()
        out = np.empty((stop - start, self.dim), np.float32)
        self._transfer(os.preadv, out, start)
        return out

    def write(self, start: int, values: np.ndarray) -> None:
        if self._values is not None:
            self._values[start : start + len(values)] = values
        else:
            self._transfer(os.pwritev, np.ascontiguousarray(values, np.float32), start)

    def take(self, rows: np.ndarray) -> np.ndarray:
        """A copy of the given rows, (len(rows), dim)."""
        if self._values is not None:
            return self._values[rows]
        out = np.empty((len(rows), self.dim), np.float32)
        for first, last in _runs(rows):
            self._transfer(os.preadv, out[first:last], int(rows[first]))
        return out

    def add(self, rows: np.ndarray, values: np.ndarray) -> None:
        """Add values (len(rows), dim) to the given rows, which must be distinct."""
        if self._values is not None:
            self._values[rows] += values
            return
        values = self.take(rows) + values
        for first, last in _runs(rows):
            self._transfer(os.pwritev, values[first:last], int(rows[first]))

    def save(self, path: Path) -> int:
        """Write all rows to `path` atomically and return their CRC-32C."""
        checksum = 0

        def write(handle) -> None:
            nonlocal checksum
            for start, stop in self.blocks():
                values = self.read(start, stop)
                checksum = _core.crc32c_array(values.view(np.uint8).reshape(-1), checksum)
                handle.write(values.data)

        write_whole(path, write)
        return checksum

    def close(self) -> None:
        """Free the memory, or remove the file."""
        self._values = None
        if self._handle is not None:
            self._handle.close()
            self.file.unlink(missing_ok=True)
            self._handle = None

    def _transfer(self, call, values: np.ndarray, row: int) -> None:
        view, at = memoryview(values).cast("B"), row * self.dim * 4
        while view:
            with named(self.file):
                done = call(self._handle.fileno(), [view], at)
            if not done:
                raise OSError(f"{self.file}: ended early; the file changed while in use, start again")
            view, at = view[done:], at + done


def _runs(rows: np.ndarray):
    """Yield (first, last) of the runs of consecutive numbers in `rows`."""
    breaks = np.flatnonzero(np.diff(rows) != 1) + 1
    return zip([0, *breaks.tolist()], [*breaks.tolist(), len(rows)], strict=True) if len(rows) else ()
