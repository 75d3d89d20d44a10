"""Interrupts from one vCPU to another, and resets of a whole machine: what shells and simulated worlds share.

INIT resets a vCPU, a start-up interrupt starts it; of the start-up address nothing is left, because a guest kernel here has one entry.
A reset of the machine (reboot) resets every vCPU of the VM, and only when all of them have stopped starts the first: the kernel that
boots there finds nobody who still works on its memory. It starts the others itself (spec §1.1).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from host.events import Interrupt, Reset, Startup
from proto.kvm import ICR_INIT, ICR_MODE, ICR_STARTUP, ICR_VECTOR

Directed = Interrupt | Reset | Startup


def from_command(cpu: int, command: int) -> Directed:
    """What a write to the interrupt command register means for its destination ``cpu``."""
    mode = command & ICR_MODE
    if mode == ICR_INIT:
        return Reset(cpu)
    if mode == ICR_STARTUP:
        return Startup(cpu)
    return Interrupt(cpu, command & ICR_VECTOR)


class MachineReset:
    """Resets under way. ``cpus``: global vCPU numbers of each VM, first one first."""

    def __init__(self, cpus: Sequence[Sequence[int]]) -> None:
        self._cpus = [tuple(numbers) for numbers in cpus]
        self._stopping: dict[int, set[int]] = {}
        self.done = [0] * len(cpus)
        """Resets of each VM that are complete."""

    def begin(self, vm: int, by: int) -> Iterable[Reset]:
        """The guest asked for it on vCPU ``by``, which resets itself. One that is under way is enough."""
        if vm in self._stopping:
            return ()
        self._stopping[vm] = set(self._cpus[vm])
        return [Reset(cpu) for cpu in self._cpus[vm] if cpu != by]

    def was_reset(self, cpu: int) -> Iterable[Startup]:
        """A vCPU has stopped; after the last one the first is started. A vCPU that was reset alone waits for its start-up interrupt."""
        vm = next(v for v, cpus in enumerate(self._cpus) if cpu in cpus)
        stopping = self._stopping.get(vm)
        if stopping is None:
            return ()
        stopping.discard(cpu)
        if stopping:
            return ()
        del self._stopping[vm]
        self.done[vm] += 1
        return (Startup(self._cpus[vm][0]),)
