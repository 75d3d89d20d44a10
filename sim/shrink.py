"""From a failing plan to a small one that fails in the same way.

Greedy: a step leaves something out (a fault, a guest, a task, half of the operations, resting, odd schedules); it is kept when the smaller
plan still fails with the same complaint. The schedule that a seed draws changes with the plan, so each smaller plan is tried with a few
seeds. The result is small, not minimal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Final

from sim.plan import SimPlan, VmPlan

ATTEMPTS_MAX: Final = 300
"""Runs of plans: some seconds."""
FRAMES_MIN: Final = 36
"""Fewer than any drawn plan has would be another plan."""
SEEDS_TRIED: Final = 6
"""Schedules tried for each smaller plan."""

Fails = Callable[[SimPlan], tuple[str, ...]]


def kind_of(failures: tuple[str, ...]) -> str:
    """What a failure is about: its first complaint without numbers. "" for none."""
    return failures[0].split("(")[0].split(":")[0].strip() if failures else ""


def shrink(plan: SimPlan, fails: Fails, attempts: int = ATTEMPTS_MAX) -> tuple[SimPlan, tuple[str, ...]]:
    """(the smallest plan found, its failures). ``fails`` runs a plan and returns its failures. ``plan`` itself must fail."""
    failures = fails(plan)
    wanted = kind_of(failures)
    left = attempts
    progress = bool(wanted)
    while progress and left > 0:
        progress = False
        for smaller in _schedules(_smaller(plan)):
            left -= 1
            found = fails(smaller)
            if kind_of(found) == wanted:
                plan, failures, progress = smaller, found, True
                break
            if left <= 0:
                break
    return plan, failures


def _schedules(plans: Iterator[SimPlan]) -> Iterator[SimPlan]:
    """Each plan with a few seeds."""
    for plan in plans:
        yield plan
        yield from (replace(plan, seed=seed) for seed in range(SEEDS_TRIED - 1))


def _pages(plan: SimPlan) -> int:
    return sum(task.pages for vm in plan.vms for task in vm.tasks)


def _as_tight(plan: SimPlan, smaller: SimPlan) -> Iterator[SimPlan]:
    """The smaller plan with as much less host memory as it needs less, and as it is: what fails, fails where frames are scarce."""
    frames = max(FRAMES_MIN, plan.frames - (_pages(plan) - _pages(smaller)))
    if frames < plan.frames:
        yield replace(
            smaller, frames=frames, low=min(plan.low, frames // 4), high=min(plan.high, frames // 2)
        )
    yield smaller


def _smaller(plan: SimPlan) -> Iterator[SimPlan]:
    """Plans with something left out, the largest pieces first."""
    if len(plan.vms) > 1:
        for v in range(len(plan.vms)):
            yield from _as_tight(plan, replace(plan, vms=plan.vms[:v] + plan.vms[v + 1 :]))
    for f in range(len(plan.faults)):
        yield replace(plan, faults=plan.faults[:f] + plan.faults[f + 1 :])
    for v, vm in enumerate(plan.vms):
        for one in _smaller_vm(vm):
            yield from _as_tight(plan, _with_vm(plan, v, one))
    if plan.schedule != "delays":
        yield replace(plan, schedule="delays", changes=0)
    elif plan.changes:
        yield replace(plan, changes=plan.changes // 2)
    if plan.park_percent:
        yield replace(plan, park_percent=0)
    if plan.link_us:
        yield replace(plan, link_us=0)


def _with_vm(plan: SimPlan, v: int, vm: VmPlan) -> SimPlan:
    return replace(plan, vms=(*plan.vms[:v], vm, *plan.vms[v + 1 :]))


def _smaller_vm(vm: VmPlan) -> Iterator[VmPlan]:
    tasks = vm.tasks
    if len(tasks) > 1:
        for t in range(len(tasks)):
            yield replace(vm, tasks=tasks[:t] + tasks[t + 1 :])
    if any(task.ops > 1 for task in tasks):
        yield replace(vm, tasks=tuple(replace(task, ops=-(-task.ops // 2)) for task in tasks))
    if vm.vcpus > 1 and all(task.vcpu < vm.vcpus - 1 for task in tasks):
        yield replace(vm, vcpus=vm.vcpus - 1)
    if any(task.pages > 1 for task in tasks):
        yield replace(vm, tasks=tuple(replace(task, pages=-(-task.pages // 2)) for task in tasks))
