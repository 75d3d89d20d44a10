"""Save and restore in the simulated world: the guest stays, everything of the host is exchanged under it.

    all vCPUs stop ─► pages are read out ─► fresh machines ─► pages go in, those of the swap device go back there
    ─► vCPU states go in ─► every CPU's last exit is answered by the new host

The guest CPUs notice nothing but the time: they leave guest mode and come back.

Not handled here: vCPU processes and their registers (guest/registers.py), image files; they are the real world's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from host import events as ev
from host.kernels import HPT_READING, HPT_SLOT
from host.saving import PageWalk
from proto.machine import MachineError
from proto.wire import Exit, ExitReason
from sim.agenda import GUEST

if TYPE_CHECKING:
    from sim.world import World

DOWN_NS: Final = 1_000_000
"""From the last page that is saved to the fresh host, and from there to its first entry."""


class Move:
    """One save and restore."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._standing: set[int] = set()
        self._walk = PageWalk(len(world.vm.state))
        self._pages: dict[int, ev.PageSaved] = {}
        self._on_swap: list[int] = []
        self._exits: list[Exit] = []
        self._states: list[dict[str, Any]] = []
        self._restored = 0

    def begin(self) -> None:
        """Ask everybody to stop."""
        for machine in self._world.vcpus:
            self._world.feed(machine, ev.Pause(machine.cpu))

    def on(self, effect: Any) -> None:
        """What a machine says about it."""
        if type(effect) is ev.Paused:
            self._standing.add(effect.cpu)
            if len(self._standing) == len(self._world.vcpus):
                state = self._world.vm.state
                self._on_swap = [gfn for gfn in range(len(state)) if state[gfn] in (HPT_SLOT, HPT_READING)]
                self._go_over(ev.Walk())
        elif type(effect) is ev.PageSaved:
            self._pages[effect.hvp] = effect
            self._go_over(effect)
        elif type(effect) is ev.Restored:
            if effect.refused:
                raise MachineError(f"vcpu {effect.cpu} cannot be restored: {effect.refused}")
            self._restored += 1
            if self._restored == len(self._world.vcpus):
                self._world.agenda.after(DOWN_NS, GUEST, self._go_on)

    def _go_over(self, event: Any) -> None:
        for effect in self._walk.on((event,), self._world.agenda.now_ns):
            if type(effect) is ev.NextPage:
                self._world.feed(self._world.vm, ev.SavePage(effect.hvp))
            else:
                self._world.agenda.after(DOWN_NS, GUEST, self._exchange)

    def _exchange(self) -> None:
        world = self._world
        self._states = [machine.state().to_plain() for machine in world.vcpus]
        self._exits = [machine.last_exit for machine in world.vcpus]
        world.fresh_host()
        world.quietly(self._load)
        for machine, state in zip(world.vcpus, self._states, strict=True):
            world.give(machine, ev.Restore(machine.cpu, state))

    def _load(self) -> None:
        for page in self._pages.values():
            self._world.give(self._world.vm, ev.LoadPage(*page))
        for gfn in self._on_swap:
            self._world.evict(gfn)

    def _go_on(self) -> None:
        for cpu, record in enumerate(self._exits):
            if record.reason != ExitReason.DONE:
                record = record._replace(reason=ExitReason.RESUME, accepted=0, eois=0)  # noqa: PLW2901
            self._world.exited(cpu, record)
