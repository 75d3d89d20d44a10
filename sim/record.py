"""What a simulated run leaves behind: events in order, the host's counters. The observer of the host's machines.

Events appear in the order in which they happened; the machines of one instant run one after the other, so equal times are ordered, too.
"""

from __future__ import annotations

from collections import Counter
from typing import Final

from proto.events import FIELDS, Kind
from proto.stats import HostCounter, HostHist
from sim.events import Event

_WITH_TOKEN: Final = frozenset(
    (
        Kind.ASYNC_PF_NOT_PRESENT, Kind.ASYNC_PF_READY, Kind.ASYNC_PF_COMPLETED, Kind.CANCEL, Kind.SETUP_FAIL, Kind.INJ,
        Kind.SLOT_WRITE, Kind.PREFAULT, Kind.APIC_ACCEPT_IRQ,
    )
)  # fmt: skip
"""Kinds whose token says something even when it is 0."""


class Record:
    """Events and counters of one run (host.observe.Observer). ``now_ns`` is set by the world before a machine runs."""

    __slots__ = ("counts", "events", "now_ns", "quiet")

    def __init__(self) -> None:
        self.counts: Counter[HostCounter] = Counter()
        self.events: list[Event] = []
        self.now_ns = 0
        self.quiet = False
        """While the world is set up nothing is recorded."""

    def count(self, counter: HostCounter, n: int = 1) -> None:
        """See host.observe.Observer."""
        if not self.quiet:
            self.counts[counter] += n

    def gauge(self, counter: HostCounter, value: int) -> None:
        """Gauges of an instant mean nothing here."""

    def record(self, hist: HostHist, value_ns: int) -> None:
        """Latencies follow from the events."""

    def trace(
        self, kind: Kind, *, vcpu: int = 0, vm: int = 0, token: int = 0, a: int = 0, b: int = 0, c: int = 0
    ) -> None:
        """See host.observe.Observer."""
        fields = {"token": token} if token or kind in _WITH_TOKEN else {}
        fields |= {name: int(value) for name, value in zip(FIELDS[kind], (a, b, c), strict=False)}
        if vm:
            fields["vm"] = vm
        self.add("host", kind.name, vcpu, fields)

    def add(self, src: str, name: str, vcpu: int, fields: dict[str, int], after_ns: int = 0) -> None:
        """Append an event that happened ``after_ns`` from now."""
        if not self.quiet:
            self.events.append(Event(self.now_ns + after_ns, src, name, vcpu, fields))
