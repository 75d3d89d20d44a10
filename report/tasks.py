"""What the guests' tasks did, from their records in the guest kernel segments at the end of a run.

Not handled here: what a record holds (proto/layout.py), tasks of a run under way (launcher/watch.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from proto.layout import (
    K_TASKS,
    K_VCPUS,
    KILL_MACHINE_CHECK,
    KILL_OOM,
    KILL_SEGV,
    KILL_SWAP_FULL,
    P_BM_WORK,
    T_CPU,
    T_CR3,
    T_GROUP,
    T_KILL_PAGES,
    T_KILL_REASON,
    T_PROGRAM,
    T_STATE,
    T_WORK,
    TASK_WORDS,
    TS_DONE,
    TS_KILLED,
    VC_WORK,
    VP_COUNTERS,
    task_base,
)
from proto.topology import Topology

U64 = npt.NDArray[np.uint64]
KILL_NAMES: Final = {
    KILL_SEGV: "segv",
    KILL_OOM: "oom",
    KILL_MACHINE_CHECK: "machine_check",
    KILL_SWAP_FULL: "swap_full",
}


def task_records(kernel: U64) -> U64:
    """The task records of a guest kernel segment, one row each."""
    tasks, vcpus = int(kernel[K_TASKS]), int(kernel[K_VCPUS])
    base = task_base(tasks, vcpus)
    return kernel[base : base + tasks * TASK_WORDS].reshape(tasks, TASK_WORDS)


def count_tasks(kernels: Sequence[U64]) -> dict[str, Any]:
    """Guest tasks of all VMs by how they ended."""
    records = [task for kernel in kernels for task in task_records(kernel)]
    states = [int(task[T_STATE]) for task in records]
    reasons = [int(task[T_KILL_REASON]) for task in records if int(task[T_STATE]) == TS_KILLED]
    return {
        "done": states.count(TS_DONE),
        "killed": states.count(TS_KILLED),
        "unfinished": len(states) - states.count(TS_DONE) - states.count(TS_KILLED),
        "kill_reasons": {name: reasons.count(reason) for reason, name in KILL_NAMES.items()},
    }


def victims(topology: Topology, kernels: Sequence[U64]) -> list[str]:
    """One line for every address space whose tasks were killed for memory: who, and how much it had."""
    found: dict[tuple[int, int], list[int]] = {}
    said: dict[tuple[int, int], str] = {}
    for v, (vm, kernel) in enumerate(zip(topology.vm, kernels, strict=True)):
        for number, task in enumerate(task_records(kernel)):
            if int(task[T_STATE]) != TS_KILLED or int(task[T_KILL_REASON]) != KILL_SWAP_FULL:
                continue
            space = v, int(task[T_CR3])
            found.setdefault(space, []).append(number)
            said[space] = f"({vm.task[int(task[T_GROUP])].workload}, {int(task[T_KILL_PAGES])} guest pages)"
    return [
        f"host memory and swap were full: VM {v} had to kill {'tasks' if len(numbers) > 1 else 'task'}"
        f" {', '.join(map(str, numbers))} {said[v, root]} (raise swapd.size_mib or host.allowance_mib)"
        for (v, root), numbers in found.items()
    ]


def work_per_vcpu(topology: Topology, vcpus: U64, kernels: Sequence[U64]) -> list[int]:
    """Work units of each vCPU: increments of the benchmark's work threads where there are any, else operations completed."""
    if not any(task.workload == "bm" and task.work_threads for vm in topology.vm for task in vm.task):
        return [int(n) for n in vcpus[:, VP_COUNTERS + VC_WORK]]
    work = [0] * topology.total_vcpus
    first = 0
    for vm, kernel in zip(topology.vm, kernels, strict=True):
        for task in task_records(kernel):
            if int(task[T_PROGRAM]) == P_BM_WORK:
                work[first + int(task[T_CPU])] += int(task[T_WORK])
        first += vm.vcpus
    return work
