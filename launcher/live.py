"""The line about a run under way: what it does per second, how many tasks wait for a page, how many of them for long.

Invariants: reads shared memory only; rates are those since the line before.

Not handled here: when a line is due and where it goes (launcher/progress.py).
"""

from __future__ import annotations

from typing import Final

from launcher.watch import Watch
from proto.stats import HostCounter

S: Final = 1_000_000_000
STALLED_NS: Final = 1 * S
"""A task that waits for a page longer than this is called stalled: a page is back within some ms, and a restarted daemon within half a
second.
"""


class Live:
    """Makes the lines of one run."""

    def __init__(self, watch: Watch) -> None:
        """watch: of the run; it must be usable for as long as lines are made."""
        self._watch = watch
        self._last_ns = 0
        self._last_faults = 0
        self._last_work = 0

    def begin(self, now_ns: int) -> None:
        """The measured time begins: rates count from here."""
        self._last_ns = now_ns
        self._last_faults, self._last_work = self._watch.host(HostCounter.NESTED_FAULTS), self._watch.work()

    def line(self, now_ns: int, elapsed: str, restarts: int, kills: int | None) -> str:
        """elapsed: how far the run is, in words. kills: daemons killed on purpose; None when that is not asked for."""
        faults, work = self._watch.host(HostCounter.NESTED_FAULTS), self._watch.work()
        seconds = max(now_ns - self._last_ns, 1) / S
        parts = [
            elapsed,
            f"{(faults - self._last_faults) / seconds:,.0f} faults/s",
            f"{self._watch.waiting_tasks(now_ns)} outstanding",
            f"{self._watch.waiting_tasks(now_ns, STALLED_NS)} stalled",
        ]
        if restarts or kills is not None:
            parts.append(f"{restarts} restarts")
        if kills is not None:
            parts.append(f"{kills} kills")
        parts.append(f"work {(work - self._last_work) / seconds:,.0f}/s")
        self._last_ns, self._last_faults, self._last_work = now_ns, faults, work
        return ", ".join(parts)
