"""The guest kernel of one CPU: boot, tasks' lives, exits, costs, interrupts; without sockets."""

from __future__ import annotations

import pytest

from guest.events import Access32, GuestPanicError, PowerOn, RunTask, TakeExit
from guest.machine import GuestCpu
from proto import layout as L  # noqa: N812 - a table of constants
from proto.events import Kind
from proto.kvm import (
    MSR_ASYNC_PF_ACK,
    MSR_ASYNC_PF_EN,
    MSR_ASYNC_PF_EN_V3,
    MSR_ASYNC_PF_INT,
    MSR_X2APIC_SPIV,
    VECTOR_RESCHEDULE,
    VECTOR_TIMER,
)
from proto.wire import HC_AT_BARRIER, Entry, Exit, ExitReason, Held, Inject
from tests.guest.cpu_world import MS, Segments, World, config, ends, faults, once, works


def wrmsrs(world: World) -> list[tuple[int, int]]:
    return [
        (e.arg0, e.arg1) for e in world.exits if e.reason == ExitReason.WRMSR and e.arg0 != MSR_ASYNC_PF_ACK
    ]


def reasons(world: World, *leave_out: ExitReason) -> list[ExitReason]:
    return [ExitReason(e.reason) for e in world.exits if e.reason not in leave_out]


# ---- boot ------------------------------------------------------------------------------------------------------------------------
def test_boot_in_mode_interrupt_writes_the_vector_first() -> None:
    world = World(config("interrupt", send_always=True), [ends, ends])
    world.run()
    assert reasons(world)[0] is ExitReason.BOOT
    assert wrmsrs(world) == [
        (MSR_X2APIC_SPIV, 0x1FF),
        (MSR_ASYNC_PF_INT, 0xF3),
        (MSR_ASYNC_PF_EN, 0x1000 | 1 | 2 | 8),
    ]
    boot = [e for e in world.exits if e.reason in (ExitReason.BOOT, ExitReason.WRMSR)][:4]
    assert [(e.if_, e.cpl, e.accepted) for e in boot] == [(0, 0, 0)] * 4
    assert world.page[L.VP_APF_ENABLED] == 1


@pytest.mark.parametrize(("profile", "msr"), [("v3", MSR_ASYNC_PF_EN_V3), ("v7", MSR_ASYNC_PF_EN)])
def test_boot_in_mode_exception(profile: str, msr: int) -> None:
    world = World(config("exception", profile), [ends, ends])
    world.run()
    assert wrmsrs(world) == [(MSR_X2APIC_SPIV, 0x1FF), (msr, 0x1000 | 1)]


@pytest.mark.parametrize("mode", ["sync", "halt"])
def test_boot_without_async_pf(mode: str) -> None:
    world = World(config(mode), [ends, ends])
    world.run()
    assert wrmsrs(world) == [(MSR_X2APIC_SPIV, 0x1FF)]
    assert world.page[L.VP_APF_ENABLED] == 0


def test_area_is_cleared_before_it_is_given_to_the_host() -> None:
    world = World(config("interrupt", vcpu_id=3, vcpus=4), [ends, ends], Segments(2, 4, lambda _: 3))
    world.seg.memory = {0x1000 + 3 * 64: 7, 0x1004 + 3 * 64: 7}
    world.run()
    assert world.seg.memory == {0x1000 + 3 * 64: 0, 0x1004 + 3 * 64: 0}
    assert world.steps.index("write4=0") < next(i for i, s in enumerate(world.steps) if "0x4b564d02" in s)
    assert world.seg.kern[L.K_ONLINE] == 1 << 3


def test_refused_msr_stops_the_guest() -> None:
    world = World(config("interrupt"), [works, works])
    world.entry_hook = lambda e: (
        world.entry(e)._replace(inject=Inject.GP) if e.arg0 == MSR_ASYNC_PF_EN else None
    )
    with pytest.raises(GuestPanicError, match="0x4b564d02"):
        world.run()


# ---- tasks -----------------------------------------------------------------------------------------------------------------------
def test_last_task_done_powers_down() -> None:
    world = World(config("sync", tasks=3), [ends, ends, ends])
    world.run()
    assert world.powered_down is not None
    record = world.powered_down.record
    assert record is not None
    assert record.reason == ExitReason.DONE
    assert world.counter(L.VC_TASKS_DONE) == 3
    assert int(world.seg.kern[L.K_DONE]) == 3
    assert [world.seg.word(t, L.T_STATE) for t in range(3)] == [L.TS_DONE] * 3
    assert world.page[L.VP_TASK] == 0


def test_cpu_without_tasks_powers_down() -> None:
    world = World(config("sync", vcpus=2), [works, works], Segments(2, 2, lambda _: 1))
    world.run()
    assert reasons(world) == [ExitReason.BOOT, ExitReason.CR0, ExitReason.WRMSR]


def test_abort_powers_down_without_a_record() -> None:
    world = World(config("sync"), [once(L.RUN_ABORT, works), works])
    world.run()
    assert world.powered_down is not None
    assert world.powered_down.record is None


@pytest.mark.parametrize(("code", "reason"), [(L.RUN_SEGV, L.KILL_SEGV), (L.RUN_OOM, L.KILL_OOM)])
def test_bad_task_is_killed_alone(code: int, reason: int) -> None:
    world = World(config("sync"), [once(code, works), ends])
    world.run()
    assert world.seg.word(0, L.T_STATE) == L.TS_KILLED
    assert world.seg.word(0, L.T_KILL_REASON) == reason
    assert world.seg.word(1, L.T_STATE) == L.TS_DONE
    assert world.counter(L.VC_TASKS_KILLED) == 1
    assert world.log.count(Kind.TASK_KILLED) == 1


def test_machine_check_kills_the_task_that_touched_the_page() -> None:
    world = World(config("sync"), [once(L.RUN_NESTED, works), once(L.RUN_BUDGET, ends)])

    def lost(record: Exit) -> Entry | None:
        return (
            world.entry(record)._replace(inject=Inject.MACHINE_CHECK)
            if record.reason == ExitReason.NESTED
            else None
        )

    world.entry_hook = lost
    world.run()
    assert world.seg.word(0, L.T_KILL_REASON) == L.KILL_MACHINE_CHECK
    assert world.seg.word(1, L.T_STATE) == L.TS_DONE


def test_killed_task_does_not_keep_its_lock() -> None:
    world = World(config("sync"), [once(L.RUN_NESTED, works), ends])
    world.seg.set_word(0, L.T_PROGRAM, L.P_SYSCALLS)
    world.seg.set_word(0, L.T_PC, 19)  # holds the lock that T_AUX1 names
    world.seg.kern[L.K_LOCKS] = 1
    world.entry_hook = lambda e: (
        world.entry(e)._replace(inject=Inject.MACHINE_CHECK) if e.reason == ExitReason.NESTED else None
    )
    world.run()
    assert world.seg.kern[L.K_LOCKS] == 0


def test_barrier_holds_tasks_until_all_are_there() -> None:
    seen: list[int] = []

    def behave(world: World, task: int, limit: int) -> tuple[int, int]:
        if not world.seg.control[L.CTL_BARRIER]:
            return L.RUN_BARRIER, 100
        seen.append(task)
        return ends(world, task, limit)

    world = World(config("sync", tasks=3), [behave] * 3)
    world.run()
    calls = [e for e in world.exits if e.reason == ExitReason.HYPERCALL]
    assert [(e.arg0, e.arg1) for e in calls] == [(HC_AT_BARRIER, n) for n in (1, 2, 3)]
    assert sorted(seen) == [0, 1, 2]
    assert world.counter(L.VC_BARRIER_VCLOCK_NS) == world.opened_ns == 300


def test_task_that_ends_before_the_barrier_counts_as_arrived() -> None:
    world = World(config("sync"), [once(L.RUN_SEGV, works), once(L.RUN_BARRIER, ends)])
    world.run()
    assert [e.arg1 for e in world.exits if e.reason == ExitReason.HYPERCALL] == [1, 2]


def test_stopped_run_holds_nobody_at_the_barrier() -> None:
    def behave(world: World, task: int, limit: int) -> tuple[int, int]:
        if world.seg.control[L.CTL_STOP]:
            return ends(world, task, limit)
        return L.RUN_BARRIER, 100

    world = World(config("sync", tasks=3), [behave, behave, works])
    world.run(until_ns=10 * MS)
    assert [world.seg.word(t, L.T_STATE) for t in range(2)] == [L.TS_BARRIER] * 2
    world.seg.control[L.CTL_STOP] = 1
    world.behaviours[2] = ends
    world.run()
    assert [world.seg.word(t, L.T_STATE) for t in range(3)] == [L.TS_DONE] * 3
    assert world.counter(L.VC_END_VCLOCK_NS) == pytest.approx(10 * MS, abs=20 * MS)


# ---- time --------------------------------------------------------------------------------------------------------------------------
def test_costs_are_charged_to_the_task() -> None:
    costs = config("sync", tasks=1, exit_cost_ns=7, switch_cost_ns=100)
    world = World(costs, [once(L.RUN_NESTED, ends)])
    world.fetch_ns = 5000
    world.run()
    # SPIV and the last hypercall (nobody to charge), switch, nested exit, held.
    assert world.cpu.vclock_ns == 7 + 100 + 7 + 5000 + 7
    assert world.seg.word(0, L.T_RUN_NS) == 100 + 7 + 5000
    assert world.counter(L.VC_BLOCKED_NS) == 5000


def test_exit_record_tells_when_the_task_would_be_preempted() -> None:
    alone = World(config("sync", tasks=1), [faults])
    alone.run(until_ns=20 * MS)
    assert {e.timer_ns for e in alone.exits} == {0}
    both = World(config("halt"), [works, faults])
    both.run(until_ns=100 * MS)
    nested = [e.timer_ns for e in both.exits if e.reason == ExitReason.NESTED]
    assert all(0 < ns <= 10 * MS for ns in nested)


def test_nested_fault_carries_the_context_of_the_task() -> None:
    world = World(config("sync", tasks=1), [faults])
    world.seg.set_word(0, L.T_CPL, 0)
    world.seg.set_word(0, L.T_CR3, 0x5000)
    world.run(until_ns=10 * MS)
    fault = next(e for e in world.exits if e.reason == ExitReason.NESTED)
    assert (fault.cpl, fault.if_, fault.cr3, fault.gpa, fault.cr0_pg) == (0, 1, 0x5000, 0x10_0000, 1)
    assert fault.flags == L.XF_WRITE | L.XF_IF | L.XF_RESTART
    assert world.counter(L.VC_NESTED) == len([e for e in world.exits if e.reason == ExitReason.NESTED])


# ---- interrupts ---------------------------------------------------------------------------------------------------------------------
def test_interrupt_waits_for_if_and_is_reported_at_the_next_exit() -> None:
    seen: list[int] = []

    def behave(world: World, task: int, limit: int) -> tuple[int, int]:
        seen.append(int(world.page[L.VP_IRQ_PENDING]))
        if len(seen) == 1:
            world.seg.set_word(task, L.T_IF, 0)
            world.irr.add(VECTOR_RESCHEDULE)
            return L.RUN_KICK, 10
        if len(seen) == 2:
            world.seg.set_word(task, L.T_IF, 1)
            return L.RUN_IRQ_WINDOW, 10
        return (L.RUN_KICK, 10) if len(seen) == 3 else ends(world, task, limit)

    world = World(config("sync", tasks=1), [behave])
    world.run()
    kicks = [(e.if_, e.accepted, e.eois) for e in world.exits if e.reason == ExitReason.KICK]
    assert seen == [0, 1, 0, 0]
    assert kicks == [(0, 0, 0), (1, VECTOR_RESCHEDULE, 1)]
    assert world.log.count(Kind.G_IRQ) == 1


def test_a_halt_that_the_waiting_interrupt_ended_brings_the_clock_to_it() -> None:
    """A CPU behind the wall clock takes an interrupt later; halted for a page meanwhile, it would go round for nothing (I49)."""
    gates: list[int] = []

    def behave(world: World, task: int, limit: int) -> tuple[int, int]:
        if world.log.count(Kind.G_IRQ):
            return ends(world, task, limit)
        if not gates:
            world.irr.add(VECTOR_RESCHEDULE)
            gates.append(world.cpu.vclock_ns + 5 * MS)
            world.cpu.interrupts.irr, world.cpu.interrupts.gate_ns = VECTOR_RESCHEDULE, gates[0]
        return L.RUN_NESTED, 10

    world = World(config("halt", tasks=1), [behave])
    world.entry_hook = lambda record: (
        world.entry(record, Held.HALTED, 0) if record.reason == ExitReason.NESTED else None
    )
    world.run()
    assert reasons(world).count(ExitReason.NESTED) == 1
    assert world.log.count(Kind.G_IRQ) == 1
    assert world.cpu.vclock_ns == gates[0]
    assert world.counter(L.VC_HALTED_NS) == 5 * MS - 10


def test_timer_interrupt_from_the_host_preempts() -> None:
    """A synthetic halt longer than the task's lead ends by the timer, and the other task gets its turn."""
    world = World(config("halt"), [works, faults])
    world.run(until_ns=50 * MS)
    assert world.counter(L.VC_HALTED_NS) > 0
    assert (Kind.G_IRQ, 0, VECTOR_TIMER, 0, 0) in world.log.events
    assert world.runs[0] > 15 * MS


def test_reschedule_ipi_brings_a_task_woken_elsewhere() -> None:
    world = World(config("sync"), [works, works])
    world.seg.set_word(1, L.T_STATE, L.TS_SLEEPING)
    world.run(until_ns=100 * MS)
    assert world.runs[1] == 0
    world.seg.set_word(1, L.T_STATE, L.TS_RUNNABLE)
    world.irr.add(VECTOR_RESCHEDULE)
    world.behaviours[0] = once(L.RUN_KICK, works)
    world.run(until_ns=200 * MS)
    assert 40 * MS < world.runs[1] < 60 * MS


def test_kernel_code_is_preempted_only_where_it_may() -> None:
    def in_kernel(world: World, task: int, limit: int) -> tuple[int, int]:
        world.seg.set_word(task, L.T_CPL, 0)
        return works(world, task, limit)

    closed = World(config("sync"), [in_kernel, works])
    # Preempted never, but asked to reach a place where it can be after a few operations.
    for _ in range(40):
        if closed.request is None:
            closed.run(until_ns=1)
        closed.step()
    assert closed.runs[1] == 0
    assert isinstance(closed.request, RunTask)
    assert closed.request.max_ops > 0
    assert closed.page[L.VP_NEED_RESCHED] == 1
    open_ = World(config("sync", preemptible=True), [in_kernel, works])
    open_.run(until_ns=100 * MS)
    assert open_.runs[1] > 40 * MS


# ---- protocol of requests -------------------------------------------------------------------------------------------------------------
def test_nested_fault_in_kernel_code_is_taken_and_the_access_repeated() -> None:
    world = World(config("interrupt"), [ends, ends])
    world.nested_accesses = 3
    world.run()
    nested = [e for e in world.exits if e.reason == ExitReason.NESTED]
    assert [(e.cpl, e.if_, e.flags & L.XF_KERNEL) for e in nested] == [(0, 0, L.XF_KERNEL)] * 3
    assert world.counter(L.VC_KERNEL_NESTED) == 3
    assert world.powered_down is not None


def test_lost_page_of_the_kernel_is_a_panic() -> None:
    world = World(config("interrupt"), [works, works])
    world.nested_accesses = 1
    world.entry_hook = lambda e: (
        world.entry(e)._replace(inject=Inject.MACHINE_CHECK) if e.reason == ExitReason.NESTED else None
    )
    with pytest.raises(GuestPanicError, match="MACHINE_CHECK"):
        world.run()


def test_sequence_numbers_and_lamport_counters_rise() -> None:
    world = World(config("interrupt"), [works, faults])

    def far_ahead(record: Exit) -> Entry | None:
        return world.entry(record)._replace(lamport=10_000) if record.seq == 3 else None

    world.entry_hook = far_ahead
    world.run(until_ns=20 * MS)
    assert [e.seq for e in world.exits] == list(range(1, len(world.exits) + 1))
    lamports = [e.lamport for e in world.exits]
    assert lamports == sorted(set(lamports))
    assert lamports[3] > 10_000


def test_one_request_at_a_time() -> None:
    world = World(config("interrupt"), [works, faults])
    cpu: GuestCpu = world.cpu
    effects = cpu.on([PowerOn()], 0)
    assert len(effects) == 1
    assert isinstance(effects[0], TakeExit)
    assert cpu.waiting == 1


def test_idle_time_is_the_cpus_and_nobody_elses() -> None:
    world = World(config("interrupt", tasks=1), [faults])
    world.run(until_ns=100 * MS)
    assert world.counter(L.VC_IDLE_NS) > 90 * MS
    assert world.seg.word(0, L.T_RUN_NS) < 10 * MS
    assert all(e.timer_ns == 0 for e in world.exits if e.reason == ExitReason.HLT)


def test_unknown_kind_of_hold_is_not_charged() -> None:
    world = World(config("sync", tasks=1), [once(L.RUN_NESTED, ends)])
    world.entry_hook = lambda e: world.entry(e, Held.NONE, 999) if e.reason == ExitReason.NESTED else None
    world.run()
    assert world.cpu.vclock_ns == 0


def test_access_request_is_not_made_outside_async_pf() -> None:
    world = World(config("sync", tasks=1), [once(L.RUN_NESTED, ends)])
    world.cpu.on([PowerOn()], 0)
    world = World(config("sync", tasks=1), [once(L.RUN_NESTED, ends)])
    world.run()
    assert not any(step.startswith(("read", "write")) for step in world.steps)
    assert not isinstance(world.request, Access32)
