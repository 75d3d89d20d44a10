"""The whole emulator in virtual time: clean on the unmodified code, the same for the same plan, and able to find what is broken."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from host.async_pf import AsyncPf
from host.vm import VmMachine
from host.x86 import X86
from launcher.sim_verdict import judge, run_plan
from proto.events import Kind
from proto.machine import Path as Steps
from proto.profile import PROFILES
from proto.stats import HostCounter
from sim.draw import draw
from sim.emulator import HOST, Emulator
from sim.plan import FAULTS, US, DaemonPlan, FaultPlan, SimPlan, TaskPlan, VmPlan, pages_needed

ROOT = Path(__file__).resolve().parents[2]
CLEAN = [range(first, first + 500) for first in range(0, 2_000, 500)]
HUNT = range(120)
Patch = Callable[[pytest.MonkeyPatch], None]
OOM_SEEDS = 3
"""Of 500 seeds so many have to kill a task for memory."""
KINDS_PASSED = 5
"""Of 500 seeds at least so many must have passed with every kind of fault."""


@pytest.mark.timeout(600)
@pytest.mark.parametrize("seeds", CLEAN, ids=lambda seeds: f"{seeds.start}-{seeds.stop - 1}")
def test_two_thousand_seeds_hold(seeds: range) -> None:
    """In parts, so that two processes can share the work."""
    passed: Counter[str] = Counter()
    seen: Counter[str] = Counter()
    for seed in seeds:
        outcome = run_plan(draw(seed))
        assert outcome.failures == (), seed
        passed.update(kind for kind in outcome.fired if not outcome.unfired[kind])
        seen[outcome.plan.profile] += 1
        seen[outcome.plan.mode] += 1
        seen[outcome.plan.schedule] += 1
        seen["lifecycles"] += outcome.lifecycles
        seen["checked"] += outcome.reads_checked
        seen["oom"] += bool(outcome.oom_kills)
    assert set(seen) >= {*PROFILES, "sync", "halt", "exception", "interrupt", "delays", "priorities"}
    assert min(seen["lifecycles"], seen["checked"]) > len(seeds)
    assert seen["oom"] >= OOM_SEEDS
    assert {kind: passed[kind] >= KINDS_PASSED for kind in FAULTS} == dict.fromkeys(FAULTS, True), passed


def test_what_a_range_comes_to() -> None:
    """Every way a fault can go, and every step that a path can rest at."""
    counts: Counter[HostCounter] = Counter()
    steps: Counter[str] = Counter()
    for seed in range(150):
        emulator = Emulator(draw(seed))
        emulator.run()
        assert judge(emulator) == [], seed
        counts += emulator.log.counts
        steps += emulator.chance.rested
    for counter in (
        HostCounter.FAULTS_ASYNC, HostCounter.FAULTS_HALT, HostCounter.FAULTS_SYNC, HostCounter.FAULTS_REPEATED, HostCounter.ELIDED,
        HostCounter.WRITEBACK_CANCELLED, HostCounter.FRAME_WAITS, HostCounter.STALE_REPLIES, HostCounter.IO_RETRIES,
        HostCounter.CHECKSUM_ERRORS, HostCounter.MACHINE_CHECKS, HostCounter.FENCES, HostCounter.RESENT, HostCounter.KICKS,
    ):  # fmt: skip
        assert counts[counter], counter.name
    host = {
        "setup.queued",
        "setup.announced",
        "worker.appended",
        "worker.queued",
        "dequeue.popped",
        "ack.cleared",
        "v3.inject",
    }
    guest = {"wait-looked", "wake-looked", "sleep-state-set", "wait-linked"}
    assert not {step for step in host | guest if not steps[step]}


def test_a_plan_is_a_run() -> None:
    for seed in (3, 4, 5):
        assert run_plan(draw(seed)).raw == run_plan(draw(seed)).raw
    assert run_plan(draw(6)).raw != run_plan(draw(7)).raw


def test_hash_seeds_do_not_matter(tmp_path: Path) -> None:
    for hash_seed in ("0", "1"):
        command = [
            sys.executable,
            str(ROOT / "launch.py"),
            "sim",
            "--seed",
            "11",
            "--out",
            str(tmp_path / hash_seed),
        ]
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        subprocess.run(command, check=True, capture_output=True, timeout=100, env=environment, cwd=ROOT)
    for name in ("events.jsonl", "plan.toml"):
        assert (tmp_path / "0" / name).read_bytes() == (tmp_path / "1" / name).read_bytes()


# -- broken on purpose ---------------------------------------------------------------------------------------
def hunt(patch: Patch, profile: str | None = None, **changes: Any) -> tuple[str, ...]:
    """The complaints of the first seed that has any; without the patch it has none."""
    with pytest.MonkeyPatch.context() as patching:
        patch(patching)
        for seed in HUNT:
            plan = replace(draw(seed, profile), **changes)
            failures = run_plan(plan).failures
            if failures:
                break
        else:
            return ()
    assert run_plan(plan).failures == ()
    return failures


def method(owner: Any, name: str, function: Any) -> Patch:
    return lambda patching: patching.setattr(owner, name, function)


def said_before_appended(self: AsyncPf, work_id: int) -> Steps:
    """Between the two the vCPU looks, finds nothing, and nobody says it again."""
    work = self.queue.get(work_id)
    if work is None:
        return
    work.arrived = True
    if not self.done:
        self._arch.present_queued()
    yield "worker.queued"
    self.done.append(work)


def always_free(_: X86) -> Steps:
    yield "can_dequeue.read"
    return True


def test_a_waker_that_looks_before_it_appends() -> None:
    assert hunt(method(AsyncPf, "completed", said_before_appended), "mainline")


def test_a_ready_that_nobody_waits_for() -> None:
    changed = replace(PROFILES["v7"], ready_needs_announced=False)
    assert hunt(lambda patching: patching.setitem(PROFILES, "v7", changed), "v7")[0].startswith("I22")


def test_a_token_word_that_is_overwritten() -> None:
    assert hunt(method(X86, "can_dequeue", always_free), "mainline")[0].startswith("I24")


# -- faults --------------------------------------------------------------------------------------------------
def small(*faults: FaultPlan, **changes: Any) -> SimPlan:
    """One vCPU that needs more memory than there is."""
    tasks = (TaskPlan("stamp", 0, 60, 200), TaskPlan("stamp", 0, 40, 200))
    vm = VmPlan(1, pages_needed(tasks) + 8, 100, False, False, tasks)
    plan = SimPlan(
        seed=1, profile="mainline", mode="interrupt", frames=60, low=8, high=16, populate=1, zero_pages=False, schedule="delays",
        changes=0, park_percent=0, link_us=5, calm_us=1_000_000, stop_us=0, vms=(vm,),
        daemons=(DaemonPlan(vm.memory_pages + 32, 10, 60),), faults=faults,
    )  # fmt: skip
    return replace(plan, **changes)


def events_of(plan: SimPlan) -> tuple[Emulator, Counter[Kind]]:
    emulator = Emulator(plan)
    emulator.run()
    assert judge(emulator) == []
    return emulator, Counter(Kind(int(kind)) for kind in emulator.log.events()["kind"])


def test_killed_daemons_come_back_and_nothing_is_lost() -> None:
    emulator, kinds = events_of(small(*(FaultPlan("kill", 0, nth) for nth in (3, 20, 40))))
    assert emulator.faults.fired == {"kill": 3}
    assert emulator.daemons.deaths == kinds[Kind.DAEMON_DOWN] == kinds[Kind.FENCED] == 3
    assert kinds[Kind.DAEMON_UP] == 4
    assert emulator.log.counts[HostCounter.RESENT], "what was under way is asked for again"


@pytest.mark.parametrize(
    ("kind", "counter"),
    [
        ("read_error", HostCounter.IO_RETRIES), ("write_error", HostCounter.IO_RETRIES), ("short_read", HostCounter.IO_RETRIES),
        ("bit_flip", HostCounter.CHECKSUM_ERRORS), ("drop", HostCounter.RESENT),
    ],
)  # fmt: skip
def test_a_fault_of_the_device_or_the_link_is_made_good(kind: str, counter: HostCounter) -> None:
    emulator, _ = events_of(small(FaultPlan(kind, 0, 5)))
    assert emulator.faults.fired == {kind: 1}
    assert emulator.log.counts[counter]


def test_a_block_that_cannot_be_read_costs_one_task() -> None:
    emulator, kinds = events_of(small(FaultPlan("bad_block", 0, 5)))
    assert emulator.faults.fired == {"bad_block": 1}
    assert kinds[Kind.TASK_KILLED] == kinds[Kind.G_MACHINE_CHECK] == 1
    assert kinds[Kind.TASK_DONE] == 1, "the other task goes on"


@pytest.mark.parametrize(
    ("profile", "mode"),
    [
        ("mainline", "sync"),
        ("mainline", "interrupt"),
        ("mainline", "halt"),
        ("v7", "exception"),
        ("v3", "exception"),
    ],
)
@pytest.mark.parametrize(
    "faults", [(), (FaultPlan("kill", 0, 3), FaultPlan("restart", 0, 80))], ids=["calm", "faults"]
)
def test_a_full_swap_costs_the_larger_task(profile: str, mode: str, faults: tuple[FaultPlan, ...]) -> None:
    emulator, kinds = events_of(small(*faults, profile=profile, mode=mode, daemons=(DaemonPlan(12, 10, 60),)))
    assert emulator.faults.fired == Counter(fault.kind for fault in faults)
    victims = [int(e["a"]) for e in emulator.log.events() if e["kind"] == Kind.G_OOM_VICTIM]
    assert victims == [1]
    assert kinds[Kind.TASK_KILLED] == kinds[Kind.TASK_DONE] == 1
    assert emulator.log.counts[HostCounter.OOM_KILLS] == 1


@pytest.mark.parametrize(
    ("profile", "mode"),
    [("mainline", "interrupt"), ("mainline", "halt"), ("v7", "exception"), ("v3", "exception")],
)
def test_guests_go_on_in_a_fresh_set(profile: str, mode: str) -> None:
    restarts = tuple(FaultPlan("restart", 0, nth) for nth in (3, 60, 200))
    emulator, kinds = events_of(small(*restarts, profile=profile, mode=mode))
    assert emulator.faults.fired == {"restart": 3}
    assert emulator.sets == 4
    assert kinds[Kind.STATE_SAVE] == kinds[Kind.STATE_RESTORE] == 3
    assert kinds[Kind.TASK_DONE] == 2
    assert emulator.guests.reads_checked > 2 * 512 * 40, "the sweep at the end has read all pages"


def test_a_restart_that_is_due_during_another_comes_after_it() -> None:
    restarts = tuple(FaultPlan("restart", 0, nth) for nth in (30, 30, 31))
    emulator, kinds = events_of(small(*restarts))
    assert emulator.faults.fired == {"restart": 3}
    assert (emulator.sets, kinds[Kind.STATE_SAVE]) == (4, 3), "each that counts was done"


def test_of_several_faults_at_one_read_each_has_one_of_its_own() -> None:
    """A block that is bad, an error, half a page and a wrong bit cannot all be of one read."""
    for wanted in (("bit_flip",) * 2, ("read_error", "short_read"), ("read_error", "bit_flip", "bit_flip")):
        emulator, _ = events_of(small(*(FaultPlan(kind, 0, 5) for kind in wanted)))
        assert emulator.faults.fired == Counter(wanted)
        counts = emulator.log.counts
        assert counts[HostCounter.CHECKSUM_ERRORS] == wanted.count("bit_flip")
        assert counts[HostCounter.IO_RETRIES] == len(wanted), "each cost a read"


def test_a_read_of_a_bad_block_is_no_occasion_for_more() -> None:
    """All tries of its page fail by the block; a wrong bit that is due then is had by a read that works, or by none."""
    happened = []
    for nth in range(3, 12):
        emulator, _ = events_of(small(FaultPlan("bad_block", 0, 5), FaultPlan("bit_flip", 0, nth)))
        happened.append(emulator.faults.fired["bit_flip"])
        assert emulator.faults.fired["bad_block"] == 1
        assert emulator.log.counts[HostCounter.CHECKSUM_ERRORS] == happened[-1]
    assert set(happened) == {0, 1}


def test_nobody_dies_twice_or_stands_still_dead() -> None:
    emulator, kinds = events_of(
        small(FaultPlan("kill", 0, 5), FaultPlan("kill", 0, 5), FaultPlan("stop", 0, 5, 400))
    )
    assert emulator.faults.fired == {"kill": 2, "stop": 1}
    assert emulator.daemons.deaths == kinds[Kind.DAEMON_DOWN] == 2


def test_the_last_daemon_that_is_left_never_goes_for_good() -> None:
    emulator, kinds = events_of(on_two(FaultPlan("gone", 0, 10), FaultPlan("gone", 1, 30)))
    assert emulator.faults.fired == {"gone": 1}
    assert kinds[Kind.DAEMON_GONE] == kinds[Kind.DAEMON_DOWN] == 1


def arrived(emulator: Emulator, *names: str) -> list[tuple[str, bool]]:
    """Who arrives of messages that a daemon sends one after the other, and whether late."""
    got: list[tuple[str, bool]] = []

    def arrive(name: str) -> None:
        got.append((name, emulator.agenda.now_ns >= LATE_US * US))

    for name in names:
        emulator.daemons._send(0, HOST, 1, partial(arrive, name))
    while emulator.agenda.step():
        pass
    return sorted(got)


LATE_US = 1_000
"""Of a delay: far longer than a message or its copy takes."""


@pytest.mark.parametrize(
    ("kinds", "arrivals"),
    [
        (("drop", "delay"), [("b", True)]),
        (("drop", "duplicate"), [("b", False), ("b", False)]),
        (("drop", "drop"), []),
        (("duplicate", "delay"), [("a", True), ("a", True), ("b", False)]),
        (("delay", "delay"), [("a", True), ("b", True)]),
        (("duplicate", "duplicate"), [("a", False), ("a", False), ("b", False), ("b", False)]),
    ],
)
def test_messages_are_lost_doubled_and_late_as_in_a_real_run(
    kinds: tuple[str, ...], arrivals: list[tuple[str, bool]]
) -> None:
    """proto/faults.py `FaultMachine.deliver`: what is due at the first message, and makes no difference there, waits."""
    emulator = Emulator(small(*(FaultPlan(kind, 0, 1, LATE_US * (kind == "delay")) for kind in kinds)))
    assert arrived(emulator, "a", "b") == arrivals
    assert emulator.faults.fired == Counter(kinds)


def test_a_restart_in_the_middle_of_a_dead_daemon() -> None:
    """Neither the fence nor the restart of the old set's daemon is anything to the new one."""
    emulator, kinds = events_of(
        small(FaultPlan("kill", 0, 10), *(FaultPlan("restart", 0, nth) for nth in range(20, 200, 30)))
    )
    assert emulator.sets > 3
    assert kinds[Kind.DAEMON_UP] >= emulator.sets


def on_two(*faults: FaultPlan, **changes: Any) -> SimPlan:
    """`small` with each page on two daemons."""
    plan = small(*faults)
    daemon = replace(plan.daemons[0], slots=2 * plan.vms[0].memory_pages)
    return replace(plan, **{"daemons": (daemon, daemon), "replicas": 2, **changes})


@pytest.mark.parametrize("nth", [1, 3, 20, 60])
def test_a_daemon_that_never_comes_back_is_done_without(nth: int) -> None:
    emulator, kinds = events_of(on_two(FaultPlan("gone", 0, nth)))
    assert emulator.faults.fired == {"gone": 1}
    assert (kinds[Kind.DAEMON_GONE], kinds[Kind.DAEMON_UP], emulator.pages_lost) == (1, 2, 0)
    assert kinds[Kind.TASK_DONE] == 2
    assert emulator.host.swap.copies.singles > 0


def test_pages_that_only_it_had_end_the_run_in_order() -> None:
    """The other daemon is dead when pages are written, and back when the first one goes."""
    kills = tuple(FaultPlan("kill", 1, nth) for nth in range(1, 12))
    emulator = Emulator(on_two(*kills, FaultPlan("gone", 0, 60)))
    emulator.run()
    assert emulator.pages_lost > 0
    assert emulator.failures == []
    assert judge(emulator) == []


def test_a_page_with_a_bad_block_comes_from_the_other_daemon_and_is_written_anew() -> None:
    emulator, kinds = events_of(on_two(FaultPlan("bad_block", 0, 5)))
    counts = emulator.log.counts
    assert emulator.faults.fired == {"bad_block": 1}
    assert (kinds[Kind.TASK_KILLED], kinds[Kind.G_MACHINE_CHECK], kinds[Kind.TASK_DONE]) == (0, 0, 2)
    assert counts[HostCounter.QUARANTINED] == kinds[Kind.COPY_BAD] == 1
    assert counts[HostCounter.REWRITTEN] == 1


def test_late_reads_are_asked_of_the_other_daemon() -> None:
    plans = [
        on_two(*(FaultPlan("stop", daemon, nth, 5_000) for daemon in (0, 1)), hedge_us=200)
        for nth in range(20, 140, 20)
    ]
    counts: Counter[HostCounter] = Counter()
    for plan in plans:
        counts += events_of(plan)[0].log.counts
    assert counts[HostCounter.HEDGED] >= counts[HostCounter.HEDGE_WINS] > 0
    without, _ = events_of(replace(plans[0], hedge_us=0))
    assert without.log.counts[HostCounter.HEDGED] == 0


def test_what_never_happened_is_said() -> None:
    outcome = run_plan(small(FaultPlan("kill", 0, 100_000), FaultPlan("stop", 0, 2, 100)))
    assert outcome.passed
    assert (dict(outcome.fired), dict(outcome.unfired)) == ({"stop": 1}, {"kill": 1})


def test_a_stop_ends_tasks_that_have_no_end() -> None:
    plan = small(stop_us=500)
    endless = replace(plan.vms[0], tasks=tuple(replace(task, ops=0) for task in plan.vms[0].tasks))
    _, kinds = events_of(replace(plan, vms=(endless,)))
    assert kinds[Kind.STOP] == 2, "the host says it, and the CPU sees it"
    assert kinds[Kind.TASK_DONE] == 2


def test_a_machine_that_dies_is_a_failure_with_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: VmMachine) -> None:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(VmMachine, "settle", broken)
    (failure,) = run_plan(small()).failures
    assert "broken" in failure
    assert "test_emulator.py" in failure
