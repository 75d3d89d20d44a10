"""Schedules of faults on real processes: what was to happen happened, is on record, and nothing was lost that should not be."""

from __future__ import annotations

import numpy as np

from proto.events import Events, Kind
from proto.faults import KINDS
from proto.run import PROC_HOST, PROC_LAUNCHER, PROC_SWAPD
from proto.trace import read_file
from tests.e2e.runs import Runner, of_kind

GUEST = """
[run]
seconds = 3.0

[host]
allowance_mib = 8
zero_pages = false

[[vm]]
vcpus = 2
memory_mib = 32
rate_ops_per_s = 30_000

[[vm.task]]
workload = "stamp"
count = 6
memory_kib = 3072

[[swapd]]

[[swapd]]
transport = "tcp"
"""
MIXED = """
{ do = "kill", on = "swapd-0", at = "read.done", nth = 5 }
{ do = "kill", on = "swapd-1", at = "swap_out.sent", nth = 10 }
{ do = "kill", every_ms = 700, until = 2.0 }
{ do = "stop", on = "vcpu-1", at = "fault.announced", nth = 2, for_ms = 100 }
{ do = "stop", on = "host", after = 0.5, for_ms = 100 }
{ do = "stop", on = "swapd-1", at = "write.started", nth = 5, for_ms = 50 }
{ do = "drop", nth = 10 }
{ do = "duplicate", nth = 4, times = 2 }
{ do = "delay", on = "swapd-0", nth = 5, for_ms = 20 }
{ do = "disconnect", on = "swapd-1", after = 0.4, for_ms = 50 }
{ do = "slow", on = "swapd-0", after = 0.3, for_ms = 50, slower_ms = 2.0 }
{ do = "read_error", nth = 2 }
{ do = "short_read", nth = 3 }
{ do = "write_error", nth = 3, times = 2 }
{ do = "no_space", on = "swapd-1", after = 0.2 }
{ do = "bit_flip", on = "swapd-0", nth = 20, times = 3 }
"""
HARMLESS_KINDS = {kind for kind in KINDS if kind not in ("bad_block", "device_gone")}


def with_faults(text: str, faults: str) -> str:
    return text + "".join(
        "\n[[fault]]\n" + "\n".join(part.strip() for part in line.strip("{ }").split(", ")) + "\n"
        for line in faults.strip().splitlines()
    )


def faults_of(events: Events, number: int) -> Events:
    found = of_kind(events, Kind.FAULT)
    chosen: Events = found[found["a"] == number]
    return chosen


def test_many_kinds_at_once_happen_are_on_record_and_cost_nothing(runner: Runner) -> None:
    ended = runner.run(with_faults(GUEST, MIXED))
    assert ended.code == 0, ended.stderr
    summary = ended.summary
    rows = summary["injected"]
    assert {row["do"] for row in rows} == HARMLESS_KINDS
    assert [row["failed"] for row in rows] == [""] * len(rows)
    assert summary["integrity"]["reads_checked"] > 0
    assert summary["integrity"]["errors"] == 0
    # Not each: with an answer that is lost the wrong bit is, too.
    assert summary["integrity"]["checksum_errors"] >= 1
    assert summary["tasks"]["killed"] == summary["totals"]["machine_checks"] == 0
    assert summary["totals"]["io_retries"] > 0
    assert summary["check"]["violations"] == {}
    assert summary["restarts"] >= 3
    events = ended.events()
    by = {PROC_HOST: 0, PROC_LAUNCHER: 0, PROC_SWAPD: 0, PROC_SWAPD + 1: 0}
    for number, row in enumerate(rows):
        found = faults_of(events, number)
        assert found["token"].tolist() == list(range(1, row["fired"] + 1)), row
        assert {KINDS[kind] for kind in found["b"].tolist()} == {row["do"]}
        for proc in found["proc"].tolist():
            by[proc] += 1
    assert all(by.values()), f"everybody did their part: {by}"
    _assert_nothing_came_after_the_kill(runner, events)


def _assert_nothing_came_after_the_kill(runner: Runner, events: Events) -> None:
    """The daemon that was killed at its fifth read never answered it: its record is the last thing of that incarnation."""
    (killed,) = faults_of(events, 0)
    request = int(killed["cause"])
    assert request & 1 == 0, "a read"
    files = [read_file(path) for path in (runner.folder / "small-out" / "events").glob("swapd-0-*.bin")]
    (own,) = [
        file for file in files if np.any(file.events["kind"] == Kind.FAULT) and file.events[-1] == killed
    ]
    assert not own.closed
    assert Kind.PROCESS_END not in own.events["kind"]


def test_a_fault_that_cannot_happen_fails_the_run(runner: Runner) -> None:
    ended = runner.run(
        GUEST,
        "--fault",
        "kill at=daemon.hello nth=90",
        "--fault",
        "duplicate nth=1",
        "--for",
        "500ms",
        command="chaos",
    )
    assert ended.code == 1
    assert (
        "fault 0, kill swapd 90th daemon.hello happened 0 times of 1 (the step was seen 0 times)"
        in ended.stderr
    )
    assert ended.summary["ended"] == "finished"
    assert [row["fired"] for row in ended.summary["injected"]] == [0, 1]


def test_a_block_that_goes_bad_costs_one_task_and_the_summary_says_so(runner: Runner) -> None:
    ended = runner.run(GUEST, "--fault", "bad_block nth=5", "--for", "1500ms", command="chaos")
    assert ended.code == 0, ended.stderr
    summary = ended.summary
    assert summary["tasks"]["killed"] == summary["tasks"]["kill_reasons"]["machine_check"] == 1
    assert summary["tasks"]["done"] == 5, "the guest goes on"
    assert summary["integrity"]["errors"] == 0
    assert any("pages were lost on purpose, which cost 1 guest tasks" in text for text in summary["warnings"])


def test_a_killed_vcpu_ends_the_run_with_who_wanted_it(runner: Runner) -> None:
    ended = runner.run(
        GUEST, "--fault", "kill on=vcpu-1 at=fault.announced nth=3", "--for", "5s", command="chaos"
    )
    assert ended.code == 1
    assert (
        "vcpu-1 killed by SIGKILL (as fault 0 of the schedule wants: kill 3rd fault.announced)"
        in ended.summary["ended"]
    )
    assert ended.summary["injected"][0]["fired"] == 1
