"""bundle.json: reading it with its version and checksum, typed access to its values, and the shape of its certificates.

What the values mean for files and weights is bundle.py's.
"""

import hashlib
import json
import math
from pathlib import Path

from .. import _core
from .files import MOST_JSON_BYTES, parse_json, read_bounded, real_path

REMEDY = "copy the bundle again"
TABLE_FILE = "bundle.json"
LISTED = f", but bundle.json lists it; {REMEDY}"

NUMBER, COUNT, TEXT = "a number", "a whole number from 0", "a text"
_SCORES = {"bits_per_weight", "perplexity", "perplexity_ratio", "kld_mean", "kld_p99", "top1_agreement"}
_SCORED = {**dict.fromkeys(sorted(_SCORES), NUMBER), "routing_changed?": NUMBER}
# Keys of a value and what each must be; a key that ends in "?" may be missing or null.
PROVENANCE = {
    "tool?": TEXT,
    "calibration?": {"tokens": COUNT, "source": TEXT, "seed?": COUNT},
    "method?": {"name": TEXT, "drop_score?": TEXT, "drop_counts?": TEXT, "spread?": NUMBER, "flat?": bool},
    "certificate?": {
        "held_out": {"tokens": COUNT, "source": TEXT},
        "context": COUNT,
        "source_perplexity": NUMBER,
        "bundle?": _SCORED,
        "uniform?": _SCORED,
    },
}
PRUNING_CERTIFICATE = {
    **dict.fromkeys(("cut", "reached", "perplexity_ratio", "kld_mean", "kld_p99", "top1_agreement"), NUMBER),
    "tokens": COUNT,
}


def table_checksum(table: dict) -> str:
    """SHA-256 of bundle.json's content without its `checksum` key."""
    content = {key: value for key, value in table.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_table(directory: Path) -> dict:
    """Read bundle.json. Raises ValueError for a newer format version, and if the checksum does not match."""
    path = directory / TABLE_FILE
    real_path(directory, TABLE_FILE, f"; a bundle directory has one, {REMEDY}")
    table = parse_json(path, read_bounded(path, MOST_JSON_BYTES, REMEDY), REMEDY)
    version = table.get("version")
    if type(version) is not int or version < 1:
        raise ValueError(f"{path}: format version is {version!r}, expected a whole number; {REMEDY}")
    if version > _core.FORMAT_VERSION:
        raise ValueError(
            f"{path}: format version {version} is newer than {_core.FORMAT_VERSION}, "
            "the newest this edge-moe reads; upgrade edge-moe"
        )
    if table.get("checksum") != table_checksum(table):
        raise ValueError(f"{path}: does not match its own checksum; {REMEDY}")
    return table


class Reader:
    """Typed access to values of bundle.json. Raises ValueError naming a value that is missing or of another type."""

    def __init__(self, path: Path):
        self.path = path

    def get(self, parent, key, kind):
        try:
            value = parent[key]
        except (KeyError, IndexError, TypeError):
            raise ValueError(f"{self.path}: {key!r} is missing; {REMEDY}") from None
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"{self.path}: {key!r} is {type(value).__name__}, expected {kind.__name__}; {REMEDY}")
        return value

    def count(self, parent, key, most: int = 2**62) -> int:
        value = self.get(parent, key, int)
        if not 0 <= value <= most:
            raise ValueError(f"{self.path}: {key!r} is {shown(value)}, expected 0 to {most}; {REMEDY}")
        return value

    def checksum(self, parent) -> int:
        text = self.get(parent, "crc32c", str)
        if len(text) != 8 or set(text) - set("0123456789abcdef"):
            raise ValueError(f"{self.path}: crc32c is {shown(text)}, expected 8 hexadecimal digits; {REMEDY}")
        return int(text, 16)

    def file_name(self, parent, key) -> str:
        name = self.get(parent, key, str)
        if name in ("", ".", "..") or set(name) & set("/\\\0") or not name.isprintable():
            raise ValueError(f"{self.path}: {name!r} is not a file name inside the bundle; {REMEDY}")
        return name

    def check(self, value, wanted, where: str) -> None:
        """Raise ValueError, naming the place, unless a value has the keys and kinds of `wanted`."""
        if isinstance(wanted, dict):
            if not isinstance(value, dict):
                raise self._wrong(where, value, "an object")
            for key, kind in wanted.items():
                name, optional = key.removesuffix("?"), key.endswith("?")
                if not (optional and value.get(name) is None):
                    self.check(value.get(name), kind, f"{where}.{name}" if where else name)
            return
        good = {
            NUMBER: is_number(value),
            COUNT: type(value) is int and 0 <= value <= 2**62,
            TEXT: isinstance(value, str),
            bool: isinstance(value, bool),
        }
        if not good[wanted]:
            raise self._wrong(where, value, "true or false" if wanted is bool else wanted)

    def _wrong(self, where: str, value, wanted: str) -> ValueError:
        return ValueError(f"{self.path}: {where} is {shown(value)}, expected {wanted}; {REMEDY}")


def is_number(value) -> bool:
    """Whether a JSON value is a number that a float can hold."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number of hundreds of digits
        return False


def shown(value) -> str:
    """A JSON value for an error message, shortened if it is long."""
    if isinstance(value, list | dict):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value):,}"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}..."
