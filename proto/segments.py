"""Shared memory of a run: memfds without names, mapped shared into every process that may see them.

Purpose: decide the size of every segment (`plan`), create them (`create`), map them again from received
descriptors (`attach`).

Invariants: a segment is a whole number of pages, zero when created, mapped at a 2 MiB boundary in every
process, and its size is sealed: nobody can truncate it under the others. It has no name, so nothing is left
behind whoever is killed.

Not handled here: what lies in a segment (proto/layout.py, proto/pcpu.py, proto/stats.py), passing descriptors
on, and use after `Segment.close`: the arrays given out before it must not be touched any more.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from proto import pcpu, stats
from proto.errors import UserError
from proto.faults import words_needed
from proto.layout import control_words, kernel_words, npt_tables
from proto.topology import PAGES_PER_MIB, Topology
from proto.units import PAGE_SIZE

HUGE_BYTES: Final = 2 << 20
"""Alignment of every mapping: the size of one huge page."""
MADV_COLLAPSE: Final = 25
"""Linux 6.1+; not in Python's mmap module. Works on shared memory whatever the sysfs switches say."""
PROT_NONE: Final = 0
"""Not in Python's mmap module, as MAP_FIXED."""
MAP_FIXED: Final = 0x10
MAP_FAILED: Final = ctypes.c_void_p(-1).value
SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
COLLAPSED: Final = ("frames",)
"""Collapsing allocates the whole segment, which only the frames need anyway: reclaim starts when they are
used up.
"""
MIB: Final = 1 << 20
CONTAINER_BOUND: Final = "what the memory limit of this container or cgroup leaves"
MEMINFO: Final = Path("/proc/meminfo")
CGROUP: Final = Path("/proc/self/cgroup")
CGROUP_ROOT: Final = Path("/sys/fs/cgroup")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

# Closing needs no memory.
_NO_BYTES: Final = np.empty(0, np.uint8)
_NO_HALVES: Final = np.empty(0, np.uint32)
_NO_WORDS: Final = np.empty(0, np.uint64)


class Segment:
    """One mapped segment.

    `u64`, `u32`, `u8` are views of the whole segment (little-endian words, 1-D, C-contiguous, writable).
    `collapse_errno` says what became of `collapse`: None not tried, 0 done, else the errno of the refusal. A
    forked child has the mapping too.
    """

    __slots__ = ("_address", "collapse_errno", "fd", "name", "size_bytes", "u8", "u32", "u64")

    def __init__(self, name: str, fd: int, size_bytes: int) -> None:
        """Map ``size_bytes`` of the memfd ``fd``, which the segment owns from now on. OSError when it cannot
        be mapped.
        """
        self.name = name
        self.fd = fd
        self.size_bytes = size_bytes
        self.collapse_errno: int | None = None
        self._address = _map_aligned(fd, size_bytes)
        try:
            buffer = (ctypes.c_uint8 * size_bytes).from_address(self._address)
            self.u8: npt.NDArray[np.uint8] = np.ctypeslib.as_array(buffer)
            self.u32: npt.NDArray[np.uint32] = self.u8.view(np.uint32)
            self.u64: npt.NDArray[np.uint64] = self.u8.view(np.uint64)
        except BaseException:
            _libc.munmap(self._address, size_bytes)
            raise

    @property
    def address(self) -> int:
        """Address of the first byte in this process; 0 after `close`."""
        return self._address

    def collapse(self) -> bool:
        """Back the segment with huge pages where the kernel does that; says whether it did. Allocates all of
        it.

        A refusal is not an error (old kernel, no contiguous memory): the segment works with small pages.
        """
        whole = self.size_bytes - self.size_bytes % HUGE_BYTES
        if not self._address or not whole:
            return False
        done: bool = _libc.madvise(self._address, whole, MADV_COLLAPSE) == 0
        self.collapse_errno = 0 if done else ctypes.get_errno()
        return done

    def close(self) -> None:
        """Unmap and close the descriptor, in this process only. Arrays taken from it before must not be used
        any more.
        """
        if not self._address:
            return
        # Our own views turn into empty arrays, so that `segment.u64[0]` afterwards is an IndexError and not a
        # crash.
        self.u8, self.u32, self.u64 = _NO_BYTES, _NO_HALVES, _NO_WORDS
        _libc.munmap(self._address, self.size_bytes)
        fd, self.fd, self._address = self.fd, -1, 0
        os.close(fd)


def plan(
    topology: Topology,
    tasks_per_vm: Sequence[int],
    shadow_words_per_vm: Sequence[int],
    trace_bytes: dict[str, int],
) -> dict[str, int]:
    """Name -> bytes of every segment of a run, whole pages.

    ``tasks_per_vm``: task records of each VM. ``shadow_words_per_vm``: u32 entries of each VM's shadow array.
    ``trace_bytes``: expanded size of each recorded trace, by segment name (``trace-0``, ...).
    """
    vms = topology.vm
    assert len(tasks_per_vm) == len(shadow_words_per_vm) == len(vms)
    cpus = sum(vm.vcpus for vm in vms)
    sizes = {
        "frames": topology.host.allowance_mib * MIB,
        "control": control_words(len(vms), len(topology.swapd)) * 8,
        "vcpus": cpus * PAGE_SIZE,
        "pcpu": pcpu.pcpu_words(cpus) * 8,
        "stats": stats.stats_words(cpus, len(topology.swapd)) * 8,
    }
    if topology.fault:
        sizes["faults"] = words_needed(len(topology.fault), len(topology.swapd)) * 8
    for v, vm in enumerate(vms):
        sizes[f"npt-{v}"] = npt_tables(vm.memory_mib * MIB // PAGE_SIZE) * PAGE_SIZE
        sizes[f"kernel-{v}"] = kernel_words(tasks_per_vm[v], vm.vcpus, vm.memory_mib * PAGES_PER_MIB) * 8
        sizes[f"shadow-{v}"] = shadow_words_per_vm[v] * 4
    for name in trace_bytes:
        assert name.startswith("trace-"), name
    return {name: _whole_pages(size) for name, size in (sizes | trace_bytes).items()}


def create(sizes: dict[str, int]) -> dict[str, Segment]:
    """Create and map the segments of a `plan`; "frames" with huge pages where possible.

    UserError when they do not fit into the memory that is free now, or when the system refuses.
    """
    free, limited_by = available_bytes()
    needed = sum(sizes.values())
    if needed > free:
        name = max(sizes, key=lambda n: sizes[n])
        raise UserError(
            f"the run needs {_mib(needed)} of shared memory (most of it for {name}: {_mib(sizes[name])})",
            where="shared memory",
            found=f"{_mib(free)} free",
            allowed=f"at most {limited_by}; lower host.allowance_mib or the guests' memory_mib",
        )
    segments: dict[str, Segment] = {}
    try:
        for name, size in sizes.items():
            segments[name] = _create_one(name, size)
            if name in COLLAPSED and size >= HUGE_BYTES:
                segments[name].collapse()
    except BaseException as error:
        for segment in segments.values():
            segment.close()
        if not isinstance(error, OSError):
            raise
        missing = next(name for name in sizes if name not in segments)
        raise UserError(
            f"the system refuses {_mib(sizes[missing])} of memory for segment {missing}: {error.strerror}",
            where="shared memory",
            found=error.strerror,
            allowed="memfd_create and mappings of that size (limits: ulimit -f, ulimit -v)",
        ) from error
    return segments


def attach(name: str, fd: int, size: int) -> Segment:
    """Map a segment whose descriptor was received. ValueError when the descriptor is not a segment of that
    size.
    """
    found = os.fstat(fd).st_size
    if found != size or size != _whole_pages(size):
        raise ValueError(f"segment {name}: descriptor {fd} holds {found} bytes, expected {size}")
    return Segment(name, fd, size)


def unmap(segment: Segment) -> None:
    """Take a segment away from a process that must not see it (daemons see the frames only, daemons behind
    tcp nothing).
    """
    segment.close()


def available_bytes() -> tuple[int, str]:
    """Memory that segments may still take, and what sets the bound: MemAvailable, or the memory cgroup where
    that is tighter.
    """
    meminfo = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
    best = int(meminfo["MemAvailable"].split()[0]) * 1024, "the available memory (MemAvailable)"
    for group in _memory_cgroups():
        for limit_name, used_name in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            limit, used = _read_int(group / limit_name), _read_int(group / used_name)
            if limit is not None and used is not None:
                best = min(best, (max(0, limit - used), CONTAINER_BOUND))
    return best


def _memory_cgroups() -> list[Path]:
    """Directories of this process's memory cgroup, versions 2 and 1; some of them may not exist (containers
    hide the path).
    """
    try:
        lines = CGROUP.read_text().splitlines()
    except FileNotFoundError:  # a kernel without cgroups
        return []
    groups = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            groups += [CGROUP_ROOT / path.lstrip("/"), CGROUP_ROOT]
        elif "memory" in controllers.split(","):
            groups += [CGROUP_ROOT / "memory" / path.lstrip("/"), CGROUP_ROOT / "memory"]
    return groups


def _read_int(path: Path) -> int | None:
    """The integer in a cgroup file; None where there is no such file or no limit."""
    try:
        text = path.read_text().strip()
    except OSError:  # another cgroup version, or hidden by the container
        return None
    return int(text) if text.isdecimal() else None


def _create_one(name: str, size: int) -> Segment:
    fd = os.memfd_create(f"asyncpf-{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
        return Segment(name, fd, size)
    except BaseException:
        os.close(fd)
        raise


def _map_aligned(fd: int, size: int) -> int:
    """Map ``fd`` shared at a 2 MiB boundary: reserve more than needed, map over the aligned part, give the
    rest back.
    """
    reserved = _whole_pages(size) + HUGE_BYTES
    base = _mmap(None, reserved, PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1)
    address = -(-base // HUGE_BYTES) * HUGE_BYTES
    end = address + _whole_pages(size)
    try:
        _mmap(address, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | MAP_FIXED, fd)
    except OSError:
        _libc.munmap(base, reserved)
        raise
    if address > base:
        _libc.munmap(base, address - base)
    if base + reserved > end:
        _libc.munmap(end, base + reserved - end)
    return address


def _mmap(address: int | None, size: int, protection: int, flags: int, fd: int) -> int:
    mapped: Any = _libc.mmap(address, size, protection, flags, fd, 0)
    if mapped in (None, MAP_FAILED):
        code = ctypes.get_errno() or errno.ENOMEM
        raise OSError(code, os.strerror(code))
    return int(mapped)


def _whole_pages(size: int) -> int:
    """Round up to pages; at least one, so that a kernel always has an array to take."""
    return max(1, -(-size // PAGE_SIZE)) * PAGE_SIZE


def _mib(size: int) -> str:
    return f"{size / MIB:.1f} MiB"
