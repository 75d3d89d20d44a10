"""Outages under several modes as a table, bars and a figure."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from proto.errors import UserError
from report import outage_plot
from report.outage import FIRST_MS, LAST_MS, ROW_MS, away_ms, bar, contrast, render

NONE: dict[str, float | None] = {"median": None, "max": None}


def summary(
    per_100ms: dict[int, float], *, before: float | None = 1000.0, down: float = 200.0, cut: int = 0
) -> Any:
    """Of one run with one outage; rows that are not named are missing."""
    return {
        "outage": {
            "count": 1,
            "work_per_100ms_before": before,
            "work_by_ms": {str(ms): per_100ms.get(ms) for ms in range(FIRST_MS, LAST_MS, ROW_MS)},
            "down_ms": {"median": down, "max": down + 1},
            "pages_ms": {"median": 2.0, "max": 2.5},
            "resume_ms": {"median": 3.0, "max": 4.5},
            "resumes_cut": cut,
        }
    }


def runs() -> dict[str, list[Any]]:
    sync = [summary({-100: 1000, 0: 50, 100: n, 200: 900}, down=down) for n, down in ((0, 210.5), (20, 190))]
    other = [summary({-100: 2000, 0: 1990, 100: 2010.4, 200: 3000}, before=2000, cut=2)]
    return {"sync": sync, "interrupt": other}


GOLDEN = """\
work per 100 ms, % of that before the daemon ended; 0 ms: its end
    ms  away  sync                              interrupt
  -500             -                                 -
  -400             -                                 -
  -300             -                                 -
  -200             -                                 -
  -100         100.0  ████████████████████       100.0  ████████████████████
     0  away     5.0  █                           99.5  ███████████████████▉
   100  away     1.0  ▎                          100.5  ████████████████████▏
   200          90.0  ██████████████████         150.0  ███████████████████████▶
sync: 2 outages in 2 runs, 100 % = 1,000 units; the daemon was away for 200.2 ms (max 211.5); \
after its return the last awaited page came within 2.0 ms (max 2.5), the last waiting task went on within 3.0 ms (max 4.5)
interrupt: 1 outages in 1 runs, 100 % = 2,000 units; the daemon was away for 200.0 ms (max 201.0); \
after its return the last awaited page came within 2.0 ms (max 2.5), the last waiting task went on within 3.0 ms (max 4.5), \
2 times only after the next outage or the end
not comparable: sync: the pace was not kept
"""


def test_the_text() -> None:
    assert render(contrast(runs()), {"sync": "the pace was not kept", "interrupt": ""}) == GOLDEN


def test_rows_are_medians_and_trailing_empty_ones_go() -> None:
    many = {"sync": [summary({0: n}) for n in (100, 900, 300)] + [summary({})]}
    report = contrast(many)
    assert [row["ms"] for row in report["rows"]][-1] == 0
    assert report["rows"][-1]["sync"] == 30.0


@pytest.mark.parametrize(
    "found",
    [
        {"outage": None},
        summary({0: 5}, before=None),
        summary({0: 5}, before=0.0),
        {"outage": {"count": 0, "work_per_100ms_before": None, "work_by_ms": None, "down_ms": NONE, "pages_ms": NONE,
                    "resume_ms": NONE, "resumes_cut": 0}},
    ],
    ids=["no table", "nothing before", "idle before", "no outage"],
)  # fmt: skip
def test_runs_without_an_outage(found: Any) -> None:
    report = contrast({"sync": [found]})
    assert report["rows"] == []
    assert render(report, {}) == "no outage was measured\n"


def test_the_time_away_is_the_least_of_the_modes() -> None:
    report = contrast({"sync": [summary({0: 1}, down=900)], "halt": [summary({0: 1}, down=300)]})
    assert away_ms(report) == 300
    assert away_ms(contrast({})) == 0


@pytest.mark.parametrize(
    ("percent", "cells"), [(0.0, 0.0), (-3.0, 0.0), (0.3, 0.0), (0.7, 0.125), (50.0, 10.0), (120.0, 24.0)]
)
def test_bars_have_eighths(percent: float, cells: float) -> None:
    shown = bar(percent)
    assert len(shown) == math.ceil(cells)
    assert sum(" ▏▎▍▌▋▊▉█".index(cell) for cell in shown) == 8 * cells


def test_a_bar_that_is_cut_says_so() -> None:
    assert bar(121) == bar(10_000) == "█" * 23 + "▶"


# the figure


@pytest.mark.parametrize("name", ["figure.png", "figure", "no/such/folder/figure.svg", "taken.svg"])
def test_a_figure_that_cannot_be_written_is_refused_before_the_runs(name: str, tmp_path: Path) -> None:
    (tmp_path / "taken.svg").mkdir()
    with pytest.raises(UserError, match="--plot"):
        outage_plot.check_path(tmp_path / name)


def test_a_figure_that_can_be_written(tmp_path: Path) -> None:
    outage_plot.check_path(tmp_path / "figure.svg")


@pytest.fixture
def figure(tmp_path: Path) -> Path:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (requirements/plot.txt has it)")
    path = tmp_path / "figure.svg"
    outage_plot.write(contrast(runs()), "a title", path)
    return path


def test_the_figure_is_the_same_every_time(figure: Path) -> None:
    first = figure.read_bytes()
    outage_plot.write(contrast(runs()), "a title", figure)
    assert figure.read_bytes() == first
    assert len(first) < 40_000
    assert b"<dc:date>" not in first


def test_the_figure_has_a_line_per_mode_and_its_text_is_text(figure: Path) -> None:
    root = ET.fromstring(figure.read_text())
    words = [node.text for node in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"a title", "swapd is away", "sync: the vCPU waits", "interrupt: only the task sleeps"} <= set(
        words
    )
    colors = [outage_plot.COLORS["sync"], outage_plot.COLORS["interrupt"]]
    assert all(color in figure.read_text() for color in colors)


def test_a_report_without_rows_is_drawn_empty(figure: Path) -> None:
    outage_plot.write(contrast({"sync": []}), "nothing", figure)
    assert "nothing" in figure.read_text()


def test_a_full_disk_is_a_user_error(figure: Path) -> None:
    with pytest.raises(UserError, match="cannot be written"):
        outage_plot.write(contrast(runs()), "x", figure.parent)
