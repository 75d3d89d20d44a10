"""io_uring without an extension module: block reads and writes driven from nopython code.

Purpose: one ring per daemon. The ring is set up and registered through libc's ``syscall``, its three areas
are mapped with `mmap`, and `Uring.submit` and `Uring.reap` are each one compiled call without the GIL per
batch, however many blocks the batch has. Completions ring an eventfd, which goes into the daemon's poller.

Invariants: at most `capacity` operations are between submit and reap, so neither ring can overflow; this
process is the only writer of the submission tail and the completion head; the memory is referenced by the
`Uring` for as long as the ring exists; operations name a frame and a slot, which the engine has bounded.

Deliberately not handled: queueing beyond the capacity, retries and bounds (`swapd.engine` does that),
registered buffers and files, polled I/O. A ring does not survive a fork: make it in the process that uses it.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import select
import time
from contextlib import ExitStack

import numpy as np

from proto.atomics import load, store
from proto.jit import inline, kernel
from swapd.syscall import (
    BLOCK_BYTES,
    EAGAIN,
    EBUSY,
    EINTR,
    NR_IO_URING_ENTER,
    NR_IO_URING_REGISTER,
    NR_IO_URING_SETUP,
    NR_READ,
    errno_text,
    syscall,
)

MAX_QUEUE_DEPTH = 4096  # the kernel takes 32768; nothing gets faster beyond 64, this only stops nonsense
ENTER_TRIES = 8  # EINTR in a row before a submission is left for the next call
STALL_LIMIT = 10_000  # refused submissions in a row before the ring is declared broken

_OP_NOP, _OP_READ, _OP_WRITE = 0, 22, 23
_REGISTER_EVENTFD = 4
_OFF_SQ_RING, _OFF_CQ_RING, _OFF_SQES = 0, 0x0800_0000, 0x1000_0000
_FEAT_NODROP, _FEAT_FAST_POLL = 1 << 1, 1 << 5  # the second came with Linux 5.7, after READ and WRITE (5.6)
_UNAVAILABLE = frozenset({errno.ENOSYS, errno.EPERM, errno.EACCES, errno.ENOMEM, errno.EOPNOTSUPP})
_U32 = 0xFFFF_FFFF

# Columns of the geometry array: what the kernels need to know about a ring.
_RING_FD, _FILE_FD, _BASE, _EVENTFD, _SCRATCH, _SQ_HEAD, _SQ_TAIL, _SQ_MASK, _CQ_HEAD, _CQ_TAIL, _CQ_MASK = (
    range(11)
)


class UringUnavailable(Exception):  # noqa: N818 (a state of the machine, not a fault)
    """io_uring is not there or not permitted (old kernel, ``io_uring_disabled``, seccomp, locked-memory
    limit).
    """


class _Offsets(ctypes.Structure):
    """Where the words of a ring are, in bytes from the start of its mapping (submission and completion ring
    alike).
    """

    _fields_ = [
        (name, ctypes.c_uint32) for name in ("head", "tail", "mask", "entries", "w4", "w5", "w6", "w7")
    ] + [("user_addr", ctypes.c_uint64)]


class _Params(ctypes.Structure):
    """struct io_uring_params (120 bytes)."""

    _fields_ = [
        *[
            (name, ctypes.c_uint32)
            for name in ("sq_entries", "cq_entries", "flags", "cpu", "idle", "features", "wq_fd")
        ],
        ("reserved", ctypes.c_uint32 * 3),
        ("sq_off", _Offsets),
        ("cq_off", _Offsets),
    ]


@inline
def _enter(sq: np.ndarray, geo: np.ndarray) -> int:
    """Hand every published entry to the kernel. Returns 0, or -errno with the rest still published."""
    code = 0
    for _ in range(ENTER_TRIES):
        pending = (np.int64(sq[geo[_SQ_TAIL]]) - np.int64(load(sq, geo[_SQ_HEAD]))) & _U32
        if pending == 0:
            return 0
        code = syscall(NR_IO_URING_ENTER, geo[_RING_FD], pending, 0, 0, 0, 0)
        if code < 0 and code != -EINTR:
            return code
    return min(code, 0)


@kernel
def _flush(sq: np.ndarray, geo: np.ndarray) -> int:
    return _enter(sq, geo)


@kernel
def _push(sq: np.ndarray, sqes: np.ndarray, geo: np.ndarray, batch: np.ndarray, n: int) -> int:
    """Write ``n`` rows (tag, op, slot, frame) of ``batch`` as submission entries, publish them, enter the
    kernel once.
    """
    tail = np.int64(sq[geo[_SQ_TAIL]])  # ours: no other writer
    for i in range(n):
        at = (tail + i) & geo[_SQ_MASK]
        opcode = _OP_READ if batch[i, 1] == 0 else _OP_WRITE
        sqes[at, 0] = np.uint64(opcode | (geo[_FILE_FD] << 32))
        sqes[at, 1] = np.uint64(batch[i, 2] * np.uint64(BLOCK_BYTES))
        sqes[at, 2] = np.uint64(geo[_BASE]) + batch[i, 3] * np.uint64(BLOCK_BYTES)
        sqes[at, 3] = np.uint64(BLOCK_BYTES)
        sqes[at, 4] = batch[i, 0]
        sqes[at, 5] = 0
        sqes[at, 6] = 0
        sqes[at, 7] = 0
    # Release: the kernel may read the entries as soon as it sees the tail (it does so without our entering,
    # when another task of this ring enters).
    store(sq, geo[_SQ_TAIL], (tail + n) & _U32)
    return _enter(sq, geo)


@kernel
def _collect(cq: np.ndarray, cqes: np.ndarray, geo: np.ndarray, out: np.ndarray) -> int:
    """Move all completions into ``out`` (tag, res); returns how many. The eventfd is cleared first: a later
    one rings again.
    """
    syscall(NR_READ, geo[_EVENTFD], geo[_SCRATCH], 8, 0, 0, 0)
    head = np.int64(cq[geo[_CQ_HEAD]])  # ours: no other writer
    ready = (np.int64(load(cq, geo[_CQ_TAIL])) - head) & _U32
    n = min(ready, out.shape[0])
    for i in range(n):
        at = (head + i) & geo[_CQ_MASK]
        out[i, 0] = np.int64(cqes[at, 0])
        out[i, 1] = np.int64(np.int32(np.uint32(cqes[at, 1] & np.uint64(_U32))))
    # Release: the kernel may overwrite the entries once it sees the head, so they must have been read by
    # then.
    store(cq, geo[_CQ_HEAD], (head + n) & _U32)
    return int(n)


# Closing needs no memory.
_NO_HALVES = np.zeros(0, dtype=np.uint32)
_NO_WORDS = np.zeros((0, 0), dtype=np.uint64)


class Uring:
    """One ring over one file and one memory region.

    ``fd`` is the swap file, ``memory`` a page-aligned, C-contiguous 1-D uint8 array (frame i at byte ``4096 *
    i``), ``depth`` the number of operations in flight. Raises `UringUnavailable` if the kernel has no usable
    io_uring for this process, `OSError` for anything else.
    """

    name = "uring"

    def __init__(self, fd: int, memory: np.ndarray, depth: int) -> None:
        if not 1 <= depth <= MAX_QUEUE_DEPTH:
            raise ValueError(f"uring: queue depth {depth} is out of range (allowed: 1..{MAX_QUEUE_DEPTH})")
        self.capacity = depth
        self._memory: np.ndarray | None = memory
        self._stalls = 0
        self._maps: list[mmap.mmap] = []
        params = _Params()
        self._ring_fd = _setup(depth, params)
        self.eventfd = -1
        try:
            self.eventfd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            self._map_rings(params)
            self._geo = self._geometry(params, fd, memory)
            _register_eventfd(self._ring_fd, self.eventfd)
            self._self_test()
        except BaseException:
            self._release()
            raise

    def _map_rings(self, params: _Params) -> None:
        def area(offset: int, size: int) -> mmap.mmap:
            flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
            mapped = mmap.mmap(self._ring_fd, size, flags, mmap.PROT_READ | mmap.PROT_WRITE, offset=offset)
            self._maps.append(mapped)
            return mapped

        # w6 of the submission side is the index array; w5 of the completion side the entries (16 bytes each).
        sq_bytes = params.sq_off.w6 + 4 * params.sq_entries
        cq_bytes = params.cq_off.w5 + 16 * params.cq_entries
        sq, cq = area(_OFF_SQ_RING, sq_bytes), area(_OFF_CQ_RING, cq_bytes)
        sqes = area(_OFF_SQES, 64 * params.sq_entries)
        self._sq = np.frombuffer(sq, dtype=np.uint32)
        self._cq = np.frombuffer(cq, dtype=np.uint32)
        self._cqes = np.frombuffer(
            cq, dtype=np.uint64, count=2 * params.cq_entries, offset=params.cq_off.w5
        ).reshape(-1, 2)
        self._sqes = np.frombuffer(sqes, dtype=np.uint64).reshape(-1, 8)
        index = params.sq_off.w6 // 4
        self._sq[index : index + params.sq_entries] = np.arange(params.sq_entries, dtype=np.uint32)
        self._scratch = np.zeros(1, dtype=np.uint64)
        self._out = np.zeros((params.cq_entries, 2), dtype=np.int64)

    def _geometry(self, params: _Params, fd: int, memory: np.ndarray) -> np.ndarray:
        geo = np.zeros(11, dtype=np.int64)
        geo[_RING_FD], geo[_FILE_FD], geo[_EVENTFD] = self._ring_fd, fd, self.eventfd
        geo[_BASE], geo[_SCRATCH] = memory.ctypes.data, self._scratch.ctypes.data
        geo[_SQ_HEAD], geo[_SQ_TAIL] = params.sq_off.head // 4, params.sq_off.tail // 4
        geo[_CQ_HEAD], geo[_CQ_TAIL] = params.cq_off.head // 4, params.cq_off.tail // 4
        geo[_SQ_MASK], geo[_CQ_MASK] = params.sq_entries - 1, params.cq_entries - 1
        return geo

    def _self_test(self) -> None:
        """One no-op through the whole path: a filter may allow the set-up and refuse the rest."""
        tail = int(self._sq[self._geo[_SQ_TAIL]])
        self._sqes[tail & int(self._geo[_SQ_MASK])] = 0  # opcode 0 is the no-op
        self._sq[self._geo[_SQ_TAIL]] = tail + 1
        code = _flush(self._sq, self._geo)
        if code < 0:
            raise UringUnavailable(f"io_uring_enter: {errno_text(code)}")
        select.select([self.eventfd], [], [], 1.0)
        if _collect(self._cq, self._cqes, self._geo, self._out) != 1:
            raise UringUnavailable("io_uring: a no-op was accepted but did not complete within 1 s")

    def submit(self, batch: np.ndarray, n: int) -> None:
        """Start the first ``n`` rows (tag, op 0 read / 1 write, slot, frame) of a C-contiguous u64[*, 4]. The
        caller bounds them.
        """
        self._entered(_push(self._sq, self._sqes, self._geo, batch, n))

    def reap(self) -> np.ndarray:
        """Completions since the last call as a view, i64[n, 2] of (tag, res); it is overwritten by the next
        call.
        """
        if self._stalls:
            self._entered(_flush(self._sq, self._geo))
        return self._out[: _collect(self._cq, self._cqes, self._geo, self._out)]

    def _entered(self, code: int) -> None:
        """The entries are in the ring whatever ``code`` says. After a refusal the eventfd is rung, so that
        `reap` tries again.
        """
        if code == 0:
            self._stalls = 0
            return
        self._stalls += 1
        if code not in (-EAGAIN, -EBUSY, -EINTR) or self._stalls > STALL_LIMIT:
            raise OSError(-code, f"io_uring_enter refused {self._stalls} times in a row: {errno_text(code)}")
        os.eventfd_write(self.eventfd, 1)

    def close(self, in_flight: int, timeout_ns: int) -> int:
        """Wait until ``in_flight`` operations are over, release everything; returns how many were still under
        way.
        """
        deadline_ns = time.monotonic_ns() + timeout_ns
        while in_flight > 0 and (left_ns := deadline_ns - time.monotonic_ns()) > 0:
            select.select([self.eventfd], [], [], left_ns / 1e9)
            in_flight -= len(self.reap())
        self._release()
        return in_flight

    def _release(self) -> None:
        if self._ring_fd < 0:
            return
        descriptors = [fd for fd in (self._ring_fd, self.eventfd) if fd >= 0]
        self._ring_fd = self.eventfd = -1
        self._memory = None
        # The arrays go first: a mapping with a view on it cannot be closed.
        self._sq = self._cq = _NO_HALVES
        self._sqes = self._cqes = _NO_WORDS
        with ExitStack() as left:
            for fd in descriptors:
                left.callback(os.close, fd)
            while self._maps:
                self._maps.pop().close()


def _libc_syscall(number: int, *args: int | ctypes._Pointer[_Params] | ctypes._CArgObject) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    result: int = libc.syscall(number, *args)
    return result if result >= 0 else -ctypes.get_errno()


def _checked(what: str, code: int) -> int:
    if code >= 0:
        return code
    if -code in _UNAVAILABLE:
        raise UringUnavailable(f"{what}: {errno_text(code)}")
    raise OSError(-code, f"{what}: {errno_text(code)}")


def _setup(depth: int, params: _Params) -> int:
    ring_fd = _checked("io_uring_setup", _libc_syscall(NR_IO_URING_SETUP, depth, ctypes.byref(params)))
    needed = _FEAT_NODROP | _FEAT_FAST_POLL
    if params.features & needed != needed:
        os.close(ring_fd)
        raise UringUnavailable(
            f"io_uring is too old here: features {params.features:#x}, needed {needed:#x} (Linux 5.7)"
        )
    os.set_inheritable(ring_fd, False)
    return ring_fd


def _register_eventfd(ring_fd: int, event_fd: int) -> None:
    number = ctypes.c_int32(event_fd)
    code = _libc_syscall(NR_IO_URING_REGISTER, ring_fd, _REGISTER_EVENTFD, ctypes.byref(number), 1)
    _checked("io_uring_register(EVENTFD)", code)


def warm() -> None:
    """Compile (or load) every kernel of this module without making a ring: the zygote calls this before it
    forks.
    """
    words, geo = np.zeros(2, dtype=np.uint32), np.zeros(11, dtype=np.int64)
    geo[_SQ_TAIL] = geo[_CQ_TAIL] = 1  # heads are word 0
    geo[_RING_FD] = geo[_EVENTFD] = -1
    _flush(words, geo)
    _push(words, np.zeros((1, 8), dtype=np.uint64), geo, np.zeros((1, 4), dtype=np.uint64), 0)
    _collect(words, np.zeros((1, 2), dtype=np.uint64), geo, np.zeros((1, 2), dtype=np.int64))
