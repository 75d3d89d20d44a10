"""Validation of configuration tables, driven by the fields of dataclasses.

Purpose: a table of keys is written once, as a frozen dataclass whose fields carry a `Rule` (meaning, unit,
range, choices); reading, refusing, writing back and the reference page all follow from it.

Invariants: `build` returns an object whose every value satisfies its rule, or raises a `UserError` that
names the file or option, the key path, what was found and what is allowed; nothing is guessed, dropped or
clipped. Every number has both a lower and an upper bound, so that no value read here can overflow an int64
or a float64 later.

Not handled here: rules that relate several keys (they live beside the dataclasses), reading files, defaults
that depend on other keys.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeVar

from proto.errors import UserError

STRING_CHARS_MAX = 1000

_T = TypeVar("_T")
_META = "schema"


@dataclass(frozen=True, slots=True)
class Rule:
    """What one key may hold. `only` = (other key, values): the key means something for those values only."""

    meaning: str
    unit: str = ""
    low: float = -math.inf
    high: float = math.inf
    choices: tuple[str, ...] = ()
    power_of_two: bool = False
    pattern: str = ""
    only: tuple[str, tuple[str, ...]] | None = None

    def allowed(self, kind: type) -> str:
        """The accepted values in words, for messages and for the reference page."""
        if self.choices:
            return ", ".join(choice or '""' for choice in self.choices)
        if kind is bool:
            return "true, false"
        if kind is str:
            return f"text matching {self.pattern}" if self.pattern else "one line of text"
        numbers = "whole number" if kind is int else "number"
        power = ", a power of two" if self.power_of_two else ""
        return f"{numbers} from {_number(self.low)} to {_number(self.high)}{power}"


@dataclass(frozen=True, slots=True)
class Section:
    """A key that holds a table of type `cls`, or (`many`) a list of such tables: at least one, unless `none` is allowed."""

    meaning: str
    cls: type
    many: bool
    none: bool = False


@dataclass(frozen=True, slots=True)
class Member:
    """One key of a table: its name, its rule, and for plain values its type and default."""

    name: str
    rule: Rule | Section
    kind: type
    default: Any


@dataclass(frozen=True, slots=True)
class Source:
    """Where values came from: a file, and per key path the command-line option that replaced its value."""

    file: str
    options: Mapping[str, str] = field(default_factory=dict)

    def where(self, key: str) -> str:
        """The option that set `key`; else the file, with the options that may have made its value wrong."""
        if key in self.options or not self.options:
            return self.options.get(key, self.file)
        return f"{self.file} (changed by {', '.join(dict.fromkeys(self.options.values()))})"


_members: dict[type, dict[str, Member]] = {}
"""What `members` found, per class: the fields of a class do not change."""


def key(default: _T, meaning: str, **rule: Any) -> _T:
    """A dataclass field holding a plain value (int, float, str, bool) under `Rule(meaning, **rule)`."""
    return field(default=default, metadata={_META: Rule(meaning, **rule)})


def table(cls: type[_T], meaning: str) -> _T:
    """A dataclass field holding one table of type `cls`; absent in the input means all defaults."""
    return field(default_factory=cls, metadata={_META: Section(meaning, cls, many=False)})


def tables(cls: type[_T], meaning: str) -> tuple[_T, ...]:
    """A dataclass field holding a list of tables; absent in the input means one table of all defaults."""
    return field(default_factory=lambda: (cls(),), metadata={_META: Section(meaning, cls, many=True)})


def optional_tables(cls: type[_T], meaning: str) -> tuple[_T, ...]:
    """A dataclass field holding a list of tables; absent in the input means none."""
    return field(default_factory=tuple, metadata={_META: Section(meaning, cls, many=True, none=True)})


def members(cls: type) -> dict[str, Member]:
    """The keys of a table in order of declaration. Fields without a rule are not keys and are left out."""
    if cls not in _members:
        hints = typing.get_type_hints(cls)
        _members[cls] = {
            f.name: Member(f.name, f.metadata[_META], hints[f.name], f.default)
            for f in dataclasses.fields(cls)
            if _META in f.metadata
        }
    return _members[cls]


def build(cls: type[_T], raw: object, source: Source, at: str = "") -> _T:
    """`cls` from a parsed table. `at` is the key path of the table, empty for the top.

    Raises UserError for an unknown key, a wrong type, a value outside its rule, or a key that does not apply.
    """
    if not isinstance(raw, Mapping):
        refuse("must be a table", source, at, raw, f"[{at}] with keys {', '.join(members(cls))}")
    values: dict[str, Any] = {}
    for name, value in raw.items():
        path = join(at, str(name))
        member = find_member(cls, str(name), source, path)
        if isinstance(member.rule, Rule):
            values[member.name] = _check_value(member, member.rule, value, source, path)
        elif member.rule.many:
            values[member.name] = _build_list(member.rule, value, source, path)
        else:
            values[member.name] = build(member.rule.cls, value, source, path)
    result = cls(**values)
    for name in values:
        _check_applies(result, name, source, at)
    return result


def find_member(cls: type, name: str, source: Source, path: str) -> Member:
    """The key `name` of `cls`; raises UserError with the nearest match and the whole list otherwise."""
    known = members(cls)
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return refuse(f"unknown key{hint}", source, path, name, ", ".join(known))


def applies(rule: Rule | Section, values: Mapping[str, Any]) -> bool:
    """Whether a key with this rule means anything beside the other `values` of its table."""
    if isinstance(rule, Section) or rule.only is None:
        return True
    other, wanted = rule.only
    return values.get(other) in wanted


def to_plain(obj: Any) -> dict[str, Any]:
    """The table as plain values, without keys that do not apply, so that `build` accepts it again."""
    values = {name: getattr(obj, name) for name in members(type(obj))}
    plain: dict[str, Any] = {}
    for name, member in members(type(obj)).items():
        if isinstance(member.rule, Rule):
            if applies(member.rule, values):
                plain[name] = values[name]
        elif member.rule.many:
            plain[name] = [to_plain(item) for item in values[name]]
        else:
            plain[name] = to_plain(values[name])
    return plain


def markdown_table(cls: type) -> str:
    """The plain keys of a table as rows of a markdown page."""
    lines = ["| key | default | unit | allowed | meaning |", "|---|---|---|---|---|"]
    for name, member in members(cls).items():
        rule = member.rule
        if isinstance(rule, Section):
            continue
        meaning = rule.meaning
        if rule.only is not None:
            other, wanted = rule.only
            meaning += f" Only with `{other}` = {', '.join(wanted)}."
        allowed = rule.allowed(member.kind).replace("|", "\\|")
        lines.append(f"| `{name}` | `{_toml(member.default)}` | {rule.unit} | {allowed} | {meaning} |")
    return "\n".join(lines) + "\n"


def join(at: str, name: str) -> str:
    """The path of key `name` in the table at path `at`."""
    return f"{at}.{name}" if at else name


def refuse(message: str, source: Source, path: str, found: object, allowed: str) -> NoReturn:
    """Raises the UserError for the key at `path`."""
    raise UserError(message, where=source.where(path), key=path, found=found, allowed=allowed)


def _build_list(section: Section, value: object, source: Source, path: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        refuse("must be a list of tables", source, path, value, f"one or more [[{path}]]")
    if not value and not section.none:
        refuse("must have at least one entry", source, path, value, f"one or more [[{path}]]")
    return tuple(build(section.cls, item, source, f"{path}[{i}]") for i, item in enumerate(value))


def _check_value(member: Member, rule: Rule, value: object, source: Source, path: str) -> Any:
    allowed = rule.allowed(member.kind)
    if member.kind in (int, float):
        return _check_number(member.kind, rule, value, source, path)
    if not isinstance(value, member.kind):
        refuse("wrong type", source, path, value, allowed)
    if isinstance(value, str):
        if rule.choices and value not in rule.choices:
            near = difflib.get_close_matches(value, rule.choices, n=1, cutoff=0.5)
            refuse(
                f"not a choice{f'; did you mean {near[0]!r}?' if near else ''}", source, path, value, allowed
            )
        # Strings end up in file names, process titles and on terminals: control characters are never meant.
        if len(value) > STRING_CHARS_MAX or not value.isprintable():
            refuse(
                "not one line of text", source, path, value, f"up to {STRING_CHARS_MAX} printable characters"
            )
        if rule.pattern and not re.fullmatch(rule.pattern, value):
            refuse("not allowed here", source, path, value, allowed)
    return value


def _check_number(kind: type, rule: Rule, value: object, source: Source, path: str) -> int | float:
    allowed = rule.allowed(kind)
    # bool is an int in Python; `vcpus = true` is a mistake all the same.
    if isinstance(value, bool) or not isinstance(value, int | float):
        refuse("wrong type", source, path, value, allowed)
    # Written so that a NaN fails; and before any conversion, which would overflow for huge integers.
    if not rule.low <= value <= rule.high:
        refuse("out of range", source, path, value, allowed)
    if kind is float:
        return float(value)
    # TOML writes large round numbers as 2e6: a whole float is accepted for an integer, anything else is not.
    whole = int(value)
    if whole != value:
        refuse("not a whole number", source, path, value, allowed)
    if rule.power_of_two and (whole < 1 or whole & (whole - 1)):
        refuse("not a power of two", source, path, value, allowed)
    return whole


def _check_applies(obj: Any, name: str, source: Source, at: str) -> None:
    rule = members(type(obj))[name].rule
    if isinstance(rule, Section) or rule.only is None:
        return
    other, wanted = rule.only
    actual = getattr(obj, other)
    if actual not in wanted:
        refuse(
            f"does not apply to {other} {actual!r}",
            source,
            join(at, name),
            getattr(obj, name),
            f"only with {other} = {', '.join(wanted)}",
        )


def _number(value: float) -> str:
    return f"{value:_}" if value == int(value) else str(value)


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f'"{value}"'
    return f"{value:_}" if isinstance(value, int) else str(value)
