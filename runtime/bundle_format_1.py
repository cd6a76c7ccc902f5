"""Bundles of format 1, which earlier releases wrote: converts their table to format 2.

Format 1 has no layouts: each record lists the widths, codecs and group of its matrices, its parts are in the order of
new bundles, and the width of a trunk tensor determines its encoding. The bytes of weights are the same in both formats.
"""

from .. import _core
from .bundle_table import REMEDY, Reader
from .codecs import encoding_of, layout_table, record_layout
from .config import ModelConfig

WIDTHS = (1, 2, 3, 4, 5, 6, 8, 16)
OF_RECORDS = ("widths", "codecs", "group", "bytes")  # keys that layouts have in format 2


def upgraded(table: dict, config: ModelConfig, read: Reader) -> dict:
    """Convert a table of format 1 to format 2."""
    trunk, experts = read.get(table, "trunk", dict), read.get(table, "experts", dict)
    if "layouts" in experts:
        raise ValueError(f"{read.path}: bundles of format 1 have no 'layouts'; {REMEDY}")
    tensors = {name: _trunk_tensor(read, name, item) for name, item in read.get(trunk, "tensors", dict).items()}
    alignment = max(read.count(experts, "alignment"), 1)
    layouts: dict[tuple, int] = {}  # index by encodings
    rows = []
    for layer, row in enumerate(read.get(experts, "records", list)):
        if not isinstance(row, list):
            raise ValueError(f"{read.path}: the records of a layer are no list; {REMEDY}")
        rows.append([_record(read, f"record {n} of row {layer}", item, layouts) for n, item in enumerate(row)])
    shape = (config.dim, config.expert_hidden)
    listed = [layout_table(encodings, record_layout(*shape, encodings), alignment) for encodings in layouts]
    for layer, row in enumerate(rows):
        for record, item in zip(experts["records"][layer], row, strict=True):
            nbytes, wanted = read.count(record, "bytes"), listed[item["layout"]]["bytes"]
            if nbytes != wanted:
                raise ValueError(f"{read.path}: a record has {nbytes:,} bytes, expected {wanted:,}; {REMEDY}")
    return {
        **table,
        "trunk": {**trunk, "tensors": tensors},
        "experts": {**experts, "layouts": listed, "records": rows},
    }


def _trunk_tensor(read: Reader, name: str, item: dict) -> dict:
    width = read.count(item, "width", 32)
    if width not in (*WIDTHS, 32):
        raise ValueError(f"{read.path}: width {width} of {name} is not possible; {REMEDY}")
    return {**item, "codec": encoding_of(width, 0).codec}


def _record(read: Reader, where: str, item: dict, layouts: dict[tuple, int]) -> dict:
    if isinstance(item, dict) and "layout" in item:
        raise ValueError(f"{read.path}: {where} has a 'layout', which format 1 does not have; {REMEDY}")
    widths = tuple(read.get(item, "widths", list))
    if len(widths) != 3 or any(type(width) is not int or width not in WIDTHS for width in widths):
        raise ValueError(f"{read.path}: widths {list(widths)} of {where} are not three of {WIDTHS}; {REMEDY}")
    group = read.count(item, "group") if any(width < 16 for width in widths) else _core.GROUPS[0]
    encodings = tuple(encoding_of(width, group) for width in widths)
    if (codecs := read.get(item, "codecs", list)) != [encoding.codec for encoding in encodings]:
        raise ValueError(f"{read.path}: codecs {codecs} of {where} are not known; upgrade edge-moe")
    if group not in _core.GROUPS:
        raise ValueError(f"{read.path}: group {group} of {where} is not one of {_core.GROUPS}; {REMEDY}")
    kept = {key: value for key, value in item.items() if key not in OF_RECORDS}
    return {**kept, "layout": layouts.setdefault(encodings, len(layouts))}
