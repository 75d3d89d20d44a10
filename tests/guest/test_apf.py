"""Async page faults in the guest: dispatch, who may sleep, halting, the ready interrupt; spec §2.2, §2.6, §2.7, §2.9."""

from __future__ import annotations

import pytest

from guest.events import GuestPanicError
from guest.sleepers import Sleepers, Woken
from proto import layout as L  # noqa: N812 - a table of constants
from proto.events import Kind
from proto.kvm import VECTOR_PAGE_READY, VECTOR_TIMER
from proto.machine import Ask
from proto.stats import VcpuHist
from proto.units import TOKEN_WAKE_ALL
from proto.wire import Entry, Exit, ExitReason, Inject
from tests.guest.cpu_world import MS, Behaviour, Segments, World, config, ends, faults, once, works

TOKEN = 1 << 12


def in_context(cpl: int, preempt: int, then: Behaviour) -> Behaviour:
    """Put the task into that context before it runs on."""

    def behave(world: World, task: int, limit: int) -> tuple[int, int]:
        world.seg.set_word(task, L.T_CPL, cpl)
        world.seg.set_word(task, L.T_PREEMPT, preempt)
        return then(world, task, limit)

    return behave


def quiet(world: World) -> bool:
    return world.cpu.sleepers.count() == (0, 0)


def after_boot(world: World) -> list[str]:
    """Steps after the broadcast that follows enabling."""
    acks = [i for i, s in enumerate(world.steps) if s == "WRMSR 0x4b564d07=0x1"]
    return world.steps[acks[0] + 1 :]


# ---- mode I ------------------------------------------------------------------------------------------------------------------------
def test_sleeper_gives_the_cpu_away_and_comes_back_by_interrupt() -> None:
    world = World(config("interrupt"), [once(L.RUN_NESTED, ends), works])
    world.run(until_ns=7 * MS)
    assert world.seg.word(0, L.T_STATE) == L.TS_SLEEPING
    assert world.runs[1] >= 7 * MS
    world.behaviours[1] = ends
    world.run()
    assert world.seg.word(0, L.T_STATE) == L.TS_DONE
    kinds = (Kind.G_NP, Kind.G_WAIT, Kind.G_SLEEP, Kind.G_WAKE, Kind.G_RESUME)
    assert world.log.kinds(*kinds) == list(kinds)
    assert {e[1] for e in world.log.events if e[0] in kinds} == {TOKEN}
    assert quiet(world)
    assert world.counter(L.VC_NOT_PRESENT) == world.counter(L.VC_READY) == 1
    assert world.counter(L.VC_BROADCASTS) == 1
    assert world.stats.count(VcpuHist.NOT_PRESENT) == world.stats.count(VcpuHist.READY) == 1


def test_ready_interrupt_reads_wakes_clears_acknowledges() -> None:
    world = World(config("interrupt"), [once(L.RUN_NESTED, ends), works])
    world.run(until_ns=30 * MS)
    assert after_boot(world)[:7] == [
        "NESTED", "read0", "write0=0", "KICK", "read4", "write4=0", "WRMSR 0x4b564d07=0x1",
    ]  # fmt: skip
    kick, ack = [e for e in world.exits if e.reason in (ExitReason.KICK, ExitReason.WRMSR)][-2:]
    assert (kick.if_, kick.accepted) == (1, 0)
    # EOI first: by the time of the ACK it is done; the handler runs with interrupts off.
    assert (ack.if_, ack.accepted, ack.eois) == (0, VECTOR_PAGE_READY, 1)
    wake = next(i for i, e in enumerate(world.log.events) if e[0] is Kind.G_WAKE and e[1] == TOKEN)
    clear = next(
        i for i, e in enumerate(world.log.events) if e[0] is Kind.G_CLEAR and e[2] == 4 and e[1] == TOKEN
    )
    assert wake < clear


def test_several_tokens_are_handed_over_one_by_one() -> None:
    world = World(config("interrupt", tasks=5), [once(L.RUN_NESTED, ends)] * 4 + [once(L.RUN_BUDGET, works)])
    world.run(until_ns=60 * MS)
    assert [world.seg.word(t, L.T_STATE) for t in range(4)] == [L.TS_DONE] * 4
    assert world.counter(L.VC_READY) == 4
    assert quiet(world)


def test_wake_before_wait_leaves_nobody_asleep() -> None:
    """TG2 on the machine: ready of a token that was not announced yet, then its not-present event."""
    world = World(config("interrupt", tasks=1), [once(L.RUN_NESTED, ends)])

    def ready_first(record: Exit) -> Entry | None:
        if record.reason != ExitReason.NESTED:
            return None
        world.done.append(TOKEN)
        world._complete(record, 0)
        world.seg.memory[world.area] = 1
        entry = world.entry(record)
        # The interrupt is taken after the exception: let the table see it first.
        for _ in world.cpu.sleepers.wake(TOKEN):
            pass
        world.irr.clear()
        world.seg.memory[world.area + 4] = 0
        return entry._replace(inject=Inject.PF_NOT_PRESENT, cr2=TOKEN, irr=0)

    world.entry_hook = ready_first
    world.run()
    assert world.log.kinds(Kind.G_SLEEP) == []
    assert world.seg.word(0, L.T_STATE) == L.TS_DONE
    assert quiet(world)


# ---- mode E ------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("profile", ["v3", "v7"])
def test_mode_exception_wakes_by_page_fault(profile: str) -> None:
    world = World(config("exception", profile), [once(L.RUN_NESTED, ends), works])
    world.run(until_ns=30 * MS)
    assert world.seg.word(0, L.T_STATE) == L.TS_DONE
    assert world.counter(L.VC_READY) == 1
    assert world.counter(L.VC_BROADCASTS) == 1
    assert "read4" not in world.steps
    assert world.seg.memory[world.area] == 0
    assert quiet(world)


def test_broadcast_wakes_every_sleeper_of_this_cpu() -> None:
    world = World(config("interrupt", tasks=4), [faults] * 3 + [works])
    world.fetch_ns = 1000 * MS
    world.run(until_ns=20 * MS)
    assert [world.seg.word(t, L.T_STATE) for t in range(3)] == [L.TS_SLEEPING] * 3
    world.done.append(TOKEN_WAKE_ALL)
    world.behaviours = [ends] * 3 + [once(L.RUN_KICK, works)]
    world.run(until_ns=60 * MS)
    assert [world.seg.word(t, L.T_STATE) for t in range(3)] == [L.TS_DONE] * 3
    assert world.counter(L.VC_BROADCASTS) == 2
    assert quiet(world)


# ---- who may sleep -----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("mode", "profile", "cpl", "preempt", "sleeps"),
    [
        ("interrupt", "mainline", 3, 0, True),
        ("interrupt", "mainline", 0, 0, False),
        ("exception", "v7", 3, 0, True),
        ("exception", "v7", 0, 0, True),
        ("exception", "v7", 0, 1, False),
        ("exception", "v3", 0, 0, True),
        ("exception", "v3", 0, 2, False),
    ],
)
def test_context_decides_between_sleeping_and_halting(
    mode: str, profile: str, cpl: int, preempt: int, sleeps: bool
) -> None:
    world = World(
        config(mode, profile, send_always=True), [in_context(cpl, preempt, once(L.RUN_NESTED, ends)), works]
    )
    world.run(until_ns=7 * MS)
    if sleeps:
        assert world.seg.word(0, L.T_STATE) == L.TS_SLEEPING
        assert world.runs[1] >= 7 * MS
    world.run(until_ns=20 * MS)
    assert world.seg.word(0, L.T_STATE) == L.TS_DONE
    assert world.counter(L.VC_HALT_TASKS) == (not sleeps)
    assert quiet(world)
    if not sleeps:
        # I41: the same task before and after, though another one was runnable all the time.
        halt = world.steps.index("HLT")
        assert halt > world.steps.index("NESTED")
        switches = [e for e in world.log.events if e[0] is Kind.SWITCH]
        resumed = next(i for i, e in enumerate(world.log.events) if e[0] is Kind.G_RESUME)
        assert all(e[3] == 1 for e in switches if world.log.events.index(e) < resumed)
        assert all(e.if_ == 1 for e in world.exits if e.reason == ExitReason.HLT)


def test_halted_context_takes_timer_interrupts_and_stays() -> None:
    world = World(
        config("exception", "v7", send_always=True), [in_context(0, 1, once(L.RUN_NESTED, ends)), works]
    )
    ticks = [0]

    def tick_first(record: Exit) -> Entry | None:
        if record.reason != ExitReason.HLT or ticks[0] == 3:
            return None
        ticks[0] += 1
        world.irr.add(VECTOR_TIMER)
        assert world.seg.word(0, L.T_STATE) == L.TS_HALTING
        return world.entry(record)

    world.entry_hook = tick_first
    world.run(until_ns=20 * MS)
    assert ticks[0] == 3
    assert sum(e[:3] == (Kind.G_IRQ, 0, VECTOR_TIMER) for e in world.log.events) == 3
    assert world.seg.word(0, L.T_STATE) == L.TS_DONE


def test_not_present_while_idle_halts_without_switching() -> None:  # TG6
    world = World(
        config("exception", "v7", tasks=1, send_always=True), [once(L.RUN_KICK, once(L.RUN_NESTED, ends))]
    )
    announced = [False]

    def announce(record: Exit) -> Entry | None:
        if record.reason != ExitReason.HLT or announced[0]:
            return None
        announced[0] = True
        world.seg.memory[world.area] = 1
        world.fetches.append((world.cpu.vclock_ns + 20 * MS, 0x7000))
        return world.entry(record)._replace(inject=Inject.PF_NOT_PRESENT, cr2=0x7000)

    world.entry_hook = announce
    world.run()
    assert announced[0]
    assert world.counter(L.VC_HALT_TASKS) == 1
    wait = next(e for e in world.log.events if e[0] is Kind.G_WAIT and e[1] == 0x7000)
    assert wait[2] == 0  # no task
    assert wait[4] == 1  # the halting variant
    assert quiet(world)
    assert world.counter(L.VC_READY) == 2


def test_mainline_guest_panics_when_interrupts_are_off() -> None:
    world = World(config("interrupt"), [once(L.RUN_NESTED, works), works])

    def announce(record: Exit) -> Entry | None:
        if record.reason != ExitReason.NESTED:
            return None
        world.seg.set_word(0, L.T_IF, 0)
        world.seg.memory[world.area] = 1
        return world.entry(record)._replace(inject=Inject.PF_NOT_PRESENT, cr2=TOKEN)

    world.entry_hook = announce
    with pytest.raises(GuestPanicError, match="interrupts off"):
        world.run()


@pytest.mark.parametrize("step", ["wait-lock", "wait-linked", "sleep-state-set"])
def test_wake_by_another_cpu_at_any_step_is_not_lost(step: str) -> None:
    """The waker unlinks, then looks at the state; the sleeper sets its state, then looks at the link (spec §2.3)."""
    world = World(config("interrupt", vcpus=2), [once(L.RUN_NESTED, ends), works], Segments(2, 2))
    other = Sleepers(world.cpu.kernel, 2, 2, 1, world.acc, lambda: Ask(1))
    state = world.seg.base + L.T_STATE
    woken: list[Woken | None] = []

    def wake(name: str) -> None:
        path = other.wake(TOKEN)
        try:
            for _ in range(1000):
                next(path)
        except StopIteration as stop:
            woken.append(stop.value)
        if woken[-1] is not None:
            world.cpu.kernel.cmpxchg(state, L.TS_SLEEPING, L.TS_RUNNABLE)
        world.fetches.clear()
        assert name == step

    world.cpu.park_with(lambda name: name == step and not woken)
    world.parked_hook = wake
    world.run(until_ns=60 * MS)
    assert len(woken) == 1
    assert (woken[0] is None) == (step == "wait-lock")
    assert world.seg.word(0, L.T_STATE) == L.TS_DONE
    assert world.log.count(Kind.G_RESUME) == 1
    assert quiet(world)


# ---- words that do not fit ---------------------------------------------------------------------------------------------------------
def test_exception_without_its_word_is_an_ordinary_fault() -> None:
    world = World(config("interrupt", tasks=1), [once(L.RUN_NESTED, ends)])
    world.entry_hook = lambda e: (
        world.entry(e)._replace(inject=Inject.PF_NOT_PRESENT, cr2=TOKEN)
        if e.reason == ExitReason.NESTED
        else None
    )
    world.run()
    assert world.cpu.apf.strays == 1
    assert world.seg.word(0, L.T_STATE) == L.TS_DONE
    assert world.counter(L.VC_NOT_PRESENT) == 0


def test_word_found_by_an_ordinary_fault_is_cleared() -> None:
    world = World(config("interrupt", tasks=1), [once(L.RUN_APF_WORD, ends)])
    world.run(until_ns=0)
    while world.area == 0:
        world.step()
    world.seg.memory[world.area] = 1
    world.run()
    assert world.cpu.apf.strays == 1
    assert world.seg.memory[world.area] == 0
    assert world.seg.word(0, L.T_STATE) == L.TS_DONE


def test_nested_faults_inside_the_handlers_do_not_disturb_them() -> None:
    world = World(config("interrupt"), [once(L.RUN_NESTED, ends), works])
    world.access_faults_first = True
    world.run(until_ns=30 * MS)
    assert world.seg.word(0, L.T_STATE) == L.TS_DONE
    assert world.counter(L.VC_KERNEL_NESTED) == sum(s.startswith(("read", "write")) for s in world.steps)
    assert quiet(world)
