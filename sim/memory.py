"""Guest memory as a simulated guest CPU reaches it: through the nested table, a 32-bit or 64-bit word at a time.

There is no TLB here: every access looks at the table, so a withdrawn entry is seen at once.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from host.memory import HostMemory
from proto.layout import NPT_A, NPT_ADDR, NPT_D, NPT_P, NPT_W
from proto.units import PAGE_SHIFT, PAGE_SIZE, WORDS_PER_PAGE


class GuestMemory:
    """Memory of VM ``vm`` with ``pages`` guest frames."""

    __slots__ = ("_leaf_words", "_leaves", "_memory", "_vm")

    def __init__(self, memory: HostMemory, vm: int, pages: int) -> None:
        self._vm = vm
        self._leaf_words = -(-pages // 512) * 512
        self.bind(memory)

    def bind(self, memory: HostMemory) -> None:
        """The host that this guest runs on, from now on."""
        self._memory = memory
        # Leaf tables are the last ones and lie in gfn order.
        self._leaves: npt.NDArray[np.uint64] = memory.vms[self._vm].npt[-self._leaf_words :]

    def _frame(self, gpa: int, write: bool) -> int:
        """The frame behind an address, -1 = nested fault. Sets the accessed and dirty bits as a walk does."""
        entry = int(self._leaves[gpa >> PAGE_SHIFT])
        if not entry & NPT_P or (write and not entry & NPT_W):
            return -1
        self._leaves[gpa >> PAGE_SHIFT] = np.uint64(entry | NPT_A | (NPT_D if write else 0))
        return (entry & NPT_ADDR) >> 12

    def read32(self, gpa: int) -> int | None:
        """The word, None = nested fault."""
        frame = self._frame(gpa, write=False)
        return None if frame < 0 else self._memory.read32(frame, gpa & (PAGE_SIZE - 1))

    def write32(self, gpa: int, value: int) -> bool:
        """False = nested fault."""
        frame = self._frame(gpa, write=True)
        if frame >= 0:
            self._memory.write32(frame, gpa & (PAGE_SIZE - 1), value)
        return frame >= 0

    def touch(self, gpa: int) -> int | None:
        """Read-modify-write of the last 64-bit word of a page: the word before, None = nested fault."""
        frame = self._frame(gpa, write=True)
        if frame < 0:
            return None
        return int(self._memory.frames[(frame + 1) * WORDS_PER_PAGE - 1])
