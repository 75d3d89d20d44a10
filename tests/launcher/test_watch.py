"""What is seen of a run from outside: tasks that wait for long, tasks that have ended, the line about it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from launcher.live import STALLED_NS, Live
from launcher.watch import Watch
from proto.layout import (
    DW_EPOCH,
    DW_GONE,
    DW_NEVER,
    K_DONE,
    T_FAULT_NS,
    T_STATE,
    TS_DONE,
    TS_HALTING,
    TS_RUNNING,
    TS_SLEEPING,
    VC_WORK,
    VP_COUNTERS,
    control_words,
    daemons_base,
)
from proto.segments import Segment, create
from proto.stats import HostCounter, host_block, stats_words
from proto.units import PAGE_SIZE, WORDS_PER_PAGE
from tests.report.test_summary import _kernel

S = 1_000_000_000
NOW = 100 * S


@pytest.fixture
def segments() -> Iterator[dict[str, Segment]]:
    """Two VMs of two vCPUs: one task waits for long, one halts for long, others do not."""
    old, new = NOW - 2 * STALLED_NS, NOW - STALLED_NS // 2
    kernels = [
        _kernel(
            [
                {T_STATE: TS_SLEEPING, T_FAULT_NS: old},
                {T_STATE: TS_SLEEPING, T_FAULT_NS: new},
                {T_STATE: TS_RUNNING, T_FAULT_NS: old},
            ]
        ),
        _kernel([{T_STATE: TS_HALTING, T_FAULT_NS: old}, {T_STATE: TS_DONE, T_FAULT_NS: old}]),
    ]
    sizes = {"control": control_words(2, 4) * 8, "vcpus": 4 * PAGE_SIZE, "stats": stats_words(4, 1) * 8}
    made = create(sizes | {f"kernel-{v}": kernel.nbytes for v, kernel in enumerate(kernels)})
    for v, kernel in enumerate(kernels):
        made[f"kernel-{v}"].u64[: len(kernel)] = kernel
    made["kernel-1"].u64[K_DONE] = 1
    yield made
    for segment in made.values():
        segment.close()


def test_tasks_that_wait_for_long_are_counted(segments: dict[str, Segment]) -> None:
    watch = Watch(segments)
    assert watch.waiting_tasks(NOW, STALLED_NS) == 2
    assert watch.waiting_tasks(NOW) == watch.waiting_tasks(NOW, STALLED_NS // 4) == 3
    assert watch.waiting_tasks(NOW, 50 * STALLED_NS) == 0
    assert watch.waiting_tasks(5, S) == 0, "a bound before the clock began"
    assert watch.tasks_done() == (1, 5)


def test_outages_are_measured_by_the_work_of_each_vm_and_the_epoch_of_each_daemon(
    segments: dict[str, Segment],
) -> None:
    segments["vcpus"].u64.reshape(-1, WORDS_PER_PAGE)[:, VP_COUNTERS + VC_WORK] = [1, 2, 30, 40]
    words = segments["control"].u64[daemons_base(2) :]
    words[:4] = [DW_EPOCH + 7, DW_NEVER, DW_EPOCH, DW_GONE]
    reading = Watch(segments, [2, 2], 4).outage_reading()
    assert reading.work == (3, 70)
    assert reading.epochs[:3] == (7, -1, 0)
    assert reading.epochs[3] > 1 << 32, "later than any that could be awaited"
    assert len(reading.epochs) == 4


def test_the_line_has_rates_of_the_time_since_the_last_one(segments: dict[str, Segment]) -> None:
    host = host_block(segments["stats"].u64)
    vcpus = segments["vcpus"].u64.reshape(-1, WORDS_PER_PAGE)
    host.set(HostCounter.NESTED_FAULTS, 1000)
    vcpus[:, VP_COUNTERS + VC_WORK] = np.uint64(10)
    live = Live(Watch(segments))
    live.begin(NOW - 10 * S)
    host.set(HostCounter.NESTED_FAULTS, 21_000)
    vcpus[:, VP_COUNTERS + VC_WORK] = np.uint64(50_010)
    line = live.line(NOW, "10 of 20 s", 3, 2)
    assert line == "10 of 20 s, 2,000 faults/s, 3 outstanding, 2 stalled, 3 restarts, 2 kills, work 20,000/s"
    assert live.line(NOW + S, "11 of 20 s", 0, None) == (
        "11 of 20 s, 0 faults/s, 3 outstanding, 3 stalled, work 0/s"
    )
