"""What the host's shell makes of a run's topology and segments before the first message: its memory, its machines, and where their
observations go.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from host.memory import HostMemory, U64Array, VmMemory, VmPort
from host.observe import Observer
from host.peers import Peer
from host.schedule import Guest
from host.slots import Memslot, Region
from host.swap import SwapMachine
from host.vcpu import VcpuMachine
from host.vm import Limits, VmMachine
from proto.kvm import AREA_BYTES
from proto.machine import Machine
from proto.profile import PROFILES
from proto.run import RunContext
from proto.stats import HostCounter, HostHist, StatsBlock
from proto.topology import PAGES_PER_MIB, Topology
from proto.trace import Kind, TraceWriter
from proto.units import PAGE_SIZE, WORDS_PER_PAGE
from proto.wire import Role

AREAS_PER_PAGE: Final = PAGE_SIZE // AREA_BYTES
PAGES_PER_INSTRUCTION: Final = 8
"""The page, four guest tables, the shared area, a table and a page that are to be linked in."""


BAD_TRACED_MAX: Final = 1000
ROLES: Final = {"L": Role.LAUNCHER, "V": Role.VCPU, "S": Role.SWAPD}
"""By the letter of a peer's name."""


class ShellObserver:
    """Counters in the stats segment, events in the trace file."""

    __slots__ = ("_bad_traced", "ready", "stats", "writer")

    def __init__(self, stats: StatsBlock, writer: TraceWriter) -> None:
        self.stats = stats
        self.writer = writer
        self.ready: list[tuple[int, int]] | None = None
        """(vm, vcpu_id) of "page ready"s that were handed over since the shell looked; None: nobody looks."""
        self._bad_traced = 0

    def bad_message(self, peer: Peer | None, code: int, kind: int, *, ours: bool = False) -> None:
        """A message with number ``kind`` was dropped for ``code`` (`Nack`): the ``peer``'s, or one of `ours` by it.

        Always counted. The first `BAD_TRACED_MAX` are events: a peer that floods the host must not fill its trace, too.
        """
        self.count(HostCounter.BAD_MESSAGES)
        if self._bad_traced < BAD_TRACED_MAX:
            self._bad_traced += 1
            role, number = (ROLES[peer[0]], peer[1]) if peer is not None else (0, 0)
            self.trace(Kind.NACKED if ours else Kind.BAD_MESSAGE, token=kind, a=role, b=number, c=code)

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
        if self.ready is not None and kind is Kind.ASYNC_PF_READY:
            self.ready.append((vm, vcpu))


def spare_pages(topology: Topology, vm: int) -> int:
    """Host pages that a guest has beside those its memory is on: room for each move of a memslot."""
    return sum(event.pages for event in topology.event if event.do == "slot_move" and event.vm == vm)


def regions(topology: Topology) -> list[Region]:
    """The host memory of each VM, one VM after the other: what its memslot maps, then its spare pages."""
    found = []
    base = 0
    for v, vm in enumerate(topology.vm):
        pages = vm.memory_mib * PAGES_PER_MIB + spare_pages(topology, v)
        found.append(Region(v, base, pages))
        base += pages
    return found


def memslots(topology: Topology) -> list[Memslot]:
    """One memslot per VM, from the first page of its host memory on."""
    return [
        Memslot(region.vm, 0, topology.vm[region.vm].memory_mib * PAGES_PER_MIB, region.first_hvp)
        for region in regions(topology)
    ]


def water_marks(topology: Topology) -> Limits:
    """Water marks of the topology in frames; the low mark never below what one batch of landing frames needs."""
    frames = topology.allowance_pages
    host = topology.host
    low = max(16, int(frames * host.low_water_percent / 100))
    high = max(low + 16, int(frames * host.high_water_percent / 100))
    areas = sum(-(-vm.vcpus // AREAS_PER_PAGE) for vm in topology.vm)
    least = least_frames(topology.total_vcpus, frames)
    return Limits(low, high, host.populate_pages, host.zero_pages, areas, least)


def least_frames(vcpus: int, frames: int) -> int:
    """Frames that must be able to change their page, or nobody gets anywhere: what an instruction of each vCPU touches."""
    return min(PAGES_PER_INSTRUCTION * vcpus, frames // 2)


def _control_page(ctx: RunContext, vm: int) -> U64Array:
    """Behind the page of the run."""
    return ctx.segments["control"].u64[(1 + vm) * WORDS_PER_PAGE : (2 + vm) * WORDS_PER_PAGE]


def host_memory(ctx: RunContext) -> HostMemory:
    """Frames, page tables, vCPU pages and control pages, as they lie in the run's segments."""
    vms = [
        VmMemory(ctx.segments[f"npt-{v}"].u64, _control_page(ctx, v), ctx.first_cpu(v), vm.vcpus)
        for v, vm in enumerate(ctx.topology.vm)
    ]
    return HostMemory(ctx.segments["frames"].u64, ctx.segments["vcpus"].u64, vms)


def guests(ctx: RunContext) -> list[Guest]:
    """What the schedule works on, for each VM."""
    return [
        Guest(_control_page(ctx, v), ctx.segments[f"kernel-{v}"].u64, slot.base_hvp + slot.pages)
        for v, slot in enumerate(memslots(ctx.topology))
    ]


def vcpus_of_vms(ctx: RunContext) -> list[list[int]]:
    """Global vCPU numbers of each VM, first one first."""
    return [
        list(range(ctx.first_cpu(v), ctx.first_cpu(v) + vm.vcpus)) for v, vm in enumerate(ctx.topology.vm)
    ]


class HostMachines(NamedTuple):
    """The machines of a host."""

    vm: VmMachine
    swap: SwapMachine
    vcpus: list[VcpuMachine]

    def all(self) -> list[Machine]:
        """Every machine, in a fixed order."""
        return [self.vm, self.swap, *self.vcpus]


def build_machines(
    topology: Topology, slots: Sequence[int], memory: VmPort, observer: Observer
) -> HostMachines:
    """Fresh machines for a run. ``slots``: blocks of each daemon's swap file."""
    profile = PROFILES[topology.run.profile]
    host_async = topology.run.mode != "sync"
    numbers = [(v, vcpu_id) for v, vm in enumerate(topology.vm) for vcpu_id in range(vm.vcpus)]
    return HostMachines(
        VmMachine(memory, memslots(topology), water_marks(topology), observer, regions(topology)),
        SwapMachine(slots, observer, topology.host.replicas, topology.hedge_ns),
        [VcpuMachine(cpu, v, i, profile, host_async, observer) for cpu, (v, i) in enumerate(numbers)],
    )
