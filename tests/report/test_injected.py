"""What a schedule of faults means for a run: what did not happen fails it, what was lost on purpose does not."""

from __future__ import annotations

from typing import Any

import pytest

from proto.faults import FaultMachine, words_needed
from proto.topology import Topology
from proto.topology_faults import schedule
from report import injected, judgement
from tests.report.test_summary import full_summary


def rows(*faults: dict[str, Any], fired: tuple[int, ...]) -> list[dict[str, Any]]:
    topology = Topology.from_dict({"run": {"seconds": 5.0}, "fault": list(faults)})
    machine = FaultMachine(schedule(topology.fault, 1, 5.0, 1), [0] * words_needed(len(faults), 1))
    machine.start(1)
    for spec, times in zip(machine.specs, fired, strict=True):
        for _ in range(times):
            machine.fire(spec, 2)
    return injected.table(topology, machine)


def summary(found: list[dict[str, Any]], machine_checks: int = 0, oom: int = 0) -> dict[str, Any]:
    made = full_summary()
    made["injected"] = found
    made["tasks"] = {
        "done": 3,
        "killed": machine_checks + oom,
        "unfinished": 0,
        "kill_reasons": {"segv": 0, "oom": oom, "machine_check": machine_checks},
    }
    return made


def test_what_happened_is_in_the_table() -> None:
    found = rows({"do": "kill", "every_ms": 1000}, {"do": "bit_flip", "nth": 3, "times": 2}, fired=(3, 2))
    assert [(row["scheduled"], row["fired"], row["passed_over"], row["failed"]) for row in found] == [
        (4, 3, 1, ""),
        (2, 2, 0, ""),
    ]
    assert list(injected.lines(found)) == [
        "fault 0, kill swapd every 1000 ms: 3 of 4, 1 passed over",
        "fault 1, bit_flip swapd every 3rd read, 2 times: 2 of 2",
    ]
    assert judgement.failures(summary(found)) == []


@pytest.mark.parametrize(
    ("fault", "fired"),
    [
        ({"do": "kill", "every_ms": 1000}, 0),
        ({"do": "kill", "after": 1.0}, 0),
        ({"do": "drop", "nth": 3, "times": 2}, 1),
        ({"do": "drop", "rate_per_s": 2}, 0),
    ],
)
def test_what_did_not_happen_fails_a_run_that_finished(fault: dict[str, Any], fired: int) -> None:
    found = rows(fault, fired=(fired,))
    (failure,) = judgement.failures(summary(found))
    assert failure.startswith(f"fault 0, {fault['do']} swapd ")
    assert "NOT AS SCHEDULED" in next(injected.lines(found))
    interrupted = {**summary(found), "ended": "interrupted"}
    assert judgement.failures(interrupted) == ["the run ended: interrupted"]


def test_a_page_that_was_lost_on_purpose_costs_its_task_and_not_the_run() -> None:
    found = rows({"do": "bad_block", "nth": 3}, fired=(1,))
    assert judgement.failures(summary(found, machine_checks=1)) == []
    assert "cost 1 guest tasks: fault 0, bad_block swapd 3rd read" in injected.lost_pages(1, found)
    assert injected.lost_pages(0, found) == ""
    assert judgement.failures(summary(found, machine_checks=1, oom=2)) == [
        "2 guest tasks were killed (2 by oom)"
    ]


@pytest.mark.parametrize(
    ("fault", "fired"),
    [
        ({"do": "kill", "every_ms": 1000}, 3),
        ({"do": "bit_flip", "nth": 3, "times": 2}, 2),
        ({"do": "write_error", "nth": 1, "times": 9}, 9),
    ],
)
def test_a_page_that_nothing_explains_fails_the_run(fault: dict[str, Any], fired: int) -> None:
    found = rows(fault, fired=(fired,))
    assert judgement.failures(summary(found, machine_checks=1)) == [
        "1 guest tasks were killed (1 by machine_check)"
    ]
    assert injected.lost_pages(1, found) == ""


def test_a_run_without_a_schedule_has_none() -> None:
    plain = Topology.from_dict({})
    assert injected.table(plain, None) == injected.table(plain, FaultMachine((), [])) == []
    assert injected.chaos(None) is None
