"""Checking the JSON object of a request by a table of its fields; every error names the field.

A field that the API has and this server has no use for is in a table of its own: it is accepted where leaving it out
changes no answer, and refused by name where it would.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from .errors import invalid, unsupported

NAMES = {str: "a string", bool: "a boolean", int: "an integer", float: "a number", list: "an array", dict: "an object"}


@dataclass(frozen=True, slots=True)
class Field:
    """kinds: Python types of its JSON values; int is a float, too. low, high: bounds of a number. choices: of a text.
    A null counts as absent."""

    kinds: tuple[type, ...]
    default: Any = None
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    required: bool = False


def text(default: str | None = None, *, choices: tuple[str, ...] = (), required: bool = False) -> Field:
    return Field((str,), default, choices=choices, required=required)


def number(default: float | None = None, low: float | None = None, high: float | None = None) -> Field:
    return Field((float,), default, low, high)


def whole(default: int | None = None, low: int | None = None, high: int | None = None, required: bool = False) -> Field:
    return Field((int,), default, low, high, required=required)


def flag(default: bool | None = None) -> Field:
    return Field((bool,), default)


def array(default: list | None = None, required: bool = False) -> Field:
    return Field((list,), default, required=required)


def object_(default: dict | None = None) -> Field:
    return Field((dict,), default)


Table = Mapping[str, Field]


def read(
    body: object,
    table: Table,
    *,
    ignored: frozenset[str] = frozenset(),
    refused: Mapping[str, tuple[Callable[[Any], bool], str]] | None = None,
    where: str = "",
) -> dict[str, Any]:
    """The values of a request's fields by name, with defaults. where: the path of this object in the request.

    ignored: fields that change nothing here. refused: by name, whether a value asks for what there is not, and what to
    do instead; other values are ignored. Raises ApiError.
    """
    if not isinstance(body, dict):
        raise invalid(
            f"Invalid type{_of(where)}: expected an object, but got {kind_of(body)} instead.",
            where or None,
            "invalid_type",
        )
    refused = refused or {}
    for name, value in body.items():
        path = f"{where}.{name}" if where else name
        if name in refused:
            asks, instead = refused[name]
            if value is not None and asks(value):
                raise unsupported(f"{path}", instead, path)
        elif name not in table and name not in ignored:
            near = get_close_matches(name, table, 1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            raise invalid(f"Unknown parameter: '{path:.100}'.{hint}", path, "unknown_parameter")
    return {
        name: value_of(body.get(name), field, f"{where}.{name}" if where else name) for name, field in table.items()
    }


def value_of(value: Any, field: Field, path: str) -> Any:
    """A field's value, checked. Raises ApiError."""
    if value is None:
        if field.required:
            raise invalid(f"Missing required parameter: '{path}'.", path, "missing_required_parameter")
        return field.default
    kinds = (*field.kinds, int) if float in field.kinds else field.kinds
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        wanted = " or ".join(NAMES[kind] for kind in field.kinds)
        raise invalid(
            f"Invalid type for '{path}': expected {wanted}, but got {kind_of(value)} instead.", path, "invalid_type"
        )
    if field.choices and isinstance(value, str) and value not in field.choices:
        wanted = ", ".join(map(repr, field.choices))
        raise invalid(f"Invalid value for '{path}': {value!r:.60}. Supported values are: {wanted}.", path)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if field.low is not None and value < field.low:
            raise invalid(f"Invalid value for '{path}': {_short(value)} is below the minimum of {field.low}.", path)
        if field.high is not None and value > field.high:
            raise invalid(f"Invalid value for '{path}': {_short(value)} is above the maximum of {field.high}.", path)
    return value


def kind_of(value: object) -> str:
    return "null" if value is None else NAMES.get(type(value), type(value).__name__)


def depth_of(value: object, most: int) -> int:
    """How deeply objects and arrays are nested, as far as `most` + 1."""
    level, depth = [value], 0
    while depth <= most:
        level = [
            item
            for one in level
            if isinstance(one, (dict, list))
            for item in (one.values() if isinstance(one, dict) else one)
        ]
        if not level:
            return depth
        depth += 1
    return depth


def _of(where: str) -> str:
    return f" for '{where}'" if where else ""


def _short(value: float) -> str:
    shown = str(value) if abs(value) < 1e30 else f"{float(min(value, 1e308)):g}"
    return shown
