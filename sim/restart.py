"""Save and restore in a simulated run: everything but the guests' memory, kernels and registers is exchanged.

    all vCPUs stop at a save point ─► pages are read out ─► the old set is gone, its I/O too ─► a fresh set
    ─► pages go in ─► states of the vCPUs go in, in KVM's order ─► every CPU goes on with its registers

What was under way (the async queue, reads of the daemons, parked paths) is not carried; the broadcast of enabling restarts all sleepers.

Not handled here: what a fresh set is made of (sim/emulator.py), image files (proto/image.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from host import events as ev
from host.saving import PageWalk
from proto.machine import MachineError

if TYPE_CHECKING:
    from sim.emulator import Emulator

MOVED: Final = (ev.Paused, ev.PageSaved, ev.PageLoaded, ev.Restored)
"""Effects that belong to a move."""


class Restart:
    """One save and restore of all guests of a run."""

    def __init__(self, emulator: Emulator) -> None:
        self._emulator = emulator
        self._standing: set[int] = set()
        self._pages: dict[int, ev.PageSaved] = {}
        self._states: list[dict[str, Any]] = []
        self._restored = 0
        self._walk = PageWalk(len(emulator.host.vm.state))
        self._loading = False

    def begin(self) -> None:
        """Ask every vCPU to stop."""
        host = self._emulator.host
        for machine in host.vcpus:
            host.later(machine, ev.Pause(machine.cpu))

    def on(self, effect: Any) -> None:
        """What a machine of the host says about it."""
        kind = type(effect)
        if kind is ev.Paused:
            self._standing.add(effect.cpu)
            if len(self._standing) == len(self._emulator.host.vcpus):
                self._go_over(ev.Walk())
        elif kind is ev.PageSaved:
            self._pages[effect.hvp] = effect
            self._go_over(effect)
        elif kind is ev.PageLoaded:
            self._go_over(effect)
        elif effect.refused:
            raise MachineError(f"vcpu {effect.cpu} cannot be restored: {effect.refused}")
        else:
            self._restored += 1
            if self._restored == len(self._emulator.host.vcpus):
                self._emulator.go_on()

    def _go_over(self, event: Any) -> None:
        """The next pages, of the old host or into the fresh one."""
        host = self._emulator.host
        for effect in self._walk.on((event,), self._emulator.agenda.now_ns):
            if type(effect) is ev.WalkDone:
                self._emulator.soon(self._restore if self._loading else self._exchange)
            elif self._loading:
                host.later(host.vm, ev.LoadPage(*self._pages[effect.hvp]))
            else:
                host.later(host.vm, ev.SavePage(effect.hvp))

    def _exchange(self) -> None:
        self._states = [machine.state().to_plain() for machine in self._emulator.host.vcpus]
        self._emulator.fresh_set()
        self._loading = True
        self._walk = PageWalk(len(self._emulator.host.vm.state))
        self._go_over(ev.Walk())

    def _restore(self) -> None:
        host = self._emulator.host
        for machine, state in zip(host.vcpus, self._states, strict=True):
            host.later(machine, ev.Restore(machine.cpu, state))
