"""Swap is too small for what the guests touch: one task after the other dies by the rule, the others never see a wrong word."""

from __future__ import annotations

import numpy as np
import pytest

from proto.events import Kind
from tests.e2e.runs import Ended, Runner, of_kind

SMALL_SWAP = """
[run]
seconds = 40.0

[host]
allowance_mib = 3
zero_pages = false

[[vm]]
vcpus = 2
memory_mib = 32

[[vm.task]]
workload = "chase"
count = 2
memory_kib = 1280
ops = 1500

[[vm.task]]
workload = "bm"
memory_kib = 4096
fault_threads = 1
work_threads = 1

[[vm.task]]
workload = "stamp"
memory_kib = 768
ops = 1500

[[swapd]]
size_mib = 3
"""
"""6.5 MiB and their tables, of which 6 are filled before the start barrier, on 6 MiB of frames and slots. However the tasks share the time
until then, the benchmark's threads have most when memory gets short: the others have 2.5 MiB in all."""
THREADS = {3, 4, 5}
"""Of the benchmark, as events count tasks."""


def judge(ended: Ended) -> None:
    """What every such run has to show."""
    summary = ended.summary
    assert ended.code == 1, "a run that had to kill a task says so"
    assert summary["ended"] == "finished"
    assert summary["integrity"]["errors"] == 0
    assert summary["integrity"]["reads_checked"] > 0
    assert summary["check"]["violations"] == {}
    assert summary["tasks"]["unfinished"] == 0
    assert summary["tasks"]["kill_reasons"]["swap_full"] == summary["tasks"]["killed"] == len(THREADS)
    totals = summary["totals"]
    assert totals["oom_kills"] == 1
    assert totals["oom_notices"] >= 1
    assert totals["pages_released"] > 500
    (warning,) = [text for text in summary["warnings"] if "host memory and swap were full" in text]
    assert "tasks 2, 3, 4 (bm" in warning
    assert "3 by swap_full" in ended.stderr


@pytest.mark.parametrize("mode", ["sync", "interrupt"])
def test_the_largest_process_dies_and_the_others_go_on(mode: str, runner: Runner) -> None:
    ended = runner.run(SMALL_SWAP, "--mode", mode)
    judge(ended)
    events = ended.events()
    victims = of_kind(events, Kind.G_OOM_VICTIM)
    assert victims["a"].tolist() == [min(THREADS)]
    released = of_kind(events, Kind.G_OOM_RELEASE)
    assert int(victims["c"][0]) in released["b"].tolist(), "all that it had was given back"
    assert set(of_kind(events, Kind.TASK_KILLED)["a"].tolist()) == THREADS
    assert set(of_kind(events, Kind.TASK_DONE)["a"].tolist()) == {1, 2, 6}
    answers = of_kind(events, Kind.OOM_ANSWER)
    assert np.count_nonzero(answers["c"] & 1) == 1
