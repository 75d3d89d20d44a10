"""The host's machines between ports that record, and between ports that replay (proto/rerun.py).

Each class here stands for one of the two things that the host's machines use outside of themselves: memory (`host.memory.VmPort`) and
observer (`host.observe.Observer`). A call is one act: its op code, its arguments, its results.

Invariant: for each op the recording and the replaying port name the same arguments in the same order; a test runs both.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from host import events as ev
from host import kernels
from host.memory import HostMemory, I64Array, U8Array
from host.observe import Observer
from host.setup import HostMachines, build_machines
from proto import inputlog
from proto.inputlog import Description, InputLogWriter, Op
from proto.records import RecordTypes
from proto.rerun import Departure, InputRecorder, Tape, op_table
from proto.stats import HostCounter, HostHist
from proto.topology import Topology
from proto.trace import Kind
from proto.wire import ExitReason, Held, Inject

ROLE: Final = "host"

OP_COUNT: Final = 1
OP_GAUGE: Final = 2
OP_LATENCY: Final = 3
OP_TRACE: Final = 4
OP_ZERO: Final = 5
OP_IS_ZERO: Final = 6
OP_CHECKSUM: Final = 7
OP_READ32: Final = 8
OP_WRITE32: Final = 9
OP_MAP: Final = 10
OP_MAP_ZEROED: Final = 11
OP_MAPPED: Final = 12
OP_UNMAP: Final = 13
OP_PICK_VICTIMS: Final = 14
OP_BUMP: Final = 15
OP_OLDEST: Final = 16
OP_PAGE: Final = 17
OP_WRITE_PAGE: Final = 18

OPS: Final = op_table((
    (OP_COUNT, Op("count", ("counter", "n"))),
    (OP_GAUGE, Op("gauge", ("counter", "value"))),
    (OP_LATENCY, Op("latency", ("histogram", "ns"))),
    (OP_TRACE, Op("trace", ("kind", "vcpu", "vm", "token", "a", "b", "c"))),
    (OP_ZERO, Op("zero", ("frame",))),
    (OP_IS_ZERO, Op("is_zero", ("frame",), "b")),
    (OP_CHECKSUM, Op("checksum", ("frame",), "i")),
    (OP_READ32, Op("read32", ("frame", "offset"), "i")),
    (OP_WRITE32, Op("write32", ("frame", "offset", "value"))),
    (OP_MAP, Op("map", ("vm", "gfn", "frame", "writable"))),
    (OP_MAP_ZEROED, Op("map_zeroed", ("vm", "gfn_minus_hvp", "pages"))),
    (OP_MAPPED, Op("mapped", ("vm", "gfn"), "bb")),
    (OP_UNMAP, Op("unmap", ("vm", "gfn"), "i")),
    (OP_PICK_VICTIMS, Op("pick_victims", ("vm", "first_gfn", "hand", "want"), "y")),
    (OP_BUMP, Op("bump_generation", ("vm",), "i")),
    (OP_OLDEST, Op("oldest_generation", ("vm", "current"), "i")),
    (OP_PAGE, Op("page", ("frame",), "y")),
    (OP_WRITE_PAGE, Op("write_page", ("frame", "page"))),
))  # fmt: skip

WORDS: Final[dict[str, type[IntEnum]]] = {"counter": HostCounter, "histogram": HostHist, "kind": Kind}
"""Arguments of acts that are numbers of something."""

TYPES: Final = RecordTypes(
    (cls for cls in vars(ev).values() if isinstance(cls, type) and cls.__module__ == ev.__name__ and hasattr(cls, "_fields")),
    {
        "Exit.reason": ExitReason, "Entry.inject": Inject, "Entry.held_kind": Held, "Answer.value": ev.Found,
    },
)  # fmt: skip
"""All that the host's machines tell each other, and what the shell tells them."""


# ---- recording -------------------------------------------------------------------------------------------
class RecordingObserver:
    """An observer that writes down what it passes on."""

    __slots__ = ("_acts", "_inner")

    def __init__(self, inner: Observer, acts: list[Any]) -> None:
        self._inner = inner
        self._acts = acts

    def count(self, counter: HostCounter, n: int = 1) -> None:
        """See host.observe.Observer."""
        self._acts += (OP_COUNT, counter, n)
        self._inner.count(counter, n)

    def gauge(self, counter: HostCounter, value: int) -> None:
        """See host.observe.Observer."""
        self._acts += (OP_GAUGE, counter, value)
        self._inner.gauge(counter, value)

    def record(self, hist: HostHist, value_ns: int) -> None:
        """See host.observe.Observer."""
        self._acts += (OP_LATENCY, hist, value_ns)
        self._inner.record(hist, value_ns)

    def trace(
        self, kind: Kind, *, vcpu: int = 0, vm: int = 0, token: int = 0, a: int = 0, b: int = 0, c: int = 0
    ) -> None:
        """See host.observe.Observer."""
        self._acts += (OP_TRACE, kind, vcpu, vm, token, a, b, c)
        self._inner.trace(kind, vcpu=vcpu, vm=vm, token=token, a=a, b=b, c=c)


class RecordingMemory:
    """A memory port that writes down what it does and what it read."""

    __slots__ = ("_acts", "_inner", "frame_count", "vm_count")

    def __init__(self, inner: HostMemory, acts: list[Any]) -> None:
        self._inner = inner
        self._acts = acts
        self.frame_count = inner.frame_count
        self.vm_count = inner.vm_count

    def zero(self, frame: int) -> None:
        """See host.memory.VmPort."""
        self._acts += (OP_ZERO, frame)
        self._inner.zero(frame)

    def is_zero(self, frame: int) -> bool:
        """See host.memory.VmPort."""
        found = self._inner.is_zero(frame)
        self._acts += (OP_IS_ZERO, frame, found)
        return found

    def checksum(self, frame: int) -> int:
        """See host.memory.VmPort."""
        found = self._inner.checksum(frame)
        self._acts += (OP_CHECKSUM, frame, found)
        return found

    def read32(self, frame: int, offset: int) -> int:
        """See host.memory.VmPort."""
        found = self._inner.read32(frame, offset)
        self._acts += (OP_READ32, frame, offset, found)
        return found

    def write32(self, frame: int, offset: int, value: int) -> None:
        """See host.memory.VmPort."""
        self._acts += (OP_WRITE32, frame, offset, value)
        self._inner.write32(frame, offset, value)

    def page(self, frame: int) -> memoryview:
        """See host.memory.VmPort."""
        found = self._inner.page(frame)
        self._acts += (OP_PAGE, frame, bytes(found))
        return found

    def write_page(self, frame: int, page: bytes) -> None:
        """See host.memory.VmPort."""
        self._acts += (OP_WRITE_PAGE, frame, page)
        self._inner.write_page(frame, page)

    def map(self, vm: int, gfn: int, frame: int, writable: bool) -> None:
        """See host.memory.VmPort."""
        self._acts += (OP_MAP, vm, gfn, frame, writable)
        self._inner.map(vm, gfn, frame, writable)

    def map_zeroed(self, vm: int, hvps: I64Array, frames: I64Array, gfn_minus_hvp: int) -> None:
        """See host.memory.VmPort."""
        self._acts += (OP_MAP_ZEROED, vm, gfn_minus_hvp, _pairs(hvps, frames))
        self._inner.map_zeroed(vm, hvps, frames, gfn_minus_hvp)

    def mapped(self, vm: int, gfn: int) -> tuple[bool, bool]:
        """See host.memory.VmPort."""
        present, writable = self._inner.mapped(vm, gfn)
        self._acts += (OP_MAPPED, vm, gfn, present, writable)
        return present, writable

    def unmap(self, vm: int, gfn: int) -> int:
        """See host.memory.VmPort."""
        entry = self._inner.unmap(vm, gfn)
        self._acts += (OP_UNMAP, vm, gfn, entry)
        return entry

    def pick_victims(
        self, vm: int, state: U8Array, flags: U8Array, first_hvp: int, pages: int, first_gfn: int, hand: int,
        want: int, out: I64Array,
    ) -> tuple[int, int]:  # fmt: skip
        """See host.memory.VmPort. What the nested entries said is the result; the victims follow from it."""
        inner = self._inner
        picked = inner.pick_victims(vm, state, flags, first_hvp, pages, first_gfn, hand, want, out)
        self._acts += (OP_PICK_VICTIMS, vm, first_gfn, hand, want, inner.aged[: inner.aged_count].tobytes())
        return picked

    def bump_generation(self, vm: int) -> int:
        """See host.memory.VmPort."""
        generation = self._inner.bump_generation(vm)
        self._acts += (OP_BUMP, vm, generation)
        return generation

    def oldest_generation(self, vm: int, current: int) -> int:
        """See host.memory.VmPort."""
        oldest = self._inner.oldest_generation(vm, current)
        self._acts += (OP_OLDEST, vm, current, oldest)
        return oldest


class Recording(NamedTuple):
    """A host whose machines are recorded: call them through ``recorder.on``, close ``log`` at the end."""

    machines: HostMachines
    recorder: InputRecorder
    log: InputLogWriter


def start_recording(
    folder: Path,
    run_id: str,
    topology: Topology,
    slots: Sequence[int],
    memory: HostMemory,
    observer: Observer,
) -> Recording:
    """Build the host's machines with ports that record, and the log in ``folder``. Raises UserError."""
    names = machine_names(topology)
    shapes = tuple(TYPES.shapes())
    log = InputLogWriter(
        folder / f"{ROLE}{inputlog.SUFFIX}", Description(ROLE, run_id, names, shapes, OPS, parks=False)
    )
    try:
        recorder = InputRecorder(TYPES, log)
        port, observed = RecordingMemory(memory, recorder.acts), RecordingObserver(observer, recorder.acts)
        machines = build_machines(topology, slots, port, observed)
        recorder.watch(machines.all())
    except BaseException:
        log.close()
        raise
    return Recording(machines, recorder, log)


def machine_names(topology: Topology) -> tuple[str, ...]:
    """Names of `HostMachines.all`, in its order."""
    return ("vm", "swap", *(f"vcpu-{cpu}" for cpu in range(topology.total_vcpus)))


# ---- replaying -------------------------------------------------------------------------------------------
class ReplayingObserver:
    """An observer that compares what it is told with what it was told then."""

    __slots__ = ("_take",)

    def __init__(self, tape: Tape) -> None:
        self._take = tape.take

    def count(self, counter: HostCounter, n: int = 1) -> None:
        """See host.observe.Observer."""
        self._take(OP_COUNT, counter, n)

    def gauge(self, counter: HostCounter, value: int) -> None:
        """See host.observe.Observer."""
        self._take(OP_GAUGE, counter, value)

    def record(self, hist: HostHist, value_ns: int) -> None:
        """See host.observe.Observer."""
        self._take(OP_LATENCY, hist, value_ns)

    def trace(
        self, kind: Kind, *, vcpu: int = 0, vm: int = 0, token: int = 0, a: int = 0, b: int = 0, c: int = 0
    ) -> None:
        """See host.observe.Observer."""
        self._take(OP_TRACE, kind, vcpu, vm, token, a, b, c)


class ReplayingMemory:
    """A memory port without memory: reads return what was read then."""

    __slots__ = ("_no_table", "_take", "frame_count", "vm_count")

    def __init__(self, tape: Tape, frame_count: int, vm_count: int) -> None:
        self._take = tape.take
        self._no_table = np.zeros(0, np.uint64)
        self.frame_count = frame_count
        self.vm_count = vm_count

    def zero(self, frame: int) -> None:
        """See host.memory.VmPort."""
        self._take(OP_ZERO, frame)

    def is_zero(self, frame: int) -> bool:
        """See host.memory.VmPort."""
        return bool(self._take(OP_IS_ZERO, frame)[0])

    def checksum(self, frame: int) -> int:
        """See host.memory.VmPort."""
        return int(self._take(OP_CHECKSUM, frame)[0])

    def read32(self, frame: int, offset: int) -> int:
        """See host.memory.VmPort."""
        return int(self._take(OP_READ32, frame, offset)[0])

    def write32(self, frame: int, offset: int, value: int) -> None:
        """See host.memory.VmPort."""
        self._take(OP_WRITE32, frame, offset, value)

    def page(self, frame: int) -> memoryview:
        """See host.memory.VmPort."""
        return memoryview(self._take(OP_PAGE, frame)[0])

    def write_page(self, frame: int, page: bytes) -> None:
        """See host.memory.VmPort."""
        self._take(OP_WRITE_PAGE, frame, page)

    def map(self, vm: int, gfn: int, frame: int, writable: bool) -> None:
        """See host.memory.VmPort."""
        self._take(OP_MAP, vm, gfn, frame, writable)

    def map_zeroed(self, vm: int, hvps: I64Array, frames: I64Array, gfn_minus_hvp: int) -> None:
        """See host.memory.VmPort."""
        self._take(OP_MAP_ZEROED, vm, gfn_minus_hvp, _pairs(hvps, frames))

    def mapped(self, vm: int, gfn: int) -> tuple[bool, bool]:
        """See host.memory.VmPort."""
        present, writable = self._take(OP_MAPPED, vm, gfn)
        return present, writable

    def unmap(self, vm: int, gfn: int) -> int:
        """See host.memory.VmPort."""
        return int(self._take(OP_UNMAP, vm, gfn)[0])

    def pick_victims(
        self, vm: int, state: U8Array, flags: U8Array, first_hvp: int, pages: int, first_gfn: int, hand: int,
        want: int, out: I64Array,
    ) -> tuple[int, int]:  # fmt: skip
        """See host.memory.VmPort. The same kernel, told what the nested entries said."""
        aged = np.frombuffer(self._take(OP_PICK_VICTIMS, vm, first_gfn, hand, want)[0], np.uint8).copy()
        hand, found, looked = kernels.pick_victims(
            self._no_table, aged, False, state, flags, first_hvp, pages, first_gfn, hand, want, out
        )
        if found < 0 or looked != len(aged):
            got = f"more than {looked}" if found < 0 else str(looked)
            raise Departure(f"{len(aged)} nested entries looked at for victims", got)
        return int(hand), int(found)

    def bump_generation(self, vm: int) -> int:
        """See host.memory.VmPort."""
        return int(self._take(OP_BUMP, vm)[0])

    def oldest_generation(self, vm: int, current: int) -> int:
        """See host.memory.VmPort."""
        return int(self._take(OP_OLDEST, vm, current)[0])


def build_for_replay(topology: Topology, slots: Sequence[int], tape: Tape) -> HostMachines:
    """The host's machines as a run builds them, between replaying ports."""
    memory = ReplayingMemory(tape, topology.allowance_pages, len(topology.vm))
    return build_machines(topology, slots, memory, ReplayingObserver(tape))


def _pairs(hvps: I64Array, frames: I64Array) -> tuple[int, ...]:
    """hvp, frame, hvp, frame, ... as ints."""
    return tuple(np.stack((hvps, frames), axis=1).ravel().tolist())
