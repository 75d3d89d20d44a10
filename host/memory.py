"""The host's view of shared memory: frames, nested tables, flush generations. `VmPort` is what the vm machine sees of it.

One object serves both worlds: it works on arrays and knows nothing of processes. It decides nothing; host/vm.py does.

Invariant: the vm machine reads and writes shared memory through its port only, so that a recorded run can be executed again without
any (host/logged.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import xxhash

from host import kernels
from proto import atomics
from proto.layout import NPT_P, NPT_W, VMC_FLUSH_GEN
from proto.pagetable import npt_clear, npt_get, npt_init, npt_set
from proto.units import PAGE_SIZE

U64Array = npt.NDArray[np.uint64]
I64Array = npt.NDArray[np.int64]
U8Array = npt.NDArray[np.uint8]


class VmMemory(NamedTuple):
    """One VM's shared arrays: its nested table, its control page (u64[512]) and its global vCPU numbers."""

    npt: U64Array
    vmc: U64Array
    first_cpu: int
    vcpus: int


class VmPort(Protocol):
    """What the vm machine reads and writes outside itself."""

    @property
    def frame_count(self) -> int:
        """Host frames."""
        ...

    @property
    def vm_count(self) -> int:
        """VMs of the run."""
        ...

    def zero(self, frame: int) -> None:
        """Fill a frame with zeros."""
        ...

    def is_zero(self, frame: int) -> bool:
        """Whether a frame is all zeros."""
        ...

    def checksum(self, frame: int) -> int:
        """Sum of a frame's contents, 64 bits."""
        ...

    def read32(self, frame: int, offset: int) -> int:
        """Aligned 32-bit word of a frame."""
        ...

    def write32(self, frame: int, offset: int, value: int) -> None:
        """Store an aligned 32-bit word into a frame."""
        ...

    def page(self, frame: int) -> memoryview:
        """The 4096 bytes of a frame."""
        ...

    def write_page(self, frame: int, page: bytes) -> None:
        """Fill a frame with 4096 bytes."""
        ...

    def map(self, vm: int, gfn: int, frame: int, writable: bool) -> None:
        """Install a nested leaf."""
        ...

    def map_zeroed(self, vm: int, hvps: I64Array, frames: I64Array, gfn_minus_hvp: int) -> None:
        """Fill the frames with zeros and map them writable, i64[n] each."""
        ...

    def mapped(self, vm: int, gfn: int) -> tuple[bool, bool]:
        """(present, writable) of a nested leaf."""
        ...

    def unmap(self, vm: int, gfn: int) -> int:
        """Clear a nested leaf, returning the old entry."""
        ...

    def pick_victims(
        self, vm: int, state: U8Array, flags: U8Array, first_hvp: int, pages: int, first_gfn: int, hand: int,
        want: int, out: I64Array,
    ) -> tuple[int, int]:  # fmt: skip
        """`host.kernels.pick_victims` on the nested table of ``vm``: (new hand, victims)."""
        ...

    def bump_generation(self, vm: int) -> int:
        """Start a flush of every vCPU of the VM; returns the new generation."""
        ...

    def oldest_generation(self, vm: int, current: int) -> int:
        """The oldest generation some vCPU may still translate with, at most ``current``."""
        ...


class HostMemory:
    """Frames u64[n * 512], vCPU pages u64[vcpus * 512] and the VMs' arrays."""

    __slots__ = ("_bytes", "_halves", "aged", "aged_count", "frame_count", "frames", "vcpus", "vms")

    def __init__(self, frames: U64Array, vcpus: U64Array, vms: Sequence[VmMemory]) -> None:
        self.frames = frames
        self.frame_count = len(frames) // 512
        self.vcpus = vcpus
        self.vms = tuple(vms)
        self._bytes = frames.data.cast("B")
        self._halves = self._bytes.cast("I")
        self.aged: U8Array = np.zeros(0, np.uint8)
        """What the nested entries told the last `pick_victims` (AGED_*, host/kernels.py); longer than what it looked at."""
        self.aged_count = 0
        for vm in self.vms:
            npt_init(vm.npt)

    @property
    def vm_count(self) -> int:
        """VMs of the run."""
        return len(self.vms)

    def zero(self, frame: int) -> None:
        """Fill a frame with zeros."""
        kernels.zero_frame(self.frames, frame)

    def is_zero(self, frame: int) -> bool:
        """Whether a frame is all zeros."""
        return bool(kernels.frame_is_zero(self.frames, frame))

    def checksum(self, frame: int) -> int:
        """xxh3 (64 bits) of a frame: 0.16 us of a core, so every page is verified."""
        at = frame * PAGE_SIZE
        return xxhash.xxh3_64_intdigest(self._bytes[at : at + PAGE_SIZE])

    def read32(self, frame: int, offset: int) -> int:
        """Aligned 32-bit word of a frame."""
        return self._halves[(frame * PAGE_SIZE + offset) >> 2]

    def write32(self, frame: int, offset: int, value: int) -> None:
        """Store an aligned 32-bit word into a frame."""
        self._halves[(frame * PAGE_SIZE + offset) >> 2] = value

    def page(self, frame: int) -> memoryview:
        """The 4096 bytes of a frame."""
        return self._bytes[frame * PAGE_SIZE : (frame + 1) * PAGE_SIZE]

    def write_page(self, frame: int, page: bytes) -> None:
        """Fill a frame with 4096 bytes."""
        self._bytes[frame * PAGE_SIZE : (frame + 1) * PAGE_SIZE] = page

    def map(self, vm: int, gfn: int, frame: int, writable: bool) -> None:
        """Install a nested leaf."""
        npt_set(self.vms[vm].npt, gfn, frame, writable)

    def map_zeroed(self, vm: int, hvps: I64Array, frames: I64Array, gfn_minus_hvp: int) -> None:
        """Fill the frames with zeros and map them writable, i64[n] each."""
        kernels.map_zeroed(self.frames, self.vms[vm].npt, hvps, frames, gfn_minus_hvp)

    def mapped(self, vm: int, gfn: int) -> tuple[bool, bool]:
        """(present, writable) of a nested leaf."""
        entry = int(npt_get(self.vms[vm].npt, gfn))
        return bool(entry & NPT_P), bool(entry & NPT_W)

    def unmap(self, vm: int, gfn: int) -> int:
        """Clear a nested leaf, returning the old entry. The caller bumps the generation before the frame is touched."""
        return int(npt_clear(self.vms[vm].npt, gfn))

    def pick_victims(
        self, vm: int, state: U8Array, flags: U8Array, first_hvp: int, pages: int, first_gfn: int, hand: int,
        want: int, out: I64Array,
    ) -> tuple[int, int]:  # fmt: skip
        """See `VmPort.pick_victims`. The caller bumps the generation before the victims' frames are touched."""
        if len(self.aged) < 2 * pages:
            self.aged = np.zeros(2 * pages, np.uint8)
        hand, found, self.aged_count = kernels.pick_victims(
            self.vms[vm].npt, self.aged, True, state, flags, first_hvp, pages, first_gfn, hand, want, out
        )
        return int(hand), int(found)

    def bump_generation(self, vm: int) -> int:
        """Start a flush of every vCPU of the VM (seq_cst, after the entries were cleared); returns the new generation."""
        return int(atomics.py_add(self.vms[vm].vmc, VMC_FLUSH_GEN, np.uint64(1))) + 1

    def oldest_generation(self, vm: int, current: int) -> int:
        """The oldest generation some vCPU may still translate with; ``current`` when all have flushed or are outside."""
        m = self.vms[vm]
        return int(kernels.grace_generation(self.vcpus, m.first_cpu, m.vcpus, current))
