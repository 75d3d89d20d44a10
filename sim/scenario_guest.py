"""The small guest of the recorded scenarios, one machine per vCPU: no timer, no preemption, tasks that touch pages and sleep.

It behaves as the guest that ran on real kernels: round robin by task number from the current one; a task that is told "not present" sleeps;
the page-ready handler makes it runnable; task 0 runs a script or a worker loop and yields whenever another task can run. Handlers run
with interrupts off. What it misdoes on purpose (no clear, no ACK) the scenario says.

Time: only a few constants; nothing in a scenario may depend on them except the order of things microseconds apart.

Not handled here: the guest kernel of real runs (guest/machine.py), which clears and acknowledges by itself.
"""

from __future__ import annotations

from typing import Any, Final

from proto import kvm
from proto.layout import APF_AREA_GPA, XF_IF, XF_KERNEL, XF_RESTART, XF_WRITE
from proto.machine import Machine, MachineError, Path
from proto.profile import PROFILES
from proto.units import TOKEN_WAKE_ALL
from proto.wire import Entry, Exit, ExitReason, Inject
from sim.events import EndRun, Leave, Off, PageOut, PowerOn, Said, SaveRestore, Spin
from sim.memory import GuestMemory
from sim.scenario_file import Scenario, Step, Task
from sim.world import WITNESS

FIRST_GFN: Final = 256
"""gfn of page 0; below lie the shared areas."""
TOUCH_NS: Final = 1_000
HANDLER_NS: Final = 2_000
SWITCH_NS: Final = 1_000
IRQ_MASK: Final = 0xFF
SAVE_POINTS: Final = (ExitReason.NESTED, ExitReason.KICK, ExitReason.HLT)
"""Outside of handlers the guest does the same again after these."""
_REGISTERS: Final = {
    "int": kvm.MSR_ASYNC_PF_INT,
    "ack": kvm.MSR_ASYNC_PF_ACK,
    "spiv": kvm.MSR_X2APIC_SPIV,
    "en_v3": kvm.MSR_ASYNC_PF_EN_V3,
    "en_merged": kvm.MSR_ASYNC_PF_EN,
}


class TaskState:
    """One task: how far it is, and whether it can run."""

    __slots__ = ("asleep", "position", "task", "touching")

    def __init__(self, task: Task) -> None:
        self.task = task
        self.position = 0
        self.touching = False
        self.asleep = False

    @property
    def finished(self) -> bool:
        """All touches are done."""
        return self.position >= len(self.task.pages)

    @property
    def runnable(self) -> bool:
        """Neither asleep nor finished."""
        return not (self.asleep or self.finished)


class ScenarioCpu(Machine):
    """vCPU number ``cpu`` of the scenario's guest. Events: PowerOn, then answers; effects: see sim/events.py."""

    def __init__(self, scenario: Scenario, cpu: int, memory: GuestMemory) -> None:
        super().__init__()
        self.scenario = scenario
        self.profile = PROFILES[scenario.profile]
        self.tasks = [TaskState(task) for task in scenario.tasks if task.vcpu == cpu]
        self.sleepers: dict[int, TaskState] = {}
        self.current: TaskState | None = None
        """None: task 0."""
        self.surprises: list[str] = []
        """Register accesses that did not end as the script says."""
        self._memory = memory
        self._area = APF_AREA_GPA + kvm.AREA_BYTES * scenario.vcpu_ids[cpu]
        self._word = self._area + (kvm.AREA_TOKEN if self.profile.ready_by_interrupt else kvm.AREA_FLAGS)
        self._script = [step for step in scenario.script if step.vcpu == cpu]
        self._last = 0
        """Number of the task that ran last: round robin goes on from it."""
        self._irr = 0
        self._accepted = 0
        self._eois = 0
        self._cost_ns = 0
        self._seq = 0
        self._faulted = False

    def path_for(self, event: Any) -> Path | None:
        """`PowerOn` starts the CPU, everything else answers its open request."""
        if type(event) is PowerOn:
            return self._main()
        self.answer(event.ask, event)
        return None

    # -- the CPU's life ------------------------------------------------------------------------------------
    def _main(self) -> Path:
        yield from self._exit(ExitReason.BOOT, if_=0)
        if self.scenario.lapic:
            yield from self._wrmsr(kvm.MSR_X2APIC_SPIV, 0x1FF)
        self._say("START")
        if self.scenario.apf:
            yield from self._enable()
        while True:
            if self._irr and self._interrupts_on():
                yield from self._interrupt()
            elif self.current is not None:
                yield from self._run(self.current)
            elif self._script:
                if not (yield from self._step(self._script[0])):
                    return
            elif not self._yield():
                if all(task.finished for task in self.tasks):
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

    def _yield(self) -> bool:
        """Switch from task 0 to a task that can run."""
        self.current = self._next()
        return self.current is not None

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
            self._say("TOUCH", page=page)
        word = self._memory.touch(gfn << 12)
        if word is None:
            yield from self._exit(ExitReason.NESTED, gpa=gfn << 12)
            return
        expected = WITNESS + gfn if self.scenario.swapped_out else 0
        if word != expected:
            raise MachineError(f"page {page} holds {word:#x}, its owner wrote {expected:#x}")
        self._say("DONE", page=page)
        state.touching = False
        state.position += 1
        if state.finished:
            self._say("TASKEND")
            self.current = self._next()

    def _sleep(self, token: int) -> None:
        state = self.current
        if state is None:
            raise MachineError("page not present announced to task 0, which touches nothing")
        state.asleep = True
        self.sleepers[token] = state
        self.current = self._next()

    def _wake(self, token: int) -> None:
        if token == TOKEN_WAKE_ALL:
            woken = list(self.sleepers.values())
            self.sleepers.clear()
        else:
            found = self.sleepers.pop(token, None)
            woken = [found] if found else []
        for state in woken:
            state.asleep = False
        if woken and self.scenario.switch_on_ready:
            self.current = woken[0]
            self._last = woken[0].task.number

    # -- events --------------------------------------------------------------------------------------------
    def _deliver(self, entry: Entry) -> Path:
        """The exception that came with an entry; interrupts are off in its handler."""
        if entry.inject in (Inject.PF_NOT_PRESENT, Inject.PF_READY):
            self._cost_ns += HANDLER_NS
            token = entry.cr2 & 0xFFFF_FFFF
            reason = yield from self._load(self._area + kvm.AREA_FLAGS)
            if reason == kvm.REASON_NOT_PRESENT:
                yield from self._store(self._area + kvm.AREA_FLAGS, 0)
                self._say("NOTPRES", token=token)
                self._sleep(token)
            elif reason == kvm.REASON_READY and not self.profile.ready_by_interrupt:
                yield from self._ready(token)
            else:
                self._say("STRAY", token=token, word=reason)
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
        else:
            self._say("IRQ", vector=vector)

    def _ready(self, token: int) -> Path:
        self._say("READY", token=token)
        self._wake(token)
        for action in self.scenario.on_ready:
            if action == "clear":
                yield from self._clear()
            else:
                yield from self._wrmsr(kvm.MSR_ASYNC_PF_ACK, 1)

    def _clear(self) -> Path:
        self._say("CLEAR")
        yield from self._store(self._word, 0)

    # -- task 0's script -----------------------------------------------------------------------------------
    def _step(self, step: Step) -> Path:
        """One step; False ends the run."""
        if step.do == "yield":
            if not self._yield():
                self._script.pop(0)
            return True
        self._script.pop(0)
        if step.do == "wait":
            yield from self._spin(step.wait_ns)
            return True
        if step.do == "end":
            self.emit(EndRun(self._spent()))
            return False
        self._say("SCRIPT_" + step.do.upper())
        if step.do == "clear":
            yield from self._clear()
        elif step.do == "ack":
            yield from self._wrmsr(kvm.MSR_ASYNC_PF_ACK, 1, if_=1)
        elif step.do == "disable":
            yield from self._wrmsr(self.profile.msr_en, 0, if_=1)
        elif step.do == "enable":
            yield from self._enable()
        elif step.do in ("lapic_on", "lapic_off"):
            yield from self._wrmsr(kvm.MSR_X2APIC_SPIV, 0x1FF if step.do == "lapic_on" else 0xFF, if_=1)
        elif step.do == "page_out":
            ask = self.new_ask()
            self.emit(PageOut(ask.ask_id, self._area >> 12 if step.page < 0 else FIRST_GFN + step.page))
            yield ask
        elif step.do == "save_restore":
            ask = self.new_ask()
            self.emit(SaveRestore(ask.ask_id))
            yield ask
            yield from self._exit(ExitReason.KICK)
        else:
            yield from self._access_register(step)
        return True

    def _access_register(self, step: Step) -> Path:
        index = _REGISTERS.get(step.register, self.profile.msr_en)
        self._faulted = False
        what = f"{step.do} of register {step.register}"
        if step.do == "write":
            yield from self._wrmsr(index, step.value, if_=1)
        else:
            entry = yield from self._exit(ExitReason.RDMSR, if_=1, arg0=index)
            if not self._faulted and not step.faults and entry.value != step.value:
                self.surprises.append(f"{what}: {entry.value:#x}, expected {step.value:#x}")
        if self._faulted:
            self._say("GP", index=index)
        if self._faulted is not step.faults:
            self.surprises.append(f"{what}: {'#GP' if self._faulted else 'no #GP'}")

    def _enable(self) -> Path:
        """INT before EN (spec §2.8)."""
        if self.profile.ready_by_interrupt:
            yield from self._wrmsr(kvm.MSR_ASYNC_PF_INT, kvm.VECTOR_PAGE_READY, if_=1)
        value = self._area | self.profile.enabled_bits
        if self.scenario.send_always:
            value |= kvm.EN_SEND_ALWAYS
        yield from self._wrmsr(self.profile.msr_en, value, if_=1)

    # -- exits ---------------------------------------------------------------------------------------------
    def _exit(self, reason: ExitReason, *, gpa: int = 0, arg0: int = 0, if_: int = 1) -> Path:
        """Leave to the host as task 0, or (``gpa``) as the task that touches; the entry's events are taken."""
        return (yield from self._leave(self._record(reason, gpa=gpa, arg0=arg0, if_=if_)))

    def _wrmsr(self, index: int, value: int, if_: int = 0) -> Path:
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
        self, reason: ExitReason, *, gpa: int = 0, arg0: int = 0, arg1: int = 0, if_: int = 1, handler: bool = False
    ) -> Exit:  # fmt: skip
        task = self.current.task if self.current is not None and not handler else None
        user = task is not None and reason == ExitReason.NESTED
        cpl, paging, shadow, pending = 0, 1, 0, 0
        if task is not None and user:
            cpl, if_, paging = task.cpl, int(task.interrupts), int(task.paging)
            shadow, pending = int(task.shadow), int(task.pending)
        self._seq += 1
        flags = XF_WRITE | (XF_IF if if_ else 0) | (XF_KERNEL if cpl == 0 else 0) if gpa else 0
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

    def _say(self, name: str, **fields: int) -> None:
        task = self.current.task.number if self.current is not None else 0
        self.emit(Said(self._cost_ns, name, {"task": task, **fields}))
