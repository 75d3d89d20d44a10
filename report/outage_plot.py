"""The figure of an outage as an SVG file: work per 100 ms around it, one line per mode.

Needs matplotlib, which only this needs (extra `plot`). The same report gives the same bytes: no date, fixed identifiers, text as text.

Not handled here: what is in the report (report/outage.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from proto.errors import UserError
from report.outage import away_ms

SUFFIX: Final = ".svg"
SIZE_INCHES: Final = (8.0, 3.6)
COLORS: Final = {"sync": "#c0392b", "halt": "#e08e0b", "exception": "#6c5ce7", "interrupt": "#1f6fb2"}
LABELS: Final = {
    "sync": "sync: the vCPU waits",
    "halt": "halt: the vCPU is halted",
    "exception": "exception: only the task sleeps",
    "interrupt": "interrupt: only the task sleeps",
}
SETTINGS: Final[dict[str, Any]] = {
    "svg.hashsalt": "asyncpf",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "path.simplify": False,
}


def check_path(path: Path) -> None:
    """UserError for a file that could not be written at the end of the runs."""
    if path.suffix != SUFFIX:
        raise UserError("not the name of a figure", where="--plot", found=str(path), allowed="a *.svg file")
    if not path.absolute().parent.is_dir():
        raise UserError("there is no such folder", where="--plot", found=str(path.absolute().parent))
    if path.is_dir():
        raise UserError("a folder has this name", where="--plot", found=str(path), allowed="a *.svg file")


def write(report: Mapping[str, Any], title: str, path: Path) -> None:
    """Draw a report of `report.outage.contrast`. UserError when the file cannot be written."""
    import matplotlib as mpl  # noqa: PLC0415 - slow, and there only when it was asked for
    from matplotlib.backends.backend_svg import FigureCanvasSVG  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    with mpl.rc_context({**mpl.rcParamsDefault, **SETTINGS}):
        figure = Figure(figsize=SIZE_INCHES, layout="constrained")
        _draw(figure.add_subplot(), report, title)
        try:
            FigureCanvasSVG(figure).print_svg(path, metadata={"Date": None, "Creator": "asyncpf"})
        except OSError as error:
            raise UserError(
                "the figure cannot be written", where="--plot", found=f"{path}: {error.strerror}"
            ) from error


def _draw(axes: Any, report: Mapping[str, Any], title: str) -> None:
    away, row_ms, rows = away_ms(report), report["row_ms"], report["rows"]
    if away:
        axes.axvspan(0, away, color="#e6e6e6", linewidth=0)
        # In the lower half, between a line near 0 and one near 100 %.
        axes.text(
            away / 2,
            0.25,
            "swapd is away",
            ha="center",
            color="#666666",
            transform=axes.get_xaxis_transform(),
        )
    for mode in report["modes"]:
        values = [float("nan") if row[mode] is None else row[mode] for row in rows]
        edges = [row["ms"] for row in rows] + [rows[-1]["ms"] + row_ms] if rows else [0]
        axes.stairs(
            values, edges, baseline=None, color=COLORS.get(mode), linewidth=1.8, label=LABELS.get(mode, mode)
        )
    axes.set_title(title, loc="left")
    axes.set_xlabel("time since swapd was killed, ms")
    axes.set_ylabel(f"guest work per {row_ms} ms, %")
    axes.set_ylim(bottom=0)
    axes.margins(x=0)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(loc="lower right", frameon=False)
