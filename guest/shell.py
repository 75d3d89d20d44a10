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
* Every wait ends: by a message, by the abort flag, or by a time limit that ends the process with its story.
* A message that is malformed or does not fit is counted, answered with NACK, and ignored.

Where the wall time of this process goes: guest mode, held in the host (the guest's blocked, halted and idle time), steal (waiting for
a token), paused (level with the wall clock), and the rest, which is what the emulator itself costs (VC_EMULATION_NS).

Not handled here: what the guest does (guest/machine.py), what a stay in guest mode is worth (guest/pacing.py).
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from typing import Any, Final, NoReturn

import numpy as np
import zmq

from guest.accounting import Accounting
from guest.boot import TraceShape, init_kernel, plan_tasks
from guest.events import (
    Access32,
    Accessed,
    ClearPage,
    CpuConfig,
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
from guest.machine import GuestCpu
from guest.mmu import OK, U64, Vcpu, flush, make_vcpu
from guest.pacing import Pacing
from guest.registers import Registers
from guest.run import kernel_access32, kernel_clear_page, vcpu_run
from guest.warm import warm_guest
from proto import link, wire
from proto.layout import (
    CTL_ABORT,
    K_TASKS,
    RUN_KICK,
    T_TRACE,
    TASK_WORDS,
    VC_BAD_MESSAGES,
    VC_EMULATION_NS,
    VC_PACE_LAG_MAX_NS,
    VC_PAUSED_NS,
    VC_STEAL_NS,
    VP_DOORBELL,
    VP_X_OPS,
    task_base,
)
from proto.pcpu import Pcpu
from proto.port import ArrayPort
from proto.profile import PROFILES
from proto.run import PROC_VCPU, RunContext
from proto.stats import vcpu_block
from proto.topology import PAGES_PER_MIB, Topology
from proto.topology_keys import GUEST_EVENTS
from proto.trace import Kind
from proto.units import WORDS_PER_PAGE
from proto.wire import Entry, Exit, ExitReason, Held, Inject, Nack, WireError

LOOK_MS: Final = 1000
"""How often a waiting process looks at the abort flag."""
HELLO_LIMIT_NS: Final = 30_000_000_000
RESTORE_LIMIT_NS: Final = 600_000_000_000
"""Longest wait for the registers: the host loads the memory of all guests first, and the launcher has a bound of its own."""
ENTRY_LIMIT_NS: Final = 60_000_000_000
"""Longest wait for an entry record of a vCPU that did not halt: the host holds it for a page, and daemons are restarted in seconds."""
TOKEN_LIMIT_NS: Final = 60_000_000_000
"""Longest wait for a run token: a stopped holder ends the run long before."""
NICE: Final = 10
"""Of an unpaced vCPU: it computes whenever it may, and leaves the cores to the host and the daemons when they have to answer. A paced
one needs little and has to keep up."""
RELAX_S: Final = 0.0001
GC_THRESHOLD: Final = 50_000
"""Allocations between collections: the loop makes no cycles, a rare collection is for what an error path may leave."""
US: Final = 1000


class _Leave(Exception):  # noqa: N818 - not an error
    """BYE, or the run is torn down."""


def main(ctx: RunContext, cpu: int) -> None:
    """Run global vCPU ``cpu`` until the run is over. Returns = clean exit. Called in a fresh child of the zygote."""
    shell = VcpuShell(ctx, cpu)
    if not shell.pacing.rate:
        os.nice(NICE)
    try:
        shell.run()
    except _Leave:
        return
    finally:
        shell.close()


def warm() -> None:
    """In the zygote: compile every kernel of this role."""
    warm_guest()


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


class VcpuShell:
    """See the module docstring."""

    def __init__(self, ctx: RunContext, cpu: int) -> None:
        self.ctx = ctx
        self.cpu = cpu
        self.vm, vcpu_id = ctx.vm_of_cpu(cpu)
        self.arrays = vcpu_arrays(ctx, cpu)
        m = self.arrays[0]
        tasks = int(m.kern[K_TASKS])
        self._config = config = cpu_config(ctx.topology, self.vm, vcpu_id, tasks)
        self._task_traces = task_base(tasks, config.vcpus) + T_TRACE
        self._kern = m.kern.data
        self._control = m.control.data
        self._page = m.vp.data
        self._doorbell = ArrayPort(m.vp)
        self.trace = ctx.trace(f"vcpu-{cpu}", PROC_VCPU + cpu)
        self.acc = Accounting(m.vp, vcpu_block(ctx.segments["stats"].u64, cpu), self.trace, self.vm, vcpu_id)
        self.machine = GuestCpu(config, m.kern, m.vp, m.control, self.acc, vmc=m.vmc)
        self._waits_for_image = bool(ctx.image)
        usable = len(os.sched_getaffinity(0))
        crowd = ctx.topology.total_vcpus // ctx.topology.pcpus(usable)
        self.pacing = Pacing(ctx.topology.vm[self.vm].rate_ops_per_s, crowd)
        self.slice_ns = ctx.topology.host.slice_us * US
        self.pcpu = Pcpu(
            ctx.segments["pcpu"].u64, cpu, ctx.eventfds, ctx.topology.pcpus(usable), self.slice_ns
        )
        self.context = link.new_context()
        self.socket = link.connect_dealer(self.context, ctx.endpoint, link.vcpu_identity(cpu, ctx.key))
        self.socket.setsockopt(zmq.RCVTIMEO, LOOK_MS)
        self._boot_ns = time.monotonic_ns()
        self._measured = False
        self._slice_start_ns = 0
        self._woken = False
        self._kicks = 0
        self._off_since_ns = self._boot_ns
        self._excused_ns = 0

    def close(self) -> None:
        """Let everything go; safe after any failure."""
        if self.pcpu.held:
            self.pcpu.release()
        self.acc.event(Kind.PROCESS_END)
        self.trace.close()
        self.socket.close()
        self.context.term()

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
        self._boot_ns = self._off_since_ns = time.monotonic_ns()
        # Guest time goes on from where it stood.
        self._boot_ns -= self.machine.vclock_ns
        event: Any = PowerOn()
        while True:
            (request,) = self.machine.on((event,), time.monotonic_ns())
            if self.machine.barrier_open and not self._measured:
                self._start_measuring()
            event = perform[type(request)](request)

    def _start_measuring(self) -> None:
        """The barrier is open: what filling the memory left this CPU behind the wall clock is not caught up in the measured time."""
        self._measured = True
        self._boot_ns = time.monotonic_ns() - self.machine.vclock_ns

    def _handshake(self) -> None:
        self.acc.event(Kind.PROCESS_START, 0, os.getpid())
        self._send(wire.Hello(wire.Role.VCPU, self.cpu, 0, os.getpid()))
        deadline_ns = time.monotonic_ns() + (RESTORE_LIMIT_NS if self._waits_for_image else HELLO_LIMIT_NS)
        while True:
            message = self._receive(deadline_ns, "REGISTERS" if self._waits_for_image else "WELCOME")
            if type(message) is wire.Registers and self._waits_for_image:
                self._resume(message)
                return
            if type(message) is wire.Welcome and not self._waits_for_image:
                return
            self._unexpected(message)

    def _resume(self, message: wire.Registers) -> None:
        """A saved CPU goes on in this process. One without registers was powered down."""
        self.trace.observe(message.lamport)
        words = message.words["word"].tolist()
        m = self.arrays[0]
        self.machine = GuestCpu(
            self._config, m.kern, m.vp, m.control, self.acc, Registers.from_words(words), m.vmc
        )

    def _hand_over(self, message: wire.Save) -> None:
        """The host saves this CPU, which waits for an entry that will not come."""
        self.trace.observe(message.lamport)
        registers = self.machine.registers(time.monotonic_ns())
        words = np.array([(word,) for word in registers.words()], wire.REGISTER_DTYPE)
        self._send(wire.Registers(self.trace.lamport, words))

    # ---- guest mode -----------------------------------------------------------------------------------------------------------
    def _run_task(self, request: RunTask) -> Ran:
        self.trace.tick()
        if self._pause_for_pace():
            return Ran(request.ask, RUN_KICK, 0)
        self._get_token()
        now_ns = time.monotonic_ns()
        room_ns = now_ns - self._boot_ns - self.machine.vclock_ns
        if self.pacing.rate and self.machine.barrier_open:
            self.acc.raise_to(VC_PACE_LAG_MAX_NS, max(0, room_ns))
        budget = self.pacing.budget(room_ns, request.max_ns, request.max_ops)
        m = self.arrays[0]
        if len(self.arrays) > 1:
            m = self.arrays[self._kern[self._task_traces + request.task * TASK_WORDS]]
        self._settle_emulation(now_ns)
        code = vcpu_run(m, request.task, budget)
        left_ns = time.monotonic_ns()
        self._off_since_ns = left_ns
        ops = self._page[VP_X_OPS]
        return Ran(request.ask, code, self.pacing.guest_ns(ops, left_ns - now_ns))

    def _access32(self, request: Access32) -> Accessed:
        self._get_token()
        status, value = kernel_access32(self.arrays[0], request.gpa, request.write, request.value)
        return Accessed(request.ask, status == OK, int(value))

    def _clear_page(self, request: ClearPage) -> Accessed:
        self._get_token()
        while True:
            status, _ = kernel_access32(self.arrays[0], request.gpa, True, 0)
            if status != OK:
                return Accessed(request.ask, False, 0)
            if kernel_clear_page(self.arrays[0], request.gpa):
                return Accessed(request.ask, True, 0)

    def _load_kernel(self, request: LoadKernel) -> Relaxed:
        m = self.arrays[0]
        m.kern[:] = kernel_image(self.ctx, self.vm)
        m.shadow[:] = 0
        return Relaxed(request.ask)

    def _relax(self, request: Relax) -> Relaxed:
        self._release_token()
        self._check_abort()
        time.sleep(RELAX_S)
        return Relaxed(request.ask)

    def _get_token(self) -> None:
        """Hold a run token. At the end of a slice it goes to whoever waits, and this vCPU queues up again."""
        now_ns = time.monotonic_ns()
        if self.pcpu.held:
            if now_ns - self._slice_start_ns < self.slice_ns:
                return
            if not self.pcpu.waiting_others():
                self._slice_start_ns = now_ns
                return
            self.pcpu.release()
        # Head of the queue after an entry: a woken vCPU may have a page-ready event to handle.
        steal_ns = self.pcpu.acquire(self._woken, TOKEN_LIMIT_NS)
        self._woken = False
        self._slice_start_ns = time.monotonic_ns()
        self._excused_ns += steal_ns
        self.acc.add(VC_STEAL_NS, steal_ns)

    def _release_token(self) -> None:
        if self.pcpu.held:
            self.pcpu.release()

    def _pause_for_pace(self) -> bool:
        """Sleep while the guest clock is level with the wall clock; True when a kick came meanwhile."""
        start_ns = time.monotonic_ns()
        pause_ns = self.pacing.pause_ns(start_ns - self._boot_ns - self.machine.vclock_ns)
        if not pause_ns:
            return False
        self._release_token()
        deadline_ns = start_ns + pause_ns
        kicked = False
        while not kicked and (left_ns := deadline_ns - time.monotonic_ns()) > 0:
            self._check_abort()
            # Not poll() on the socket's descriptor: that is edge-triggered, zmq_poll looks at the queue first.
            if zmq.zmq_poll([(self.socket, zmq.POLLIN)], min(LOOK_MS, -(-left_ns // 1_000_000))):
                kicked = self._take_kick()
        paused_ns = time.monotonic_ns() - start_ns
        self._excused_ns += paused_ns
        self.acc.add(VC_PAUSED_NS, paused_ns)
        return kicked

    def _take_kick(self) -> bool:
        message = self._receive(time.monotonic_ns() + LOOK_MS * 1_000_000, "KICK")
        if type(message) is wire.Kick:
            return True
        self._unexpected(message)
        return False

    def _settle_emulation(self, now_ns: int) -> None:
        """Since guest mode was left: what was not held, stolen or paused is the emulator's own time."""
        self.acc.add(VC_EMULATION_NS, max(0, now_ns - self._off_since_ns - self._excused_ns))
        self._excused_ns = 0

    # ---- exits ----------------------------------------------------------------------------------------------------------------
    def _take_exit(self, request: TakeExit) -> Entered:
        self._release_token()
        record = request.record
        self._send(record)
        entry = self._await_entry(record)
        self._woken = True
        self._excused_ns += entry.held_ns
        if entry.inject == Inject.RESET:
            flush(self.arrays[0])
        if record.reason == ExitReason.KICK:
            self._resync_doorbell()
        self._kicks = 0
        self.pacing.resume()
        at_ns = time.monotonic_ns() - self._boot_ns if self.pacing.rate else 0
        return Entered(request.ask, entry, at_ns)

    def _await_entry(self, record: Exit) -> Entry:
        """The entry that answers ``record``. Kicks on the way are swallowed: the host looks at its requests before each entry."""
        # A vCPU that has halted may sleep as long as it likes.
        limit_ns = None if record.reason == ExitReason.HLT else time.monotonic_ns() + ENTRY_LIMIT_NS
        while True:
            message = self._receive(limit_ns, f"ENTRY {record.seq}")
            if type(message) is Entry:
                if (
                    message.seq == record.seq
                    and message.inject <= Inject.OUT_OF_MEMORY
                    and message.held_kind <= Held.IDLE
                ):
                    return message
                self._refuse(
                    WireError(Nack.FIELD, f"ENTRY {message.seq}, expected {record.seq}", wire.Kind.ENTRY)
                )
            elif type(message) is wire.Save:
                self._hand_over(message)
                # Memory is written now, however much there is. Only BYE follows, or the abort flag.
                limit_ns = None
            elif type(message) is not wire.Kick:
                self._unexpected(message)

    def _resync_doorbell(self) -> None:
        """The host rings after sending, and messages keep their order, so the kick was received before this entry, or it was lost."""
        if not self._kicks:
            self.acc.add(VC_BAD_MESSAGES)
            self._doorbell.add(VP_DOORBELL, -1)

    def _power_down(self, request: PowerDown) -> NoReturn:
        self._release_token()
        self._settle_emulation(time.monotonic_ns())
        if request.record is None:
            raise _Leave
        self._send(request.record)
        while True:
            # Other vCPUs may run for hours yet: only BYE, the abort flag or the zygote's death end this.
            message = self._receive(None, "BYE")
            if type(message) is not wire.Kick:
                self._unexpected(message)

    # ---- messages ---------------------------------------------------------------------------------------------------------------
    def _send(self, message: wire.Message) -> None:
        self.socket.send(wire.encode(message), zmq.NOBLOCK)

    def _receive(self, deadline_ns: int | None, expected: str) -> wire.Message:
        """The next well-formed message. BYE and the abort flag leave; TimeoutError after ``deadline_ns`` (monotonic; None: no limit)."""
        while True:
            try:
                raw = self.socket.recv()
            except zmq.Again:
                self.trace.tick()
                self._check_abort()
                if deadline_ns is not None and time.monotonic_ns() > deadline_ns:
                    raise TimeoutError(f"vCPU {self.cpu}: no {expected} from the host in time") from None
                continue
            try:
                message = wire.decode(raw)
            except WireError as error:
                self._refuse(error)
                continue
            if type(message) is wire.Kick:
                self.trace.observe(message.lamport)
                self._kicks += 1
                self._doorbell.add(VP_DOORBELL, -1)
            elif type(message) is wire.Bye:
                raise _Leave
            return message

    def _unexpected(self, message: wire.Message) -> None:
        if type(message) is wire.NackMsg:
            raise RuntimeError(
                f"vCPU {self.cpu}: the host refused a message: {message.text} (code {message.code})"
            )
        self._refuse(WireError(Nack.NOT_EXPECTED, f"{type(message).__name__} is not expected here"))

    def _refuse(self, error: WireError) -> None:
        self.acc.add(VC_BAD_MESSAGES)
        self._send(wire.NackMsg(error.code, error.kind, error.text))

    def _check_abort(self) -> None:
        if self._control[CTL_ABORT]:
            raise _Leave
