"""Bugs between host and daemons, found by plans of the whole emulator (sim/emulator.py)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

from host import events as ev
from host.giveback import GiveBack
from host.kernels import HPT_READING
from host.page_in import PageIn
from host.swap import SwapMachine
from launcher.sim_verdict import run_plan
from sim.daemons import Daemons
from sim.draw import draw
from sim.plan import DaemonPlan, FaultPlan, SimPlan, TaskPlan, VmPlan, pages_needed
from swapd.machine import RequestQueue
from tests.zoo.core import Bug, Patch, Trial
from tests.zoo.trials import complaint

SEEDS: Final = 60
"""Plans per trial, at most."""


def plans(name: str, change: Callable[[SimPlan], SimPlan]) -> Trial:
    """Drawn plans, changed so that the bug's occasion comes, one after the other until one complains."""

    def go() -> list[str]:
        for n, seed in enumerate(range(SEEDS), 1):
            failures = run_plan(change(draw(seed))).failures
            if failures:
                return [*map(complaint, failures), f"@seed {seed} of {name}, the {n}. of {SEEDS}"]
        return []

    return Trial(f"plans {name}", go)


# -- occasions -------------------------------------------------------------------------------------------------
def with_copies(plan: SimPlan) -> SimPlan:
    """Message after message arrives twice."""
    return replace(plan, faults=tuple(FaultPlan("duplicate", 0, nth) for nth in range(1, 60)))


def with_a_loss(plan: SimPlan) -> SimPlan:
    """One message is lost."""
    return replace(plan, faults=(FaultPlan("drop", 0, 3),))


def with_many_deaths(plan: SimPlan) -> SimPlan:
    """The only daemon, a slow one, dies again and again."""
    kills = tuple(FaultPlan("kill", 0, nth) for nth in range(5, 200, 4))
    return replace(plan, faults=kills, daemons=(DaemonPlan(1 << 12, 20, 200),))


def with_long_stays(plan: SimPlan) -> SimPlan:
    """Two vCPUs that store all the time and stay in guest mode for long, since nearly everything is in memory."""
    tasks = tuple(TaskPlan("stamp", cpu, 60, 1500, 90) for cpu in (0, 1))
    vm = VmPlan(2, pages_needed(tasks) + 8, 100, False, False, tasks)
    return replace(
        plan, vms=(vm,), daemons=(DaemonPlan(vm.memory_pages + 32, 0, 0),), frames=120, low=8, high=24, faults=(),
        zero_pages=False, schedule="delays", link_us=0, calm_us=1_000_000, park_percent=0,
    )  # fmt: skip


def with_a_full_swap(plan: SimPlan) -> SimPlan:
    """A process with threads on both vCPUs, and checked tasks beside it, on too little memory and swap for all."""
    tasks = (
        TaskPlan("bm", 0, 56, 0, fault_threads=2, work_threads=2),
        *(TaskPlan("stamp", cpu, 24, 400, 90) for cpu in (0, 1)),
    )
    vm = VmPlan(2, pages_needed(tasks) + 8, 100, False, False, tasks)
    return replace(
        plan, vms=(vm,), daemons=(DaemonPlan(30, 200, 3_000),), frames=84, low=8, high=16, populate=1, faults=(), zero_pages=False,
        calm_us=1_000_000, stop_us=60_000,
    )  # fmt: skip


# -- bugs ------------------------------------------------------------------------------------------------------
def done_again(original: Any) -> Any:
    def accept(self: RequestQueue, requests: Any, settled: int, now_ns: int) -> Any:
        self._answered.clear()
        return original(self, requests, min(settled, self._settled), now_ns)

    return accept


def asks_nobody_again(_: SwapMachine) -> None:
    return


def handlers_without_a_second_look(original: Any) -> Any:
    def init(self: SwapMachine, *args: Any) -> None:
        original(self, *args)
        self._handlers[ev.LookAtRequests] = asks_nobody_again

    return init


def succeeds_at_once(original: Any) -> Any:
    """The successor says hello while what the dead one has begun may still land."""

    def die(self: Daemons, d: int, one: Any) -> None:
        epoch = one.epoch
        original(self, d, one)
        for event in (ev.DaemonLost(d, epoch), ev.DaemonFenced(d, epoch)):
            self._to_host(event)
        self._hello(d, epoch + 1)

    return die


def said_already(_self: Daemons, _d: int, _epoch: int) -> None:
    return


def frees_at_once(original: Any) -> Any:
    """The landing frame of a read that nobody waits for any more is free as soon as the vCPUs have flushed."""

    def take(self: GiveBack, vm: int, hvp: int, frames: list[int]) -> bool:
        reading = int(self._m.frame_of[hvp]) if self._m.state[hvp] == HPT_READING else -1
        held = bool(original(self, vm, hvp, frames))
        if reading >= 0:
            self._m.frames.lent.remove(reading)
            frames.append(reading)
        return held

    return take


def comes_back_twice(original: Any) -> Any:
    def frame_back(self: PageIn, event: ev.FrameBack) -> None:
        if event.frame in self._m.frames.lent:
            original(self, event)

    return frame_back


BUGS: Final = (
    Bug("D-11", "a request that comes twice is done twice", "found by the first plans with copies", "drawn", (),
        (Patch(RequestQueue, "accept", done_again(RequestQueue.accept)),), (plans("with copies", with_copies),)),
    Bug("D-12", "a request that was lost is never asked for again", "found by the first plans with losses", "drawn", (),
        (Patch(SwapMachine, "__init__", handlers_without_a_second_look(SwapMachine.__init__)),), (plans("with a loss", with_a_loss),)),
    Bug("D-14", "the landing frame of a page that was given back is used again at once", "of our own making", "drawn", (),
        (Patch(GiveBack, "_take", frees_at_once(GiveBack._take)), Patch(PageIn, "frame_back", comes_back_twice(PageIn.frame_back))),
        (plans("with a full swap", with_a_full_swap),)),
    Bug("D-13", "a daemon's successor comes before the fence", "of our own making", "drawn", (),
        (Patch(Daemons, "_die", succeeds_at_once(Daemons._die)), Patch(Daemons, "_fenced", said_already)),
        (plans("with many deaths", with_many_deaths),)),
)  # fmt: skip
