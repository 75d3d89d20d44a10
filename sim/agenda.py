"""The order of everything in a simulated world: by virtual time, or by priorities that change at a few points.

`Agenda` does what is due first: virtual time, then actor, then the order in which it was asked for.

`PriorityAgenda` explores schedules that delays alone hardly reach. Every actor has a priority; whoever has the highest one and anything to
do goes on, however early others were due, until a *change point* sends it to the back. Few change points are enough for bugs that need
few orderings, and which ones is drawn (probabilistic concurrency testing; Burckhardt et al., 2010).

Invariants: `now_ns` never falls; what one actor asked for happens in that order at equal times, and always in order of time; with
priorities nobody is put off for ever (`FAIR_STEPS`).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from typing import Final

ARRIVAL: Final = 0
"""Something reaches the host from outside: a page, a timer."""
GUEST: Final = 1
"""A guest CPU goes on. After arrivals of the same instant, as a kick that was sent is seen before the next instruction."""
CLOCK: Final = 0
"""The actor that acts by the clock, where priorities count."""
FAIR_STEPS: Final = 200
"""Every so many steps the action that has been due the longest is done, whoever it belongs to."""

Action = Callable[[], None]
_Item = tuple[int, int, int, Action]
"""(due, actor, sequence number, action)"""


class Agenda:
    """Actions in virtual time. `now_ns` moves only when an action is taken out."""

    __slots__ = ("_heap", "_sequence", "now_ns")

    def __init__(self) -> None:
        self._heap: list[_Item] = []
        self._sequence = 0
        self.now_ns = 0

    def at(self, at_ns: int, actor: int, action: Action) -> None:
        """``actor`` does ``action`` at ``at_ns``, not before now."""
        self._sequence += 1
        heapq.heappush(self._heap, (max(at_ns, self.now_ns), actor, self._sequence, action))

    def after(self, ns: int, actor: int, action: Action) -> None:
        """``actor`` does ``action`` ``ns`` from now."""
        self._sequence += 1
        heapq.heappush(self._heap, (self.now_ns + ns, actor, self._sequence, action))

    def demote(self, actor: int) -> None:
        """``actor`` cannot get on before others do (it spins on a lock)."""

    def calm_down(self) -> None:
        """From now on everybody has a turn when their time has come: what is kept from acting for ever would never drain."""

    def step(self) -> bool:
        """Do the next action; False when there is none."""
        if not self._heap:
            return False
        item = heapq.heappop(self._heap)
        self.now_ns = item[0]
        item[3]()
        return True

    def __len__(self) -> int:
        """Actions that are still to come."""
        return len(self._heap)


class PriorityAgenda(Agenda):
    """``order``: actors from the highest priority to the lowest, all that will ever act. ``changes``: numbers of steps, ascending.

    Actor 0 acts by the clock: nobody can make it act before its time, so it waits for that unless nobody else has anything to do.
    """

    __slots__ = ("_calm", "_changes", "_order", "_queues", "_steps")

    def __init__(self, order: Sequence[int], changes: Sequence[int]) -> None:
        super().__init__()
        self._order = list(order)
        self._queues: dict[int, list[_Item]] = {actor: [] for actor in order}
        self._changes = list(changes)
        self._steps = 0
        self._calm = False

    def calm_down(self) -> None:
        """See `Agenda.calm_down`."""
        self._calm = True

    def at(self, at_ns: int, actor: int, action: Action) -> None:
        """See `Agenda.at`."""
        self._sequence += 1
        heapq.heappush(self._queues[actor], (max(at_ns, self.now_ns), actor, self._sequence, action))

    def after(self, ns: int, actor: int, action: Action) -> None:
        """See `Agenda.after`."""
        self.at(self.now_ns + ns, actor, action)

    def demote(self, actor: int) -> None:
        """Send it to the back."""
        self._order.remove(actor)
        self._order.append(actor)

    def step(self) -> bool:
        """See `Agenda.step`."""
        self._steps += 1
        fair = self._calm or self._steps % FAIR_STEPS == 0
        queue = min(filter(None, self._queues.values()), default=None) if fair else self._highest()
        if queue is None:
            return False
        item = heapq.heappop(queue)
        self.now_ns = max(self.now_ns, item[0])
        if self._changes and self._steps >= self._changes[0]:
            self._changes.pop(0)
            self.demote(item[1])
        item[3]()
        return True

    def _highest(self) -> list[_Item] | None:
        clock = self._queues[CLOCK]
        for actor in self._order:
            queue = self._queues[actor]
            if queue and (actor != CLOCK or queue[0][0] <= self.now_ns):
                return queue
        return clock or None

    def __len__(self) -> int:
        """See `Agenda.__len__`."""
        return sum(map(len, self._queues.values()))
