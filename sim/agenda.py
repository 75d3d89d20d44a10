"""The order of everything in a simulated world: virtual time, then priority, then the order in which it was asked for."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Final, NamedTuple

ARRIVAL: Final = 0
"""Something reaches the host from outside: a page, a timer."""
GUEST: Final = 1
"""A guest CPU goes on. After arrivals of the same instant, as a kick that was sent is seen before the next instruction."""


class _Item(NamedTuple):
    at_ns: int
    priority: int
    sequence: int
    action: Callable[[], None]


class Agenda:
    """Actions in virtual time. `now_ns` moves only when an action is taken out."""

    __slots__ = ("_heap", "_sequence", "now_ns")

    def __init__(self) -> None:
        self._heap: list[_Item] = []
        self._sequence = 0
        self.now_ns = 0

    def at(self, at_ns: int, priority: int, action: Callable[[], None]) -> None:
        """Do ``action`` at ``at_ns``, not before now."""
        self._sequence += 1
        heapq.heappush(self._heap, _Item(max(at_ns, self.now_ns), priority, self._sequence, action))

    def after(self, ns: int, priority: int, action: Callable[[], None]) -> None:
        """Do ``action`` ``ns`` from now."""
        self.at(self.now_ns + ns, priority, action)

    def step(self) -> bool:
        """Do the next action; False when there is none."""
        if not self._heap:
            return False
        item = heapq.heappop(self._heap)
        self.now_ns = item.at_ns
        item.action()
        return True

    def __len__(self) -> int:
        """Actions that are still to come."""
        return len(self._heap)
