"""Page tables of a scenario's guest: four levels in guest memory, one address space, one table per level.

Page p of the scenario is virtual page p. The tables lie below the pages and can be on swap like any other page; the guest reads an entry
of each level before a touch, and every entry must be what was put there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from proto.layout import PTE_P, PTE_U, PTE_W
from proto.units import PAGE_SHIFT

FIRST_GFN: Final = 256
"""gfn of page 0; below lie the tables and the shared areas."""
ROOT_GFN: Final = 128
LEVELS: Final = (4, 3, 2, 1)
"""In the order of a walk."""
_FLAGS: Final = PTE_P | PTE_W | PTE_U


def table_gfn(level: int) -> int:
    """Where the table of a level lies."""
    return ROOT_GFN + 4 - level


def entry_gpa(level: int, page: int) -> int:
    """Address of the entry that a walk for ``page`` reads."""
    index = page if level == 1 else 0
    return (table_gfn(level) << PAGE_SHIFT) + 8 * index


def entry(level: int, page: int) -> int:
    """What it holds."""
    to = FIRST_GFN + page if level == 1 else table_gfn(level - 1)
    return to << PAGE_SHIFT | _FLAGS


def contents(level: int, pages: Sequence[int]) -> dict[int, int]:
    """Words of a table by index, for these pages."""
    return {page if level == 1 else 0: entry(level, page) for page in pages}
