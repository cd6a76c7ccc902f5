"""Tables of n-gram embeddings in a checkpoint: matrices of many rows, in shards or whole, of which rows are read."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...runtime.tensorfile import Stored
from .formats import Tensor, locate
from .quantisation import Block
from .reading import read


@dataclass(frozen=True, slots=True)
class Table:
    """The tensors that have the rows of a table, one after another."""

    name: str  # canonical
    shards: tuple[Tensor, ...]

    @classmethod
    def find(
        cls,
        name: str,
        key: str,
        shape: tuple[int, int],
        stored: Mapping[str, Stored],
        blocks: tuple[Block, ...],
        directory: Path,
    ) -> "Table":
        """The table whose shards are named `key` with their number in place of `{}`, or whole without `shard_{}.`.

        Raises ValueError if it is missing or has other than shape[0] rows.
        """
        whole = key.replace("shard_{}.", "")
        keys = [whole] if whole in stored else []
        while not keys or (keys[0] != whole and key.format(len(keys)) in stored):
            keys.append(key.format(len(keys)))
        found, rows = [], 0
        for one in keys:
            of_shard = stored[one].shape[0] if one in stored and stored[one].shape else shape[0]
            if (tensor := locate(one, (of_shard, shape[1]), stored, blocks)) is None:
                raise ValueError(
                    f"{directory}: tensor {one} is missing; config.json and the weights do not belong together, or the "
                    "download is not complete"
                )
            found.append(tensor)
            rows += of_shard
        if rows != shape[0]:
            raise ValueError(
                f"{directory}: the {len(keys)} tensors {key.format('N')} have {rows:,} rows, config.json has "
                f"{shape[0]:,}; config.json and the weights do not belong together, or the download is not complete"
            )
        return cls(name, tuple(found))

    @property
    def shape(self) -> tuple[int, int]:
        return sum(one.shape[0] for one in self.shards), self.shards[0].shape[1]

    def read(self, first: int, count: int, fetch: Callable[[Tensor], None]) -> np.ndarray:
        """Read rows as float32, (count, cols). fetch: called with each tensor before it is read."""
        parts, begin = [], 0
        for shard in self.shards:
            end = begin + shard.shape[0]
            low, high = max(first, begin), min(first + count, end)
            if low < high:
                fetch(shard)
                parts.append(read(shard, low - begin, (high - low, shard.shape[1]), self.name))
            begin = end
        return np.concatenate(parts)

    def rows(self, rows: np.ndarray, fetch: Callable[[Tensor], None]) -> np.ndarray:
        """Read the given rows as float32, (len(rows), cols)."""
        different, places = np.unique(rows, return_inverse=True)
        out = np.empty((len(different), self.shape[1]), np.float32)
        ends = np.flatnonzero(np.diff(different) != 1) + 1
        for low, high in zip([0, *ends.tolist()], [*ends.tolist(), len(different)], strict=True):
            out[low:high] = self.read(int(different[low]), high - low, fetch)
        return out[places.reshape(-1)]
