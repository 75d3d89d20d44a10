"""Who waits for a page, and which pages wait for a frame. Part of the vm machine.

Invariants
* Whoever waits is answered by the event that makes it possible, or taken back by `CancelPage` or `CancelFetch`.
* A page that nobody waits for does not queue for a frame, unless it is READING: who asks again finds it there.
* Frames go to the host's own accesses first, else first come, first served.

Not handled here: whether a page can be mapped (host/vm.py), the reads themselves (host/page_in.py), frames (host/frames.py).
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

from host.events import Answer, CancelFetch, CancelPage, Fetch, Fetched, Found, GetPage
from host.kernels import HPT_READING, HPT_SLOT
from proto.stats import HostCounter

if TYPE_CHECKING:
    from host.vm import VmMachine


class Waiters:
    """Requests by page, and pages by urgency."""

    __slots__ = ("_frame", "_m", "_pages", "_state", "guests", "urgent")

    def __init__(self, machine: VmMachine) -> None:
        self._m = machine
        self._state = machine.state.data
        self._frame = machine.frame_of.data
        self._pages: dict[int, list[Any]] = {}
        self.guests: deque[int] = deque()
        """Pages that guests need a frame for."""
        self.urgent: deque[int] = deque()
        """Pages that the host itself needs a frame for, when even the reserve was used up."""

    @property
    def starving(self) -> int:
        """How many pages wait for a frame."""
        return len(self.guests) + len(self.urgent)

    def starved(self, *, urgent: bool) -> list[Any]:
        """Who waits for those pages, of the guests or of the host itself. Nobody, where who waited was reset meanwhile."""
        queue = self.urgent if urgent else self.guests
        return [event for hvp in queue for event in self._pages.get(hvp, ())]

    def wait(self, hvp: int, event: Any, *, urgent: bool = False) -> None:
        """Answer ``event`` when the page can be had; starts what that takes. ``urgent``: the host itself needs the page."""
        m = self._m
        self._pages.setdefault(hvp, []).append(event)
        state = self._state[hvp]
        if state == HPT_SLOT:
            m.page_in.want(hvp, urgent=urgent)
        elif state != HPT_READING:
            self.queue(hvp, urgent=urgent)
        elif urgent and self._frame[hvp] < 0:
            m.page_in.read(hvp, urgent=urgent)

    def queue(self, hvp: int, *, urgent: bool) -> None:
        """No frame is free for this page."""
        self._m.obs.count(HostCounter.FRAME_WAITS)
        (self.urgent if urgent else self.guests).append(hvp)

    def serve(self, hvp: int) -> None:
        """Answer everybody who waits for a page that can be mapped now."""
        m = self._m
        for event in self._pages.pop(hvp, ()):
            if type(event) is GetPage:
                m.came(hvp, event)
            elif type(event) is Fetch:
                m.emit(Fetched(event.cpu, event.work))
            else:
                m.host_access.again(event)

    def feed(self) -> None:
        """Frames came back."""
        m = self._m
        for queue, urgent in ((self.urgent, True), (self.guests, False)):
            while queue and not m.frames.short(urgent=urgent):
                hvp = queue.popleft()
                if self._state[hvp] != HPT_READING:
                    self.serve(hvp)
                elif self._frame[hvp] < 0:
                    m.page_in.read(hvp, urgent=urgent)

    # -- taken back ----------------------------------------------------------------------------------------
    def cancel_page(self, event: CancelPage) -> None:
        """The page goes on coming; the vCPU will fault on it again."""
        m = self._m
        for hvp, waiters in self._pages.items():
            for waiter in waiters:
                if type(waiter) is GetPage and (waiter.cpu, waiter.ask) == (event.cpu, event.ask):
                    waiters.remove(waiter)
                    self._forget(hvp, waiters)
                    m.emit(Answer(event.cpu, event.ask, Found.NO_MEMORY, True, hvp))
                    return
        if m.change.cancel(event):
            m.emit(Answer(event.cpu, event.ask, Found.NO_MEMORY, True))

    def _forget(self, hvp: int, waiters: list[Any]) -> None:
        """A page that nobody wants any more does not queue for a frame. A read keeps its place: who asks again finds it READING."""
        if not waiters:
            del self._pages[hvp]
            if self._state[hvp] != HPT_READING:
                for queue in (self.guests, self.urgent):
                    while hvp in queue:
                        queue.remove(hvp)

    def cancel_fetch(self, event: CancelFetch) -> None:
        """The read goes on (its frame is named by a request); only the answer is not wanted any more."""
        waiters = self._pages.get(event.hvp)
        if waiters is not None:
            waiters[:] = [
                w for w in waiters if not (type(w) is Fetch and (w.cpu, w.work) == (event.cpu, event.work))
            ]
