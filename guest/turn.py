"""A vCPU's turns on the physical CPUs: when it holds a run token, and where its wall time goes while it does not execute.

Wall time of a vCPU process: guest mode, held in the host (the guest's blocked, halted and idle time), steal (waiting for a token), paused
(level with the wall clock), and the rest, which is what the emulator itself costs (VC_EMULATION_NS).

Invariant: a token is kept to the end of a slice, and longer while nobody waits for one.

Not handled here: who gets a token (proto/pcpu.py), how long a stay may be (guest/pacing.py).
"""

from __future__ import annotations

import time
from typing import Final

from guest.accounting import Accounting
from proto.layout import VC_EMULATION_NS, VC_PAUSED_NS, VC_STEAL_NS
from proto.pcpu import Pcpu

TOKEN_LIMIT_NS: Final = 60_000_000_000
"""Longest wait for a run token: a stopped holder ends the run long before."""


class Turn:
    """See the module docstring. Times monotonic, in ns."""

    __slots__ = ("_acc", "_excused_ns", "_off_since_ns", "_pcpu", "_slice_ns", "_slice_start_ns", "_woken")

    def __init__(self, pcpu: Pcpu, slice_ns: int, acc: Accounting) -> None:
        self._pcpu = pcpu
        self._slice_ns = slice_ns
        self._acc = acc
        self._slice_start_ns = 0
        self._woken = False
        self._off_since_ns = time.monotonic_ns()
        """When guest mode was left last."""
        self._excused_ns = 0
        """Wall time since then that was held, stolen or paused."""

    # ---- the token ------------------------------------------------------------------------------------------------------------
    def get(self) -> None:
        """Hold a run token. At the end of a slice it goes to whoever waits, and this vCPU queues up again."""
        now_ns = time.monotonic_ns()
        if self._pcpu.held:
            if now_ns - self._slice_start_ns < self._slice_ns:
                return
            if not self._pcpu.waiting_others():
                self._slice_start_ns = now_ns
                return
            self._pcpu.release()
        # Head of the queue after an entry: a woken vCPU may have a page-ready event to handle.
        steal_ns = self._pcpu.acquire(self._woken, TOKEN_LIMIT_NS)
        self._woken = False
        self._slice_start_ns = time.monotonic_ns()
        self._excused_ns += steal_ns
        self._acc.add(VC_STEAL_NS, steal_ns)

    def give_up(self) -> None:
        """Hold none any more; nothing if none is held."""
        if self._pcpu.held:
            self._pcpu.release()

    # ---- wall time ------------------------------------------------------------------------------------------------------------
    def off(self, now_ns: int) -> None:
        """Guest mode was left, or accounts start: what was before is settled or nobody's."""
        self._off_since_ns = now_ns

    def entered(self, held_ns: int) -> None:
        """Back from the host, which held this vCPU for ``held_ns``."""
        self._woken = True
        self._excused_ns += held_ns

    def paused(self, ns: int) -> None:
        """The guest clock was level with the wall clock for so long."""
        self._excused_ns += ns
        self._acc.add(VC_PAUSED_NS, ns)

    def settle(self, now_ns: int) -> None:
        """Since guest mode was left: what was not held, stolen or paused is the emulator's own time."""
        self._acc.add(VC_EMULATION_NS, max(0, now_ns - self._off_since_ns - self._excused_ns))
        self._excused_ns = 0
