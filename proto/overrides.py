"""Changes to a parsed configuration from the command line, as in `--set vm.vcpus=8`.

Purpose: turn `path=value` texts into changes of the nested dicts and lists that `schema.build` reads, and
remember which option set which key, so that a refusal names the option and not the file.

Invariants: the input is not modified; only keys the schema knows are set; a list without an index means
every entry of it. When a key that decides about others changes (the workload of a task, the model of a
daemon), the file's keys that meant something for the old value only are left out; keys set by another
option never are.

Not handled here: types and ranges of the values, which `schema.build` checks afterwards.
"""

from __future__ import annotations

import copy
import re
import tomllib
from collections.abc import Sequence
from typing import Any

from proto.errors import UserError
from proto.schema import Rule, Section, Source, applies, find_member, join, members, refuse

INDEX_DIGITS_MAX = 9
PATH_EXAMPLES = "PATH=VALUE, as in vm.vcpus=8 (every vm) or vm.0.task.1.memory_kib=4096"


def override(
    cls: type, raw: dict[str, Any], texts: Sequence[str], option: str = "--set"
) -> tuple[dict[str, Any], dict[str, str]]:
    """A changed copy of `raw`, and which option set which key path.

    `raw` is a table that `schema.build(cls, ...)` has accepted. Raises UserError for a text that is not
    PATH=VALUE, an unknown key, a path that ends at a table, or an index beyond the list.
    """
    changed = copy.deepcopy(raw)
    options: dict[str, str] = {}
    for text in texts:
        shown = f"{option} {text}"
        path, equals, value = text.partition("=")
        parts = re.sub(r"\[(\d+)\]", r".\1", path.strip()).split(".")
        if not equals or not all(parts):
            raise UserError("not an assignment", where=shown, found=text, allowed=PATH_EXAMPLES)
        _assign(cls, changed, parts, parse_value(value), _Target("", shown, options))
    return changed, options


def parse_value(text: str) -> object:
    """A TOML value (`8`, `1e6`, `true`, `"a b"`); what is not one is taken as a string (`ssd`)."""
    text = text.strip()
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    # A text with line breaks could smuggle in further keys.
    return parsed["value"] if len(parsed) == 1 else text


class _Target:
    """Where an assignment has arrived: the path, the option being applied, the options so far."""

    __slots__ = ("at", "options", "shown", "source")

    def __init__(self, at: str, shown: str, options: dict[str, str]) -> None:
        self.at = at
        self.shown = shown
        self.options = options
        self.source = Source(shown)

    def down(self, at: str) -> _Target:
        return _Target(at, self.shown, self.options)


def _assign(cls: type, table: dict[str, Any], parts: Sequence[str], value: object, target: _Target) -> None:
    name, rest = parts[0], parts[1:]
    path = join(target.at, name)
    rule = find_member(cls, name, target.source, path).rule
    if isinstance(rule, Rule):
        if rest:
            refuse("is a value and has no keys", target.source, path, ".".join(rest), f"{path}=VALUE")
        table[name] = value
        target.options[path] = target.shown
        _leave_out_unused(cls, table, name, target)
    elif rule.many:
        _assign_in_list(rule, table.setdefault(name, [{}]), rest, value, target.down(path))
    elif not rest:
        refuse("is a table; name one of its keys", target.source, path, None, ", ".join(members(rule.cls)))
    else:
        _assign(rule.cls, table.setdefault(name, {}), rest, value, target.down(path))


def _assign_in_list(
    section: Section, items: list[dict[str, Any]], rest: Sequence[str], value: object, target: _Target
) -> None:
    chosen: Sequence[int] = range(len(items))
    if rest and rest[0].isdecimal():
        # Whoever names an entry in more digits than a list can have means none of them.
        index, rest = int(rest[0][:INDEX_DIGITS_MAX]), rest[1:]
        if index >= len(items):
            refuse("no such entry", target.source, target.at, index, f"0 to {len(items) - 1}")
        chosen = [index]
    if not rest:
        refuse(
            "is a table; name one of its keys",
            target.source,
            target.at,
            None,
            ", ".join(members(section.cls)),
        )
    for i in chosen:
        _assign(section.cls, items[i], rest, value, target.down(f"{target.at}[{i}]"))


def _leave_out_unused(cls: type, table: dict[str, Any], changed: str, target: _Target) -> None:
    for name, member in members(cls).items():
        decided = (
            isinstance(member.rule, Rule) and member.rule.only is not None and member.rule.only[0] == changed
        )
        if decided and join(target.at, name) not in target.options and not applies(member.rule, table):
            table.pop(name, None)
