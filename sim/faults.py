"""What goes wrong in a simulated run: the plan's faults, counted by the same machine as those of a real run (proto/faults.py).

A fault waits for the n-th occasion of its kind (`FAULTS` in sim/plan.py), at its daemon where a daemon counts. When the run calms down
those that are left are disarmed: they did not fire, and the seed does not count as passed for them.
"""

from __future__ import annotations

from collections import Counter
from typing import Final

from proto.faults import NATURAL, FaultMachine, Spec, words_needed
from sim.plan import FaultPlan

MESSAGE, READ, WRITE = NATURAL["drop"], NATURAL["read_error"], NATURAL["write_error"]
TO_DAEMON, EXIT = "to daemon", "exit"
OCCASION: Final = {
    "kill": TO_DAEMON, "stop": TO_DAEMON, "drop": MESSAGE, "duplicate": MESSAGE, "delay": MESSAGE,
    "read_error": READ, "short_read": READ, "bit_flip": READ, "bad_block": READ, "write_error": WRITE, "restart": EXIT,
    "gone": TO_DAEMON,
}  # fmt: skip
"""What is counted for each kind."""
_ROLE: Final = "swapd"
_NOW_NS: Final = 1
"""Faults of a plan do not look at the time."""


class Faults:
    """The faults of a plan. ``fired``: those that have happened, by kind."""

    __slots__ = ("_left", "_machine", "_planned", "fired")

    def __init__(self, planned: tuple[FaultPlan, ...]) -> None:
        self._planned = planned
        specs = [
            Spec(i, fault.kind, _ROLE, (fault.daemon,), step=OCCASION[fault.kind], nth=fault.nth)
            for i, fault in enumerate(planned)
        ]
        daemons = 1 + max((fault.daemon for fault in planned), default=0)
        self._machine = FaultMachine(specs, [0] * words_needed(len(planned), daemons))
        self._machine.start(_NOW_NS)
        self._left = len(planned)
        self.fired: Counter[str] = Counter()

    def due(self, daemon: int, occasion: str) -> list[FaultPlan]:
        """Count an occasion; returns the faults that happen at it."""
        machine = self._machine
        if not self._left or not machine.step(occasion, _ROLE, daemon, _NOW_NS):
            return []
        due = []
        for spec in machine.specs:
            if spec.step == occasion and machine.target(spec) == daemon and machine.pending(spec, _NOW_NS):
                machine.fire(spec, _NOW_NS)
                self.fired[spec.kind] += 1
                self._left -= 1
                due.append(self._planned[spec.number])
        return due

    def disarm(self) -> None:
        """Nothing goes wrong any more."""
        self._machine.stop(_NOW_NS)
        self._left = 0

    @property
    def over(self) -> bool:
        """Nothing can fire any more."""
        return not self._left
