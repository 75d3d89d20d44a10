"""Event and effect records as plain values and back: NamedTuples of ints, bools, strings, bytes, IntEnums, tuples of these, and such
NamedTuples. A field of type ``dict[str, Any]`` is plain already, with lists where others have tuples.

A record travels as ``(type number, fields)``; nested records as their fields alone, since the type of a field is known. What a type
looks like (`RecordTypes.shapes`) goes into the header of whatever holds records, so that a reader of another version refuses it.

Invariant: what `RecordTypes.read` returns has the types that the class declares; anything else raises `RecordError`.

Not handled here: files (proto/inputlog.py), messages between processes, which have a contract of their own (proto/wire.py).
"""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import IntEnum
from typing import Any, Final

from proto.machine import MachineError

FIELDS_MAX: Final = 64
"""Of one record; the largest, an exit record, has 18."""

BYTES_SHOWN: Final = 24
HEX_FROM: Final = 1 << 20
"""Larger numbers are addresses, sums or registers."""

Shape = tuple[str, tuple[str, ...]]
"""Name of a record type and the names of its fields."""


class RecordError(Exception):
    """Plain values that are no record of these types."""


class RecordTypes:
    """A numbered set of record types; types of their fields need no number.

    ``words``: plain numbers that people read better by name, as in ``{"Exit.reason": ExitReason}``; only `show` looks at it.
    """

    __slots__ = ("_known", "_readers", "_words", "classes", "numbers")

    def __init__(
        self, classes: Iterable[type[Any]], words: Mapping[str, type[IntEnum]] | None = None
    ) -> None:
        self.classes = tuple(classes)
        self._words = words or {}
        self.numbers = {cls: number for number, cls in enumerate(self.classes)}
        self._known: dict[type[Any], Callable[[Any], Any]] = {}
        self._readers = [self._reader(cls) for cls in self.classes]

    def plain(self, record: Any) -> tuple[int, Any]:
        """``record`` as (number, fields). Raises MachineError for a type that is not in the set."""
        number = self.numbers.get(type(record))
        if number is None:
            raise MachineError(f"{type(record).__name__} is not among the record types")
        return number, record

    def read(self, plain: Any) -> Any:
        """The record of ``(number, fields)``. Raises RecordError."""
        if type(plain) is not tuple or len(plain) != 2 or type(plain[0]) is not int:
            raise RecordError("a record is a number and its fields")
        number, fields = plain
        if not 0 <= number < len(self._readers):
            raise RecordError(f"type {number} of {len(self._readers)}")
        return self._readers[number](fields)

    def same(self, plain: Any, record: Any) -> bool:
        """Whether ``plain`` is ``record``. Never raises."""
        if type(plain) is not tuple or len(plain) != 2 or plain[0] != self.numbers.get(type(record)):
            return False
        if plain[1] == record:
            return True
        try:
            return bool(self.read(plain) == record)
        except RecordError:
            return False

    def shapes(self) -> list[Shape]:
        """The types with a number in their order, then those of their fields."""
        nested = [cls for cls in self._known if cls not in self.numbers]
        return [(cls.__name__, cls._fields) for cls in (*self.classes, *nested)]

    def show(self, record: Any) -> str:
        """A record for people: ``Name(field=value)`` without the fields that are 0, False or None."""
        name = type(record).__name__
        shown = []
        for field, value in zip(record._fields, record, strict=True):
            if value in (0, None):
                continue
            nested = isinstance(value, tuple) and hasattr(value, "_fields")
            text = self.show(value) if nested else show_value(value, self._words.get(f"{name}.{field}"))
            shown.append(f"{field}={text}")
        return f"{name}({', '.join(shown)})"

    # -- building --------------------------------------------------------------------------------------------------------
    def _reader(self, cls: type[Any]) -> Callable[[Any], Any]:
        if cls in self._known:
            return self._known[cls]
        hints = typing.get_type_hints(cls)
        names: Sequence[str] = cls._fields
        if len(names) > FIELDS_MAX:
            raise MachineError(f"{cls.__name__} has {len(names)} fields")
        readers = [self._value_reader(hints[name], f"{cls.__name__}.{name}") for name in names]
        make: Callable[[Iterable[Any]], Any] = cls._make
        where = cls.__name__

        def read(fields: Any) -> Any:
            if type(fields) is not tuple or len(fields) != len(readers):
                raise RecordError(f"{where} has {len(readers)} fields")
            return make([reader(value) for reader, value in zip(readers, fields, strict=True)])

        self._known[cls] = read
        return read

    def _value_reader(self, hint: Any, where: str) -> Callable[[Any], Any]:
        if isinstance(hint, type) and issubclass(hint, IntEnum):
            return _enum_reader(hint, where)
        if isinstance(hint, type) and hasattr(hint, "_fields"):
            return self._reader(hint)
        origin, parts = typing.get_origin(hint), typing.get_args(hint)
        if origin is tuple:
            return self._tuple_reader(parts, where)
        inner = [part for part in parts if part is not type(None)]
        if isinstance(hint, types.UnionType) and len(inner) == 1:
            reader = self._value_reader(inner[0], where)
            return lambda value: None if value is None else reader(value)
        if hint == dict[str, Any]:
            return _dict_reader(where)
        allowed = _PLAIN.get(hint)
        if allowed is None:
            raise MachineError(f"{where}: a record field cannot be a {hint}")
        return _checked(allowed, where)

    def _tuple_reader(self, parts: Sequence[Any], where: str) -> Callable[[Any], Any]:
        any_length = parts[-1] is Ellipsis
        readers = [self._value_reader(part, where) for part in parts if part is not Ellipsis]

        def read(value: Any) -> Any:
            if type(value) is not tuple or not (any_length or len(value) == len(readers)):
                raise RecordError(f"{where} is {type(value).__name__}, not a tuple of that length")
            of_each = readers * len(value) if any_length else readers
            return tuple(reader(part) for reader, part in zip(of_each, value, strict=True))

        return read


_PLAIN: Final[dict[Any, tuple[type[Any], ...]]] = {
    int: (int, bool),  # a flag is an int, too, where the code says so
    bool: (bool,),
    str: (str,),
    bytes: (bytes,),
}


def _checked(allowed: tuple[type[Any], ...], where: str) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        if type(value) not in allowed:
            raise RecordError(f"{where} is {type(value).__name__}, not {allowed[0].__name__}")
        return value

    return read


def _dict_reader(where: str) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        if type(value) is not dict:
            raise RecordError(f"{where} is {type(value).__name__}, not dict")
        return _with_lists(value)

    return read


def _with_lists(value: Any) -> Any:
    if type(value) is dict:
        return {key: _with_lists(part) for key, part in value.items()}
    return [_with_lists(part) for part in value] if type(value) is tuple else value


def _enum_reader(enum: type[IntEnum], where: str) -> Callable[[Any], Any]:
    members: dict[int, IntEnum] = {int(member): member for member in enum}

    def read(value: Any) -> Any:
        if type(value) is not int or value not in members:
            raise RecordError(f"{where} is {value!r}, not a {enum.__name__}")
        return members[value]

    return read


def show_value(value: Any, words: type[IntEnum] | None = None) -> str:
    """A plain value for people; ``words``: names of numbers."""
    if words is not None and type(value) is int and value in words._value2member_map_:
        return words(value).name
    if isinstance(value, IntEnum):
        return value.name
    if type(value) is int and value >= HEX_FROM:
        return hex(value)
    if type(value) is tuple:
        return f"({', '.join(show_value(part) for part in value)})"
    if type(value) is bytes:
        more = f"... {len(value)} bytes" if len(value) > BYTES_SHOWN else ""
        return value[:BYTES_SHOWN].hex() + more
    return repr(value)
