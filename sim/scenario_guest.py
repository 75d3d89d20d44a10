"""The small guest of the recorded scenarios, one machine per vCPU: no timer, no preemption, tasks that touch pages and sleep.

It behaves as the guest that ran on real kernels: round robin by task number from the current one; a task that is told "not present" sleeps;
the page-ready handler makes it runnable; task 0 runs a script or a worker loop and yields whenever another task can run. Handlers run
with interrupts off. What it misdoes on purpose (no clear, no ACK) the scenario says. After a reset it boots again, goes on with its
script, and its tasks begin again.

Time: only a few constants; nothing in a scenario may depend on them except the order of things microseconds apart.

Not handled here: vCPUs that go and come, reboots, tasks on other vCPUs (sim/scenario_life.py); the guest kernel of real runs
(guest/machine.py), which clears and acknowledges by itself.
"""

from __future__ import annotations

from typing import Any, Final

from proto import kvm
from proto.layout import APF_AREA_GPA, XF_IF, XF_KERNEL, XF_RESTART, XF_WALK, XF_WRITE
from proto.machine import Machine, MachineError, Path
from proto.port import MemoryPort
from proto.profile import PROFILES
from proto.units import TOKEN_WAKE_ALL
from proto.wire import Entry, Exit, ExitReason, Inject
from sim.events import Leave, Off, PowerOn, Said, Spin
from sim.memory import GuestMemory
from sim.scenario_file import Scenario
from sim.scenario_life import Life
from sim.scenario_script import Script
from sim.scenario_steps import LIFE
from sim.scenario_tables import FIRST_GFN, LEVELS, entry, entry_gpa
from sim.scenario_tasks import Online, TaskState
from sim.world import WITNESS

TOUCH_NS: Final = 1_000
HANDLER_NS: Final = 2_000
SWITCH_NS: Final = 1_000
IRQ_MASK: Final = 0xFF
SAVE_POINTS: Final = (ExitReason.NESTED, ExitReason.KICK, ExitReason.HLT)
"""Outside of handlers the guest does the same again after these."""


class Restarted(Exception):  # noqa: N818 - not an error
    """The host reset this vCPU: whatever it was doing is over, it starts from its beginning."""


class ScenarioCpu(Machine):
    """vCPU number ``cpu`` of the scenario's guest. Events: PowerOn, then answers; effects: see sim/events.py."""

    def __init__(self, scenario: Scenario, cpu: int, memory: GuestMemory, shared: MemoryPort) -> None:
        """``shared``: words that all vCPUs of this guest have in common (sim/scenario_tasks.py)."""
        super().__init__()
        self.scenario = scenario
        self.profile = PROFILES[scenario.profile]
        self.cpu = cpu
        self.everybody = [TaskState(task, shared) for task in scenario.tasks]
        self.online = Online(shared)
        for state in self.everybody:
            if state.task.vcpu == cpu:
                state.begin()
                state.move(cpu)
        self.life = Life(self)
        self.sleepers: dict[int, TaskState] = {}
        self.current: TaskState | None = None
        """None: task 0."""
        self.surprises: list[str] = []
        """Register accesses that did not end as the script says."""
        self._memory = memory
        self._area = APF_AREA_GPA + kvm.AREA_BYTES * scenario.vcpu_ids[cpu]
        self._word = self._area + (kvm.AREA_TOKEN if self.profile.ready_by_interrupt else kvm.AREA_FLAGS)
        self.script = Script(self, [step for step in scenario.script if step.vcpu == cpu])
        self._last = 0
        """Number of the task that ran last: round robin goes on from it."""
        self._irr = 0
        self._accepted = 0
        self._eois = 0
        self._cost_ns = 0
        self._seq = 0
        self._faulted = False
        self.paging = 1
        """CR0.PG outside tasks that say otherwise."""
        self._lasting = any(step.do in LIFE for step in scenario.script) or any(
            task.wakes_on >= 0 for task in scenario.tasks
        )
        """Tasks may come from another vCPU: nobody leaves before all are finished."""
        self._fresh = {step.page for step in scenario.script if step.fresh}
        """Pages whose contents go with their host memory at some time."""

    @property
    def tasks(self) -> list[TaskState]:
        """Those of this vCPU."""
        return [state for state in self.everybody if state.cpu == self.cpu]

    def path_for(self, event: Any) -> Path | None:
        """`PowerOn` starts the CPU, everything else answers its open request."""
        if type(event) is PowerOn:
            return self._main()
        self.answer(event.ask, event)
        return None

    # -- the CPU's life ------------------------------------------------------------------------------------
    def _main(self) -> Path:
        first = True
        while True:
            try:
                yield from self._boot(first=first)
                yield from self._run_until_off()
            except Restarted:
                first = False
                self._forget()
            else:
                return

    def _boot(self, *, first: bool) -> Path:
        yield from self._exit(ExitReason.BOOT, if_=0)
        if self.scenario.lapic:
            yield from self.wrmsr(kvm.MSR_X2APIC_SPIV, 0x1FF)
        self.say("START")
        if self.scenario.apf:
            yield from self.enable()
        self.online.set(self.cpu, on=True)
        if not first:
            yield from self.life.booted_again()

    def _forget(self) -> None:
        """After a reset: registers, handlers and sleepers of this vCPU are gone, its tasks begin again."""
        self.current = None
        self.sleepers.clear()
        self._irr = self._accepted = self._eois = self._last = 0
        self.paging = 1
        for state in self.tasks:
            state.begin()

    def _run_until_off(self) -> Path:
        while True:
            if self._irr and self._interrupts_on():
                yield from self._interrupt()
            elif self.current is not None:
                yield from self._run(self.current)
            elif self.script.left:
                if not (yield from self.script.step()):
                    return
            elif not self.give_up():
                if all(task.finished for task in (self.everybody if self._lasting else self.tasks)):
                    self.emit(Off(self._spent(), self._record(ExitReason.DONE)))
                    return
                yield from self._worker()

    def _worker(self) -> Path:
        if self.scenario.worker == "halt":
            yield from self._exit(ExitReason.HLT)
        else:
            yield from self._spin(None)

    def _spin(self, ns: int | None) -> Path:
        """Run for a while; with ``ns`` interrupts are taken and the rest of the time is run, without until the host forced an exit."""
        left = ns
        while True:
            ask = self.new_ask()
            self.emit(Spin(ask.ask_id, None if left is None else left + self._spent()))
            self._spent()
            spun = yield ask
            left = spun.left_ns
            if spun.kicked:
                yield from self._exit(ExitReason.KICK)
            if ns is None:
                return
            while self._irr:
                yield from self._interrupt()
            if not left:
                return

    def spin(self, ns: int) -> Path:
        """Run for a while; interrupts are taken."""
        yield from self._spin(ns)

    def _next(self) -> TaskState | None:
        """Round robin by number from the task that ran last; None = task 0."""
        order = sorted(self.tasks, key=lambda t: (t.task.number <= self._last, t.task.number))
        found = next((task for task in order if task.runnable), None)
        self._last = found.task.number if found else 0
        self._cost_ns += SWITCH_NS
        return found

    def _interrupts_on(self) -> bool:
        task = self.current
        return task is None or not task.touching or (task.task.interrupts and not task.task.shadow)

    # -- tasks ---------------------------------------------------------------------------------------------
    def _run(self, state: TaskState) -> Path:
        """One attempt at the task's next touch."""
        page = state.task.pages[state.position]
        gfn = FIRST_GFN + page
        if not state.touching:
            state.touching = True
            self._cost_ns += TOUCH_NS
            self.say("TOUCH", page=page)
        if self.scenario.tables_swapped_out is not None and not (yield from self._walk(page)):
            return
        word = self._memory.touch(gfn << 12)
        if word is None:
            yield from self._exit(ExitReason.NESTED, gpa=gfn << 12)
            return
        expected = WITNESS + gfn if self.scenario.swapped_out else 0
        if word != expected and not (word == 0 and page in self._fresh):
            raise MachineError(f"page {page} holds {word:#x}, its owner wrote {expected:#x}")
        self.say("DONE", page=page)
        state.touching = False
        state.advance()
        if state.finished:
            self.say("TASKEND")
            self.current = self._next()

    def _walk(self, page: int) -> Path:
        """Read the entries of all levels; False = a table was missing, and its fault has been taken."""
        for level in LEVELS:
            gpa = entry_gpa(level, page)
            word = self._memory.read32(gpa)
            if word is None:
                yield from self._exit(ExitReason.NESTED, gpa=gpa, flags=XF_WALK)
                return False
            if word != entry(level, page):
                raise MachineError(
                    f"level {level} of page {page} holds {word:#x}, not {entry(level, page):#x}"
                )
        return True

    def _sleep(self, token: int) -> None:
        state = self.current
        if state is None:
            raise MachineError("page not present announced to task 0, which touches nothing")
        state.sleep(token)
        self.sleepers[token] = state
        self.current = self._next()

    def _wake(self, token: int) -> Path:
        if token == TOKEN_WAKE_ALL:
            found = list(self.sleepers.items())
            self.sleepers.clear()
        else:
            found = [(token, self.sleepers.pop(token))] if token in self.sleepers else []
        # Not one that somebody woke before, and that sleeps on another page by now.
        woken = [
            state for told, state in found if state.cpu == self.cpu and state.asleep and state.token == told
        ]
        for state in woken:
            state.wake()
            yield from self.life.place(state)
        here = [state for state in woken if state.cpu == self.cpu]
        if here and self.scenario.switch_on_ready:
            self.current = here[0]
            self._last = here[0].task.number

    # -- events --------------------------------------------------------------------------------------------
    def _deliver(self, entry: Entry) -> Path:
        """The exception that came with an entry; interrupts are off in its handler."""
        if entry.inject == Inject.RESET:
            raise Restarted
        if entry.inject in (Inject.PF_NOT_PRESENT, Inject.PF_READY):
            self._cost_ns += HANDLER_NS
            token = entry.cr2 & 0xFFFF_FFFF
            reason = yield from self._load(self._area + kvm.AREA_FLAGS)
            if reason == kvm.REASON_NOT_PRESENT:
                yield from self._store(self._area + kvm.AREA_FLAGS, 0)
                self.say("NOTPRES", token=token)
                self._sleep(token)
            elif reason == kvm.REASON_READY and not self.profile.ready_by_interrupt:
                yield from self._ready(token)
            else:
                self.say("STRAY", token=token, word=reason)
        elif entry.inject == Inject.GP:
            self._faulted = True
        elif entry.inject != Inject.NONE:
            raise MachineError(f"exception {Inject(entry.inject).name}: a page is lost")

    def _interrupt(self) -> Path:
        """Take the highest pending vector."""
        vector = self._irr & IRQ_MASK
        self._irr >>= 8
        self._accepted = self._accepted << 8 | vector
        self._eois += 1
        self._cost_ns += HANDLER_NS
        if vector == kvm.VECTOR_PAGE_READY:
            token = yield from self._load(self._area + kvm.AREA_TOKEN)
            yield from self._ready(token)
        elif vector == kvm.VECTOR_CALL:
            yield from self.life.called()
        else:
            self.say("IRQ", vector=vector)

    def _ready(self, token: int) -> Path:
        self.say("READY", token=token)
        yield from self._wake(token)
        for action in self.scenario.on_ready:
            if action == "clear":
                yield from self.clear()
            else:
                yield from self.wrmsr(kvm.MSR_ASYNC_PF_ACK, 1)

    # -- task 0 --------------------------------------------------------------------------------------------
    def clear(self) -> Path:
        """Clear the word that the profile's ready event is told by."""
        self.say("CLEAR")
        yield from self._store(self._word, 0)

    def give_up(self) -> bool:
        """Let another task run; False when none can."""
        self.current = self._next()
        return self.current is not None

    def gfn_of(self, page: int) -> int:
        """Guest frame of a page of the script."""
        return self._area >> 12 if page < 0 else FIRST_GFN + page

    def spent(self) -> int:
        """Time since the last request, for the next one."""
        return self._spent()

    def take_fault(self) -> bool:
        """Whether a register access since the last look ended with #GP."""
        faulted, self._faulted = self._faulted, False
        return faulted

    def enable(self) -> Path:
        """Switch async PF on: INT before EN (spec §2.8)."""
        if self.profile.ready_by_interrupt:
            yield from self.wrmsr(kvm.MSR_ASYNC_PF_INT, kvm.VECTOR_PAGE_READY, if_=1)
        value = self._area | self.profile.enabled_bits
        if self.scenario.send_always:
            value |= kvm.EN_SEND_ALWAYS
        yield from self.wrmsr(self.profile.msr_en, value, if_=1)

    # -- exits ---------------------------------------------------------------------------------------------
    def _exit(
        self, reason: ExitReason, *, gpa: int = 0, arg0: int = 0, arg1: int = 0, if_: int = 1, flags: int = XF_WRITE
    ) -> Path:  # fmt: skip
        """Leave to the host as task 0, or (``gpa``) as the task that touches; the entry's events are taken."""
        record = self._record(reason, gpa=gpa, arg0=arg0, arg1=arg1, if_=if_, flags=flags)
        return (yield from self._leave(record))

    def leave(self, reason: ExitReason, *, arg0: int = 0, arg1: int = 0, if_: int = 1) -> Path:
        """An exit of task 0 or of a handler."""
        return (yield from self._exit(reason, arg0=arg0, arg1=arg1, if_=if_))

    def wrmsr(self, index: int, value: int, if_: int = 0) -> Path:
        """WRMSR by task 0 (``if_`` = 1) or by a handler."""
        yield from self._leave(self._record(ExitReason.WRMSR, arg0=index, arg1=value, if_=if_))

    def _leave(self, record: Exit) -> Path:
        ask = self.new_ask()
        self.emit(Leave(ask.ask_id, self._spent(), record))
        back = yield ask
        self._irr = back.entry.irr
        yield from self._deliver(back.entry)
        return back.entry

    def _record(
        self, reason: ExitReason, *, gpa: int = 0, arg0: int = 0, arg1: int = 0, if_: int = 1, handler: bool = False,
        flags: int = XF_WRITE,
    ) -> Exit:  # fmt: skip
        task = self.current.task if self.current is not None and not handler else None
        user = task is not None and reason == ExitReason.NESTED
        cpl, paging, shadow, pending = 0, self.paging, 0, 0
        if task is not None and user:
            cpl, if_, paging = task.cpl, int(task.interrupts), int(task.paging and self.paging)
            shadow, pending = int(task.shadow), int(task.pending)
        self._seq += 1
        flags = flags | (XF_IF if if_ else 0) | (XF_KERNEL if cpl == 0 else 0) if gpa else 0
        if reason in SAVE_POINTS and not handler:
            flags |= XF_RESTART
        record = Exit(
            self._seq, 0, reason, flags, cpl, if_, shadow, pending, paging, gpa, gpa, 0x5000, 0,
            self._accepted, self._eois, arg0, arg1, 0,
        )  # fmt: skip
        self._accepted = self._eois = 0
        return record

    def _load(self, gpa: int) -> Path:
        """A word of guest memory, read by a handler."""
        while (word := self._memory.read32(gpa)) is None:
            yield from self._leave(self._record(ExitReason.NESTED, gpa=gpa, if_=0, handler=True))
        return word

    def _store(self, gpa: int, value: int) -> Path:
        """A word of guest memory, written by a handler or by task 0."""
        while not self._memory.write32(gpa, value):
            yield from self._leave(self._record(ExitReason.NESTED, gpa=gpa, if_=0, handler=True))

    def _spent(self) -> int:
        ns, self._cost_ns = self._cost_ns, 0
        return ns

    def say(self, name: str, **fields: int) -> None:
        """A line of the guest's log."""
        task = self.current.task.number if self.current is not None else 0
        self.emit(Said(self._cost_ns, name, {"task": task, **fields}))
