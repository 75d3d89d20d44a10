"""A daemon killed with direct reads in flight: after the fence, nothing changes in the shared frames any
more.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from swapd import swapfile, uring
from swapd.swapfile import SwapFile
from swapd.syscall import BLOCK_BYTES

Region = Callable[[int], np.ndarray]

TRIALS = 20
READS = 256
SETTLE_S = 0.008


@pytest.fixture
def big_swap(disk_dir: Path, region: Region) -> Iterator[SwapFile]:
    """4096 written slots, so that scattered reads stay many requests; no word of them is zero."""
    file = swapfile.create(disk_dir, 4096)
    pages = region(file.slots)
    pages[:] = 0xA5
    os.pwritev(file.fd, [pages.data], 0)
    yield file
    file.close()


@pytest.mark.usefixtures("uring_here")
def test_nothing_lands_after_the_fence(
    big_swap: SwapFile,
    disk_dir: Path,
    region: Region,
    record_testsuite_property: Callable[[str, object], None],
) -> None:
    """Control and fenced trials alternate. Whether the control sees late landings depends on the device and
    is recorded, not asserted.
    """
    if not big_swap.direct:
        pytest.skip("no direct I/O here: nothing to fence")
    if not swapfile.verify_fence(disk_dir):
        pytest.skip("this file system's fence is not relied upon")
    uring.warm()
    memory = region(READS)
    batch = swapfile.scattered_reads(big_swap.slots, READS)
    late = {"control": 0, "fenced": 0}
    landed = 0
    for trial in range(2 * TRIALS):
        way = ("control", "fenced")[trial % 2]
        memory[:] = 0
        assert swapfile.killed_reader(big_swap.fd, memory, batch) == ""
        if way == "fenced":
            swapfile.fence(big_swap.fd, big_swap.size_bytes)
        before = memory.copy()
        time.sleep(SETTLE_S)
        late[way] += int(not np.array_equal(before, memory))
        swapfile.fence(big_swap.fd, big_swap.size_bytes)  # nothing of this trial may land in the next
        landed += int(np.count_nonzero(memory[::BLOCK_BYTES]))
    record_testsuite_property("fence_control_late_trials", f"{late['control']} of {TRIALS}")
    record_testsuite_property("fence_reads_landed", f"{landed} of {2 * TRIALS * READS}")
    assert late["fenced"] == 0
    assert landed > 0  # the reads were started and went to the mapping that was watched


def test_probe_knows_this_file_system(swap: SwapFile, disk_dir: Path) -> None:
    probe = swapfile.probe_fence(disk_dir)
    if swap.direct and swap.fs_type in ("ext4", "xfs", "btrfs") and probe.rounds:
        assert probe.reliable, probe.reason
    assert swap.fs_type in probe.reason


@pytest.mark.usefixtures("uring_here")
def test_probe_notices_a_late_landing(
    swap: SwapFile, disk_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not swap.direct:
        pytest.skip("no direct I/O here")
    frames: list[np.ndarray] = []

    def reader(_fd: int, memory: np.ndarray, _batch: np.ndarray) -> str:
        frames.append(memory)
        return ""

    def late(_seconds: float) -> None:
        frames[0][-1] ^= 1

    monkeypatch.setattr(swapfile, "killed_reader", reader)
    monkeypatch.setattr(time, "sleep", late)
    monkeypatch.setattr(swapfile, "_WAITS_FOR_DIRECT_IO", frozenset({swap.fs_type}))
    probe = swapfile.probe_fence(disk_dir)
    assert (probe.reliable, probe.rounds) == (False, 1)
    assert "landed after the fence" in probe.reason


def test_probe_distrusts_an_unknown_file_system(
    swap: SwapFile, disk_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not swap.direct:
        pytest.skip("no direct I/O here")
    monkeypatch.setattr(swapfile, "fs_type_of", lambda _fd: "0x1234")
    probe = swapfile.probe_fence(disk_dir)
    assert not probe.reliable
    assert "0x1234 is not known" in probe.reason
    assert not swapfile.verify_fence(disk_dir)


def test_probe_reports_a_child_that_cannot_read(
    swap: SwapFile, disk_dir: Path, region: Region, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise uring.UringUnavailable("io_uring_setup: EPERM")

    monkeypatch.setattr(uring, "Uring", refuse)
    fds = len(list(Path("/proc/self/fd").iterdir()))
    assert (
        swapfile.killed_reader(swap.fd, region(1), swapfile.scattered_reads(1, 1)) == "io_uring_setup: EPERM"
    )
    assert len(list(Path("/proc/self/fd").iterdir())) == fds
    probe = swapfile.probe_fence(disk_dir)
    assert not probe.reliable
