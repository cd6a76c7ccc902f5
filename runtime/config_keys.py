"""Typed access to the keys of a config.json, with defaults for absent keys and checks of values."""

from collections.abc import Mapping

MAX_NUMBER = 1e30  # larger than in any model: refuses damaged files
COMMON_DEFAULTS = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False}


class Keys:
    """The keys of one object of a config.json, read by name and checked. `kind` is the architecture.

    A key may have several names. If a file has several of them they must agree, as versions of transformers differ in
    the one that takes precedence.
    """

    def __init__(self, raw: dict, where: str, defaults: Mapping[str, object] | None = None, kind: str = ""):
        self.raw, self.where, self.defaults, self.kind = raw, where, defaults or {}, kind

    def changed(self, **values) -> "Keys":
        """A copy with some values changed; None removes a key."""
        return Keys({**self.raw, **values}, self.where, self.defaults, self.kind)

    def any(self, *names, default=None):
        given = [name for name in names if self.raw.get(name) is not None]
        for name in given[1:]:
            check_agree(self.where, given[0], self.raw[given[0]], name, self.raw[name])
        if given:
            return self.raw[given[0]]
        if names[0] in self.defaults and (default is None or names[0] not in self.raw):
            return self.defaults[names[0]]
        if default is None:
            raise ValueError(f"{self.where}: key {' or '.join(repr(name) for name in names)} is missing")
        return default

    def nullable(self, name: str):
        """The value of any type; None if it is null, or absent without a default."""
        return self.raw.get(name, self.defaults.get(name))

    def count(self, *names, default=None, limit=2**31 - 1) -> int:
        value = self.any(*names, default=default)
        if type(value) is not int or not 0 < value <= limit:
            raise ValueError(f"{self.where}: {names[0]} is {value!r}, expected a whole number from 1 to {limit:,}")
        return value

    def number(self, *names, default=None) -> float:
        value = self.any(*names, default=default)
        if type(value) not in (int, float) or not 0 <= value <= MAX_NUMBER:
            raise ValueError(f"{self.where}: {names[0]} is {value!r}, expected a number from 0 to {MAX_NUMBER:g}")
        return float(value)

    def above_zero(self, *names, default=None) -> float:
        value = self.number(*names, default=default)
        if value == 0:
            raise ValueError(f"{self.where}: {names[0]} is 0, expected a number above 0")
        return value

    def flag(self, name: str, default: bool | None = None) -> bool:
        value = self.any(name, default=default)
        if not isinstance(value, bool):
            raise ValueError(f"{self.where}: {name} is {value!r}, expected true or false")
        return value


def check_agree(where: str, name: str, value, other: str, other_value) -> None:
    """Raise ValueError if two spellings of one key have different values."""
    if value != other_value:
        raise ValueError(
            f"{where}: {name} is {value!r} and {other} is {other_value!r}, two spellings of one key; "
            "remove the one that is wrong"
        )
