"""What machines tell about themselves: counters, latencies, trace events. Output only: no machine ever reads it back."""

from __future__ import annotations

from typing import Protocol

from proto.stats import HostCounter, HostHist
from proto.trace import Kind


class Observer(Protocol):
    """Given to every machine by its world."""

    def count(self, counter: HostCounter, n: int = 1) -> None:
        """Add to a counter."""
        ...

    def gauge(self, counter: HostCounter, value: int) -> None:
        """Set a gauge."""
        ...

    def record(self, hist: HostHist, value_ns: int) -> None:
        """Add one latency."""
        ...

    def trace(
        self, kind: Kind, *, vcpu: int = 0, vm: int = 0, token: int = 0, a: int = 0, b: int = 0, c: int = 0
    ) -> None:
        """Append a trace event (proto/trace.py says what a, b, c mean for each kind)."""
        ...
