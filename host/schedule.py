"""What a topology schedules for its guests while they run (``[[event]]``): when it begins, and when it is done.

Events of one guest happen in order, each after the one before it is done. What the guest's kernel has to do (offline, online, reboot) is
put into the VM's control page, and the vCPUs are poked; it is done when the guest says so in its own memory, or when the machine was
reset. Memslots are the host's own affair.

Pure: the shell asks what is due and carries out what it gets; nothing here waits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from host.events import SetMemslots
from host.machine_reset import MachineReset
from host.slots import Memslot, Slots, cut_out, moved
from proto.layout import K_DEAD, K_ONLINE, VMC_OFFLINE, VMC_REBOOTS
from proto.topology_events import in_order
from proto.topology_keys import Event

U64 = npt.NDArray[np.uint64]
NS: Final = 1_000_000_000


class Guest(NamedTuple):
    """What an event of one VM works on: its control page, its kernel segment (read only), and the first spare host page."""

    vmc: U64
    kernel: U64
    spare_hvp: int


class Action(NamedTuple):
    """To be carried out now: poke the vCPUs of ``vm`` (None), or give the vm machine this."""

    vm: int
    memslots: SetMemslots | None


class Schedule:
    """The events of a run. ``slots`` and ``resets`` are looked at only."""

    def __init__(
        self, events: Sequence[Event], guests: Sequence[Guest], slots: Slots, resets: MachineReset
    ) -> None:
        self._guests = guests
        self._slots = slots
        self._resets = resets
        self._waiting = [deque(e for e in in_order(events) if e.vm == v) for v in range(len(guests))]
        self._open: list[Callable[[], bool] | None] = [None] * len(guests)
        """What tells that the event under way is done."""
        self._spare = [guest.spare_hvp for guest in guests]
        self._deleted: dict[tuple[int, int, int], list[Memslot]] = {}
        self._reboots = [0] * len(guests)
        self.done = 0

    def next_ns(self) -> int | None:
        """When something begins, ns since the barrier; None while nothing can begin."""
        due = [
            int(waiting[0].at * NS)
            for waiting, done in zip(self._waiting, self._open, strict=True)
            if waiting and done is None
        ]
        return min(due, default=None)

    @property
    def open(self) -> bool:
        """Something is under way."""
        return any(done is not None for done in self._open)

    def step(self, since_barrier_ns: int) -> list[Action]:
        """Count what is done, begin what is due."""
        actions = []
        for vm, done in enumerate(self._open):
            if done is not None and done():
                self._open[vm] = None
                self.done += 1
            waiting = self._waiting[vm]
            if waiting and self._open[vm] is None and waiting[0].at * NS <= since_barrier_ns:
                actions.append(self._begin(vm, waiting.popleft()))
        return actions

    def _begin(self, vm: int, event: Event) -> Action:
        guest = self._guests[vm]
        if event.do in ("offline", "online"):
            word, bit = event.vcpu // 64, np.uint64(1 << event.vcpu % 64)
            guest.vmc[VMC_OFFLINE + word] ^= bit
            # Gone is who is dead: only then its tasks are elsewhere, and it can be started again.
            bitmap = K_DEAD if event.do == "offline" else K_ONLINE
            self._open[vm] = lambda: bool(guest.kernel[bitmap + word] & bit)
            return Action(vm, None)
        if event.do == "reboot":
            self._reboots[vm] += 1
            wanted = self._reboots[vm]
            guest.vmc[VMC_REBOOTS] = np.uint64(wanted)
            self._open[vm] = lambda: self._resets.done[vm] >= wanted
            return Action(vm, None)
        # A change of the layout is two publications.
        published = self._slots.generation[vm] + 2
        self._open[vm] = lambda: self._slots.generation[vm] >= published
        return Action(vm, self._memslots(vm, event))

    def _memslots(self, vm: int, event: Event) -> SetMemslots:
        now = self._slots.of_vm(vm)
        place = vm, event.page, event.pages
        if event.do == "slot_delete":
            left, self._deleted[place] = cut_out(now, event.page, event.pages)
            return SetMemslots(vm, tuple(left))
        if event.do == "slot_add":
            return SetMemslots(vm, (*now, *self._deleted.pop(place)))
        layout, moves = moved(now, vm, event.page, event.pages, self._spare[vm])
        self._spare[vm] += event.pages
        return SetMemslots(vm, tuple(layout), tuple(moves))
