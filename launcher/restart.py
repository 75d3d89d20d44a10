"""A run that is saved and restored: one set of processes after the other, an image in between.

Purpose: say at which measured times a run is saved (`Moves`), what of shared memory goes from an image into fresh segments
(`fill`), and which image a topology may go on from (`check_identity`).

What goes on: guest memory, guest kernels, vCPUs; the counters of the vCPUs and, within one run, those of the host and the latency
histograms, so that the summary tells of all parts as of one; the shadow by which the guests' reads are checked. What does not: host,
swap files, queues, translations, run tokens.

Not handled here: the host's part (host/image.py), processes (launcher/execute.py).
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from guest.registers import Registers
from host.image import SECTIONS
from host.setup import memslots
from host.slots import Memslot, Slots
from host.state import VcpuState
from proto.errors import UserError
from proto.image import ImageReader
from proto.layout import VP_COUNTERS, VP_COUNTERS_LEN, VP_TASK
from proto.segments import Segment
from proto.topology import PAGES_PER_MIB, Topology
from proto.units import WORDS_PER_PAGE

S: Final = 1_000_000_000
SAME_VERSION: Final = "the image of a run of this version"
MEMSLOTS_MAX: Final = 2048
"""The host looks at each for each: more would hold it up for long, and nobody has so many."""
REGISTERS_END: Final = 32
"""Words VP_TASK to here of a vCPU's page are registers of the guest CPU (proto/layout.py)."""

U64 = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class Moves:
    """When a run is saved. Times are measured time, ns.

    restart_at_ns: and restored into a fresh set of processes, which goes on. save_at_ns: and ends there, leaving `image`. restore: the
    image that the run begins with.
    """

    restart_at_ns: tuple[int, ...] = ()
    save_at_ns: int = 0
    image: Path | None = None
    restore: Path | None = None

    @property
    def times_ns(self) -> tuple[int, ...]:
        """Every save, in order."""
        return (*self.restart_at_ns, *((self.save_at_ns,) if self.save_at_ns else ()))

    def check(self, topology: Topology) -> None:
        """Raises UserError for what the run cannot do."""
        end_ns = int(topology.run.seconds * S)
        begin_ns = 0
        if self.times_ns or self.restore is not None:
            _check_schedules(topology)
        if self.restore is not None:
            with ImageReader(self.restore) as image:
                begin_ns = check_identity(image, topology)
                image.check_pages()
        option = "--restart-at" if self.restart_at_ns else "--save-at"
        last_ns = begin_ns
        for time_ns in self.times_ns:
            if not last_ns < time_ns < end_ns:
                after = f"after {last_ns / S:g} s and " if last_ns else ""
                raise UserError(
                    "a save at a time that does not come",
                    where=option,
                    found=f"{time_ns / S:g} s",
                    allowed=f"{after}before the measured time ends (run.seconds = {topology.run.seconds:g})",
                )
            last_ns = time_ns
        if begin_ns >= end_ns:
            raise UserError(
                "the image was saved when the measured time was over",
                where="--restore",
                found=f"{begin_ns / S:g} s of run.seconds = {topology.run.seconds:g}",
                allowed="more seconds than that (--seconds)",
            )
        if self.image is not None and (self.image.exists() or not self.image.parent.is_dir()):
            raise UserError(
                "the image cannot be put there",
                where="--image",
                found=str(self.image),
                allowed="a file that does not exist, in a folder that does",
            )


def _check_schedules(topology: Topology) -> None:
    """A fresh host would not know what of a schedule has been done, and a CPU that is offline never comes to a save point."""
    for key, what, planned in (("event", "events", topology.event), ("fault", "faults", topology.fault)):
        if planned:
            raise UserError(
                f"a run with scheduled {what} cannot be saved or restored",
                where=topology.file,
                key=key,
                found=len(planned),
                allowed=f"a topology without [[{key}]]",
            )


def check_identity(image: ImageReader, topology: Topology) -> int:
    """Whether the topology describes the guests of the image; the measured time at its save, ns. Raises UserError."""
    meta, wanted = image.meta, topology.guest_identity()
    elapsed_ns: Any = meta.get("elapsed_ns")
    vcpus = meta.get("vcpus")
    if (
        not _is_counter(elapsed_ns)
        or not _is_counter(meta.get("lamport"))
        or not isinstance(vcpus, list)
        or not isinstance(meta.get("identity"), dict)
    ):
        raise UserError(
            "not the image of a run", where=str(image.path), allowed="one that `run --save-at` wrote"
        )
    _check_records(image, vcpus, len(topology.vm))
    difference = _difference(meta["identity"], wanted)
    if not difference and len(vcpus) != topology.total_vcpus:
        difference = f"vCPUs: the image has {len(vcpus)}, the topology {topology.total_vcpus}"
    pages = topology.guest_pages
    if not difference and image.pages != pages:
        difference = (
            f"memory: the image has {image.pages // PAGES_PER_MIB} MiB, the topology {pages // PAGES_PER_MIB}"
        )
    if difference:
        raise UserError(
            f"the image is of other guests: {difference}",
            where=str(image.path),
            found=topology.file or topology.run.name,
            allowed="the topology it was saved with; host, swapd and run.seconds may differ",
        )
    _check_layout(image, topology)
    return int(elapsed_ns)


def _check_layout(image: ImageReader, topology: Topology) -> None:
    """The memslots as the host will set them: it takes them as they are."""
    try:
        Slots(memslots(topology), len(topology.vm)).replace(
            [Memslot(*slot) for slot in image.meta["memslots"]]
        )
    except ValueError as error:
        raise UserError(f"memslots: {error}", where=str(image.path), allowed=SAME_VERSION) from error


def _check_records(image: ImageReader, vcpus: list[Any], vms: int) -> None:
    """What the host and the vCPUs will be given. UserError for what is no record of theirs."""
    what = ""
    try:
        for cpu, saved in enumerate(vcpus):
            what = f"vCPU {cpu}"
            VcpuState.from_plain(saved["state"])
            Registers.from_words(saved["registers"])
        what = "memslots"
        good = len(image.meta["memslots"]) <= MEMSLOTS_MAX and all(
            all(map(_is_counter, (vm, base_gfn, pages, base_hvp)))
            and vm < vms
            and base_hvp + pages <= image.pages
            for vm, base_gfn, pages, base_hvp in image.meta["memslots"]
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{what}: {error}", where=str(image.path), allowed=SAME_VERSION) from error
    if not good:
        raise UserError(
            "memslots: outside of the image, or too many", where=str(image.path), allowed=SAME_VERSION
        )


def _is_counter(value: Any) -> bool:
    """A count or a time that fits in 63 bits, as everything here that only grows."""
    return type(value) is int and 0 <= value < 1 << 63


def _difference(saved: Any, wanted: Any, where: str = "") -> str:
    """The first place where two plain values differ; "" if none."""
    if isinstance(saved, dict) and isinstance(wanted, dict):
        # Keys of an image may be of any type.
        for key in sorted(set(saved) | set(wanted), key=repr):
            if found := _difference(saved.get(key), wanted.get(key), f"{where}.{key}" if where else key):
                return found
        return ""
    if isinstance(saved, list | tuple) and isinstance(wanted, list | tuple):
        for k in range(max(len(saved), len(wanted))):
            one, other = (values[k] if k < len(values) else None for values in (saved, wanted))
            if found := _difference(one, other, f"{where}[{k}]"):
                return found
        return ""
    if saved == wanted:
        return ""
    has = reprlib.repr(saved)
    return f"{where}: the image has {has}, the topology {wanted!r}"


def fill(image: ImageReader, segments: Mapping[str, Segment], vms: int) -> None:
    """Put what the image holds of shared memory into fresh segments. UserError for sections that do not fit."""
    for v in range(vms):
        for name in SECTIONS:
            segments[f"{name}-{v}"].u8[:] = _section(image, f"{name}-{v}", segments[f"{name}-{v}"])
    pages = _section(image, "vcpus", segments["vcpus"]).view(np.uint64).reshape(-1, WORDS_PER_PAGE)
    fresh = segments["vcpus"].u64.reshape(-1, WORDS_PER_PAGE)
    # Neither the mode nor the doorbell of a process that is gone.
    for first, last in ((VP_TASK, REGISTERS_END), (VP_COUNTERS, VP_COUNTERS + VP_COUNTERS_LEN)):
        fresh[:, first:last] = pages[:, first:last]


def _section(image: ImageReader, name: str, segment: Segment) -> npt.NDArray[np.uint8]:
    data = np.frombuffer(image.section(name), np.uint8)
    if len(data) != segment.size_bytes:
        raise UserError(
            f"section {name} of the image does not fit",
            where=str(image.path),
            found=f"{len(data)} bytes",
            allowed=f"{segment.size_bytes}",
        )
    return data


@dataclass(slots=True)
class Carried:
    """What goes from one set of processes of a run to the next beside the image, and what of it the summary tells.

    stats: the segment of that name. down_ns: time in which the guests did not run. done: restores so far. lamport: what the counters of
    the next set begin above.
    """

    stats: U64 | None = None
    down_ns: int = 0
    done: int = 0
    lamport: int = 0

    def take(self, segments: Mapping[str, Segment]) -> None:
        """Everybody has left; the segments are about to go."""
        self.stats = segments["stats"].u64.copy()

    def put(self, segments: Mapping[str, Segment]) -> None:
        """Into the fresh segments."""
        if self.stats is not None:
            segments["stats"].u64[:] = self.stats

    def went_on(self, before_ns: int, start_ns: int, *, resumed: bool) -> None:
        """A set is over. before_ns, start_ns: the start of the measured time as the set before and this one counted it, 0 = never.

        A restore moves it by as long as the guests stood still.
        """
        if resumed and start_ns not in (0, before_ns):
            self.done += 1
            self.down_ns += start_ns - before_ns if before_ns else 0

    def facts(self, moves: Moves, image_pages: int) -> dict[str, Any] | None:
        """The `save_restore` table of the summary; None for a run that was not to be moved."""
        if not moves.times_ns and moves.restore is None:
            return None
        planned = len(moves.restart_at_ns) + (moves.restore is not None)
        return {
            "planned": planned,
            "done": self.done,
            "down_ms": round(self.down_ns / 1e6, 3),
            "image_pages": image_pages,
        }
