"""The vcpu machine: what KVM does in a vCPU's thread, from an exit record to the next entry record (spec §3.4, §1.15).

It acts on guest state only between an exit and an entry: a vCPU in guest mode is kicked out first, so nothing is ever decided on
stale state. What blocks in KVM (a synchronous fault, a held shared-area access) holds this vCPU's path, never the host's loop.

States: `Where` it is and why it does not run (`Halt`), with their arrows in proto/lives.py.

Invariants
* Requests are taken in KVM's order, before the entry and nowhere else.
* An entry carries one exception. A reset goes first, then what the exit raised; a notice that memory is short waits for both.

Not handled here: what an exit asks for (host/exits.py), async PF (host/x86.py, host/async_pf.py), notices that memory is short
(host/notices.py), what is saved of a vCPU (host/state.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from host.events import (
    Answer,
    CancelPage,
    Enter,
    ExitTaken,
    Fetched,
    GetPage,
    Gup,
    Interrupt,
    KickVcpu,
    MemoryNotice,
    Pause,
    Paused,
    Poke,
    PoweredDown,
    Reset,
    Restore,
    SetTimer,
    Startup,
    TimerDue,
    WasReset,
)
from host.exits import Exits
from host.lapic import Lapic
from host.notices import Notice
from host.observe import Observer
from host.state import MpState, VcpuState, restore
from host.x86 import CANCEL_DESTROY, REQ_APF_HALT, REQ_APF_READY, REQ_RESET, X86
from proto.kvm import VECTOR_TIMER
from proto.layout import XF_RESTART
from proto.lives import HALT, VCPU, Halt, Where
from proto.machine import Machine, MachineError, Path
from proto.profile import Profile
from proto.stats import HostCounter
from proto.trace import Kind
from proto.wire import (
    Entry,
    Exit,
    ExitReason,
    Held,
    Inject,
)

HOST_TICK_NS: Final = 4_000_000
"""The host's own timer makes a running vCPU exit every 1 to 4 ms (seen in the recorded kernels); here only when something waits."""

_NO_EXIT: Final = Exit(0, 0, ExitReason.BOOT, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)


class VcpuMachine(Machine):
    """One vCPU. ``cpu`` is its global number, ``vcpu_id`` the one inside ``vm``."""

    def __init__(
        self, cpu: int, vm: int, vcpu_id: int, profile: Profile, host_async: bool, observer: Observer
    ) -> None:
        super().__init__()
        self.cpu = cpu
        self.vm = vm
        self.vcpu_id = vcpu_id
        self.obs = observer
        self.lapic = Lapic()
        self.requests = 0
        self.halt = Halt.RUNS
        self._startup_due = False
        """A start-up came while the reset before it still waits for the vCPU to leave guest mode: both are taken then."""
        self._restart = False
        """The next entry begins at the guest's beginning."""
        self.exception: tuple[Inject, int] | None = None
        self.last_exit = _NO_EXIT
        self.where = Where.OUT
        self.x86 = X86(self, profile, host_async)
        self.result = 0
        """Of a register read, for the next entry."""
        self._held_kind = Held.NONE
        self._held_ns = 0
        self.exit_ns = 0
        """When the last exit was taken, monotonic; for latencies and the guest's timer."""
        self._blocked_since_ns = 0
        self._timer_generation = 0
        self._kicked = False
        self._poked = False
        self._pausing = False
        self.notice = Notice(self)
        self._exits = Exits(self)
        self.page_ask = 0
        """The request for a page that this vCPU is held for."""
        self._handlers: dict[type[Any], Callable[[Any], Path | None]] = {
            ExitTaken: self._exit_taken,
            Answer: self._answered,
            Fetched: self._fetched,
            TimerDue: self._timer_due,
            Interrupt: self._interrupt,
            Poke: self._poke,
            MemoryNotice: self.notice.come,
            Pause: self._pause,
            Restore: self._restore,
            Reset: self._reset_wanted,
            Startup: self._startup,
        }

    # -- Machine -------------------------------------------------------------------------------------------
    def path_for(self, event: Any) -> Path | None:
        """Dispatch by event type."""
        handler = self._handlers.get(type(event))
        if handler is None:
            raise MachineError(f"vcpu {self.cpu}: unknown event {event!r}")
        return handler(event)

    def _answered(self, event: Answer) -> None:
        self.answer(event.ask, event)

    @property
    def halted(self) -> bool:
        """Synthetic halt; never part of mp_state, so that saving the state cannot see it (I37)."""
        return self.halt is Halt.HALTED

    @property
    def mp_halted(self) -> bool:
        """The guest executed HLT: mp_state HALTED."""
        return self.halt is Halt.HLT

    @property
    def mp_init(self) -> bool:
        """Was reset and waits for its start-up: mp_state INIT_RECEIVED."""
        return self.halt is Halt.INIT

    # -- one exit ------------------------------------------------------------------------------------------
    def expects_exit(self) -> bool:
        """An exit record is only accepted from a vCPU that was entered (or boots)."""
        return self.where is Where.IN_GUEST or (self.where is Where.OUT and self.last_exit is _NO_EXIT)

    @property
    def started(self) -> bool:
        """Its guest has been heard of: it will be entered."""
        return self.last_exit is not _NO_EXIT

    def _exit_taken(self, event: ExitTaken) -> Path:
        record = event.record
        self.where = VCPU.go(self.where, "boot" if self.last_exit is _NO_EXIT else "exit")
        self.last_exit = record
        self._kicked = False
        self.exit_ns = self.now_ns
        self._timer_generation += 1
        self.lapic.took(record.accepted, record.eois)
        if record.reason == ExitReason.DONE:
            return self._power_down()
        return self._one_exit(record)

    def _one_exit(self, record: Exit) -> Path:
        yield from self._exits.path(record)
        yield from self._vcpu_run()

    def _power_down(self) -> Path:
        self.x86.forget(CANCEL_DESTROY)
        self.where = VCPU.go(self.where, "power_down")
        self.notice.lose()
        self.emit(PoweredDown(self.cpu))
        if self._pausing:
            self.emit(Paused(self.cpu))
        if self.requests & REQ_RESET:
            # Nobody may wait for a vCPU that is gone.
            self.emit(WasReset(self.cpu))
        yield "powered_down"

    # -- the run loop --------------------------------------------------------------------------------------
    def _vcpu_run(self) -> Path:
        """Requests in KVM's order, then block or enter."""
        while True:
            if self.requests & REQ_RESET:
                yield from self._reset()
            # A notice goes first: it is not part of what is saved.
            if self._pausing and self._at_save_point() and self.notice.due is None:
                self._stop_here()
                return
            if self.requests & REQ_APF_HALT:
                self.requests &= ~REQ_APF_HALT
                self.halt = HALT.go(self.halt, "apf_halt")
                self.trace(Kind.HALT_ON, a=1, b=self.last_exit.gpa >> 12)
                yield "run.halt"
            if self.halt:
                if not self.runnable():
                    self._block()
                    return
                self._unblock()
            yield from self._completions()
            if not self.requests & REQ_APF_HALT:
                break
        yield "run.enter"
        self._enter()

    def _completions(self) -> Path:
        x86 = self.x86
        if x86.profile.ready_by_interrupt or not x86.enabled:
            # Without a request mode E looks, too: v3 switches it off and keeps what was done (BZ-28), which must not keep HLT from halting.
            if self.requests & REQ_APF_READY or (x86.apf.done and not x86.profile.ready_by_interrupt):
                self.requests &= ~REQ_APF_READY
                yield "run.ready"
                yield from x86.apf.check_completion()
            return
        # Mode E looks at the done list at every entry and hands over one (spec §8.3); a not-present event decided by v3 goes first.
        self.requests &= ~REQ_APF_READY
        if x86.deferred is not None and (yield from x86.deliver_deferred()):
            return
        if x86.apf.done and self.exception is None:
            yield from x86.apf.check_completion(at_most=1)

    def runnable(self) -> bool:
        """kvm_arch_vcpu_runnable for a vCPU that does not execute (spec §1.15)."""
        if self.requests & REQ_RESET:
            return True
        if self.mp_init:
            return False
        if not self.halt:
            return True
        if self.x86.apf.done or self.exception is not None or self._poked or self.notice.due is not None:
            return True
        return bool(self.lapic.irr) and self.x86.interrupts_allowed()

    def _reset(self) -> Path:
        """kvm_vcpu_reset (spec §1.16): what was outstanding is forgotten, registers and LAPIC are as after power-on."""
        self.requests = 0
        self.halt = HALT.go(self.halt, "reset")
        if self._startup_due:
            self.halt = HALT.go(self.halt, "startup")
        self._startup_due = False
        self.exception = None
        self._poked = False
        self.notice.lose()
        self.result = 0
        self.lapic.reset()
        self.x86.reset()
        self.last_exit = self.last_exit._replace(cpl=0, if_=0, shadow=0, pending=0, cr0_pg=0, timer_ns=0)
        self._restart = True
        self.trace(Kind.RESET)
        self.emit(WasReset(self.cpu))
        yield "reset"

    def unhalt(self) -> None:
        """Every completion ends a halt, also one the guest executed (spec §1.15 rule 7)."""
        if self.halted or self.mp_halted:
            self.trace(Kind.HALT_OFF, a=2)
            self.halt = HALT.go(self.halt, "go_on")

    def _block(self) -> None:
        self.where = VCPU.go(self.where, "block")
        self._blocked_since_ns = self.now_ns
        if self.last_exit.timer_ns:
            self._arm(self.exit_ns + self.last_exit.timer_ns)

    def _unblock(self) -> None:
        if self.where is Where.BLOCKED:
            self._held(Held.HALTED if self.halted else Held.IDLE, self.now_ns - self._blocked_since_ns)
            self.where = VCPU.go(self.where, "wake")
        elif self.halted:
            # A pending interrupt ends the halt at once. A guest whose clock is behind must know, or it would touch the page again.
            self._held(Held.HALTED, 0)
        self.trace(Kind.HALT_OFF, a=1)
        if self.halted or self.mp_halted:
            self.halt = HALT.go(self.halt, "go_on")

    def _held(self, kind: Held, held_ns: int) -> None:
        """Remember what kept the vCPU; one kind per entry, the last one (a path never mixes them)."""
        self._held_kind = kind
        self._held_ns += held_ns

    def _enter(self) -> None:
        inject, cr2 = self.exception if self.exception is not None else (Inject.NONE, 0)
        if self._restart:
            inject, self._restart = Inject.RESET, False
        elif self.notice.due is not None and self.exception is None:
            inject, cr2 = Inject.OUT_OF_MEMORY, self.notice.take()
        self.exception = None
        self._poked = False
        self.where = VCPU.go(self.where, "enter")
        self.emit(
            Enter(
                self.cpu,
                Entry(
                    self.last_exit.seq, 0, inject, 0, cr2, self.lapic.pending(), self.result, self._held_kind,
                    max(0, self._held_ns), 0,
                ),
            )
        )  # fmt: skip
        self.result = 0
        self._held_kind = Held.NONE
        self._held_ns = 0
        if self.x86.apf.done and not self.x86.profile.ready_by_interrupt:
            # Mode E hands over one completion per entry: the next exit takes the next one, at the latest at the host's tick. In mode I
            # the rest waits for the guest's ACK, however often it exits (recorded: ack_no_clr, clr_no_ack).
            self._arm(self.now_ns + HOST_TICK_NS)
        if self.requests or self._pausing or self.notice.due is not None:
            self.kick(self.requests)

    # -- save and restore ----------------------------------------------------------------------------------
    def _pause(self, _: Pause) -> None:
        """A path under way (a synchronous fault) finishes first; kernel code of the guest runs on to the next save point."""
        self._pausing = True
        if self.where in (Where.OFF, Where.PAUSED):
            self.emit(Paused(self.cpu))
        elif self.where is Where.BLOCKED and self._at_save_point() and self.notice.due is None:
            self._stop_here()
        else:
            self.kick(0)

    def _at_save_point(self) -> bool:
        return bool(self.last_exit.flags & XF_RESTART)

    def _stop_here(self) -> None:
        self.where = VCPU.go(self.where, "pause")
        state = self.state()
        self.trace(Kind.STATE_SAVE, a=state.mp_state, b=self.halted, c=self.x86.msr_en)
        self.emit(Paused(self.cpu))

    @property
    def mp_state(self) -> MpState:
        """KVM_GET_MP_STATE. A synthetic halt is none of its business (I37); a halted vCPU with an event to take is RUNNABLE."""
        if self.where is Where.OFF:
            return MpState.UNINITIALIZED
        return MpState.HALTED if self.mp_halted and not self.runnable() else MpState.RUNNABLE

    def state(self) -> VcpuState:
        """What is saved (spec §1.16). Queue, done list and synthetic halt are not part of it. Raises MachineError while it runs."""
        if self.where not in (Where.PAUSED, Where.OFF):
            raise MachineError(f"vcpu {self.cpu}: state read while it is {self.where.name}")
        return VcpuState.of(self)

    def _restore(self, event: Restore) -> Path:
        if self.last_exit is not _NO_EXIT or self.where is not Where.OUT:
            raise MachineError(f"vcpu {self.cpu}: only a fresh vCPU can be restored")
        return restore(self, event.state)

    # -- events from elsewhere -----------------------------------------------------------------------------
    def _fetched(self, event: Fetched) -> Path:
        if self.where is Where.PAUSED:
            # Completions after the vCPU stopped are discarded: the broadcast at the destination covers them (spec §1.16).
            return
        first = not self.x86.apf.done
        yield from self.x86.apf.completed(event.work)
        if first and self.where is Where.IN_GUEST and self.requests and not self._kicked:
            # Requested without a kick, since a ready event is un-acknowledged: seen at the next exit (spec §3.3, recorded: clr_no_ack).
            self._arm(self.now_ns + HOST_TICK_NS)
        yield from self.wake()

    def _timer_due(self, event: TimerDue) -> Path | None:
        if event.generation != self._timer_generation:
            return None
        if self.where is Where.IN_GUEST:
            # The tick is an exit and nothing else: it requests nothing.
            self.kick(self.requests)
            return None
        if self.where is not Where.BLOCKED:
            return None
        self.lapic.raise_fixed(VECTOR_TIMER)
        return self.wake()

    def _interrupt(self, event: Interrupt) -> Path | None:
        if self.where is Where.OFF or not self.lapic.raise_fixed(event.vector):
            return None
        self.kick(0)
        return self.wake()

    def _poke(self, _: Poke) -> Path | None:
        if self.where is Where.OFF:
            return None
        self._poked = True
        self.kick(0)
        return self.wake()

    def _reset_wanted(self, _: Reset) -> Path | None:
        """INIT, or a reset of the machine: taken when the vCPU is outside guest mode, before anything else."""
        if self.where is Where.OFF:
            self.emit(WasReset(self.cpu))
            return None
        self.requests |= REQ_RESET
        # As in KVM, INIT drops a start-up that has not been taken.
        self._startup_due = False
        self.kick(REQ_RESET)
        return self.wake()

    def _startup(self, _: Startup) -> Path | None:
        if self.requests & REQ_RESET:
            self._startup_due = True
        elif self.mp_init:
            self.halt = HALT.go(self.halt, "startup")
            return self.wake()
        return None

    def wake(self) -> Path:
        """Somebody made it runnable: a blocked vCPU goes back to its run loop, any other will see it at its next entry."""
        if self.where is Where.BLOCKED and self.runnable():
            self._unblock()
            yield "woken"
            yield from self._vcpu_run()

    def request(self, bit: int) -> None:
        """Set a request bit; it is consumed before the next entry."""
        self.requests |= bit
        self.trace(Kind.REQ, a=bit)

    def kick(self, why: int) -> None:
        """Make a vCPU in guest mode exit. Once per stay in guest mode is enough."""
        if self.where is Where.IN_GUEST and not self._kicked:
            self._kicked = True
            self.obs.count(HostCounter.KICKS)
            self.emit(KickVcpu(self.cpu, why))

    def _arm(self, deadline_ns: int) -> None:
        self._timer_generation += 1
        self.emit(SetTimer(self.cpu, self._timer_generation, deadline_ns))

    # -- helpers -------------------------------------------------------------------------------------------
    def get_page(self, gfn: int, write: bool, how: Gup) -> Path:
        """Ask the vm machine for a page; returns its Answer. A notice to the guest takes back what the vCPU is held for."""
        held = how is not Gup.PREFAULT
        return (
            yield from self.query(lambda ask: GetPage(self.cpu, ask, self.vm, gfn, write, how), held=held)
        )

    def query(self, request: Callable[[int], object], *, held: bool = False) -> Path:
        """Ask the vm machine; returns its `Answer`. If it had to wait, the vCPU was blocked: guest time passed."""
        ask = self.new_ask()
        since_ns = self.now_ns
        self.emit(request(ask.ask_id))
        if held:
            self.page_ask = ask.ask_id
            if self.notice.due is not None:
                self.emit(CancelPage(self.cpu, ask.ask_id))
        answer = yield ask
        if held:
            self.page_ask = 0
        if answer.waited:
            held_ns = self.now_ns - since_ns
            self._held(Held.BLOCKED, held_ns)
            self.trace(Kind.HELD, a=held_ns)
        return answer

    def trace(self, kind: Kind, *, a: int = 0, b: int = 0, c: int = 0) -> None:
        """A record of this vCPU."""
        self.obs.trace(kind, vcpu=self.vcpu_id, vm=self.vm, a=a, b=b, c=c)
