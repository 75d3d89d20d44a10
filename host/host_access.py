"""The host's own accesses to guest memory: words of the shared areas, pages of images. Part of the vm machine.

Invariants
* Nothing is pinned: an access goes up the same ladder as the guest's, and on a miss whoever asked waits.
* These accesses are urgent: they may use the frames of the reserve, so that they wait for I/O at most, never for a guest.

Not handled here: where a shared area is (host/x86.py), image files and their order (host/image.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from host.events import STALE, Answer, GuestRead32, GuestWrite32, LoadPage, PageLoaded, PageSaved, SavePage
from host.kernels import (
    F_DIRTY,
    F_YOUNG,
    F_ZEROED,
    HPT_BAD,
    HPT_NONE,
    HPT_READING,
    HPT_SLOT,
    HPT_ZERO,
)
from proto.image import Content
from proto.machine import MachineError
from proto.units import PAGE_SIZE

if TYPE_CHECKING:
    from host.vm import VmMachine

_CONTENT: Final = {HPT_NONE: Content.NONE, HPT_ZERO: Content.ZERO, HPT_BAD: Content.BAD}
"""Pages without contents, as images call them."""
_LOADS: Final = {Content.DATA: "load", Content.ZERO: "load_zero", Content.BAD: "load_bad"}
"""What loading a page is called in its table; a page that was never touched stays so."""


class HostAccess:
    """Words and pages, read and written by the host."""

    __slots__ = ("_flags", "_frame", "_m", "_state")

    def __init__(self, machine: VmMachine) -> None:
        self._m = machine
        self._state = machine.state.data
        self._frame = machine.frame_of.data
        self._flags = machine.flags.data

    def again(self, event: Any) -> None:
        """The page that an access waited for can be had."""
        if type(event) is SavePage:
            self.save_page(event)
        elif type(event) is LoadPage:
            self.load_page(event)
        else:
            self.word(event, waited=True)

    # -- words ---------------------------------------------------------------------------------------------
    def word(self, event: GuestRead32 | GuestWrite32, waited: bool = False) -> None:
        """A word of a shared area; on a miss the asking vCPU is held.

        The caller brings the translation it remembers; it is good while the generation of the slots is the one it was made with.
        """
        m = self._m
        hvp, generation = event.hvp, m.slots.generation[event.vm]
        write = type(event) is GuestWrite32
        if event.generation != generation:
            m.emit(Answer(event.cpu, event.ask, STALE, waited, generation=generation))
            return
        if hvp < 0 or self._state[hvp] == HPT_BAD:
            m.emit(Answer(event.cpu, event.ask, 0 if write else -1, waited, hvp, generation))
            return
        if self._state[hvp] in (HPT_NONE, HPT_ZERO):
            if m.frames.short(urgent=True):
                m.waiters.wait(hvp, event, urgent=True)
                return
            m.fill_with_zeros(hvp)
        elif self._state[hvp] in (HPT_SLOT, HPT_READING):
            m.waiters.wait(hvp, event, urgent=True)
            return
        else:
            m.take_back(hvp, write)
        offset = event.gpa & (PAGE_SIZE - 1)
        if isinstance(event, GuestWrite32):
            old = m.memory.read32(self._frame[hvp], offset)
            m.memory.write32(self._frame[hvp], offset, event.value)
            self._flags[hvp] = (self._flags[hvp] | F_DIRTY | F_YOUNG) & ~F_ZEROED
            dirty = bool(self._flags[hvp] & F_DIRTY)
            m.emit(Answer(event.cpu, event.ask, 1 + old, waited, hvp, generation, dirty))
        else:
            word = m.memory.read32(self._frame[hvp], offset)
            m.emit(Answer(event.cpu, event.ask, word, waited, hvp, generation))

    # -- images --------------------------------------------------------------------------------------------
    def save_page(self, event: SavePage) -> None:
        """No vCPU runs. The page is read like any other and is not kept from being reclaimed again: what leaves is a copy."""
        m = self._m
        hvp = event.hvp
        state = self._state[hvp]
        if state in (HPT_SLOT, HPT_READING):
            m.waiters.wait(hvp, event, urgent=True)
        elif state in _CONTENT:
            m.emit(PageSaved(hvp, _CONTENT[state], b""))
        elif m.limits.zero_pages and m.memory.is_zero(self._frame[hvp]):
            m.emit(PageSaved(hvp, Content.ZERO, b""))
        else:
            m.emit(PageSaved(hvp, Content.DATA, bytes(m.memory.page(self._frame[hvp]))))

    def load_page(self, event: LoadPage) -> None:
        """Into a fresh host: resident and dirty, so that reclaim finds it like a page that a guest wrote. Raises MachineError."""
        m = self._m
        hvp, content = event.hvp, event.content
        if self._state[hvp] != HPT_NONE:
            raise MachineError(
                f"page {hvp} of an image goes where something is already (state {self._state[hvp]})"
            )
        if content is Content.DATA:
            if m.frames.short(urgent=True):
                m.waiters.wait(hvp, event, urgent=True)
                return
            m.memory.write_page(m.frames.take(hvp), event.data)
            self._flags[hvp] = F_DIRTY
        if content in _LOADS:
            m.move(hvp, _LOADS[content])
        m.emit(PageLoaded(hvp))
