"""What must hold of a simulated run, and what does not.

Beside the invariants of KVM (report/check, by number): the run came to its end, every read saw what was written there, no sleeper and no
dummy is left, and every frame and every swap slot is accounted for. What stopped the run comes first; the rest of a stopped run is judged
for safety only, unless it stopped because nothing could happen any more.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from host.kernels import (
    HPT_BAD,
    HPT_EVICT,
    HPT_NONE,
    HPT_READING,
    HPT_RESIDENT,
    HPT_SLOT,
    HPT_WRITING,
    HPT_ZERO,
)
from proto.events import Events
from proto.layout import ALLOC_FIRST_GFN, KILL_SWAP_FULL, VC_TASKS_KILLED
from proto.stats import HostCounter
from proto.units import PAGE_SIZE
from report.check.checker import Checker
from report.check.verdict import Finding
from sim.emulator import Emulator
from sim.plan import SimPlan

_HAS_FRAME: Final = (HPT_RESIDENT, HPT_EVICT, HPT_WRITING, HPT_READING)
LIFECYCLES: Final = (
    HostCounter.FAULTS_ASYNC, HostCounter.FAULTS_HALT, HostCounter.FAULTS_SYNC, HostCounter.FAULTS_REPEATED,
)  # fmt: skip
"""Faults that needed a page from swap, however they were served."""


@dataclass(frozen=True, slots=True)
class SimOutcome:
    """One run. ``failures``: what does not hold, as lines; ``fired``: faults of the plan that happened, by kind."""

    plan: SimPlan
    failures: tuple[str, ...]
    fired: Counter[str]
    raw: bytes
    events: int
    lifecycles: int
    faults: int
    parks: int
    reads_checked: int
    oom_kills: int

    @property
    def passed(self) -> bool:
        """Everything held."""
        return not self.failures

    @property
    def unfired(self) -> Counter[str]:
        """Faults of the plan whose occasion never came: the run says nothing about them."""
        return Counter(fault.kind for fault in self.plan.faults) - self.fired


def run_plan(plan: SimPlan) -> SimOutcome:
    """Run a plan and judge it."""
    emulator = Emulator(plan)
    emulator.run()
    counts = emulator.log.counts
    return SimOutcome(
        plan=plan,
        failures=tuple(judge(emulator)),
        fired=emulator.faults.fired,
        raw=emulator.log.raw,
        events=len(emulator.log),
        lifecycles=sum(counts[counter] for counter in LIFECYCLES),
        faults=counts[HostCounter.NESTED_FAULTS],
        parks=emulator.chance.rested.total(),
        reads_checked=emulator.guests.reads_checked,
        oom_kills=counts[HostCounter.OOM_KILLS],
    )


def judge(emulator: Emulator) -> list[str]:
    """What does not hold, as lines: invariants by number first."""
    stopped = bool(emulator.failures) or emulator.pages_lost > 0
    if lost := _lost_kernel_pages(emulator):
        # As on hardware, the end of that guest; how soon it notices is not promised. What happened until then must be right.
        found = invariants(
            emulator.plan.profile, emulator.log.events(), f"a guest has lost {lost} pages of its kernel"
        )
        # With its shared area gone what is done is never taken, and no halt lasts (spec §3.3: a read that fails counts as not free).
        found = [line for line in found if not line.startswith("I49 ")]
        return [*found, *_misread(emulator)]
    # Where nothing can happen any more, whoever still waits will wait for ever: liveness can be judged.
    cut = ""
    if stopped and not emulator.stuck:
        cut = (
            emulator.failures[0]
            if emulator.failures
            else f"{emulator.pages_lost} pages were lost with a daemon"
        )
    broken = invariants(emulator.plan.profile, emulator.log.events(), cut, finished=not stopped)
    found = [*broken, *emulator.failures, *_misread(emulator)]
    if not stopped:
        found += _left_over(emulator)
    return found


def _misread(emulator: Emulator) -> list[str]:
    errors = emulator.guests.integrity_errors
    return [f"{errors} reads did not see what was written there"] if errors else []


def _lost_kernel_pages(emulator: Emulator) -> int:
    """Unreadable pages below those that the guest's allocator hands out: the kernel's own."""
    vm = emulator.host.vm
    pages = [vm.find_hvp(v, gfn) for v in range(len(emulator.plan.vms)) for gfn in range(ALLOC_FIRST_GFN)]
    return sum(int(vm.state[hvp] == HPT_BAD) for hvp in pages if hvp >= 0)


def invariants(profile: str, events: Events, cut: str = "", *, finished: bool = True) -> list[str]:
    """The invariants that events break, with an example each. ``finished``: every task has ended."""
    checker = Checker(profile)
    checker.feed(events)
    verdict = checker.finish("simulated", cut=cut, finished=finished)
    return [f"I{one.number} {one.text} ({_example(one)})" for one in verdict.violated]


def _example(finding: Finding) -> str:
    example: dict[str, Any] = finding.examples[0] if finding.examples else {}
    event = example.get("event")
    at = f"event {event['lamport']} {example['kind']}" if event else "at the end"
    return f"vm {example.get('vm')} vcpu {example.get('vcpu')} token {example.get('token', 0):#x}, {at}"


def _free_pages(emulator: Emulator) -> list[str]:
    """What a guest's allocator would hand out next has nothing in it, wherever the host keeps it."""
    vm, found = emulator.host.vm, []
    for v, guest in enumerate(emulator.guests.vms):
        for gfn in guest.free_pages():
            hvp = vm.find_hvp(v, gfn)
            if not _is_empty(emulator, hvp):
                found.append(f"vm {v}: free page {gfn} is not empty (state {vm.state[hvp]})")
    return found[:3]


def _is_empty(emulator: Emulator, hvp: int) -> bool:
    """A page that was given back may be filled with zeros again together with a neighbour, and then be swapped like any other."""
    vm = emulator.host.vm
    state = int(vm.state[hvp])
    if state == HPT_SLOT:
        copies = emulator.host.swap.copies.copies(int(vm.slot_of[hvp]))
        return all(emulator.daemons.block(copy) == bytes(PAGE_SIZE) for copy in copies)
    if state in _HAS_FRAME and (frame := int(vm.frame_of[hvp])) >= 0:
        return vm.memory.is_zero(frame)
    return state in (HPT_NONE, HPT_ZERO)


def _left_over(emulator: Emulator) -> list[str]:
    """A run that came to its end leaves nothing half done."""
    found = []
    guests = emulator.guests
    for v in range(len(guests.vms)):
        first = next(one for one in guests.cpus if one.machine.config.vm == v)
        linked, used = first.machine.sleepers.count()
        # Dummies are the checker's business (I45): a broadcast may wake a task whose own ready event then leaves one, in KVM, too.
        if linked != used:
            found.append(f"vm {v}: {linked} nodes in the sleeper table, {used} of them dummies")
    found += _free_pages(emulator)
    short = sum(guest.killed_by(KILL_SWAP_FULL) for guest in guests.vms)
    killed = guests.counter(VC_TASKS_KILLED) - short
    if killed and not _can_lose_pages(emulator):
        found.append(f"{killed} tasks were killed, and no page can have lost all its copies")
    if short and not emulator.plan.small_swap:
        found.append(f"{short} tasks were killed for memory, and swap has room for all")
    vm = emulator.host.vm
    owned = vm.frame_of[np.isin(vm.state, _HAS_FRAME)]
    frames = np.concatenate([owned[owned >= 0], vm.frames.free[: vm.frames.free_count]])
    if len(frames) != emulator.plan.frames or len(np.unique(frames)) != emulator.plan.frames:
        found.append(
            f"{len(np.unique(frames))} of {emulator.plan.frames} frames are accounted for, {len(frames)} times"
        )
    if vm.frames.lent:
        found.append(f"frames {sorted(vm.frames.lent)} are lent for reads that are over")
    copies = emulator.host.swap.copies
    named = sorted(copy for slot in vm.slot_of[vm.slot_of >= 0].tolist() for copy in copies.copies(slot))
    blocks = sorted(copies.blocks_used())
    if named != blocks or len(blocks) != copies.used:
        found.append(
            f"pages have {len(named)} copies in slots, {len(blocks)} blocks are in use, counted {copies.used}"
        )
    return found


_LEAVE_ONE_COPY: Final = ("kill", "gone", "write_error", "stop", "drop", "delay", "restart")
"""Faults after which a page may have one copy only."""


def _can_lose_pages(emulator: Emulator) -> bool:
    """Whether some page may have been unreadable: a bad block, and where pages have two copies something that cost the other one."""
    fired = emulator.faults.fired
    if emulator.plan.replicas == 1 or not fired["bad_block"]:
        return fired["bad_block"] > 0
    return fired["bad_block"] > 1 or any(fired[kind] for kind in _LEAVE_ONE_COPY)
