"""The per-vCPU hash of outstanding gfns: 64 slots, open addressing, linear probing (spec §1.14).

It answers one question: has the guest been told about this page already? A second fault on such a gfn halts the vCPU instead of
telling it again. Exactly as many slots as faults allowed, so it may be full; deletion shifts backward, so no tombstones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from proto.events import Kind
from proto.kvm import GFN_HASH_BITS, GFN_HASH_SLOTS, hash_32

EMPTY: Final = -1
ALL: Final = (1 << 64) - 1
"""In place of a gfn that was taken out: every one."""
Note = Callable[[Kind, int, int, int], None]
"""(kind, a, b, c) of a trace event."""
_MASK: Final = GFN_HASH_SLOTS - 1


class GfnHash:
    """A set of gfns with KVM's slot order."""

    __slots__ = ("_note", "slots")

    def __init__(self, note: Note = lambda *_: None) -> None:
        """note: told of every entry that is put somewhere or taken out."""
        self.slots = [EMPTY] * GFN_HASH_SLOTS
        self._note = note

    @staticmethod
    def home(gfn: int) -> int:
        """Slot where the probe for ``gfn`` begins: hash_32 of its low 32 bits, 6 bits."""
        return hash_32(gfn & 0xFFFF_FFFF, GFN_HASH_BITS)

    def _find(self, gfn: int) -> int:
        """Slot of ``gfn``, or -1: the probe stops at the first empty slot or after a full circle."""
        slot = self.home(gfn)
        for _ in range(GFN_HASH_SLOTS):
            if self.slots[slot] == gfn:
                return slot
            if self.slots[slot] == EMPTY:
                return -1
            slot = (slot + 1) & _MASK
        return -1

    def __contains__(self, gfn: int) -> bool:
        return self._find(gfn) >= 0

    def add(self, gfn: int) -> None:
        """Insert; the queue limit guarantees a free slot. Raises OverflowError if there is none (our bug)."""
        slot = self.home(gfn)
        for _ in range(GFN_HASH_SLOTS):
            if self.slots[slot] == EMPTY:
                self.slots[slot] = gfn
                self._note(Kind.HASH_SET, gfn, self.home(gfn), slot)
                return
            slot = (slot + 1) & _MASK
        raise OverflowError(f"gfn hash full when adding {gfn:#x}")

    def remove(self, gfn: int) -> bool:
        """Delete with backward shift; False when absent (mainline warns and returns; I6, BZ-32)."""
        hole = self._find(gfn)
        if hole < 0:
            return False
        self.slots[hole] = EMPTY
        self._note(Kind.HASH_DROP, gfn, hole, 0)
        j = hole
        while True:
            j = (j + 1) & _MASK
            if self.slots[j] == EMPTY:
                return True
            home = self.home(self.slots[j])
            # An entry whose home lies cyclically in (hole, j] stays reachable where it is.
            stays = hole < home <= j if hole <= j else home > hole or home <= j
            if not stays:
                self.slots[hole], self.slots[j] = self.slots[j], EMPTY
                self._note(Kind.HASH_SET, self.slots[hole], home, hole)
                hole = j

    def clear(self) -> None:
        """Empty it (queue flushed)."""
        if any(gfn != EMPTY for gfn in self.slots):
            self._note(Kind.HASH_DROP, ALL, 0, 0)
        self.slots = [EMPTY] * GFN_HASH_SLOTS
