"""The frames of the host's memory: which are free, whose they are, and which may still be written into. Part of the vm machine.

Invariants
* A frame is in exactly one place: the free stack, owned by a page, on its way from a page that was given back (host/giveback.py), held
  for an unanswered write that names it (``pinned``), or lent to the swap machine for a further read of a page (``lent``).
* A frame that an unanswered request names is not free, whoever gave it up: a write keeps it in limbo, a read keeps it lent.
* The last ``reserve`` frames are for the host's own accesses, so that these wait for I/O at most, never for a guest.

Not handled here: who waits for a frame (host/waiters.py), which page loses its frame (host/reclaim.py).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from proto.machine import MachineError


class Frames:
    """``count`` frames, all free. ``frame_of`` is the machine's column of frames by page (int32, -1: none); taking a frame sets it."""

    __slots__ = (
        "_frame",
        "_free",
        "_limbo",
        "_owner",
        "free",
        "free_count",
        "lent",
        "owner",
        "pinned",
        "reserve",
    )

    def __init__(self, count: int, frame_of: NDArray[np.int32], reserve: int) -> None:
        self.reserve = reserve
        self.owner = np.full(count, -1, np.int32)
        """Page by frame, -1: none."""
        self.free = np.arange(count - 1, -1, -1, dtype=np.int32)
        """The stack of free frames: the first ``free_count``."""
        self.free_count = count
        self.pinned: dict[int, int] = {}
        """Serial number of an unanswered write -> frame: the page was written to or given back meanwhile."""
        self.lent: set[int] = set()
        self._limbo: set[int] = set()
        # Views for single words: 0.1 us instead of a kernel call.
        self._owner = self.owner.data
        self._free = self.free.data
        self._frame = frame_of.data

    def short(self, *, urgent: bool) -> bool:
        """Whether there is none for who asks; ``urgent``: the host itself, so the reserve is for it."""
        return self.free_count <= (0 if urgent else self.reserve)

    def take(self, hvp: int) -> int:
        """A free frame for a page. Raises MachineError when there is none."""
        if self.free_count == 0:
            raise MachineError("take: no frame is free; callers queue for one")
        self.free_count -= 1
        frame = self._free[self.free_count]
        self._owner[frame] = hvp
        self._frame[hvp] = frame
        return frame

    def give(self, frame: int) -> None:
        """A frame that no page has any more and no vCPU reaches; limbo, while an unanswered write names it."""
        self._owner[frame] = -1
        if self.pinned and frame in self.pinned.values():
            self._limbo.add(frame)
            return
        self.push(frame)

    def push(self, frame: int) -> None:
        """Nobody has it: it is free."""
        self._free[self.free_count] = frame
        self.free_count += 1

    # -- named by a write ----------------------------------------------------------------------------------
    def pin(self, serial: int, frame: int) -> None:
        """The page of a write under way needs its contents no more, or has others now: the write still names the frame."""
        self.pinned[serial] = frame

    def unpin(self, serial: int) -> None:
        """That write was answered. Nothing happens where it named no frame."""
        frame = self.pinned.pop(serial, -1)
        if frame in self._limbo and frame not in self.pinned.values():
            self._limbo.discard(frame)
            self.push(frame)

    # -- lent to the swap machine --------------------------------------------------------------------------
    def lend_free(self) -> int:
        """A free frame for a second read of a page. There must be one."""
        self.free_count -= 1
        frame = self._free[self.free_count]
        self.lent.add(frame)
        return frame

    def lend(self, frame: int) -> None:
        """A frame that a read may land in, and that no page owns any more."""
        self.lent.add(frame)
        self._owner[frame] = -1

    def exchange(self, hvp: int, frame: int) -> None:
        """The page came in a lent frame; the one that was meant for it stays lent until nothing can land there."""
        own = self._frame[hvp]
        self.lent.remove(frame)
        self.lend(own)
        self._owner[frame] = hvp
        self._frame[hvp] = frame

    def end_loan(self, frame: int) -> None:
        """Nothing can land in it any more: it is free. Raises MachineError when it was not lent."""
        if frame not in self.lent:
            raise MachineError(f"frame {frame} comes back and was not lent")
        self.lent.remove(frame)
        self.push(frame)
