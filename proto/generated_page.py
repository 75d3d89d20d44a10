"""Documentation pages of which a part is made from the code, between two marker lines."""

from __future__ import annotations

END = "<!-- end of tables -->"


def with_tables(page: str, begin: str, tables: str) -> str:
    """``page`` with what stands between the line ``begin`` and `END` replaced. Raises ValueError when a marker is missing."""
    before, found, rest = page.partition(begin)
    _, ended, after = rest.partition(END)
    if not found or not ended:
        raise ValueError(f"the page lacks {begin if not found else END}")
    return f"{before}{begin}\n\n{tables}\n\n{END}{after}"
