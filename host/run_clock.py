"""The clock of a run: from the barrier, which all tasks reach before any is measured, to the stop and the end.

It opens the barrier, begins what the topology schedules meanwhile, stops the guests when their time is over, and tells the launcher when
the measured time has begun and when everything has ended.

Invariants: the barrier opens once and the stop comes once, whoever asks for them; the launcher hears of one end; vCPUs hear of news in
shared memory only after it is there.

Not handled here: what the schedule wants (host/schedule.py), how guests stop (guest/), ends that the launcher decides itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

import numpy as np

from host import events as ev
from host.machine_reset import MachineReset
from host.memory import U64Array
from host.peers import Handler, Peer, only_launcher
from host.schedule import Schedule
from host.setup import ShellObserver, guests
from host.swap import SwapMachine
from host.vcpu import VcpuMachine
from host.vm import VmMachine
from proto import atomics, wire
from proto.layout import CTL_BARRIER, CTL_START_NS, CTL_STOP, K_TASKS
from proto.lives import Where
from proto.run import RunContext
from proto.stats import HostCounter
from proto.trace import Kind
from proto.wire import Message

EVENT_POLL_NS: Final = 5_000_000
"""How often it is looked whether a guest has done what the schedule wants of it."""


class Shell(Protocol):
    """What is needed of the host's shell."""

    ctx: RunContext
    control: U64Array
    vm: VmMachine
    swap: SwapMachine
    vcpus: list[VcpuMachine]
    resets: MachineReset
    obs: ShellObserver

    def feed(self, machine: Any, event: Any) -> None:
        """Give a machine an event."""

    def to_launcher(self, message: Message) -> None:
        """As soon as it can take it."""


class RunClock:
    """See the module docstring. Times are monotonic nanoseconds."""

    def __init__(self, shell: Shell) -> None:
        self._shell = shell
        events = shell.ctx.topology.event
        self._schedule = Schedule(events, guests(shell.ctx), shell.vm.slots, shell.resets)
        shell.obs.gauge(HostCounter.EVENTS_SCHEDULED, len(events))
        self._at_barrier: dict[int, int] = {}
        """Tasks there, by VM."""
        self._powered_down = 0
        self.start_ns = 0
        self.stop_at_ns = 0
        self.started = False
        self.stopped = False
        self.finished = False
        """The launcher was told how the run ended."""
        self.may_begin: Callable[[], bool] = lambda: True
        """Whether the measured time may begin, as far as others than the guests are concerned."""
        self.on_start: list[Callable[[int], None]] = []
        """Called with ``start_ns`` when the measured time runs, before the launcher hears of it."""
        self.on_stop: list[Callable[[], None]] = []
        """Called before the guests are told to stop."""
        self.messages: dict[type[Any], Handler] = {wire.Stop: self._stop_message}
        self.effects: dict[type[Any], Callable[[Any], None]] = {
            ev.AtBarrier: self._barrier,
            ev.PoweredDown: self._power_down,
            ev.OutOfMemory: self._out_of_memory,
        }

    @property
    def measures(self) -> bool:
        """Between barrier and stop."""
        return self.started and not self.stopped

    def next_ns(self, now_ns: int) -> int:
        """When `turn` has something to do, between barrier and stop."""
        if self._schedule.open:
            return min(self.stop_at_ns, now_ns + EVENT_POLL_NS)
        if (next_ns := self._schedule.next_ns()) is not None:
            return min(self.stop_at_ns, self.start_ns + next_ns)
        return self.stop_at_ns

    def turn(self, now_ns: int) -> None:
        """Between barrier and stop: begin what the topology wants now, count what has come to its end, stop when it is time."""
        shell = self._shell
        for action in self._schedule.step(now_ns - self.start_ns):
            if action.memslots is not None:
                shell.feed(shell.vm, action.memslots)
            else:
                self._poke_all(action.vm)
        shell.obs.gauge(HostCounter.EVENTS_DONE, self._schedule.done)
        shell.obs.gauge(HostCounter.REBOOTS, sum(shell.resets.done))
        if now_ns >= self.stop_at_ns:
            self.stop("time")

    # -- barrier -------------------------------------------------------------------------------------------
    def _barrier(self, effect: ev.AtBarrier) -> None:
        """Tasks of a VM are at the barrier."""
        at = self._at_barrier
        at[effect.vm] = max(at.get(effect.vm, 0), effect.tasks)
        self.open_when_due()

    def open_when_due(self) -> None:
        """Open the barrier and start the clock if all tasks of all VMs are there and `may_begin` says so.

        To be called whenever one of these may have become true.
        """
        at, segments = self._at_barrier, self._shell.ctx.segments
        vms = range(len(self._shell.ctx.topology.vm))
        # A VM that has not spoken yet may not have its tasks yet.
        if self.started or any(v not in at or at[v] < segments[f"kernel-{v}"].u64[K_TASKS] for v in vms):
            return
        if not self.may_begin():
            return
        self.open(time.monotonic_ns())
        self._poke_all()

    def open(self, start_ns: int) -> None:
        """The barrier is open since ``start_ns``."""
        control = self._shell.control
        self._shell.obs.trace(Kind.BARRIER)
        control[CTL_START_NS] = np.uint64(start_ns)
        atomics.py_store(control, CTL_BARRIER, np.uint64(1))
        self.start(start_ns)

    def start(self, start_ns: int) -> None:
        """The measured time runs, and began at ``start_ns``."""
        self.started = True
        self.start_ns = start_ns
        self.stop_at_ns = start_ns + int(self._shell.ctx.topology.run.seconds * 1e9)
        for told in self.on_start:
            told(start_ns)
        self._shell.to_launcher(wire.Started(start_ns))

    # -- stop and end --------------------------------------------------------------------------------------
    def _stop_message(self, peer: Peer, identity: bytes, message: wire.Stop, _: Sequence[bytes]) -> None:
        only_launcher(peer)
        self.stop(message.reason)

    def stop(self, reason: str) -> None:
        """Have the guests power down. reason: "time", or why before it."""
        if self.stopped:
            return
        for told in self.on_stop:
            told()
        self.stopped = True
        self._shell.obs.trace(Kind.STOP, a=0 if reason == "time" else 1)
        atomics.py_store(self._shell.control, CTL_STOP, np.uint64(1))
        self._poke_all()

    def _poke_all(self, vm: int = -1) -> None:
        """News in shared memory for the vCPUs of one VM, or of all."""
        for machine in self._shell.vcpus:
            if vm in (-1, machine.vm) and machine.where is not Where.OFF:
                self._shell.feed(machine, ev.Poke(machine.cpu))

    def _power_down(self, _: ev.PoweredDown) -> None:
        self._powered_down += 1
        if self._powered_down == len(self._shell.vcpus):
            self.finish("all vCPUs powered down")

    def finish(self, reason: str) -> None:
        """Nothing more will happen."""
        self._end(wire.Finished(reason))

    def fail(self, reason: str) -> None:
        """The run cannot go on, or cannot begin."""
        self._end(wire.Failed(reason[: wire.TEXT_MAX]))

    def _out_of_memory(self, effect: ev.OutOfMemory) -> None:
        """No frame, no slot, and no guest has anything to give back: an orderly end instead of a hang."""
        used = self._shell.swap.slots_used
        self.fail(
            f"out of memory: {effect.waiting} faults wait for a frame and all {used} swap slots are used"
            " (raise swapd.size_mib or host.allowance_mib)"
        )

    def _end(self, message: wire.Finished | wire.Failed) -> None:
        if not self.finished:
            self.finished = True
            self._shell.to_launcher(message)
