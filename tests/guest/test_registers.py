"""A fresh guest CPU goes on from the registers of a saved one, at every kind of save point."""

from __future__ import annotations

import pytest

from guest.registers import Registers
from proto import layout as L  # noqa: N812 - a table of constants
from proto.events import Kind
from proto.wire import POWERED_DOWN, ExitReason
from tests.guest.cpu_world import MS, Behaviour, World, config, ends, faults, once, works
from tests.guest.test_apf import in_context, quiet

OFF = Registers.from_words([POWERED_DOWN])
MODES = (("interrupt", "mainline"), ("exception", "v7"), ("exception", "v3"), ("halt", "mainline"))


def run_with_restarts(world: World, every: int, steps: int = 4000) -> set[ExitReason]:
    """Restart at every ``every``-th save point until all is done; the reasons of the exits it was restarted at."""
    seen = 0
    reasons: set[ExitReason] = set()
    world.step_first()
    for _ in range(steps):
        if world.powered_down is not None:
            return reasons
        if world.at_save_point():
            seen += 1
            if seen % every == 0:
                reasons.add(ExitReason(world.request.record.reason))
                world.restart()
        world.step()
    raise AssertionError("never done")


def faults_then_ends(times: int) -> Behaviour:
    """So many nested faults, each answered before the next operation, then done."""
    left: dict[int, int] = {}

    def behave(world: World, task: int, limit: int) -> tuple[int, int]:
        n = left.setdefault(task, times)
        if n == 0:
            return L.RUN_DONE, 0
        left[task] = n - 1
        return faults(world, task, limit)

    return behave


@pytest.mark.parametrize(("mode", "profile"), MODES)
@pytest.mark.parametrize("every", [2, 3, 5])
def test_tasks_finish_however_often_the_cpu_is_exchanged(mode: str, profile: str, every: int) -> None:
    world = World(config(mode, profile, tasks=3), [faults_then_ends(12)] * 3)
    reasons = run_with_restarts(world, every)
    assert ExitReason.NESTED in reasons
    assert [world.seg.word(t, L.T_STATE) for t in range(3)] == [L.TS_DONE] * 3
    assert quiet(world)
    resumes = [e for e in world.exits if e.reason == ExitReason.RESUME]
    assert resumes
    assert all(e.flags == L.XF_RESTART for e in resumes)
    assert sum(e.reason == ExitReason.BOOT for e in world.exits) == 1


def test_idle_cpu_goes_on_idle_and_wakes_its_sleeper() -> None:
    world = World(config("interrupt"), [once(L.RUN_NESTED, ends), ends])
    world.step_first()
    while not (world.at_save_point() and world.request.record.reason == ExitReason.HLT):
        world.step()
    assert world.seg.word(0, L.T_STATE) == L.TS_SLEEPING
    world.restart()
    assert (world.request.record.if_, world.request.record.cpl) == (1, 0)
    world.run()
    assert world.seg.word(0, L.T_STATE) == L.TS_DONE
    assert world.counter(L.VC_BROADCASTS) == 2
    assert quiet(world)


@pytest.mark.parametrize("profile", ["v3", "v7"])
def test_halting_task_halts_on_in_a_fresh_cpu(profile: str) -> None:
    world = World(
        config("exception", profile, send_always=True, tasks=2),
        [in_context(0, 2, once(L.RUN_NESTED, ends)), ends],
    )
    world.step_first()
    while not (world.at_save_point() and world.request.record.reason == ExitReason.HLT):
        world.step()
    assert world.cpu.apf.halting
    assert world.seg.word(0, L.T_STATE) == L.TS_HALTING
    token = next(e[1] for e in reversed(world.log.events) if e[0] is Kind.G_WAIT)
    world.restart()
    assert world.cpu.apf.halting
    world.run()
    assert world.seg.word(0, L.T_STATE) == L.TS_DONE
    assert (Kind.G_RESUME, token, 1, 0, 0) in world.log.events
    assert quiet(world)


def test_woken_while_it_was_being_saved() -> None:
    """Another CPU unlinks the node between the halt and the save."""
    world = World(
        config("exception", "v7", send_always=True), [in_context(0, 2, once(L.RUN_NESTED, ends)), ends]
    )
    world.step_first()
    while not (world.at_save_point() and world.request.record.reason == ExitReason.HLT):
        world.step()
    for _ in world.cpu.sleepers.wake_all():
        pass
    world.restart()
    world.done.clear()
    world.step()
    assert world.log.count(Kind.G_RESUME) == 1
    world.run()
    assert world.seg.word(0, L.T_STATE) == L.TS_DONE


def test_exits_of_kernel_code_are_no_save_points() -> None:
    world = World(config("interrupt"), [once(L.RUN_NESTED, ends), once(L.RUN_KICK, works)])
    world.access_faults_first = True
    world.run(until_ns=30 * MS)
    points = {ExitReason(e.reason) for e in world.exits if e.flags & L.XF_RESTART}
    kernel = [e for e in world.exits if not e.flags & L.XF_RESTART]
    assert points == {ExitReason.NESTED, ExitReason.KICK}
    assert {ExitReason(e.reason) for e in kernel} >= {ExitReason.BOOT, ExitReason.WRMSR, ExitReason.NESTED}
    assert all(e.cpl == 0 for e in kernel)
    assert all(not e.if_ for e in kernel if e.reason != ExitReason.HYPERCALL)


def test_time_goes_on_and_the_time_between_is_nobodys() -> None:
    world = World(config("interrupt"), [works, faults_then_ends(3)])
    world.run(until_ns=5 * MS)
    while not world.at_save_point():
        world.step()
    before = world.cpu.vclock_ns
    world.page[L.VP_COUNTERS + L.VC_BARRIER_WALL_NS] = MS
    world.restart(gap_ns=2 * MS)
    assert world.cpu.vclock_ns == before
    assert world.counter(L.VC_BARRIER_WALL_NS) == 3 * MS, "as if the barrier had opened that much later"


def test_powered_down_cpu_stays_down() -> None:
    world = World(config("interrupt"), [ends, ends])
    world.run()
    assert world.powered_down is not None
    assert Registers.from_words(OFF.words()) == OFF
    fresh = World(config("interrupt"), [ends, ends], world.seg)
    fresh.cpu = type(fresh.cpu)(fresh.config, fresh.seg.kern, fresh.page, fresh.seg.control, fresh.acc, OFF)
    fresh.run()
    assert [e.reason for e in fresh.exits] == []
    assert fresh.powered_down is not None
    assert fresh.powered_down.record is not None
    assert fresh.powered_down.record.reason == ExitReason.DONE


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "version None"),
        ([2, *OFF.words()[1:]], "version 2, allowed: 1"),
        (OFF.words()[:-1], "20 register words, allowed: 21"),
        ([*OFF.words(), 0], "22 register words, allowed: 21"),
    ],
)
def test_bad_registers_are_refused(words: list[int], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Registers.from_words(words)


def test_negative_numbers_survive() -> None:
    record = OFF._replace(current=-1, last=-1, vclock_ns=(1 << 62) + 1)
    assert Registers.from_words(record.words()) == record
