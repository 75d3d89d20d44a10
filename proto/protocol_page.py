"""The diagrams and tables of docs/protocol.md, made from proto/lives.py: `python -m proto.protocol_page docs/protocol.md` rewrites the
page between its markers.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from proto import generated_page
from proto.lives import TABLES
from proto.profile import PROFILES
from proto.transitions import Arrow, S, Transitions, profiles_of

COLUMNS: Final = 140
BEGIN: Final = "<!-- tables: python -m proto.protocol_page docs/protocol.md -->"


def tables() -> str:
    """The generated part of the page."""
    return "\n\n".join("\n".join(_section(number, table)) for number, table in enumerate(TABLES, 1))


def diagram(table: Transitions[S]) -> list[str]:
    """A mermaid state diagram; arrows between the same two states are one."""
    lines = ["```mermaid", "stateDiagram-v2"]
    lines += [f"    [*] --> {start.name}" for start in table.starts]
    labels: dict[tuple[S, S], list[str]] = {}
    for arrow in table.arrows:
        events = labels.setdefault((arrow.source, arrow.target), [])
        if arrow.event not in events:
            events.append(arrow.event)
    lines += [
        f"    {source.name} --> {target.name}: {', '.join(events)}"
        for (source, target), events in labels.items()
    ]
    lines += [f"    {end.name} --> [*]" for end in table.ends()]
    return [*lines, "```"]


def _section(number: int, table: Transitions[S]) -> Iterator[str]:
    yield f"## {number}. {table.title}"
    yield ""
    yield from textwrap.wrap(
        f"{table.text} In the code: {_files(table.code)}.", COLUMNS, break_long_words=False
    )
    yield ""
    yield from diagram(table)
    yield ""
    yield from _states(table)
    yield ""
    yield from _arrows(table)


def _states(table: Transitions[S]) -> Iterator[str]:
    yield "| state | number | meaning |"
    yield "|---|---|---|"
    for value, meaning in table.states:
        yield f"| {value.name} | {int(value)} | {meaning} |"


def _arrows(table: Transitions[S]) -> Iterator[str]:
    by_profile = any(arrow.only for arrow in table.arrows)
    yield "| from | event | to | when |" + (" profiles |" if by_profile else "")
    yield "|---|---|---|---|" + ("---|" if by_profile else "")
    for arrow in table.arrows:
        row = f"| {arrow.source.name} | `{arrow.event}` | {arrow.target.name} | {arrow.when} |"
        yield row + (f" {_profiles(arrow)} |" if by_profile else "")


def _profiles(arrow: Arrow[S]) -> str:
    names = profiles_of(arrow)
    return "all" if len(names) == len(PROFILES) else ", ".join(names)


def _files(code: str) -> str:
    return ", ".join(f"`{name}`" for name in code.split(", "))


def with_tables(page: str) -> str:
    """The page with its generated part made anew."""
    return generated_page.with_tables(page, BEGIN, tables())


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(with_tables(path.read_text()))
