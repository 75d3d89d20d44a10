"""The comparison of modes: medians, ratios, reasons, and columns that line up."""

from __future__ import annotations

from typing import Any

from report.compare import render, table


def _summary(work: int, nested: int = 100, seconds: float = 2.0, **changes: Any) -> dict[str, Any]:
    return {
        "work": {"total": work},
        "seconds": seconds,
        "faults": {"nested": nested, "async": 1, "sync": 2, "halt": 3},
        "latency_us": {"fault_to_ready": {"p50": None}, "fault_to_mapped": {"p50": 5.5}},
        "vcpu_time": {"steal": 0.25},
        "pace": {"kept": True},
        "integrity": {"errors": 0},
    } | changes


def test_figures_are_medians_and_ratios_are_to_the_first_mode() -> None:
    rows = table(
        {
            "sync": [_summary(100), _summary(120), _summary(1000)],
            "interrupt": [_summary(228, nested=300)],
        }
    )
    assert [row["work"] for row in rows] == [120, 228]
    assert [row["work_ratio"] for row in rows] == [1.0, 1.9]
    assert [row["faults_per_s"] for row in rows] == [50.0, 150.0]
    assert [row["faults_ratio"] for row in rows] == [1.0, 3.0]
    assert [row["runs"] for row in rows] == [3, 1]


def test_missing_figures_stay_missing() -> None:
    (row,) = table({"sync": [_summary(0, seconds=0.0)]})
    assert row["work_ratio"] is None
    assert row["faults_per_s"] is None
    assert row["fault_to_ready_us"] is None


def test_pace_of_a_mode_is_kept_only_by_all_runs() -> None:
    for kept, expected in (([True, True], True), ([True, False], False), ([True, None], None)):
        (row,) = table({"sync": [_summary(1, pace={"kept": one}) for one in kept]})
        assert row["pace"] is expected


def test_errors_are_added_not_averaged() -> None:
    (row,) = table({"sync": [_summary(1, integrity={"errors": n}) for n in (0, 0, 4)]})
    assert row["errors"] == 4


def test_the_table_lines_up_and_says_what_must_not_be_compared() -> None:
    runs = {"sync": [_summary(1_234_567)], "interrupt": [_summary(2, pace={"kept": False})]}
    lines = render(table(runs), {"sync": "", "interrupt": "the pace was not kept"}).splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("mode")
    assert "1,234,567" in lines[1]
    assert "NOT KEPT" in lines[2]
    assert lines[3] == "not comparable: interrupt: the pace was not kept"
    end = lines[0].index("work") + len("work")
    assert [line[end - 1 : end + 1] for line in lines[1:3]] == ["7 ", "2 "]
