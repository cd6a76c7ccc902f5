"""Rounding the tables of n-gram embeddings to nearest, a few rows at a time."""

from collections.abc import Callable

from ...runtime.row_tables import RowTable
from ..writing.writer import BundleWriter
from .quantise import quantise

STEP_VALUES = 1 << 24  # of a table that are in memory at a time


def write_table(
    writer: BundleWriter, table: RowTable, weights, threads: int, tell: Callable[[int], None] = lambda rows: None
) -> None:
    """Write a table. weights: has table_part(name, first, count), float32 (count, cols); tell: called with the rows
    done."""
    step, encoding = max(STEP_VALUES // table.cols, 1), table.encoding
    for first in range(0, table.rows, step):
        values = weights.table_part(table.name, first, min(step, table.rows - first))
        packed = quantise(values, encoding.width, encoding.group, search=False, threads=threads)
        writer.write_rows(table, first, packed)
        tell(first + len(values))
    writer.finish_table(table)
