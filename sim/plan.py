"""The plan of a simulated run: everything that is decided before it begins. Read from a file, or drawn from a seed (sim/draw.py).

A plan says what the machine is (guests, host memory, daemons), how time passes (delays, schedule, resting at steps) and what goes wrong
(faults). Its seed decides the rest: which delay, which step, which order. The same plan gives the same events, byte for byte.

`parse` is strict: an unknown key, another type or a value out of range is a `UserError` with file, key, found and allowed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final

from guest.boot import PROGRAMS
from proto.files import TOML_BYTES_MAX, parse_toml, read_regular
from proto.layout import ALLOC_FIRST_GFN
from proto.profile import PROFILES
from proto.topology import process_pages
from sim.table_reader import Reader

SEED_MAX: Final = (1 << 63) - 1
WORKLOADS: Final = ("bm", *sorted(set(PROGRAMS) - {"replay"}))
MODES_OF: Final = {
    "v3": ("sync", "exception"),
    "v7": ("sync", "halt", "exception"),
    "mainline": ("sync", "halt", "interrupt"),
}
SCHEDULES: Final = ("delays", "priorities")
FAULTS: Final = (
    "kill", "stop", "read_error", "write_error", "short_read", "bit_flip", "bad_block", "drop", "duplicate", "delay", "restart",
    "gone",
)  # fmt: skip
"""What can happen:

* ``kill``: the daemon dies when the n-th message reaches it, with whatever it has under way
* ``stop``: it stands still for ``for_us`` from then on
* ``read_error``, ``write_error``, ``short_read``, ``bit_flip``: the n-th read or write of the device fails, comes short, or has a wrong
  bit
* ``bad_block``: the block of the n-th read can never be read again
* ``drop``, ``duplicate``, ``delay``: what becomes of the n-th message of the link, counted in both directions
* ``gone``: as kill, and it never comes back; only where pages have two copies, and not to the last daemon that is left
* ``restart``: with the n-th exit of a vCPU all guests are saved and go on in a fresh set of host, daemons and vCPUs

Of several that are due at one occasion each waits for one at which it makes a difference: a message that is lost is neither doubled nor
late, a read fails in one way, nobody dies twice.
"""
LASTING: Final = ("stop", "delay")
"""Kinds that are nothing without ``for_us``, and the only ones that have it."""
US: Final = 1_000
PAGES_MAX: Final = 1 << 20
OPS_MAX: Final = 1 << 40
THREADS_MAX: Final = 4096
RUN_US_MAX: Final = 3_600_000_000
COUNTER_PAGES: Final = 16
"""The counters of the benchmark's threads, far from its buffer: pages and page tables."""


@dataclass(frozen=True, slots=True)
class TaskPlan:
    """One task, as a ``[[vm.task]]`` table of a topology; ``ops`` 0: until the run is stopped. The threads are those of workload bm."""

    workload: str
    vcpu: int
    pages: int
    ops: int
    write_percent: int = 50
    fault_threads: int = 0
    work_threads: int = 0

    @property
    def threads(self) -> int:
        """Task records of the guest kernel."""
        return 1 + self.fault_threads + self.work_threads if self.workload == "bm" else 1


@dataclass(frozen=True, slots=True)
class VmPlan:
    """One guest. ``memory_pages``: guest frames; ``op_ns``: guest time of one operation."""

    vcpus: int
    memory_pages: int
    op_ns: int
    send_always: bool
    preemptible: bool
    tasks: tuple[TaskPlan, ...]


@dataclass(frozen=True, slots=True)
class DaemonPlan:
    """One swap daemon: blocks of its file, service times of its device."""

    slots: int
    service_us: int
    service_us_max: int


@dataclass(frozen=True, slots=True)
class FaultPlan:
    """Something that goes wrong at the ``nth`` occasion; ``for_us`` where it lasts (`LASTING`), 0 elsewhere."""

    kind: str
    daemon: int
    nth: int
    for_us: int = 0


@dataclass(frozen=True, slots=True)
class SimPlan:
    """One run. Times in virtual us.

    frames: host memory; low, high: water marks; populate: pages that a first touch maps at once; park_percent: of named steps at which a
    path rests; link_us: longest delay of a message; calm_us: when faults stop and everything must drain; stop_us: after the start
    barrier, when tasks without a number of operations are stopped, 0 = never; replicas: copies of each page; hedge_us: after how long a
    read is asked of the other copy, too, 0 = never.
    """

    seed: int
    profile: str
    mode: str
    frames: int
    low: int
    high: int
    populate: int
    zero_pages: bool
    schedule: str
    changes: int
    park_percent: int
    link_us: int
    calm_us: int
    stop_us: int
    vms: tuple[VmPlan, ...]
    daemons: tuple[DaemonPlan, ...]
    faults: tuple[FaultPlan, ...] = ()
    replicas: int = 1
    hedge_us: int = 0

    @property
    def cpus(self) -> tuple[tuple[int, int], ...]:
        """(vm, vcpu_id) of each global vCPU."""
        return tuple((v, cpu) for v, vm in enumerate(self.vms) for cpu in range(vm.vcpus))

    @property
    def small_swap(self) -> bool:
        """Whether memory and swap together may be too small for all that the guests can touch."""
        pages = self.replicas * sum(vm.memory_pages for vm in self.vms)
        return sum(daemon.slots for daemon in self.daemons) < pages

    @property
    def ops(self) -> int:
        """Operations of all tasks."""
        return sum(task.ops for vm in self.vms for task in vm.tasks)

    def parameters(self) -> dict[str, Any]:
        """In short, to be shown before the run."""
        tasks = [task for vm in self.vms for task in vm.tasks]
        device = self.daemons[0]
        return {
            "seed": self.seed, "profile": self.profile, "mode": self.mode, "vcpus": "+".join(str(vm.vcpus) for vm in self.vms),
            "tasks": len(tasks), "pages": sum(task.pages for task in tasks), "ops": self.ops, "frames": self.frames,
            "daemons": len(self.daemons), "replicas": self.replicas, "hedge_us": self.hedge_us,
            "service_us": f"{device.service_us}..{device.service_us_max}",
            "schedule": self.schedule, "park_percent": self.park_percent,
            "faults": ",".join(f"{fault.kind}@{fault.nth}" for fault in self.faults) or "none",
        }  # fmt: skip


# -- files -------------------------------------------------------------------------------------------------
def to_toml(plan: SimPlan) -> str:
    """The plan as a file that `load` reads back."""
    lines = [f"{f.name} = {_plain(getattr(plan, f.name))}" for f in fields(plan) if f.name not in _TABLES]
    for vm in plan.vms:
        lines += ["", "[[vm]]"]
        lines += [f"{key} = {_plain(value)}" for key, value in asdict(vm).items() if key != "tasks"]
        for task in vm.tasks:
            lines += ["[[vm.task]]", *(f"{key} = {_plain(value)}" for key, value in asdict(task).items())]
    for name, rows in (("daemon", plan.daemons), ("fault", plan.faults)):
        for row in rows:
            lines += ["", f"[[{name}]]", *(f"{key} = {_plain(value)}" for key, value in asdict(row).items())]
    return "\n".join(lines) + "\n"


_TABLES: Final = ("vms", "daemons", "faults")


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return f'"{value}"' if isinstance(value, str) else str(value)


def load(path: Path) -> SimPlan:
    """Read and check one file."""
    raw = read_regular(path, "plan", TOML_BYTES_MAX, "a TOML file")
    return parse(parse_toml(raw, str(path), "as `sim --seed N --out DIR` writes")[0], str(path))


def parse(values: Mapping[str, Any], where: str) -> SimPlan:
    """Check the values of one file."""
    top = Reader(values, where, "")
    profile = top.choice("profile", tuple(PROFILES))
    mode = top.choice("mode", MODES_OF[profile])
    vms = tuple(_vm(table) for table in top.tables("vm", required=True))
    daemons = tuple(_daemon(table) for table in top.tables("daemon", required=True))
    frames = top.number("frames", 32, PAGES_MAX)
    plan = SimPlan(
        seed=top.number("seed", 0, SEED_MAX),
        profile=profile,
        mode=mode,
        frames=frames,
        low=top.number("low", 1, frames),
        high=top.number("high", 2, frames),
        populate=top.number("populate", 1, 512),
        zero_pages=top.flag("zero_pages"),
        schedule=top.choice("schedule", SCHEDULES),
        changes=top.number("changes", 0, 1000),
        park_percent=top.number("park_percent", 0, 90),
        link_us=top.number("link_us", 0, RUN_US_MAX),
        calm_us=top.number("calm_us", 0, RUN_US_MAX),
        stop_us=top.number("stop_us", 0, RUN_US_MAX),
        vms=vms,
        daemons=daemons,
        faults=tuple(_fault(table, len(daemons)) for table in top.tables("fault", required=False)),
        replicas=top.number("replicas", 1, 2, default=1),
        hedge_us=top.number("hedge_us", 0, RUN_US_MAX, default=0),
    )
    top.finish()
    _check_daemons(top, plan)
    if not plan.stop_us and any(not task.ops for vm in vms for task in vm.tasks):
        top.refuse("stop_us", "some tasks have no number of operations", 0, "more than 0")
    return plan


def _check_daemons(top: Reader, plan: SimPlan) -> None:
    if len(plan.daemons) < plan.replicas:
        top.refuse("replicas", "too few daemons", plan.replicas, f"at most {len(plan.daemons)}")
    if plan.replicas == 1 and any(fault.kind == "gone" for fault in plan.faults):
        top.refuse("fault", "pages of a daemon that is gone need another copy", "gone", "replicas = 2")


def _vm(table: Reader) -> VmPlan:
    vcpus = table.number("vcpus", 1, 64)
    tasks = tuple(_task(task, vcpus) for task in table.tables("task", required=True))
    needed = pages_needed(tasks)
    vm = VmPlan(
        vcpus, table.number("memory_pages", needed, PAGES_MAX), table.number("op_ns", 1, 1_000_000_000), table.flag("send_always"),
        table.flag("preemptible"), tasks,
    )  # fmt: skip
    table.finish()
    return vm


def _task(table: Reader, vcpus: int) -> TaskPlan:
    workload = table.choice("workload", WORKLOADS)
    threads = (0, THREADS_MAX if workload == "bm" else 0)
    task = TaskPlan(
        workload=workload,
        vcpu=table.number("vcpu", 0, vcpus - 1),
        pages=table.number("pages", 1, PAGES_MAX),
        ops=table.number("ops", 0, OPS_MAX if workload != "bm" else 0),
        write_percent=table.number("write_percent", 0, 100, default=50),
        fault_threads=table.number("fault_threads", *threads, default=0),
        work_threads=table.number("work_threads", *threads, default=0),
    )
    table.finish()
    return task


def _daemon(table: Reader) -> DaemonPlan:
    least = table.number("service_us", 0, RUN_US_MAX)
    daemon = DaemonPlan(
        table.number("slots", 1, PAGES_MAX), least, table.number("service_us_max", least, RUN_US_MAX)
    )
    table.finish()
    return daemon


def _fault(table: Reader, daemons: int) -> FaultPlan:
    kind = table.choice("kind", FAULTS)
    lasts = kind in LASTING
    fault = FaultPlan(
        kind=kind,
        daemon=table.number("daemon", 0, daemons - 1),
        nth=table.number("nth", 1, PAGES_MAX),
        for_us=table.number("for_us", int(lasts), RUN_US_MAX * lasts, default=None if lasts else 0),
    )
    table.finish()
    return fault


def pages_needed(tasks: tuple[TaskPlan, ...]) -> int:
    """Guest pages for these tasks, each in an address space of its own."""
    return ALLOC_FIRST_GFN + sum(
        process_pages(task.pages) + (COUNTER_PAGES if task.workload == "bm" else 0) for task in tasks
    )
