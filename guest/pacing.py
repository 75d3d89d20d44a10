"""How long a vCPU may stay in guest mode: operations and guest time, pace, length of a stay.

Unpaced, guest time is the wall time of the stay. Paced, an operation takes a fixed guest time (1e9 / rate ns) and the CPU's guest clock may
never be ahead of the wall clock; when it is level the vCPU pauses until there is a useful amount to catch up.

Not handled here: measuring (guest/turn.py, guest/shell.py), the guest clock itself (guest/clock.py).
"""

from __future__ import annotations

from typing import Final

STAY_NS: Final = 1_000_000
"""Wall time a stay in guest mode aims at: well below a slice, well above what entering costs."""
CATCH_UP_NS: Final = 2_000_000
"""Guest time a paced vCPU waits for before it goes on: 500 wake-ups per second at most, and as many less as there are vCPUs per core."""
CROWD_FREE: Final = 4
"""vCPUs per physical CPU up to which waking each 500 times per second costs little."""
FIRST_GUESS_NS: Final = 100.0
"""Wall time of one operation before anything was measured; too long rather than too short."""
SAMPLE_OPS: Final = 32
"""Shorter stays measure the cost of entering, not that of operations."""
OPS_MAX: Final = 1 << 40
_SECOND_NS: Final = 1_000_000_000


class Pacing:
    """``rate``: operations per second of guest time, 0 = unpaced. ``crowd``: vCPUs for each physical CPU."""

    __slots__ = ("_carry", "_catch_up_ns", "_level", "_op_wall_ns", "_room_ops", "op_ns", "rate")

    def __init__(self, rate: int, crowd: int = 1) -> None:
        self.rate = rate
        self._catch_up_ns = CATCH_UP_NS * max(1, crowd // CROWD_FREE)
        self.op_ns = -(-_SECOND_NS // rate) if rate else 0
        """Guest time of one operation, rounded up."""
        self._carry = 0
        self._room_ops = 0
        self._level = False
        self._op_wall_ns = FIRST_GUESS_NS

    def budget(self, room_ns: int, max_ns: int, max_ops: int) -> int:
        """Operations for the next stay, at least 1.

        ``room_ns``: how far the wall clock is ahead of the guest clock (paced only). ``max_ns``, ``max_ops``: the scheduler's
        bounds, 0 = none.
        """
        ops = max(1, int(STAY_NS / self._op_wall_ns))
        if self.rate:
            self._room_ops = max(1, room_ns * self.rate // _SECOND_NS)
            ops = min(ops, self._room_ops)
        if max_ns:
            # Rounded up, so that the bound is reached: stopping short of a tick would lead to a stay of no length.
            per_second = self.rate or int(_SECOND_NS / self._op_wall_ns)
            ops = min(ops, -(-max_ns * per_second // _SECOND_NS))
        if max_ops:
            ops = min(ops, max_ops)
        return max(1, min(ops, OPS_MAX))

    def guest_ns(self, ops: int, wall_ns: int) -> int:
        """Guest time of a stay of ``ops`` operations that took ``wall_ns``; takes note of the speed."""
        if ops >= SAMPLE_OPS:
            # Half old, half new: programs change their step (set-up, main phase, sweep) by factors, once or twice in their life.
            self._op_wall_ns = max(0.5, (self._op_wall_ns + wall_ns / ops) / 2)
        if not self.rate:
            return wall_ns
        self._level = ops >= self._room_ops
        whole, self._carry = divmod(ops * _SECOND_NS + self._carry, self.rate)
        return whole

    def pause_ns(self, room_ns: int) -> int:
        """How long to pause before going on; 0: go.

        A CPU that was level pauses until there is something to catch up, not only until the next operation is due: else it would
        chase the wall clock in stays of a few operations.
        """
        wanted_ns = max(self._catch_up_ns, self.op_ns)
        if not self.rate or room_ns >= (wanted_ns if self._level else self.op_ns):
            return 0
        return wanted_ns - room_ns

    def resume(self) -> None:
        """Something happened to the guest (an exit): it goes on at once, as far as the wall clock allows."""
        self._level = False
