"""What the host's shell makes of a topology before the first message: memslots, water marks, and where observations go."""

from __future__ import annotations

from host.slots import Memslot
from host.vm import Limits
from proto.stats import HostCounter, HostHist, StatsBlock
from proto.topology import Topology
from proto.trace import Kind, TraceWriter


class ShellObserver:
    """Counters in the stats segment, events in the trace file."""

    __slots__ = ("stats", "writer")

    def __init__(self, stats: StatsBlock, writer: TraceWriter) -> None:
        self.stats = stats
        self.writer = writer

    def count(self, counter: HostCounter, n: int = 1) -> None:
        """See host.observe.Observer."""
        self.stats.add(counter, n)

    def gauge(self, counter: HostCounter, value: int) -> None:
        """See host.observe.Observer."""
        self.stats.set(counter, value)

    def record(self, hist: HostHist, value_ns: int) -> None:
        """See host.observe.Observer."""
        self.stats.record(hist, value_ns)

    def trace(
        self, kind: Kind, *, vcpu: int = 0, vm: int = 0, token: int = 0, a: int = 0, b: int = 0, c: int = 0
    ) -> None:
        """See host.observe.Observer."""
        self.writer.event(kind, vcpu, vm, token, a, b, c)


def memslots(topology: Topology) -> list[Memslot]:
    """One memslot per VM, host virtual pages one VM after the other."""
    slots = []
    base = 0
    for v, vm in enumerate(topology.vm):
        pages = vm.memory_mib * 256
        slots.append(Memslot(v, 0, pages, base))
        base += pages
    return slots


def water_marks(topology: Topology) -> Limits:
    """Water marks of the topology in frames; the low mark never below what one batch of landing frames needs."""
    frames = topology.allowance_pages
    host = topology.host
    low = max(16, int(frames * host.low_water_percent / 100))
    high = max(low + 16, int(frames * host.high_water_percent / 100))
    return Limits(low, high, host.populate_pages, host.zero_pages)
