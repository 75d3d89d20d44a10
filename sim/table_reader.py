"""Strict reading of one TOML table: every key is taken once, with its type and range; what is left over is refused."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any, Final, NoReturn

from proto.errors import UserError

TOKENS_MAX: Final = 100_000


class Reader:
    """A table and where it stands. ``at``: key path of the table, empty at the top."""

    __slots__ = ("_at", "_known", "_values", "_where")

    def __init__(self, values: Mapping[str, Any], where: str, at: str) -> None:
        self._values = values
        self._where = where
        self._at = at
        self._known: set[str] = set()

    def refuse(self, key: str, message: str, found: object, allowed: str) -> NoReturn:
        """Raise for this key of the table."""
        path = f"{self._at}.{key}" if self._at else key
        raise UserError(message, where=self._where, key=path, found=found, allowed=allowed)

    def finish(self) -> None:
        """Refuse keys that nobody asked for."""
        for key in self._values:
            if key not in self._known:
                near = difflib.get_close_matches(key, sorted(self._known), 1)
                hint = f" (did you mean {near[0]}?)" if near else ""
                self.refuse(key, f"unknown key{hint}", None, ", ".join(sorted(self._known)))

    def keys(self) -> list[str]:
        """All keys that the file has here."""
        return list(self._values)

    def has(self, key: str) -> bool:
        """Whether the key is there; it counts as known from now on."""
        self._known.add(key)
        return key in self._values

    def any(self, key: str) -> Any:
        """The value as it is; the caller checks it."""
        if not self.has(key):
            self.refuse(key, "missing", None, "it must be given")
        return self._values[key]

    def flag(self, key: str, default: bool | None = None) -> bool:
        """A truth value."""
        if not self.has(key) and default is not None:
            return default
        value = self.any(key)
        if not isinstance(value, bool):
            self.refuse(key, "not a truth value", value, "true, false")
        return value

    def number(self, key: str, low: int, high: int, default: int | None = None) -> int:
        """A whole number in [low, high]."""
        if not self.has(key) and default is not None:
            return default
        value = self.any(key)
        if type(value) is not int or not low <= value <= high:
            self.refuse(key, "not accepted", value, f"whole number from {low} to {high}")
        return value

    def text(self, key: str) -> str:
        """One line of text."""
        value = self.any(key)
        if not isinstance(value, str) or not value or not value.isprintable():
            self.refuse(key, "not accepted", value, "one line of text")
        return value

    def choice(self, key: str, choices: tuple[str, ...]) -> str:
        """One of these words."""
        value = self.any(key)
        if not isinstance(value, str) or value not in choices:
            self.refuse(key, "not accepted", value, ", ".join(choices))
        return value

    def choice_of_numbers(self, key: str, choices: tuple[int, ...]) -> int:
        """One of these numbers."""
        value = self.any(key)
        if type(value) is not int or value not in choices:
            self.refuse(key, "not accepted", value, ", ".join(map(str, choices)))
        return value

    def words(self, key: str, choices: tuple[str, ...]) -> tuple[str, ...]:
        """A list of different words, in the file's order."""
        value = self.any(key)
        if (
            not isinstance(value, list)
            or not all(isinstance(word, str) and word in choices for word in value)
            or len(set(value)) != len(value)
        ):
            self.refuse(key, "not accepted", value, f"a list of different ones of {', '.join(choices)}")
        return tuple(value)

    def counts(self, key: str) -> tuple[int, ...]:
        """A count, or a list of the counts that are all right."""
        value = self.any(key)
        values = value if isinstance(value, list) else [value]
        if not values or not all(type(one) is int and one >= 0 for one in values):
            self.refuse(key, "not accepted", value, "a count, or a list of counts (any of them)")
        return tuple(values)

    def tokens(self, key: str) -> tuple[int, ...]:
        """Tokens in order."""
        value = self.any(key)
        if (
            not isinstance(value, list)
            or len(value) > TOKENS_MAX
            or not all(type(one) is int and 0 <= one <= 0xFFFF_FFFF for one in value)
        ):
            self.refuse(key, "not accepted", value, "a list of tokens, 0 to 0xffffffff each")
        return tuple(value)

    def lines(self, key: str) -> tuple[str, ...]:
        """Lines of text."""
        value = self.any(key)
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            self.refuse(key, "not accepted", value, "a list of lines")
        return tuple(value)

    def table(self, key: str, *, required: bool = True) -> Reader:
        """A table inside this one; empty when it may be and is missing."""
        value = self.any(key) if required or self.has(key) else {}
        if not isinstance(value, dict):
            self.refuse(key, "not accepted", value, f"a table [{key}]")
        return Reader(value, self._where, f"{self._at}.{key}" if self._at else key)

    def tables(self, key: str, *, required: bool) -> Iterator[Reader]:
        """The tables [[key]]."""
        value = self.any(key) if required or self.has(key) else []
        if (
            not isinstance(value, list)
            or not all(isinstance(one, dict) for one in value)
            or (required and not value)
        ):
            self.refuse(key, "not accepted", value, f"tables [[{key}]]")
        for index, one in enumerate(value):
            yield Reader(one, self._where, f"{key}[{index}]")
