"""What a vCPU is made of: the CPU's configuration, the arrays its guest mode works on, and the image its kernel starts from.

Not handled here: the run's segments (proto/run.py), the layout of the guest kernel's memory (guest/boot.py).
"""

from __future__ import annotations

from typing import Final

import numpy as np

from guest.boot import TraceShape, init_kernel, plan_tasks
from guest.events import CpuConfig
from guest.mmu import U64, Vcpu, make_vcpu
from proto.profile import PROFILES
from proto.run import RunContext
from proto.topology import PAGES_PER_MIB, Topology
from proto.topology_keys import GUEST_EVENTS
from proto.units import WORDS_PER_PAGE

US: Final = 1000


def cpu_config(topology: Topology, vm: int, vcpu_id: int, tasks: int) -> CpuConfig:
    """What the kernel of this CPU is built with."""
    table = topology.vm[vm]
    return CpuConfig(
        vm=vm,
        vcpu_id=vcpu_id,
        vcpus=table.vcpus,
        tasks=tasks,
        mode=topology.run.mode,
        profile=PROFILES[topology.run.profile],
        send_always=table.send_always,
        preemptible=table.preemptible,
        tick_ns=table.tick_us * US,
        granularity_ns=table.granularity_us * US,
        exit_cost_ns=table.exit_cost_ns,
        exception_cost_ns=table.exception_cost_ns,
        switch_cost_ns=table.switch_cost_ns,
        interrupt_cost_ns=table.interrupt_cost_ns,
        hotplug=any(event.vm == vm and event.do in GUEST_EVENTS for event in topology.event),
    )


def vcpu_arrays(ctx: RunContext, cpu: int) -> list[Vcpu]:
    """The arrays this vCPU works on, once per recorded trace of its VM (at least once); they share TLB and page-walk cache."""
    vm, _ = ctx.vm_of_cpu(cpu)
    segments = ctx.segments
    pages = WORDS_PER_PAGE
    control = segments["control"].u64
    vcpu = make_vcpu(
        segments["frames"].u64,
        segments[f"npt-{vm}"].u64,
        segments[f"kernel-{vm}"].u64,
        control[:pages],
        control[(1 + vm) * pages : (2 + vm) * pages],
        segments["vcpus"].u64[cpu * pages : (cpu + 1) * pages],
        segments[f"shadow-{vm}"].u32,
        np.zeros(1, np.uint32),
        np.zeros(1, np.uint64),
    )
    # T_TRACE counts the traces of the VM in the order of its tables (guest/boot.py).
    names = dict.fromkeys(task.trace for task in ctx.topology.vm[vm].task if task.workload == "replay")
    number = {trace.path: k for k, trace in enumerate(ctx.traces)}
    replaying = []
    for name in names:
        k = number[name]
        shape, segment = ctx.traces[k], segments[f"trace-{k}"]
        vpns = segment.u64[: shape.pages]
        accesses = segment.u32[2 * shape.pages : 2 * shape.pages + shape.accesses]
        replaying.append(vcpu._replace(trace_vpns=vpns, trace_accesses=accesses))
    return replaying or [vcpu]


def kernel_image(ctx: RunContext, vm: int) -> U64:
    """The guest kernel segment of a VM as it is at power-on, u64."""
    table = ctx.topology.vm[vm]
    plan = plan_tasks(table)
    shapes = {trace.path: TraceShape(trace.pages, trace.accesses) for trace in ctx.traces}
    image = np.zeros(len(ctx.segments[f"kernel-{vm}"].u64), np.uint64)
    traces = [shapes[name] for name in plan.traces]
    # Guests of one run do not make the same choices.
    seed = ctx.topology.run.seed + vm
    init_kernel(image, plan.tasks, table.vcpus, table.memory_mib * PAGES_PER_MIB, seed, traces)
    return image
