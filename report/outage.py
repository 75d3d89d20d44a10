"""Runs with outages of swap daemons, side by side: what guests got done before, during and after, as a table and as bars.

Purpose: `contrast` turns summaries into percentages of the undisturbed work, medians over repeats; `render` shows them.

Invariants: each mode is measured by its own work before the outages, so that modes compare whatever their speeds; a row that no run
has is null, and trailing ones are left out.

Not handled here: measuring (launcher/outage.py), the figure as a file (report/outage_plot.py).
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Final

Summary = Mapping[str, Any]

FIRST_MS: Final = -500
LAST_MS: Final = 3000
"""What is looked at around the beginning of an outage."""
ROW_MS: Final = 100
SLOT_MS: Final = 20
BAR_CELLS: Final = 24
"""Width of a bar of BAR_PERCENT_MAX percent; longer ones are cut, with a mark."""
BAR_PERCENT_MAX: Final = 120
EIGHTHS: Final = " ▏▎▍▌▋▊▉█"
CUT_MARK: Final = "▶"
AWAY: Final = "away"


def contrast(runs: Mapping[str, Sequence[Summary]]) -> dict[str, Any]:
    """The comparison as plain values; runs: mode -> summaries of its repeats.

    ``rows``: dicts of ``ms`` (a row's beginning relative to that of the outage) and the percentage of each mode. ``modes``: for each mode
    its runs, outages, the work per 100 ms that stands for 100 %, and medians and maxima of the outages' lengths and of the resumes, ms.
    """
    rows = []
    for ms in range(FIRST_MS, LAST_MS, ROW_MS):
        row: dict[str, Any] = {"ms": ms}
        row |= {mode: _median([_percent(summary, ms) for summary in found]) for mode, found in runs.items()}
        rows.append(row)
    while rows and all(rows[-1][mode] is None for mode in runs):
        rows.pop()
    return {"row_ms": ROW_MS, "rows": rows, "modes": {mode: _mode(found) for mode, found in runs.items()}}


def _percent(summary: Summary, ms: int) -> float | None:
    outage = summary["outage"]
    if not outage or not outage["work_by_ms"] or not outage["work_per_100ms_before"]:
        return None
    work: float | None = outage["work_by_ms"][str(ms)]
    before: float = outage["work_per_100ms_before"]
    return None if work is None else 100 * work / before


def _median(values: Sequence[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return round(statistics.median(found), 1) if found else None


def _mode(found: Sequence[Summary]) -> dict[str, Any]:
    tables = [summary["outage"] for summary in found if summary["outage"]]
    return {
        "runs": len(found),
        "outages": sum(table["count"] for table in tables),
        "work_per_100ms_before": _median([table["work_per_100ms_before"] for table in tables]),
        "down_ms": _both([table["down_ms"] for table in tables]),
        "pages_ms": _both([table["pages_ms"] for table in tables]),
        "resume_ms": _both([table["resume_ms"] for table in tables]),
        "resumes_cut": sum(table["resumes_cut"] for table in tables),
    }


def _both(found: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    """Median of medians, largest maximum."""
    maxima = [value for one in found if (value := one["max"]) is not None]
    return {"median": _median([one["median"] for one in found]), "max": max(maxima, default=None)}


def away_ms(report: Mapping[str, Any]) -> float:
    """How long the daemon was away at least in half of the outages, in every mode; 0 when nothing is known."""
    found = [one["down_ms"]["median"] for one in report["modes"].values()]
    return min((value for value in found if value is not None), default=0.0)


def render(report: Mapping[str, Any], reasons: Mapping[str, str]) -> str:
    """Table and bars, with a line break at the end. report: of `contrast`; reasons: mode -> why it must not be compared."""
    modes = list(report["modes"])
    if not report["rows"]:
        return "no outage was measured\n"
    lines = [
        f"work per {report['row_ms']} ms, % of that before the daemon ended; 0 ms: its end",
        f"{'ms':>6}  {AWAY:4}  " + "  ".join(f"{mode:<{8 + BAR_CELLS}}" for mode in modes).rstrip(),
    ]
    away = away_ms(report)
    for row in report["rows"]:
        mark = AWAY if 0 <= row["ms"] < away else ""
        cells = "  ".join(f"{_cell(row[mode]):<{8 + BAR_CELLS}}" for mode in modes)
        lines.append(f"{row['ms']:>6}  {mark:4}  {cells}".rstrip())
    lines += [line(mode, report["modes"][mode]) for mode in modes]
    lines += [f"not comparable: {mode}: {reason}" for mode, reason in reasons.items() if reason]
    return "\n".join(lines) + "\n"


def line(mode: str, one: Mapping[str, Any]) -> str:
    """One mode in words."""
    before = "-" if one["work_per_100ms_before"] is None else f"{one['work_per_100ms_before']:,.0f}"
    runs = f"{one['outages']} outages in {one['runs']} runs"
    down = f"the daemon was away for {median_and_max(one['down_ms'])}"
    pages = f"after its return the last awaited page came within {median_and_max(one['pages_ms'])}"
    resumed = f"the last waiting task went on within {median_and_max(one['resume_ms'])}"
    cut = f", {one['resumes_cut']} times only after the next outage or the end" if one["resumes_cut"] else ""
    return f"{mode}: {runs}, 100 % = {before} units; {down}; {pages}, {resumed}{cut}"


def median_and_max(value: Mapping[str, float | None]) -> str:
    """Median and maximum, ms."""
    if value["median"] is None or value["max"] is None:
        return "-"
    return f"{value['median']:,.1f} ms (max {value['max']:,.1f})"


def _cell(percent: float | None) -> str:
    return "     -" if percent is None else f"{percent:>6.1f}  {bar(percent)}"


def bar(percent: float) -> str:
    """Length in proportion, to an eighth of a cell."""
    if percent > BAR_PERCENT_MAX:
        return EIGHTHS[-1] * (BAR_CELLS - 1) + CUT_MARK
    eighths = round(max(0.0, percent) * BAR_CELLS * 8 / BAR_PERCENT_MAX)
    return EIGHTHS[-1] * (eighths // 8) + EIGHTHS[eighths % 8].strip()
