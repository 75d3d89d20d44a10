"""Deadlines that vCPUs have set with the timers of their local APICs: one heap for all.

Invariants: at most `TIMERS_PER_VCPU` for each vCPU are kept; what was armed anew still comes due, and the vCPU's machine knows by the
generation that it means nothing any more.

Not handled here: what a deadline is for (host/vcpu.py), who waits until it is due (host/shell.py).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import Final

from host.events import SetTimer, TimerDue

TIMERS_PER_VCPU: Final = 64
"""Timers kept before those that were armed anew are thrown away."""


class Timers:
    """Of a host with so many vCPUs."""

    def __init__(self, vcpus: int) -> None:
        self._most = TIMERS_PER_VCPU * vcpus
        self._heap: list[tuple[int, int, int]] = []

    def __len__(self) -> int:
        return len(self._heap)

    def set(self, effect: SetTimer) -> None:
        """A vCPU wants to be told."""
        heapq.heappush(self._heap, (effect.deadline_ns, effect.cpu, effect.generation))
        if len(self._heap) > self._most:
            # Deadlines that a guest put centuries away: only the last of each vCPU still means something.
            newest = {cpu: (ns, cpu, number) for ns, cpu, number in sorted(self._heap, key=lambda t: t[2])}
            self._heap = sorted(newest.values())

    def next_ns(self) -> int | None:
        """The first deadline."""
        return self._heap[0][0] if self._heap else None

    def due(self, now_ns: int) -> Iterator[TimerDue]:
        """Those that have come, the earliest first; they are not kept."""
        while self._heap and self._heap[0][0] <= now_ns:
            _, cpu, generation = heapq.heappop(self._heap)
            yield TimerDue(cpu, generation)
