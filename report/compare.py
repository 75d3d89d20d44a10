"""Runs of the same work under several modes, side by side.

Purpose: `table` gives medians and ratios to the first mode; `render` prints them aligned.

Invariants: a ratio is null where the first mode's figure is missing or 0; figures are shown even where they must not be compared,
with the reason beside them.

Not handled here: running anything, and whether a single run may be compared (report/pace.py `not_comparable`).
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

Summary = Mapping[str, Any]

COLUMNS = (
    ("mode", "mode"),
    ("work", "work"),
    ("work_ratio", "ratio"),
    ("faults_per_s", "faults/s"),
    ("faults_ratio", "ratio"),
    ("async", "async"),
    ("sync", "sync"),
    ("halt", "halts"),
    ("fault_to_ready_us", "fault-ready us"),
    ("fault_to_mapped_us", "fault-mapped us"),
    ("steal_s", "steal s"),
    ("pace", "pace"),
    ("errors", "errors"),
)
"""Key of a row, heading."""


def table(runs: Mapping[str, Sequence[Summary]]) -> list[dict[str, Any]]:
    """One row per mode, in the order given; each figure is the median of the mode's runs."""
    rows = [_row(mode, summaries) for mode, summaries in runs.items()]
    for row in rows:
        row["work_ratio"] = _ratio(row["work"], rows[0]["work"])
        row["faults_ratio"] = _ratio(row["faults_per_s"], rows[0]["faults_per_s"])
    return rows


def render(rows: Sequence[Mapping[str, Any]], reasons: Mapping[str, str]) -> str:
    """The table as aligned text; reasons: mode -> why its figures must not be compared."""
    cells = [[heading for _, heading in COLUMNS]]
    cells += [[_cell(row[key]) for key, _ in COLUMNS] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(COLUMNS))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    ]
    lines += [f"not comparable: {mode}: {reason}" for mode, reason in reasons.items() if reason]
    return "\n".join(lines) + "\n"


def _row(mode: str, summaries: Sequence[Summary]) -> dict[str, Any]:
    def median(*path: str) -> float | None:
        found = [value for summary in summaries if (value := _at(summary, path)) is not None]
        return statistics.median(found) if found else None

    rates = [s["faults"]["nested"] / s["seconds"] for s in summaries if s["seconds"]]
    kept = [summary["pace"]["kept"] for summary in summaries]
    return {
        "mode": mode,
        "runs": len(summaries),
        "work": median("work", "total"),
        "faults_per_s": round(statistics.median(rates), 1) if rates else None,
        "async": median("faults", "async"),
        "sync": median("faults", "sync"),
        "halt": median("faults", "halt"),
        "fault_to_ready_us": median("latency_us", "fault_to_ready", "p50"),
        "fault_to_mapped_us": median("latency_us", "fault_to_mapped", "p50"),
        "steal_s": median("vcpu_time", "steal"),
        "pace": None if None in kept else all(kept),
        "errors": sum(summary["integrity"]["errors"] for summary in summaries),
    }


def _at(summary: Summary, path: Sequence[str]) -> Any:
    value: Any = summary
    for name in path:
        value = value[name]
    return value


def _ratio(value: float | None, first: float | None) -> float | None:
    return round(value / first, 3) if value is not None and first else None


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "kept" if value else "NOT KEPT"
    if isinstance(value, float):
        return f"{value:,.3f}" if abs(value) < 10 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
