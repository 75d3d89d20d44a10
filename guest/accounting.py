"""What a vCPU tells about itself: counters in its page, latencies in its stats block, trace events. No rule reads them back.

Invariant: one writing process, so adding is a plain read and write.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from proto.layout import VP_COUNTERS
from proto.stats import StatsBlock
from proto.trace import Kind


class TraceSink(Protocol):
    """The part of a trace writer that a machine uses (proto/trace.py TraceWriter)."""

    lamport: int

    def event(
        self,
        kind: int,
        vcpu: int = 0,
        vm: int = 0,
        token: int = 0,
        a: int = 0,
        b: int = 0,
        c: int = 0,
        cause: int = 0,
    ) -> int:
        """Record an event; returns its Lamport counter."""
        ...

    def observe(self, lamport: int) -> None:
        """Later events come after this counter."""
        ...


class Accounting:
    """Counters (`VC_*`), histograms and trace of one vCPU. ``cause`` goes into every event until it is changed."""

    __slots__ = ("_stats", "_vcpu_id", "_vm", "_words", "cause", "interrupts", "trace")

    def __init__(
        self, vcpu_page: npt.NDArray[np.uint64], stats: StatsBlock, trace: TraceSink, vm: int, vcpu_id: int
    ) -> None:
        self._words = vcpu_page.data[VP_COUNTERS:]
        self._stats = stats
        self._vm = vm
        self._vcpu_id = vcpu_id
        self.trace = trace
        self.interrupts = 0
        """The CPU's interrupt flag, as far as kernel code goes."""
        self.cause = 0

    def add(self, counter: int, n: int = 1) -> None:
        """Add ``n`` >= 0."""
        self._words[counter] += n

    def set(self, counter: int, value: int) -> None:
        """Set to a value in [0, 2^64)."""
        self._words[counter] = value

    def get(self, counter: int) -> int:
        """Current value."""
        return int(self._words[counter])

    def raise_to(self, counter: int, value: int) -> None:
        """Keep the largest value seen."""
        self._words[counter] = max(self._words[counter], value)

    def latency(self, hist: int, ns: int) -> None:
        """Put a duration into a histogram (VcpuHist)."""
        self._stats.record(hist, ns)

    def event(self, kind: Kind, token: int = 0, a: int = 0, b: int = 0, c: int = 0) -> None:
        """Trace an event of this vCPU. Call it before publishing what it tells about, and after observing."""
        self.trace.event(kind, self._vcpu_id, self._vm, token, a, b, c, self.cause)
