"""The tables of docs/memory-map.md, made from proto/layout.py: `python -m proto.layout_page docs/memory-map.md`."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import Final, NamedTuple

from proto import generated_page, layout

BEGIN: Final = "<!-- tables: python -m proto.layout_page docs/memory-map.md -->"

SECTIONS: Final[tuple[tuple[str, tuple[str, ...]], ...]] = (
    ("Run page (page 0 of `control`)", ("CTL_",)),
    ("VM page (page 1 + v of `control`)", ("VMC_",)),
    ("Word of a daemon (word d behind the VM pages of `control`)", ("DW_",)),
    ("vCPU page", ("VP_", "XF_")),
    ("Counters in the vCPU page, from word `VP_COUNTERS`", ("VC_",)),
    ("Guest kernel segment: header, owners and sleeper hash", ("K_", "OWNER_", "B_")),
    ("Sleeper node", ("N_",)),
    ("Task record", ("T_", "DIE_")),
    ("Task states, programs, exit codes of the run loop", ("TS_", "P_", "RUN_", "KILL_")),
    ("Page-table entries", ("PTE_", "NPT_")),
)


class Constant(NamedTuple):
    """One named word, bit or value."""

    name: str
    value: int
    text: str


def constants() -> list[Constant]:
    """Every integer constant of proto/layout.py with the docstring below it, in source order."""
    tree = ast.parse(Path(layout.__file__).read_text())
    found: list[Constant] = []
    body = tree.body
    for i, node in enumerate(body):
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        value = getattr(layout, node.target.id)
        after = body[i + 1] if i + 1 < len(body) else None
        text = ""
        if (
            isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
            and isinstance(after.value.value, str)
        ):
            text = " ".join(after.value.value.split())
        found.append(Constant(node.target.id, value, text))
    return found


def tables() -> str:
    """The generated part of the page."""
    every = constants()
    parts = []
    for title, prefixes in SECTIONS:
        rows = [f"### {title}", "", "| name | word or value | meaning |", "|---|---|---|"]
        for c in every:
            if c.name.startswith(prefixes):
                shown = hex(c.value) if prefixes[0] == "PTE_" else str(c.value)
                rows.append(f"| `{c.name}` | {shown} | {c.text.replace('|', chr(92) + '|')} |")
        parts.append("\n".join(rows))
    return "\n\n".join(parts)


def with_tables(page: str) -> str:
    """The page with its generated part made anew."""
    return generated_page.with_tables(page, BEGIN, tables())


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(with_tables(path.read_text()))
