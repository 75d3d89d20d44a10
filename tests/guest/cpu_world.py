"""A world for guest CPUs without processes: scripted tasks, a small host in virtual time. Tests read what it logged."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from guest.accounting import Accounting
from guest.boot import TaskSpec, init_kernel
from guest.events import (
    Access32,
    Accessed,
    CpuConfig,
    Entered,
    PowerDown,
    PowerOn,
    Ran,
    Relax,
    Relaxed,
    RunTask,
    TakeExit,
)
from guest.machine import GuestCpu
from guest.registers import Registers
from proto import layout as L  # noqa: N812 - a table of constants
from proto.events import Kind
from proto.kvm import MSR_ASYNC_PF_ACK, VECTOR_PAGE_READY, VECTOR_TIMER, make_token
from proto.profile import PROFILES, Profile
from proto.stats import BLOCK_WORDS, StatsBlock
from proto.units import TOKEN_WAKE_ALL
from proto.wire import Entry, Exit, ExitReason, Held, Inject, unpack_vectors

MS = 1_000_000
STEPS_MAX = 400_000


class Log:
    """A trace sink that keeps (kind, token, a, b, c)."""

    def __init__(self) -> None:
        self.lamport = 0
        self.events: list[tuple[Kind, int, int, int, int]] = []

    def event(
        self,
        kind: int,
        vcpu: int = 0,  # noqa: ARG002 - the shape of a trace writer
        vm: int = 0,  # noqa: ARG002
        token: int = 0,
        a: int = 0,
        b: int = 0,
        c: int = 0,
        cause: int = 0,  # noqa: ARG002
    ) -> int:
        """Keep it."""
        self.lamport += 1
        self.events.append((Kind(kind), token, a, b, c))
        return self.lamport

    def observe(self, lamport: int) -> None:
        """As a trace writer."""
        self.lamport = max(self.lamport, lamport)

    def kinds(self, *wanted: Kind) -> list[Kind]:
        """The kinds in order, only those wanted."""
        return [e[0] for e in self.events if e[0] in wanted]

    def count(self, kind: Kind) -> int:
        """How many of a kind."""
        return sum(e[0] is kind for e in self.events)


Behaviour = Callable[["World", int, int], tuple[int, int]]
"""(world, task, ns it may run at most, 0 = no bound) -> (RUN_* code, guest ns used)."""


def config(mode: str = "interrupt", profile: str = "mainline", **changes: Any) -> CpuConfig:
    """A CPU of a one-CPU guest without costs, 1 ms tick, 4 ms granularity."""
    values: dict[str, Any] = {
        "vm": 0, "vcpu_id": 0, "vcpus": 1, "tasks": 2, "mode": mode, "profile": PROFILES[profile],
        "send_always": False, "preemptible": False, "tick_ns": MS, "granularity_ns": 4 * MS, "exit_cost_ns": 0,
        "exception_cost_ns": 0, "switch_cost_ns": 0, "interrupt_cost_ns": 0,
    }  # fmt: skip
    return CpuConfig(**{**values, **changes})


class Segments:
    """What the CPUs of one guest share."""

    def __init__(self, tasks: int, vcpus: int, cpu_of: Callable[[int], int] = lambda _: 0) -> None:
        self.kern = np.zeros(L.kernel_words(tasks, vcpus, 256), np.uint64)
        specs = [TaskSpec(L.P_BM_WORK, cpu=cpu_of(t)) for t in range(tasks)]
        init_kernel(self.kern, specs, vcpus, 256, 1)
        self.control = np.zeros(512, np.uint64)
        self.memory: dict[int, int] = {}
        self.base = L.task_base(tasks, vcpus)

    def word(self, task: int, field: int) -> int:
        """A word of a task record."""
        return int(self.kern[self.base + task * L.TASK_WORDS + field])

    def set_word(self, task: int, field: int, value: int) -> None:
        """Set one."""
        self.kern[self.base + task * L.TASK_WORDS + field] = value


class World:
    """One CPU and its host. Virtual time is the CPU's guest clock; the host takes no time but what it holds the CPU for."""

    def __init__(
        self, cpu_config: CpuConfig, behaviours: Sequence[Behaviour], segments: Segments | None = None
    ) -> None:
        self.config = cpu_config
        self.profile: Profile = cpu_config.profile
        self.seg = segments or Segments(cpu_config.tasks, cpu_config.vcpus)
        self.behaviours: list[Behaviour] = list(behaviours)
        self.page = np.zeros(512, np.uint64)
        self.log = Log()
        self.stats = StatsBlock(np.zeros(BLOCK_WORDS, np.uint64))
        self.acc = Accounting(self.page, self.stats, self.log, 0, cpu_config.vcpu_id)
        self.cpu = GuestCpu(cpu_config, self.seg.kern, self.page, self.seg.control, self.acc)
        self.exits: list[Exit] = []
        self.steps: list[str] = []
        """Exits and accesses in order, as text."""
        self.runs: Counter[int] = Counter()
        """Guest ns run per task."""
        self.irr: set[int] = set()
        self.done: list[int] = []
        self.fetches: list[tuple[int, int]] = []
        self.inject: tuple[Inject, int] | None = None
        self.entry_hook: Callable[[Exit], Entry | None] = lambda _: None
        self.parked_hook: Callable[[str], None] = lambda _: None
        """What another CPU does while this one is parked at a step (see `Machine.park_with`)."""
        self.nested_accesses = 0
        self.access_faults_first = False
        self._faulted = False
        self.fetch_ns = 8 * MS
        self.attempts = 0
        self.area = 0
        self.unacked = False
        self.powered_down: PowerDown | None = None
        self.opened_ns: int | None = None
        self.request: Any = None

    # -- driving -------------------------------------------------------------------------------------------------------
    def run(self, until_ns: int = 1 << 62) -> None:
        """Perform requests until the CPU powers down or its clock reaches ``until_ns``."""
        self.step_first()
        for _ in range(STEPS_MAX):
            if self.powered_down is not None or self.cpu.vclock_ns >= until_ns:
                return
            self.step()
        raise AssertionError("the CPU does not get on")

    def step_first(self) -> None:
        """Power on, unless that was done."""
        if self.request is None:
            self._feed(PowerOn())

    def step(self) -> None:
        """Perform the open request."""
        request = self.request
        if isinstance(request, RunTask):
            self._feed(self._run_task(request))
        elif isinstance(request, TakeExit):
            self._feed(Entered(request.ask, self._serve(request.record)))
        elif isinstance(request, Access32):
            self._feed(self._access(request))
        elif isinstance(request, Relax):
            self._feed(Relaxed(request.ask))
        else:
            assert isinstance(request, PowerDown)
            self.powered_down = request

    def _feed(self, event: Any) -> None:
        effects = self.cpu.on([event], self.cpu.vclock_ns)
        while not effects and self.cpu.parked:
            self.parked_hook(self.cpu.parked[0])
            effects = self.cpu.resume(0, self.cpu.vclock_ns)
        (self.request,) = effects
        vc = [
            int(self.page[L.VP_COUNTERS + c])
            for c in (L.VC_RUNNING_NS, L.VC_BLOCKED_NS, L.VC_HALTED_NS, L.VC_IDLE_NS)
        ]
        assert sum(vc) == self.cpu.vclock_ns == int(self.page[L.VP_COUNTERS + L.VC_VCLOCK_NS])

    def at_save_point(self) -> bool:
        """Whether the open request is an exit at which the CPU may be saved."""
        return isinstance(self.request, TakeExit) and bool(self.request.record.flags & L.XF_RESTART)

    def restart(self, gap_ns: int = 0) -> None:
        """A fresh CPU goes on from this one's registers, on a host that has forgotten every fault and broadcasts.

        ``gap_ns``: how long ago the save was.
        """
        assert self.at_save_point()
        saved = Registers.from_words(self.cpu.registers(self.cpu.vclock_ns - gap_ns).words())
        self.cpu = GuestCpu(self.config, self.seg.kern, self.page, self.seg.control, self.acc, saved)
        self.fetches.clear()
        self.done = [TOKEN_WAKE_ALL] if self.area else []
        self.unacked = False
        self._feed(PowerOn())

    def counter(self, name: int) -> int:
        """A VC_* counter."""
        return int(self.page[L.VP_COUNTERS + name])

    # -- guest mode ------------------------------------------------------------------------------------------------------
    def _run_task(self, request: RunTask) -> Ran:
        assert self.seg.word(request.task, L.T_STATE) == L.TS_RUNNING
        limit = request.max_ns
        kick_ns = self.fetches[0][0] - self.cpu.vclock_ns if self.fetches else 0
        if self.fetches and kick_ns <= 0:
            return Ran(request.ask, L.RUN_KICK, 0)
        if self.fetches and (limit == 0 or kick_ns < limit):
            limit = kick_ns
        if self.done and not self.profile.ready_by_interrupt:
            # One completion an entry in mode E: the host makes the CPU exit again soon.
            return Ran(request.ask, L.RUN_KICK, 0)
        code, ns = self.behaviours[request.task](self, request.task, limit)
        assert limit == 0 or ns <= limit
        self.runs[request.task] += ns
        return Ran(request.ask, code, ns)

    def _access(self, request: Access32) -> Accessed:
        if self.nested_accesses or (self.access_faults_first and not self._faulted):
            self.nested_accesses = max(0, self.nested_accesses - 1)
            self._faulted = True
            self.page[L.VP_X_FLAGS] = L.XF_KERNEL | (L.XF_WRITE if request.write else 0)
            return Accessed(request.ask, False, 0)
        self._faulted = False
        offset = request.gpa - L.APF_AREA_GPA - 64 * self.config.vcpu_id
        if request.write:
            self.steps.append(f"write{offset}={request.value}")
            self.seg.memory[request.gpa] = request.value
            return Accessed(request.ask, True, request.value)
        self.steps.append(f"read{offset}")
        return Accessed(request.ask, True, self.seg.memory.get(request.gpa, 0))

    # -- the host --------------------------------------------------------------------------------------------------------
    def _serve(self, record: Exit) -> Entry:
        self.exits.append(record)
        reason = ExitReason(record.reason)
        self.steps.append(
            reason.name if reason is not ExitReason.WRMSR else f"WRMSR {record.arg0:#x}={record.arg1:#x}"
        )
        self.irr -= set(unpack_vectors(record.accepted))
        hooked = self.entry_hook(record)
        if hooked is not None:
            return hooked._replace(seq=record.seq)
        held = (Held.NONE, 0)
        if reason is ExitReason.NESTED:
            held = self._fault(record)
        elif reason is ExitReason.WRMSR:
            self._wrmsr(record)
        elif reason is ExitReason.HLT:
            held = self._idle()
        elif reason is ExitReason.HYPERCALL and record.arg1 >= self.config.tasks:
            self.seg.control[L.CTL_BARRIER] = 1
            self.opened_ns = self.cpu.vclock_ns
        self._complete(record, self.cpu.vclock_ns + held[1])
        return self.entry(record, *held)

    def entry(self, record: Exit, held_kind: int = 0, held_ns: int = 0) -> Entry:
        """The entry record for ``record`` with what is pending."""
        inject, cr2 = self.inject or (Inject.NONE, 0)
        self.inject = None
        packed = 0
        for shift, vector in enumerate(sorted(self.irr, reverse=True)):
            packed |= vector << (8 * shift)
        return Entry(record.seq, 0, inject, 0, cr2, packed, 0, held_kind, held_ns, 0)

    def _fault(self, record: Exit) -> tuple[Held, int]:
        if self.config.mode == "sync" or not record.if_:
            return Held.BLOCKED, self.fetch_ns if record.if_ else 0
        token = make_token(self.attempts + 1, self.config.vcpu_id)
        self.attempts += 1
        if self.config.mode == "halt":
            timer_ns = record.timer_ns
            if timer_ns and timer_ns < self.fetch_ns:
                self.irr.add(VECTOR_TIMER)
                return Held.HALTED, timer_ns
            return Held.HALTED, self.fetch_ns
        assert self.area
        self.seg.memory[self.area] = 1
        self.inject = Inject.PF_NOT_PRESENT, token
        heapq.heappush(self.fetches, (self.cpu.vclock_ns + self.fetch_ns, token))
        return Held.NONE, 0

    def _wrmsr(self, record: Exit) -> None:
        if record.arg0 == self.profile.msr_en:
            self.area = record.arg1 & ~63
            self.done.append(TOKEN_WAKE_ALL)
        elif record.arg0 == MSR_ASYNC_PF_ACK:
            self.unacked = False

    def _idle(self) -> tuple[Held, int]:
        if self.done or self.irr:
            return Held.NONE, 0
        assert self.fetches, "the CPU halts and nothing will ever wake it"
        return Held.IDLE, max(0, self.fetches[0][0] - self.cpu.vclock_ns)

    def _complete(self, record: Exit, now_ns: int) -> None:
        while self.fetches and self.fetches[0][0] <= now_ns:
            self.done.append(heapq.heappop(self.fetches)[1])
        if not self.done or self.inject is not None:
            return
        if not self.profile.ready_by_interrupt:
            if record.if_:
                self.seg.memory[self.area] = 2
                self.inject = Inject.PF_READY, self.done.pop(0)
        elif not self.unacked and self.seg.memory.get(self.area + 4, 0) == 0:
            self.seg.memory[self.area + 4] = self.done.pop(0)
            self.unacked = True
            self.irr.add(VECTOR_PAGE_READY)


# ---- tasks -------------------------------------------------------------------------------------------------------------------
def works(world: World, task: int, limit: int) -> tuple[int, int]:  # noqa: ARG001
    """Executes and touches nothing new."""
    return L.RUN_BUDGET, min(limit or 10 * MS, 10 * MS)


def faults(world: World, task: int, limit: int) -> tuple[int, int]:  # noqa: ARG001
    """Takes a nested fault with every operation, each 1 us."""
    world.page[L.VP_X_GPA] = 0x10_0000
    world.page[L.VP_X_FLAGS] = L.XF_WRITE | L.XF_IF
    return L.RUN_NESTED, min(limit or 1000, 1000)


def ends(world: World, task: int, limit: int) -> tuple[int, int]:  # noqa: ARG001
    """Is done at once."""
    return L.RUN_DONE, 0


def once(code: int, then: Behaviour) -> Behaviour:
    """Leave guest mode with ``code`` the first time, then behave as ``then``."""
    fired: set[int] = set()

    def behave(world: World, task: int, limit: int) -> tuple[int, int]:
        if task not in fired:
            fired.add(task)
            world.page[L.VP_X_FLAGS] = L.XF_IF
            return code, 0
        return then(world, task, limit)

    return behave
