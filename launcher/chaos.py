"""Killing daemons on purpose: `ChaosPlan` says who is killed when.

Invariants: kills begin at the start barrier and end after `for_ns`; daemons take turns; a time that was missed is not made up for.
Pure: every call is told the time.

Not handled here: how a process is killed and started again (launcher/lifecycle.py), what the guests get done meanwhile
(launcher/outage.py).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class ChaosPlan:
    """Kill a daemon every `every_ns` for `for_ns`, round robin."""

    every_ns: int
    for_ns: int
    daemons: int
    kills: int = 0
    _next_ns: int = 0
    _end_ns: int = 0
    _turn: int = 0

    def begin(self, start_ns: int) -> None:
        """The barrier has opened."""
        self._next_ns = start_ns + self.every_ns
        self._end_ns = start_ns + self.for_ns

    def due(self, now_ns: int) -> int | None:
        """The daemon to kill now, if any."""
        if not self._next_ns or now_ns < self._next_ns or now_ns >= self._end_ns:
            return None
        missed = (now_ns - self._next_ns) // self.every_ns
        self._next_ns += (missed + 1) * self.every_ns
        daemon = self._turn
        self._turn = (daemon + 1) % self.daemons
        return daemon

    @property
    def next_ns(self) -> int:
        """When `due` may say something again; 0 before `begin`."""
        return self._next_ns
