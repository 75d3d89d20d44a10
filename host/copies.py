"""Where the copies of each slot lie: columns over the blocks of every daemon's file.

A slot is known by the number of its first copy's block, daemon * SLOTS_PER_DAEMON + block. The column `mirror` says where the second copy
is. The number stays while the slot is in use, also when its first copy can no longer be read: a block that proved bad is never given out
again, and neither are those of a daemon that is gone, so nobody else gets that number.

Invariants
* The copies of a slot are on different daemons.
* A block is free, or holds a copy of one slot, or is given back while a request still names it (DOOMED), or proved bad for good.
* `good` counts the copies of a slot that hold its page: 0 from the start of a write to its end. Singles are the slots with one.

Deliberately not here: what is asked of which daemon (host/swap.py), which page a slot belongs to (host/vm.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final

import numpy as np

SLOTS_PER_DAEMON: Final = 1 << 28
"""1 TiB of swap per daemon."""
FREE, NAME, MIRROR, DOOMED, BAD = range(5)
"""What a block is: free, first copy, second copy, given back while a request names it, never to be used again."""

IsUp = Callable[[int], bool]


def _any(_: int) -> bool:
    return True


class _Blocks:
    """Columns over the blocks of one daemon, with memoryviews for single words."""

    __slots__ = ("free", "free_count", "gone", "good", "mirror", "named", "sums", "use", "used")

    def __init__(self, slots: int) -> None:
        self.free = np.arange(slots - 1, -1, -1, dtype=np.int64).data
        self.free_count = slots
        self.use = np.zeros(slots, np.uint8).data
        self.mirror = np.full(slots, -1, np.int64).data
        self.good = np.zeros(slots, np.uint8).data
        self.named = np.zeros(slots, np.uint8).data
        """Requests that name the block: a write, or a read and the one that lost against it."""
        self.sums = np.zeros(slots, np.uint64).data
        self.used = 0
        """NAME, MIRROR or DOOMED."""
        self.gone = False

    def take(self, use: int) -> int:
        """A free block, from now on in use."""
        self.free_count -= 1
        block = self.free[self.free_count]
        self.use[block] = use
        self.used += 1
        return block


class Copies:
    """All slots of a run. ``slots``: blocks of each daemon's file; ``replicas``: copies of each page, 1 or 2."""

    def __init__(self, slots: Sequence[int], replicas: int = 1) -> None:
        self.replicas = replicas
        self.singles = 0
        """Slots with one copy, where two are wanted."""
        self._blocks = [_Blocks(n) for n in slots]
        self._turn = 0

    @property
    def used(self) -> int:
        """Blocks that hold a copy or are named by a request, of daemons that are not gone."""
        return sum(one.used for one in self._blocks if not one.gone)

    # -- getting and giving back ---------------------------------------------------------------------------
    def take(self, is_up: IsUp) -> int:
        """A new slot, its copies on daemons that are up, daemons in turn; -1 when all are full.

        With fewer daemons up than copies wanted it has one copy. With none up they are on daemons that may come back.
        """
        wanted = is_up
        first = self._with_room(wanted)
        if first < 0:
            wanted = _any
            first = self._with_room(wanted)
        if first < 0:
            return -1
        self._turn = (first + 1) % len(self._blocks)
        slot = first * SLOTS_PER_DAEMON + self._blocks[first].take(NAME)
        self._second(slot, wanted)
        return slot

    def rewrite(self, slot: int, is_up: IsUp) -> int:
        """Make a slot ready to be written anew; returns its number from now on, which may be another.

        Copies on daemons that are not up are given up as soon as there is one that is: it takes their place.
        """
        copies = self.copies(slot)
        self._set_good(slot, 0)
        up = [copy for copy in copies if is_up(copy // SLOTS_PER_DAEMON)]
        kept = up or copies
        for copy in copies:
            if copy not in kept:
                self._release(copy)
        if not kept:
            self._forget(slot)
            return self.take(is_up)
        slot = self._renamed(slot, kept)
        self._second(slot, is_up if up else _any)
        return slot

    def free(self, slot: int) -> None:
        """Nobody needs the slot any more. One whose copies are all lost already is forgotten."""
        self._set_good(slot, 0)
        for copy in self.copies(slot):
            self._release(copy)
        self._forget(slot)

    def written(self, slot: int, good: Sequence[int], xxh3: int) -> int:
        """A write is over and ``good`` copies, at least one, hold a page with this sum; returns the slot's number from now on.

        The others are given back: a block may be half written, nobody reads it before it is written again.
        """
        for copy in self.copies(slot):
            if copy not in good:
                self._release(copy)
        slot = self._renamed(slot, good)
        for copy in good:
            d, block = divmod(copy, SLOTS_PER_DAEMON)
            self._blocks[d].sums[block] = xxh3
        self._set_good(slot, len(good))
        return slot

    def quarantine(self, slot: int, copy: int) -> bool:
        """A copy proved bad: it leaves the slot, and its block is never given out again. False when it is no copy of it."""
        if copy not in self.copies(slot):
            return False
        d, block = divmod(copy, SLOTS_PER_DAEMON)
        one = self._blocks[d]
        one.use[block] = BAD
        one.used -= 1
        if copy != slot:
            self._set_mirror(slot, -1)
        self._set_good(slot, self.good(slot) - 1)
        return True

    def gone(self, daemon: int) -> list[int]:
        """A daemon never comes back; returns the slots whose only copy was there. Slots being written lose that copy silently."""
        lost: list[int] = []
        self._blocks[daemon].gone = True
        for d, one in enumerate(self._blocks):
            good, mirror, use = np.asarray(one.good), np.asarray(one.mirror), np.asarray(one.use)
            if d == daemon:
                hit = (use == NAME) & (good > 0)
            else:
                hit = (mirror >= 0) & (mirror // SLOTS_PER_DAEMON == daemon)
                mirror[hit] = -1
            single = hit & (good == 1)
            lost += (d * SLOTS_PER_DAEMON + np.flatnonzero(single)).tolist()
            if self.replicas > 1:
                self.singles += int((hit & (good == 2)).sum()) - int(single.sum())
            good[hit & (good > 0)] -= 1
        return lost

    # -- looking -------------------------------------------------------------------------------------------
    def copies(self, slot: int) -> list[int]:
        """Blocks of the slot's copies that have not proved bad, on daemons that are not gone, the first copy first."""
        d, block = divmod(slot, SLOTS_PER_DAEMON)
        one = self._blocks[d]
        found = [slot] if one.use[block] == NAME and not one.gone else []
        if one.mirror[block] >= 0:
            found.append(one.mirror[block])
        return found

    def good(self, slot: int) -> int:
        """How many copies hold the page."""
        d, block = divmod(slot, SLOTS_PER_DAEMON)
        return self._blocks[d].good[block]

    def xxh3(self, copy: int) -> int:
        """Sum of what was written there last."""
        d, block = divmod(copy, SLOTS_PER_DAEMON)
        return self._blocks[d].sums[block]

    def blocks_used(self) -> Iterator[int]:
        """Every block that holds a copy or is named by a request, of daemons that are not gone."""
        for d, one in enumerate(self._blocks):
            if not one.gone:
                use = np.asarray(one.use)
                yield from (d * SLOTS_PER_DAEMON + np.flatnonzero((use != FREE) & (use != BAD))).tolist()

    # -- requests that name a block ------------------------------------------------------------------------
    def name(self, copy: int) -> None:
        """A request names this block until `unname`."""
        d, block = divmod(copy, SLOTS_PER_DAEMON)
        self._blocks[d].named[block] += 1

    def unname(self, copy: int) -> None:
        """That request was answered, fenced or never sent."""
        d, block = divmod(copy, SLOTS_PER_DAEMON)
        one = self._blocks[d]
        one.named[block] -= 1
        if one.use[block] == DOOMED and not one.named[block]:
            self._push(one, block)

    # -- inside --------------------------------------------------------------------------------------------
    def _with_room(self, wanted: IsUp, but: int = -1) -> int:
        for k in range(len(self._blocks)):
            d = (self._turn + k) % len(self._blocks)
            if d != but and self._blocks[d].free_count and not self._blocks[d].gone and wanted(d):
                return d
        return -1

    def _second(self, slot: int, is_up: IsUp) -> None:
        """Give a slot that has one copy another one, on another daemon with room."""
        d, block = divmod(slot, SLOTS_PER_DAEMON)
        if self.replicas == 1 or self._blocks[d].mirror[block] >= 0:
            return
        other = self._with_room(is_up, but=d)
        if other >= 0:
            self._set_mirror(slot, other * SLOTS_PER_DAEMON + self._blocks[other].take(MIRROR))

    def _renamed(self, slot: int, kept: Sequence[int]) -> int:
        """Number of a slot that goes on with the copies ``kept``, in their old order."""
        mirror = self._mirror(slot)
        if slot in kept:
            if mirror not in kept:
                self._set_mirror(slot, -1)
            return slot
        self._forget(slot)
        d, block = divmod(mirror, SLOTS_PER_DAEMON)
        self._blocks[d].use[block] = NAME
        return mirror

    def _forget(self, slot: int) -> None:
        self._set_mirror(slot, -1)

    def _mirror(self, slot: int) -> int:
        d, block = divmod(slot, SLOTS_PER_DAEMON)
        return self._blocks[d].mirror[block]

    def _set_mirror(self, slot: int, copy: int) -> None:
        d, block = divmod(slot, SLOTS_PER_DAEMON)
        self._blocks[d].mirror[block] = copy

    def _set_good(self, slot: int, good: int) -> None:
        d, block = divmod(slot, SLOTS_PER_DAEMON)
        one = self._blocks[d]
        if self.replicas > 1:
            self.singles += (good == 1) - (one.good[block] == 1)
        one.good[block] = good

    def _release(self, copy: int) -> None:
        """Give a block back, when no request names it any more."""
        d, block = divmod(copy, SLOTS_PER_DAEMON)
        one = self._blocks[d]
        if one.named[block]:
            one.use[block] = DOOMED
        else:
            self._push(one, block)

    @staticmethod
    def _push(one: _Blocks, block: int) -> None:
        one.use[block] = FREE
        one.used -= 1
        one.free[one.free_count] = block
        one.free_count += 1
