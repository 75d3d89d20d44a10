"""A plan with the machine of a topology: its guests, its memory, its daemons; a seed still draws times, schedule and faults."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from host.setup import water_marks
from proto.errors import UserError
from proto.topology import PAGES_PER_MIB, Topology
from proto.topology_keys import Swapd, Task, Vm
from sim.draw import draw
from sim.plan import DaemonPlan, SimPlan, TaskPlan, VmPlan

NS: Final = 1_000_000_000
US: Final = 1_000_000
DISK_US: Final = (60, 150)
"""Service time where the topology models none: that of an ordinary SSD."""
UNPACED_OP_NS: Final = 100
TAIL: Final = 4
"""Longest service time of a modelled distribution, in its scale."""


def plan_of(topology: Topology, seed: int, faults: Sequence[str], seconds: float | None = None) -> SimPlan:
    """``seconds``: instead of the topology's measured time. UserError for what has no place in virtual time."""
    for v, vm in enumerate(topology.vm):
        for t, task in enumerate(vm.task):
            if task.workload == "replay":
                raise UserError(
                    "recorded traces are not replayed in virtual time", where=topology.file, key=f"vm[{v}].task[{t}].workload",
                    found="replay", allowed="any other workload",
                )  # fmt: skip
    drawn = draw(seed, topology.run.profile, faults)
    marks = water_marks(topology)
    vms = tuple(_vm(vm) for vm in topology.vm)
    daemons = tuple(
        _daemon(daemon, slots) for daemon, slots in zip(topology.swapd, topology.swapd_pages(), strict=True)
    )
    return replace(
        drawn,
        mode=topology.run.mode,
        frames=topology.allowance_pages,
        low=marks.low,
        high=marks.high,
        populate=marks.populate_pages,
        zero_pages=marks.zero_pages,
        stop_us=int((topology.run.seconds if seconds is None else seconds) * US),
        vms=vms,
        daemons=daemons,
        faults=tuple(
            replace(fault, daemon=fault.daemon % len(daemons))
            for fault in drawn.faults
            if fault.kind != "gone" or topology.host.replicas > 1
        ),
        replicas=topology.host.replicas,
        hedge_us=int(topology.host.hedge_ms * 1000),
    )


def _vm(vm: Vm) -> VmPlan:
    tasks = tuple(_task(task, vm, copy) for task in vm.task for copy in range(task.count))
    op_ns = -(-NS // vm.rate_ops_per_s) if vm.rate_ops_per_s else UNPACED_OP_NS
    return VmPlan(vm.vcpus, vm.memory_mib * PAGES_PER_MIB, op_ns, vm.send_always, vm.preemptible, tasks)


def _task(task: Task, vm: Vm, copy: int) -> TaskPlan:
    threads = (task.fault_threads, task.work_threads) if task.workload == "bm" else (0, 0)
    cpu = task.vcpu if task.vcpu >= 0 else 0 if task.workload == "bm" else copy % vm.vcpus
    ops = 0 if task.workload == "bm" else task.ops
    return TaskPlan(task.workload, cpu, -(-task.memory_kib // 4), ops, task.write_percent, *threads)


def _daemon(daemon: Swapd, slots: int) -> DaemonPlan:
    if daemon.model == "none":
        return DaemonPlan(slots, *DISK_US)
    if daemon.model == "fixed":
        return DaemonPlan(slots, int(daemon.model_read_us), int(daemon.model_read_us))
    scale = int(daemon.model_read_us) or DISK_US[0]
    return DaemonPlan(slots, scale // 2, TAIL * scale)
