"""Rounding the tables of n-gram embeddings to nearest, a few rows at a time."""

from collections.abc import Callable

from ..writing.writer import BundleWriter
from .quantise import quantise

STEP_VALUES = 1 << 24  # of a table that are in memory at a time


def write_tables(
    writer: BundleWriter, weights, threads: int, tell: Callable[[str, int], None] = lambda name, rows: None
) -> None:
    """Write the tables that have not been written. weights: has table_part(name, first, count), float32 (count, cols);
    tell: called with a table's name and how many of its rows are done."""
    for table in writer.tables:
        if table.name in writer.tables_written:
            continue
        step, encoding = max(STEP_VALUES // table.cols, 1), table.encoding
        for first in range(0, table.rows, step):
            values = weights.table_part(table.name, first, min(step, table.rows - first))
            packed = quantise(values, encoding.width, encoding.group, search=False, threads=threads)
            writer.write_rows(table, first, packed)
            tell(table.name, first + len(values))
        writer.finish_table(table)
