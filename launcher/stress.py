"""How large a stress is: memory of host and guests, vCPUs of each VM, tasks.

Purpose: from what a user asks for (vCPUs, VMs, overcommit) to the tables of a topology. The host gets as little memory as it can work
with, the guests a multiple of that, their tasks nearly all of it: so pages are swapped from the first second on. Nothing is paced.

Each VM has a checked task (`stamp`) and a random one on each of its vCPUs, and a kernel of its own; all share the host's frames and the
swap.

Pure, except `check_machine`, which asks what memory is free.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any, Final

from proto import segments
from proto.errors import UserError
from proto.layout import ALLOC_FIRST_GFN
from proto.topology import PAGES_PER_MIB, PAGES_PER_TABLE, process_pages
from proto.topology_keys import ALLOWANCE_SPARE_PAGES, MIB_MAX
from proto.units import ASYNC_PF_PER_VCPU, MAX_VCPUS

OVERCOMMIT: Final = 4.0
EVERY_NS: Final = 1_000_000_000
"""Between two kills."""
TASKS_PER_VCPU: Final = 2
TASK_SPARE_PAGES: Final = 16
"""Room in the address space of a task beside its data, at least (proto.topology.process_pages)."""
TASK_PAGES_MIN: Final = 8
"""A task of fewer pages would hardly be swapped."""
VCPU_PROCESS_MIB: Final = 6
"""Private memory of a vCPU process, with some room: 5 MiB were measured (docs/measuring.md)."""
OTHER_PROCESSES_MIB: Final = 512
"""Launcher, zygote, host and daemons, the code they share."""


@dataclass(frozen=True, slots=True)
class Size:
    """allowance_mib: memory of the host. guests: vCPUs, memory in MiB and pages of each task, for each VM."""

    allowance_mib: int
    guests: tuple[tuple[int, int, int], ...]

    @property
    def guest_mib(self) -> int:
        """Memory of all guests."""
        return sum(memory_mib for _, memory_mib, _ in self.guests)

    @property
    def vcpus(self) -> int:
        """VCPUs of all guests."""
        return sum(vcpus for vcpus, _, _ in self.guests)


def plan(vcpus: int, vms: int, overcommit: float) -> Size:
    """The size of a stress. overcommit: memory of all guests over memory of the host. UserError for what cannot be."""
    if not 1 <= vcpus <= MAX_VCPUS:
        raise UserError("too many vCPUs", where="--vcpus", found=vcpus, allowed=f"1 to {MAX_VCPUS}")
    if not 1 <= vms <= vcpus:
        raise UserError(
            "each VM needs a vCPU", where="--vms", found=vms, allowed=f"1 to {vcpus}, the number of vCPUs"
        )
    if not (math.isfinite(overcommit) and overcommit >= 1):
        raise UserError(
            "the host has never more memory than its guests",
            where="--overcommit",
            found=overcommit,
            allowed="1 or more",
        )
    pages = vcpus * ASYNC_PF_PER_VCPU + ALLOWANCE_SPARE_PAGES
    least_mib = 1 + -(-pages // PAGES_PER_MIB)
    if overcommit * least_mib > MIB_MAX:
        raise UserError(
            "so much memory cannot be described",
            where="--overcommit",
            found=overcommit,
            allowed=f"at most {MIB_MAX // least_mib} with {vcpus} vCPUs",
        )
    guests = []
    for vm in range(vms):
        cpus = vcpus // vms + (vm < vcpus % vms)
        needed = ALLOC_FIRST_GFN + TASKS_PER_VCPU * cpus * (TASK_PAGES_MIN + TASK_SPARE_PAGES)
        memory_mib = max(math.ceil(overcommit * least_mib * cpus / vcpus - 1e-9), -(-needed // PAGES_PER_MIB))
        pages_each = (memory_mib * PAGES_PER_MIB - ALLOC_FIRST_GFN) // (TASKS_PER_VCPU * cpus)
        guests.append((cpus, memory_mib, _data_pages(pages_each)))
    # Memory comes in whole MiB, which is much for a guest of one vCPU: the host gets its share of what they became.
    total = sum(memory_mib for _, memory_mib, _ in guests)
    return Size(min(total, max(least_mib, round(total / overcommit))), tuple(guests))


def _data_pages(pages: int) -> int:
    """Pages of data in an address space that may have so many with its page tables."""
    return min(
        pages - TASK_SPARE_PAGES, (pages - process_pages(0) - 1) * PAGES_PER_TABLE // (PAGES_PER_TABLE + 1)
    )


def check_machine(size: Size) -> None:
    """UserError when this machine has not the memory that such a run needs beside its swap file."""
    free_bytes, limited_by = segments.available_bytes()
    needed = size.allowance_mib + size.vcpus * VCPU_PROCESS_MIB + OTHER_PROCESSES_MIB
    free = free_bytes >> 20
    if needed > free:
        room = free - OTHER_PROCESSES_MIB
        least = VCPU_PROCESS_MIB + size.allowance_mib / size.vcpus
        raise UserError(
            f"{size.vcpus} vCPUs need about {needed} MiB of memory, {size.allowance_mib} of them for the guests' frames",
            where="--vcpus",
            found=f"{free} MiB free",
            allowed=f"{limited_by}: about {max(0, int(room / least))} vCPUs on this machine",
        )


def reshape(raw: dict[str, Any], size: Size) -> dict[str, Any]:
    """The tables of a topology of one guest with a stamp and a uniform task, at that size."""
    changed = copy.deepcopy(raw)
    changed["host"]["allowance_mib"] = size.allowance_mib
    (guest,) = changed["vm"]
    changed["vm"] = []
    for vcpus, memory_mib, task_pages in size.guests:
        vm = copy.deepcopy(guest) | {"vcpus": vcpus, "memory_mib": memory_mib, "rate_ops_per_s": 0}
        for task in vm["task"]:
            task |= {"count": vcpus, "memory_kib": 4 * task_pages}
        changed["vm"].append(vm)
    return changed
