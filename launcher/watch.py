"""Looking at a run from outside: sums over the vCPU pages, memory of processes, the state of each vCPU in words.

Purpose: what the launcher shows while a run is under way, what it samples for the summary, and what it says when a run hangs. All
of it reads shared memory and /proc and writes nothing.

Not handled here: the figures of a finished run (report/summary.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from launcher.outage import Reading
from proto.layout import (
    CTL_STOP,
    DW_EPOCH,
    K_DONE,
    MODE_IN_GUEST,
    T_FAULT_NS,
    T_STATE,
    TS_HALTING,
    TS_SLEEPING,
    VC_EXITS,
    VC_VCLOCK_NS,
    VC_WORK,
    VP_COUNTERS,
    VP_DOORBELL,
    VP_STATE,
    VP_TASK,
    control_words,
    daemons_base,
)
from proto.segments import Segment
from proto.stats import HostCounter, StatsBlock, host_block
from proto.units import WORDS_PER_PAGE
from report.summary import Snapshot
from report.tasks import task_records

MODE_MASK: Final = 3
KIB_PER_MIB: Final = 1024


class Watch:
    """Views of the segments of a run. They must not be used after the segments were closed."""

    def __init__(
        self, segments: Mapping[str, Segment], vm_vcpus: Sequence[int] = (), daemons: int = 0
    ) -> None:
        """segments: of one run, mapped in this process. vm_vcpus: vCPUs of each VM, daemons: how many, both for `outage_reading`."""
        self._vcpus: npt.NDArray[np.uint64] = segments["vcpus"].u64.reshape(-1, WORDS_PER_PAGE)
        self._stats = segments["stats"].u64
        self._control = segments["control"].u64
        self._host: StatsBlock = host_block(self._stats)
        self._kernels = [
            segments[f"kernel-{v}"].u64 for v in range(sum(name.startswith("kernel-") for name in segments))
        ]
        self._tasks = [task_records(kernel) for kernel in self._kernels]
        vms = len(self._kernels)
        self._daemons = self._control[daemons_base(vms) : control_words(vms, daemons)]
        self._first_vcpus = np.cumsum([0, *vm_vcpus[:-1]])

    def work(self) -> int:
        """Work units of all vCPUs so far."""
        return int(self._vcpus[:, VP_COUNTERS + VC_WORK].sum())

    def epochs(self) -> tuple[int, ...]:
        """Of each daemon the incarnation that the host connected last; -1 before the first, more than any epoch when it is gone."""
        return tuple(word - DW_EPOCH for word in self._daemons.tolist())

    def outage_reading(self) -> Reading:
        """What outages are measured by."""
        silences = self._host.get(HostCounter.SILENCES)
        work = np.add.reduceat(self._vcpus[:, VP_COUNTERS + VC_WORK], self._first_vcpus)
        epochs = self.epochs()
        silent_ns, heard_ns = self._host.get(HostCounter.SILENT_NS), self._host.get(HostCounter.HEARD_NS)
        return Reading(tuple(work.tolist()), epochs, silences, silent_ns, heard_ns)

    def all_booted(self) -> bool:
        """Whether every vCPU has left guest mode at least once, which it does for its boot."""
        return bool((self._vcpus[:, VP_COUNTERS + VC_EXITS] > 0).all())

    def stopped(self) -> bool:
        """Whether the measured time is over."""
        return bool(self._control[CTL_STOP])

    def host(self, counter: HostCounter) -> int:
        """A counter of the host."""
        return self._host.get(counter)

    def waiting_tasks(self, now_ns: int, bound_ns: int = 0) -> int:
        """Guest tasks that wait for a page, those that have for longer than ``bound_ns``: asynchronous faults under way."""
        before = np.uint64(max(0, now_ns - bound_ns))
        return sum(
            int(
                (
                    ((tasks[:, T_STATE] == TS_SLEEPING) | (tasks[:, T_STATE] == TS_HALTING))
                    & (tasks[:, T_FAULT_NS] < before)
                ).sum()
            )
            for tasks in self._tasks
        )

    def tasks_done(self) -> tuple[int, int]:
        """Guest tasks that have ended, and all."""
        return sum(int(kernel[K_DONE]) for kernel in self._kernels), sum(len(tasks) for tasks in self._tasks)

    def snapshot(self, now_ns: int) -> Snapshot:
        """A copy of all figures."""
        return Snapshot(now_ns, self._stats.copy(), self._vcpus.copy())

    def describe_vcpus(self) -> list[str]:
        """One line per vCPU: where it is."""
        return list(self._lines())

    def _lines(self) -> Iterator[str]:
        for cpu, page in enumerate(self._vcpus):
            inside = int(page[VP_STATE]) & MODE_MASK == MODE_IN_GUEST
            task = int(page[VP_TASK])
            yield (
                f"vcpu-{cpu}: {'in guest mode' if inside else 'outside'}, {f'task {task - 1}' if task else 'idle'},"
                f" {int(page[VP_COUNTERS + VC_EXITS])} exits, guest time"
                f" {int(page[VP_COUNTERS + VC_VCLOCK_NS]) / 1e9:.3f} s, doorbell {int(page[VP_DOORBELL].astype(np.int64))}"
            )


def private_memory_mib(pids: Iterable[int]) -> dict[str, float] | None:
    """Private memory of processes, MiB: the largest of them; None when none could be read.

    ``uss``: what would be free if the process ended. ``mapped_alone``: the same and pages of shared segments and of its event file that
    nobody else happens to have mapped; they stay when it ends.
    """
    found = [sizes for pid in pids if (sizes := _private_kib(pid)) is not None]
    if not found:
        return None
    return {
        name: round(max(sizes[i] for sizes in found) / KIB_PER_MIB, 3)
        for i, name in enumerate(("uss", "mapped_alone"))
    }


def _private_kib(pid: int) -> tuple[int, int] | None:
    """(private pages of mappings that are not shared, all private pages), KiB; None when the process has gone."""
    uss = alone = 0
    shared = False
    with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
        for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
            name, _, rest = line.partition(" ")
            if not name.endswith(":"):
                shared = rest[3] == "s"
            elif name.startswith("Private_") and name != "Private_Hugetlb:":
                kib = int(rest.split()[0])
                alone += kib
                uss += 0 if shared else kib
    return (uss, alone) if uss else None
