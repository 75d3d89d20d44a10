"""What goes wrong in a simulated run: the plan's faults, armed until their occasion comes, and which of them have fired.

A fault waits for the n-th occasion of its kind (`FAULTS` in sim/plan.py), at its daemon where a daemon counts. When the run calms down
those that are left are disarmed: they did not fire, and the seed does not count as passed for them.
"""

from __future__ import annotations

from collections import Counter
from typing import Final

from sim.plan import FaultPlan

MESSAGE, TO_DAEMON, READ, WRITE, EXIT = "message", "to daemon", "read", "write", "exit"
OCCASION: Final = {
    "kill": TO_DAEMON, "stall": TO_DAEMON, "drop": MESSAGE, "duplicate": MESSAGE, "delay": MESSAGE,
    "read_error": READ, "short_read": READ, "bit_flip": READ, "bad_block": READ, "write_error": WRITE, "restart": EXIT,
    "gone": TO_DAEMON,
}  # fmt: skip
"""What is counted for each kind."""


class Faults:
    """The faults of a plan. ``fired``: those that have happened, by kind."""

    __slots__ = ("_armed", "_seen", "fired")

    def __init__(self, planned: tuple[FaultPlan, ...]) -> None:
        self._armed = list(planned)
        self._seen: Counter[tuple[int, str]] = Counter()
        self.fired: Counter[str] = Counter()

    def due(self, daemon: int, occasion: str) -> list[FaultPlan]:
        """Count an occasion; returns the faults that happen at it."""
        self._seen[daemon, occasion] += 1
        if not self._armed:
            return []
        n = self._seen[daemon, occasion]
        due = [f for f in self._armed if f.daemon == daemon and OCCASION[f.kind] == occasion and f.nth <= n]
        for fault in due:
            self._armed.remove(fault)
            self.fired[fault.kind] += 1
        return due

    def disarm(self) -> None:
        """Nothing goes wrong any more."""
        self._armed.clear()

    @property
    def over(self) -> bool:
        """Nothing can fire any more."""
        return not self._armed
