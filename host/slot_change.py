"""Memslots that change while the guest runs: move, delete, add (spec §1.7, §1.16).

In KVM's order: the guest frames that change lose their slot, which is a publication of its own; their nested entries are cleared and
the flush generation is bumped; when every vCPU has flushed or is outside guest mode the new layout is published. Until then a fault
on such a frame is held, as by a VMM that stops its vCPUs for a replacement (KVM itself would fail a host access in between).

Pages keep what they hold: dirty bits of cleared entries are carried over, a page whose slot is deleted stays in the host's memory and
can be reclaimed, and a fetch goes on for the host page it was started for. ``moves`` are mremap: the contents of host pages get other
host addresses; that waits for reads and writes under way, because requests name the old ones.

One change at a time; what is asked for meanwhile queues.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, Final

from host.events import GetPage, MemslotsSet, SetMemslots
from host.kernels import F_WRITEBACK, HPT_EVICT, HPT_NONE, HPT_READING, HPT_WRITING
from host.slots import Memslot, without
from proto.layout import NPT_D, NPT_P
from proto.stats import HostCounter
from proto.trace import Kind

if TYPE_CHECKING:
    from host.vm import VmMachine

_ON_ITS_WAY: Final = (HPT_READING, HPT_EVICT, HPT_WRITING)
"""States of a page that an unanswered request or a grace period names by its host address."""


class SlotChange:
    """The changes of all VMs, one after the other."""

    def __init__(self, machine: VmMachine) -> None:
        self._m = machine
        self._wanted: deque[SetMemslots] = deque()
        self._now: SetMemslots | None = None
        self._gone: list[Memslot] = []
        """Parts of the old layout that the new one has not: their pages hold what they held until the change is finished."""
        self._changing: list[Memslot] = []
        """Parts of the old and of the new layout that differ: faults on their guest frames are held."""
        self._held: list[Any] = []
        self._added = 0
        self._flush_generation = 0

    @property
    def pending(self) -> bool:
        """Whether a change is under way."""
        return self._now is not None

    def set_memslots(self, event: SetMemslots) -> None:
        """Begin a change, or queue it. Raises ValueError for slots that are no layout of the VM."""
        self._m.slots.check(event.vm, event.slots)
        self._wanted.append(event)
        if self._now is None:
            self._begin()

    def hold(self, event: Any) -> bool:
        """Keep an event (`GetPage`, `Translate`) whose guest frame is being changed; True when it was kept."""
        if self._now is None or event.vm != self._now.vm:
            return False
        if not any(s.base_gfn <= event.gfn < s.base_gfn + s.pages for s in self._changing):
            return False
        self._held.append(event)
        return True

    def cancel(self, event: Any) -> bool:
        """Forget a held `GetPage`; True when there was one."""
        found = [e for e in self._held if (type(e), e.cpu, e.ask) == (GetPage, event.cpu, event.ask)]
        self._held = [e for e in self._held if e not in found]
        return bool(found)

    @property
    def moving(self) -> bool:
        """Whether pages without a slot may be about to move: reclaim leaves those alone."""
        return self._now is not None and bool(self._now.moves)

    def former_hvp(self, vm: int, gfn: int) -> int:
        """The host page behind a guest frame that has no slot just now, because the one it had is about to change; -1: there is none."""
        if self._now is None or vm != self._now.vm:
            return -1
        found = [
            s.base_hvp + gfn - s.base_gfn for s in self._gone if s.base_gfn <= gfn < s.base_gfn + s.pages
        ]
        return found[0] if found else -1

    def _begin(self) -> None:
        m = self._m
        self._now = event = self._wanted.popleft()
        old = m.slots.of_vm(event.vm)
        self._gone = gone = without(old, event.slots)
        new = without(event.slots, old)
        self._changing = gone + new
        self._added = sum(s.pages for s in new)
        generation = m.slots.publish(event.vm, without(old, gone))
        cleared = sum(self._zap(event.vm, slot) for slot in gone)
        # Also when nothing was mapped: a vCPU may be between its walk and its access.
        self._flush_generation = m.memory.bump_generation(event.vm)
        m.obs.count(HostCounter.FLUSHES)
        m.obs.trace(Kind.FLUSH, vm=event.vm, a=self._flush_generation, b=cleared)
        m.obs.trace(Kind.MEMSLOTS, vm=event.vm, a=generation, b=sum(s.pages for s in gone))

    def _zap(self, vm: int, slot: Memslot) -> int:
        """Clear the nested entries of a slot; returns how many were present. The page keeps their dirty bits."""
        m, cleared = self._m, 0
        for gfn in range(slot.base_gfn, slot.base_gfn + slot.pages):
            entry = m.memory.unmap(vm, gfn)
            if not entry & NPT_P:
                continue
            cleared += 1
            if entry & NPT_D:
                m.mark_dirty(slot.base_hvp + gfn - slot.base_gfn)
        return cleared

    def advance(self) -> None:
        """Finish what can be finished."""
        while self._now is not None and self._flushed() and self._at_rest():
            self._finish(self._now)
            if self._wanted:
                self._begin()

    def _flushed(self) -> bool:
        event = self._now
        assert event is not None
        return self._m.memory.oldest_generation(event.vm, self._flush_generation) >= self._flush_generation

    def _at_rest(self) -> bool:
        """No request names a page that is about to move."""
        state, flags = self._m.state, self._m.flags
        assert self._now is not None
        for first, _, pages in self._now.moves:
            part = slice(first, first + pages)
            moving = state[part]
            if any((moving == s).any() for s in _ON_ITS_WAY) or (flags[part] & F_WRITEBACK).any():
                return False
        return True

    def _finish(self, event: SetMemslots) -> None:
        m = self._m
        for first, to, pages in event.moves:
            self._move(first, to, pages)
        generation = m.slots.publish(event.vm, event.slots)
        m.obs.trace(Kind.MEMSLOTS, vm=event.vm, a=generation, c=self._added)
        held, self._held, self._changing, self._gone, self._now = self._held, [], [], [], None
        m.emit(MemslotsSet(event.vm, generation))
        for one in held:
            m.again(one)

    def _move(self, first: int, to: int, pages: int) -> None:
        """mremap: columns of the host page table change their place; nothing maps either range."""
        m = self._m
        old, new = slice(first, first + pages), slice(to, to + pages)
        for column, empty in ((m.state, HPT_NONE), (m.flags, 0), (m.frame_of, -1), (m.slot_of, -1)):
            column[new] = column[old]
            column[old] = empty
        for hvp in range(to, to + pages):
            frame = int(m.frame_of[hvp])
            if frame >= 0:
                m.frames.owner[frame] = hvp
