"""The process of one vCPU: one loop that performs what the guest kernel's machine asks for.

    run a task     get a run token, wait if the pace says so, stay in guest mode (`vcpu_run`)
    take an exit   give the token up, send EXIT, wait for ENTRY
    access         one access of kernel code to guest memory, in guest mode; a page is cleared in the same way
    load kernel    put the guest kernel's segment and the shadow back to what they were at power-on
    relax          let other vCPUs run
    power down     send EXIT(DONE), wait for BYE

Invariants
* A run token is held only while something is executed; never while this process waits.
* A vCPU whose pace is set is never ahead of the wall clock.

Not handled here: what the guest does (guest/machine.py), messages and their limits (guest/host_link.py), run tokens and where wall time
goes (guest/turn.py), what a stay in guest mode is worth (guest/pacing.py).
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from typing import Any, Final, NoReturn

from guest.accounting import Accounting
from guest.assembly import US, cpu_config, kernel_image, vcpu_arrays
from guest.events import (
    Access32,
    Accessed,
    ClearPage,
    Entered,
    LoadKernel,
    PowerDown,
    PowerOn,
    Ran,
    Relax,
    Relaxed,
    RunTask,
    TakeExit,
)
from guest.host_link import HostLink, Leave
from guest.machine import GuestCpu
from guest.mmu import OK, flush
from guest.pacing import Pacing
from guest.run import kernel_access32, kernel_clear_page, vcpu_run
from guest.turn import Turn
from guest.warm import warm_guest
from proto.layout import K_TASKS, RUN_KICK, T_TRACE, TASK_WORDS, VC_PACE_LAG_MAX_NS, VP_X_OPS, task_base
from proto.pcpu import Pcpu
from proto.run import PROC_VCPU, RunContext
from proto.stats import vcpu_block
from proto.trace import Kind
from proto.wire import Inject

NICE: Final = 10
"""Of an unpaced vCPU: it computes whenever it may, and leaves the cores to the host and the daemons when they have to answer. A paced
one needs little and has to keep up."""
RELAX_S: Final = 0.0001
GC_THRESHOLD: Final = 50_000
"""Allocations between collections: the loop makes no cycles, a rare collection is for what an error path may leave."""


def main(ctx: RunContext, cpu: int) -> None:
    """Run global vCPU ``cpu`` until the run is over. Returns = clean exit. Called in a fresh child of the zygote."""
    shell = VcpuShell(ctx, cpu)
    if not shell.pacing.rate:
        os.nice(NICE)
    try:
        shell.run()
    except Leave:
        return
    finally:
        shell.close()


def warm() -> None:
    """In the zygote: compile every kernel of this role."""
    warm_guest()


class VcpuShell:
    """See the module docstring."""

    def __init__(self, ctx: RunContext, cpu: int) -> None:
        self.ctx = ctx
        self.vm, vcpu_id = ctx.vm_of_cpu(cpu)
        self.arrays = vcpu_arrays(ctx, cpu)
        m = self.arrays[0]
        tasks = int(m.kern[K_TASKS])
        self._config = config = cpu_config(ctx.topology, self.vm, vcpu_id, tasks)
        self._task_traces = task_base(tasks, config.vcpus) + T_TRACE
        self._kern = m.kern.data
        self._page = m.vp.data
        self.trace = ctx.trace(f"vcpu-{cpu}", PROC_VCPU + cpu)
        self.acc = Accounting(m.vp, vcpu_block(ctx.segments["stats"].u64, cpu), self.trace, self.vm, vcpu_id)
        self.machine = GuestCpu(config, m.kern, m.vp, m.control, self.acc, vmc=m.vmc)
        usable = len(os.sched_getaffinity(0))
        pcpus = ctx.topology.pcpus(usable)
        self.pacing = Pacing(ctx.topology.vm[self.vm].rate_ops_per_s, ctx.topology.total_vcpus // pcpus)
        slice_ns = ctx.topology.host.slice_us * US
        pcpu = Pcpu(ctx.segments["pcpu"].u64, cpu, ctx.eventfds, pcpus, slice_ns)
        self.turn = Turn(pcpu, slice_ns, self.acc)
        self.host = HostLink(ctx, cpu, m.vp, m.control, self.acc, self.trace)
        self._boot_ns = time.monotonic_ns()
        self._measured = False

    def close(self) -> None:
        """Let everything go; safe after any failure."""
        self.turn.give_up()
        self.acc.event(Kind.PROCESS_END)
        self.trace.close()
        self.host.close()

    # ---- the loop -----------------------------------------------------------------------------------------------------------
    def run(self) -> None:
        """Until the CPU powers down and the host says BYE."""
        self._handshake()
        gc.collect()
        gc.freeze()
        gc.set_threshold(GC_THRESHOLD)
        perform: dict[type[Any], Callable[[Any], Any]] = {
            RunTask: self._run_task,
            TakeExit: self._take_exit,
            Access32: self._access32,
            ClearPage: self._clear_page,
            LoadKernel: self._load_kernel,
            Relax: self._relax,
            PowerDown: self._power_down,
        }
        now_ns = time.monotonic_ns()
        self.turn.off(now_ns)
        # Guest time goes on from where it stood.
        self._boot_ns = now_ns - self.machine.vclock_ns
        event: Any = PowerOn()
        while True:
            (request,) = self.machine.on((event,), time.monotonic_ns())
            if self.machine.barrier_open and not self._measured:
                self._start_measuring()
            event = perform[type(request)](request)

    def _handshake(self) -> None:
        """A saved CPU goes on in this process with its registers. One without any was powered down."""
        self.acc.event(Kind.PROCESS_START, 0, os.getpid())
        registers = self.host.greet(saved=bool(self.ctx.image))
        if registers is not None:
            m = self.arrays[0]
            self.machine = GuestCpu(self._config, m.kern, m.vp, m.control, self.acc, registers, m.vmc)

    def _start_measuring(self) -> None:
        """The barrier is open: what filling the memory left this CPU behind the wall clock is not caught up in the measured time."""
        self._measured = True
        self._boot_ns = time.monotonic_ns() - self.machine.vclock_ns

    # ---- guest mode -----------------------------------------------------------------------------------------------------------
    def _run_task(self, request: RunTask) -> Ran:
        self.trace.tick()
        if self._pause_for_pace():
            return Ran(request.ask, RUN_KICK, 0)
        self.turn.get()
        now_ns = time.monotonic_ns()
        room_ns = now_ns - self._boot_ns - self.machine.vclock_ns
        if self.pacing.rate and self.machine.barrier_open:
            self.acc.raise_to(VC_PACE_LAG_MAX_NS, max(0, room_ns))
        budget = self.pacing.budget(room_ns, request.max_ns, request.max_ops)
        m = self.arrays[0]
        if len(self.arrays) > 1:
            m = self.arrays[self._kern[self._task_traces + request.task * TASK_WORDS]]
        self.turn.settle(now_ns)
        code = vcpu_run(m, request.task, budget)
        left_ns = time.monotonic_ns()
        self.turn.off(left_ns)
        ops = self._page[VP_X_OPS]
        return Ran(request.ask, code, self.pacing.guest_ns(ops, left_ns - now_ns))

    def _pause_for_pace(self) -> bool:
        """Sleep while the guest clock is level with the wall clock; True when a kick came meanwhile."""
        start_ns = time.monotonic_ns()
        pause_ns = self.pacing.pause_ns(start_ns - self._boot_ns - self.machine.vclock_ns)
        if not pause_ns:
            return False
        self.turn.give_up()
        deadline_ns = start_ns + pause_ns
        kicked = False
        while not kicked and (left_ns := deadline_ns - time.monotonic_ns()) > 0:
            kicked = self.host.wait_for_kick(left_ns)
        self.turn.paused(time.monotonic_ns() - start_ns)
        return kicked

    def _access32(self, request: Access32) -> Accessed:
        self.turn.get()
        status, value = kernel_access32(self.arrays[0], request.gpa, request.write, request.value)
        return Accessed(request.ask, status == OK, int(value))

    def _clear_page(self, request: ClearPage) -> Accessed:
        self.turn.get()
        while True:
            status, _ = kernel_access32(self.arrays[0], request.gpa, True, 0)
            if status != OK:
                return Accessed(request.ask, False, 0)
            if kernel_clear_page(self.arrays[0], request.gpa):
                return Accessed(request.ask, True, 0)

    # ---- the rest -------------------------------------------------------------------------------------------------------------
    def _load_kernel(self, request: LoadKernel) -> Relaxed:
        m = self.arrays[0]
        m.kern[:] = kernel_image(self.ctx, self.vm)
        m.shadow[:] = 0
        return Relaxed(request.ask)

    def _relax(self, request: Relax) -> Relaxed:
        self.turn.give_up()
        self.host.check_abort()
        time.sleep(RELAX_S)
        return Relaxed(request.ask)

    def _take_exit(self, request: TakeExit) -> Entered:
        self.turn.give_up()
        entry = self.host.exchange(request.record, self.machine.registers)
        self.turn.entered(entry.held_ns)
        if entry.inject == Inject.RESET:
            flush(self.arrays[0])
        self.pacing.resume()
        at_ns = time.monotonic_ns() - self._boot_ns if self.pacing.rate else 0
        return Entered(request.ask, entry, at_ns)

    def _power_down(self, request: PowerDown) -> NoReturn:
        self.turn.give_up()
        self.turn.settle(time.monotonic_ns())
        if request.record is None:
            raise Leave
        self.host.say_done(request.record)
