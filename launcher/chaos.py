"""Killing daemons on purpose, and what the guests got done meanwhile.

Purpose: `ChaosPlan` says who is killed when; `OutageMeter` splits the guests' work into that done while every daemon was up and
that done while one was down.

Invariants: kills begin at the start barrier and end after `for_ns`; daemons take turns; a time that was missed is not made up for.
Pure: every call is told the time.

Not handled here: how a process is killed and started again (launcher/lifecycle.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

MS = 1_000_000


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


@dataclass(slots=True)
class OutageMeter:
    """Guest work by outage state. `work` is the sum over all vCPUs, `connected` the host's count of daemons that came back.

    A daemon is down from the moment its end is known here until the host has connected its successor. The work of each interval
    goes to the state that held during it, so an interval never mixes both.
    """

    count: int = 0
    _up_ns: int = 0
    _down_ns: int = 0
    _up_work: int = 0
    _down_work: int = 0
    _last_ns: int = 0
    _last_work: int = 0
    _down: set[int] = field(default_factory=set)
    _connected_target: int = 0

    def is_down(self) -> bool:
        """Whether a daemon is down."""
        return bool(self._down)

    def begin(self, now_ns: int, work: int) -> None:
        """The barrier has opened."""
        self._last_ns, self._last_work = now_ns, work

    def sample(self, now_ns: int, work: int, connected: int) -> None:
        """Close the interval since the last call, and see whether the daemons are back."""
        if not self._last_ns:
            return
        if self._down:
            self._down_ns += now_ns - self._last_ns
            self._down_work += work - self._last_work
        else:
            self._up_ns += now_ns - self._last_ns
            self._up_work += work - self._last_work
        self._last_ns, self._last_work = now_ns, work
        if connected >= self._connected_target:
            self._down.clear()

    def down(self, daemon: int, now_ns: int, work: int, connected: int) -> None:
        """A daemon ended."""
        if not self._last_ns:
            return
        self.sample(now_ns, work, connected)
        if not self._down:
            self.count += 1
        self._down.add(daemon)
        # A daemon that died again before it was connected is one that is missing, not two.
        self._connected_target = connected + len(self._down)

    def summary(self) -> dict[str, Any]:
        """The `outage` table of the summary."""
        return {
            "count": self.count,
            "total_ms": round(self._down_ns / MS, 3),
            "work_per_100ms_up": _rate(self._up_work, self._up_ns),
            "work_per_100ms_down": _rate(self._down_work, self._down_ns),
        }


def _rate(work: int, time_ns: int) -> float | None:
    return round(work * 100 * MS / time_ns, 1) if time_ns else None
