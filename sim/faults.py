"""What goes wrong in a simulated run: the plan's faults, counted by the same machine as those of a real run (proto/faults.py).

A fault waits for the n-th occasion of its kind (`FAULTS` in sim/plan.py), at its daemon where a daemon counts. Whoever can do it takes one
at a time, so that each that counts as happened has an effect of its own; what else is due waits for the next occasion. When the run calms
down those that are left are disarmed: they did not fire, and the seed does not count as passed for them.
"""

from __future__ import annotations

from collections import Counter
from typing import Final

from proto.faults import NATURAL, Delivery, FaultMachine, Firing, Spec, words_needed
from sim.plan import US, FaultPlan

MESSAGE, READ, WRITE = NATURAL["drop"], NATURAL["read_error"], NATURAL["write_error"]
TO_DAEMON, EXIT = "to daemon", "exit"
OCCASION: Final = {
    "kill": TO_DAEMON, "stop": TO_DAEMON, "drop": MESSAGE, "duplicate": MESSAGE, "delay": MESSAGE,
    "read_error": READ, "short_read": READ, "bit_flip": READ, "bad_block": READ, "write_error": WRITE, "restart": EXIT,
    "gone": TO_DAEMON,
}  # fmt: skip
"""What is counted for each kind."""
PLAIN: Final = Delivery(1, 0, ())
_ROLE: Final = "swapd"
_NOW_NS: Final = 1
"""Faults of a plan do not look at the time."""


class Faults:
    """The faults of a plan. ``fired``: those that have happened, by kind."""

    __slots__ = ("_left", "_machine", "fired")

    def __init__(self, planned: tuple[FaultPlan, ...]) -> None:
        specs = [
            Spec(
                i,
                fault.kind,
                _ROLE,
                (fault.daemon,),
                step=OCCASION[fault.kind],
                nth=fault.nth,
                for_ns=fault.for_us * US,
            )
            for i, fault in enumerate(planned)
        ]
        daemons = 1 + max((fault.daemon for fault in planned), default=0)
        self._machine = FaultMachine(specs, [0] * words_needed(len(planned), daemons))
        self._machine.start(_NOW_NS)
        self._left = len(planned)
        self.fired: Counter[str] = Counter()

    def see(self, occasion: str, daemon: int = 0) -> None:
        """Count an occasion."""
        if self._left:
            self._machine.step(occasion, _ROLE, daemon, _NOW_NS)

    def take(self, kind: str, daemon: int = 0) -> Firing | None:
        """A fault of this kind that happens now, if one is due: the caller does it."""
        firing = self._machine.take(kind, _ROLE, daemon, _NOW_NS) if self._left else None
        if firing is not None:
            self._count(firing)
        return firing

    def deliver(self, daemon: int) -> Delivery:
        """Count a message of a daemon's link, and say what becomes of it."""
        self.see(MESSAGE, daemon)
        if not self._left:
            return PLAIN
        delivery = self._machine.deliver(daemon, _NOW_NS)
        for firing in delivery.firings:
            self._count(firing)
        return delivery

    def _count(self, firing: Firing) -> None:
        self.fired[firing.spec.kind] += 1
        self._left -= 1

    def disarm(self) -> None:
        """Nothing goes wrong any more."""
        self._machine.stop(_NOW_NS)
        self._left = 0
