"""From a seed to a plan. Each seed draws its own machine, its own times and its own faults.

One in three keeps two copies of each page; what that changes is drawn apart, so that the others stay what they are.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from sim.plan import FAULTS, LASTING, MODES_OF, DaemonPlan, FaultPlan, SimPlan, TaskPlan, VmPlan, pages_needed

PROFILES_DRAWN: Final = ("mainline", "mainline", "mainline", "v7", "v7", "v3")
MODE_WEIGHTS: Final = {"sync": 1, "halt": 3, "exception": 8, "interrupt": 12}
WORKLOADS_DRAWN: Final = (
    "stamp",
    "stamp",
    "stamp",
    "syscalls",
    "syscalls",
    "uniform",
    "zipf",
    "sequential",
    "chase",
)
SERVICE_US: Final = ((0, 0), (1, 3), (5, 20), (10, 100), (50, 150), (100, 2_000))
PARK_PERCENT: Final = (0, 0, 5, 20, 50)
LINK_US: Final = (0, 1, 5, 40)
NTH: Final = (1, 2, 3, 5, 8, 20, 60)
EXITS: Final = (1, 10, 30, 60, 100, 200, 300)
CALM_US: Final = (2_000, 10_000, 40_000)
HEDGE_US: Final = (0, 20, 100, 500)
OP_NS: Final = 100
SPARE_SLOTS: Final = 32
SMALL_SWAP: Final = 1 / 8
"""So many seeds get a swap that is too small for what their guests touch, or nearly."""
SLOTS_LEAST: Final = 4
TABLES: Final = 4
"""Page tables of one task, at least."""
FRAMES_BASE: Final = 32
"""Enough for what one operation may touch at a time, and for the water marks."""


def draw(seed: int, profile: str | None = None, faults: Sequence[str] = FAULTS) -> SimPlan:
    """The plan of a seed. ``profile`` fixes the rule set, ``faults`` which kinds may be drawn."""
    rng = random.Random(f"plan {seed}")
    name = rng.choice(PROFILES_DRAWN)
    name = profile or name
    modes = MODES_OF[name]
    mode = rng.choices(modes, [MODE_WEIGHTS[one] for one in modes])[0]
    vms = tuple(_vm(rng) for _ in range(rng.choice((1, 1, 1, 1, 2))))
    working = sum(task.pages + TABLES for vm in vms for task in vm.tasks)
    frames = FRAMES_BASE + 4 * sum(vm.vcpus for vm in vms) + int(working * rng.choice((0.0, 0.05, 0.1, 0.3)))
    pages = sum(vm.memory_pages for vm in vms)
    count = rng.choice((1, 1, 1, 2))
    # Drawn apart, so that a seed's other choices do not depend on it.
    small = random.Random(f"swap {seed}")
    swapped = pages + count * SPARE_SLOTS
    if small.random() < SMALL_SWAP:
        swapped = max(count * SLOTS_LEAST, int(working * small.choice((0.0, 0.2, 0.4, 0.6))))
    daemons = tuple(_daemon(rng, -(-swapped // count)) for _ in range(count))
    plan = SimPlan(
        seed=seed,
        profile=name,
        mode=mode,
        frames=frames,
        low=max(4, frames // 16),
        high=max(8, frames // 8),
        populate=rng.choice((1, 8, 16)),
        zero_pages=rng.random() < 0.3,
        schedule=rng.choice(("delays", "delays", "priorities")),
        changes=rng.choice((1, 3, 10, 30)),
        park_percent=rng.choice(PARK_PERCENT),
        link_us=rng.choice(LINK_US),
        calm_us=rng.choice(CALM_US),
        stop_us=0,
        vms=vms,
        daemons=daemons,
        faults=_faults(rng, count, [kind for kind in faults if kind != "gone"]),
    )
    return _with_replicas(plan, random.Random(f"replicas {seed}"), "gone" in faults)


def _with_replicas(plan: SimPlan, rng: random.Random, may_go: bool) -> SimPlan:
    """Two copies of each page in one of three plans, on two or three daemons; in half of these one daemon dies for good."""
    if rng.random() >= 1 / 3:
        return plan
    count = rng.choice((2, 2, 3))
    # Enough for all pages when one of them is gone, unless it was not enough before.
    slots = 2 * sum(vm.memory_pages for vm in plan.vms) // (count - 1) + SPARE_SLOTS
    if plan.small_swap:
        slots = -(-2 * sum(daemon.slots for daemon in plan.daemons) // count)
    daemons = tuple(_daemon(rng, slots) for _ in range(count))
    faults = tuple(
        fault if fault.kind == "restart" else replace(fault, daemon=rng.randrange(count))
        for fault in plan.faults
    )
    if may_go and rng.random() < 1 / 2:
        faults += (FaultPlan("gone", rng.randrange(count), rng.choice(NTH)),)
    return replace(plan, daemons=daemons, faults=faults, replicas=2, hedge_us=rng.choice(HEDGE_US))


def _vm(rng: random.Random) -> VmPlan:
    vcpus = rng.choice((1, 1, 2, 2, 3, 4))
    tasks = tuple(_task(rng, vcpus) for _ in range(rng.randint(2, 6)))
    return VmPlan(vcpus, pages_needed(tasks) + 16, OP_NS, rng.random() < 0.4, rng.random() < 0.3, tasks)


def _task(rng: random.Random, vcpus: int) -> TaskPlan:
    return TaskPlan(
        workload=rng.choice(WORKLOADS_DRAWN),
        vcpu=rng.randrange(vcpus),
        pages=rng.randint(8, 48),
        ops=rng.randint(10, 60),
        write_percent=rng.choice((0, 10, 50, 100)),
    )


def _daemon(rng: random.Random, slots: int) -> DaemonPlan:
    least, most = rng.choice(SERVICE_US)
    return DaemonPlan(slots, least, most)


def _faults(rng: random.Random, daemons: int, kinds: Sequence[str]) -> tuple[FaultPlan, ...]:
    """None in a third of the seeds: the plain case must hold, too."""
    if not kinds or rng.random() < 1 / 3:
        return ()
    return tuple(_fault(rng, daemons, rng.choice(list(kinds))) for _ in range(rng.randint(1, 5)))


def _fault(rng: random.Random, daemons: int, kind: str) -> FaultPlan:
    if kind == "restart":
        return FaultPlan(kind, 0, rng.choice(EXITS))
    lasts = kind in LASTING
    return FaultPlan(
        kind,
        rng.randrange(daemons),
        rng.choice(NTH),
        rng.choice((50, 500, 5_000)) if lasts else 0,
    )
