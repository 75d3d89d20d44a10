"""Going over all pages of an image, a bounded number under way at a time: the pure part of saving and of loading memory.

    walk ── NextPage ──► shell ── SavePage / LoadPage ──► vm machine
     ▲                                                        │
     └──────────────── PageSaved / PageLoaded ────────────────┘

The shell (or a simulated world) turns `NextPage` into the request, and keeps or provides the bytes.

Not handled here: the bytes, files (proto/image.py), stopping the vCPUs (host/vcpu.py).
"""

from __future__ import annotations

from typing import Any, Final

from host.events import NextPage, PageLoaded, PageSaved, Walk, WalkDone
from proto.machine import Machine, MachineError, Path

WINDOW: Final = 64
"""Pages under way: one batch of swap reads. What waits for a frame or for a device is never more."""


class PageWalk(Machine):
    """All of ``pages`` host virtual pages, in order; emits `WalkDone` once."""

    __slots__ = ("_next", "_under_way", "pages")

    def __init__(self, pages: int) -> None:
        super().__init__()
        self.pages = pages
        self._next = 0
        self._under_way = 0

    def path_for(self, event: Any) -> Path | None:
        """`Walk` begins; every page that is done makes room for the next."""
        kind = type(event)
        if kind is PageSaved or kind is PageLoaded:
            self._under_way -= 1
        elif kind is not Walk:
            raise MachineError(f"page walk: unknown event {event!r}")
        while self._next < self.pages and self._under_way < WINDOW:
            self.emit(NextPage(self._next))
            self._next += 1
            self._under_way += 1
        if self._next == self.pages and not self._under_way:
            self.emit(WalkDone())
        return None
