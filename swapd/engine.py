"""The I/O engine of the swap daemon: bounds, order, retries and accounting over io_uring or a thread pool.

Purpose: `open_engine` picks a backend; `Engine.submit` takes any number of block operations, `Engine.reap`
returns what is over, and `Engine.eventfd` becomes readable when there is something to reap.

Invariants: every accepted operation is reported by exactly one `reap` row, whatever happens to it in between;
operations start in the order of their submission; at most `queue_depth` are at the device; an operation whose
frame or slot is out of range never reaches the device; a tag is opaque and need not be unique.

Deliberately not handled: which frame or slot may be used (the host decides), deadlines, ordering between a
read and a write of the same slot (none is promised: wait for the first), EIO (reported, the host chooses what
to do).
"""

from __future__ import annotations

import errno
import os
import select
from types import TracebackType
from typing import Protocol, Self

import numpy as np

from proto.jit import kernel
from swapd import pread_pool, uring
from swapd.pread_pool import PreadPool
from swapd.syscall import BLOCK_BYTES, EAGAIN, EINTR
from swapd.uring import Uring, UringUnavailable

READ, WRITE = 0, 1
DEFAULT_QUEUE_DEPTH = 32  # 64 gives about 1.3x the operations at twice the latency, 128 no more than 64
MAX_TRIES = 4  # of one operation that came back short, or with EAGAIN or EINTR
QUEUE_LIMIT = 65_536  # operations waiting inside for a place at the device
CLOSE_TIMEOUT_NS = 5_000_000_000

RESULT = np.dtype([("tag", np.uint64), ("res", np.int64)])  # res: bytes moved (4096 is success) or -errno

_TAG, _OP, _SLOT, _FRAME, _TRIES = range(5)  # columns of the table of operations at the device
_FREE, _RETRIED = range(2)  # words of the state array


class QueueFullError(RuntimeError):
    """More than `QUEUE_LIMIT` operations wait inside the engine; the batch was refused as a whole."""


class Backend(Protocol):
    """What an engine drives. ``submit`` is never given more than ``capacity`` operations that were not reaped
    yet.
    """

    name: str
    capacity: int
    eventfd: int

    def submit(self, batch: np.ndarray, n: int) -> None:
        """Start the first ``n`` rows (place, op, slot, frame) of a C-contiguous u64[*, 4]."""

    def reap(self) -> np.ndarray:
        """What is over, as a view i64[k, 2] of (place, res)."""

    def close(self, in_flight: int, timeout_ns: int) -> int:
        """Wait for ``in_flight`` operations, release everything; returns how many were left."""


@kernel
def _first_bad(ops: np.ndarray, frames: int) -> int:
    """Index of the first row with an unknown operation or a frame out of range, -1 if there is none."""
    for i in range(ops.shape[0]):
        if ops[i, 1] > np.uint64(1) or ops[i, 3] >= np.uint64(frames):
            return i
    return -1


@kernel
def _start(
    ops: np.ndarray, n: int, table: np.ndarray, free: np.ndarray, state: np.ndarray, batch: np.ndarray
) -> None:
    """Give the first ``n`` rows of ``ops`` a place in ``table`` each; ``batch`` gets the same rows tagged
    with that place.
    """
    for i in range(n):
        state[_FREE] -= 1
        place = free[state[_FREE]]
        for column in range(4):
            table[place, column] = ops[i, column]
            batch[i, column] = ops[i, column]
        table[place, _TRIES] = 1
        batch[i, 0] = np.uint64(place)


@kernel
def _settle(
    raw: np.ndarray,
    table: np.ndarray,
    free: np.ndarray,
    state: np.ndarray,
    out: np.ndarray,
    batch: np.ndarray,
) -> tuple[int, int]:
    """Turn completions (place, res) into results or, within the budget, into another try of the whole block.

    Whole, because a direct operation cannot go on in the middle of a sector. Returns (results in ``out``,
    tries in ``batch``).
    """
    results = 0
    again = 0
    for i in range(raw.shape[0]):
        place = raw[i, 0]
        res = raw[i, 1]
        transient = 0 <= res < BLOCK_BYTES or res in (-EAGAIN, -EINTR)
        if transient and table[place, _TRIES] < np.uint64(MAX_TRIES):
            table[place, _TRIES] += np.uint64(1)
            batch[again, 0] = np.uint64(place)
            for column in range(1, 4):
                batch[again, column] = table[place, column]
            again += 1
            continue
        out[results, 0] = np.int64(table[place, _TAG])
        out[results, 1] = res
        results += 1
        free[state[_FREE]] = place
        state[_FREE] += 1
    state[_RETRIED] += again
    return results, again


class Engine:
    """Block I/O between the slots of a file and the frames of a memory region. Use `open_engine`.

    ``slots`` and ``frames`` are the bounds, in blocks of 4096 bytes; ``why`` says how the backend was chosen.
    """

    def __init__(
        self, backend: Backend, slots: int, frames: int, queue_limit: int = QUEUE_LIMIT, why: str = ""
    ) -> None:
        self.slots, self.frames, self.why = slots, frames, why
        self.next_ns: int | None = None  # nothing is ever held back here
        self.queue_limit = queue_limit
        self.out_of_range = 0  # operations answered with -EIO because there is no such slot
        self._backend = backend
        depth = backend.capacity
        self._table = np.zeros((depth, 5), dtype=np.uint64)
        self._free = np.arange(depth - 1, -1, -1, dtype=np.int64)
        self._state = np.array([depth, 0], dtype=np.int64)
        self._batch = np.zeros((depth, 4), dtype=np.uint64)
        self._out = np.zeros((depth, 2), dtype=np.int64)
        self._waiting: list[np.ndarray] = []  # batches in FIFO order, each non-empty
        self._waiting_rows = 0
        self._refused: list[np.ndarray] = []  # tags without a slot, to be reported by the next reap
        self._refused_rows = 0
        self._closed = False

    @property
    def name(self) -> str:
        """The backend: ``uring`` or ``pread``."""
        return self._backend.name

    @property
    def eventfd(self) -> int:
        """Readable when `reap` may have something to return; `reap` clears it."""
        return self._backend.eventfd

    @property
    def queue_depth(self) -> int:
        """Most operations at the device at a time."""
        return self._backend.capacity

    @property
    def at_device(self) -> int:
        """Operations handed to the backend and not reaped."""
        return self.queue_depth - int(self._state[_FREE])

    @property
    def in_flight(self) -> int:
        """Operations accepted and not yet reported, those that wait inside included."""
        return self.at_device + self._waiting_rows + self._refused_rows

    @property
    def retried(self) -> int:
        """How often an operation was tried again after a short count, EAGAIN or EINTR."""
        return int(self._state[_RETRIED])

    def submit(self, ops: np.ndarray) -> None:
        """Accept operations, u64[n, 4] with columns tag, op (0 read, 1 write), slot, frame; they are copied.

        All or none are accepted. Raises ValueError for a wrong shape, an unknown op or a frame outside the
        memory, `QueueFullError` if too many wait already. A slot beyond the end of the file is a failed
        operation (-EIO), as on a disk, and not an exception: the number comes from a peer.
        """
        if self._closed:
            raise ValueError("engine: submit after close")
        rows = self._validated(ops)
        if len(rows) == 0:
            return
        beyond = rows[:, 2] >= self.slots
        if beyond.any():
            self._refuse(rows[beyond, 0])
            rows = np.ascontiguousarray(rows[~beyond])
        if len(rows):
            self._waiting.append(rows)
            self._waiting_rows += len(rows)
            self._pump()

    def _validated(self, ops: np.ndarray) -> np.ndarray:
        if ops.ndim != 2 or ops.shape[1] != 4 or ops.dtype != np.uint64:
            raise ValueError(
                f"engine: ops is {ops.dtype}{list(ops.shape)} (needed: uint64[n, 4] of tag, op, slot, frame)"
            )
        if self._waiting_rows + self._refused_rows + len(ops) > self.queue_limit:
            raise QueueFullError(
                f"engine: {self._waiting_rows + self._refused_rows} operations wait, "
                f"{len(ops)} more exceed {self.queue_limit}"
            )
        rows = np.array(ops, dtype=np.uint64, order="C")  # a copy: the caller may reuse its array at once
        bad = _first_bad(rows, self.frames)
        if bad >= 0:
            tag, op, slot, frame = (int(word) for word in rows[bad])
            raise ValueError(
                f"engine: operation {bad} (tag {tag}): op {op} slot {slot} frame {frame} is out of range "
                f"(allowed: op 0 or 1, frame 0..{self.frames - 1})"
            )
        return rows

    def _refuse(self, tags: np.ndarray) -> None:
        self._refused.append(tags)
        self._refused_rows += len(tags)
        self.out_of_range += len(tags)
        os.eventfd_write(self.eventfd, 1)

    def _pump(self) -> None:
        """Move waiting operations to the device, oldest first, while it has room."""
        while self._waiting and (room := int(self._state[_FREE])):
            rows = self._waiting[0]
            n = min(room, len(rows))
            _start(rows, n, self._table, self._free, self._state, self._batch)
            if n == len(rows):
                self._waiting.pop(0)
            else:
                self._waiting[0] = rows[n:]
            self._waiting_rows -= n
            self._backend.submit(self._batch, n)

    def reap(self) -> np.ndarray:
        """What is over since the last call, as a new array of `RESULT` rows, in no particular order; does not
        wait.
        """
        raw = self._backend.reap()
        results, again = _settle(raw, self._table, self._free, self._state, self._out, self._batch)
        answers = np.zeros(results + self._refused_rows, dtype=RESULT)
        answers["tag"][:results] = self._out[:results, 0].view(np.uint64)
        answers["res"][:results] = self._out[:results, 1]
        if self._refused_rows:
            answers["tag"][results:] = np.concatenate(self._refused)
            answers["res"][results:] = -errno.EIO
            self._refused.clear()
            self._refused_rows = 0
        if again:
            self._backend.submit(self._batch, again)
        self._pump()
        return answers

    def wait(self, timeout_ns: int) -> bool:
        """Sleep until there may be something to reap; False if the time passed first."""
        poller = select.poll()
        poller.register(self.eventfd, select.POLLIN)
        return bool(poller.poll(timeout_ns / 1e6))

    def close(self, timeout_ns: int = CLOSE_TIMEOUT_NS) -> None:
        """Wait for what is at the device, drop what waits inside, release everything. Idempotent; the file
        stays open.

        Raises TimeoutError if the device kept operations beyond the timeout: their frames must then not be
        reused.
        """
        if self._closed:
            return
        self._closed = True
        self._waiting.clear()
        self._waiting_rows = 0
        left = self._backend.close(self.at_device, timeout_ns)
        if left > 0:
            raise TimeoutError(f"engine: {left} operations still at the device after {timeout_ns / 1e9:g} s")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_engine(kind: str, fd: int, memory: np.ndarray, queue_depth: int = DEFAULT_QUEUE_DEPTH) -> Engine:
    """An engine between file ``fd`` (open for reading and writing, not taken over) and ``memory``.

    ``kind``: ``uring``, ``pread``, or ``auto`` (io_uring where permitted, else the thread pool;
    ``Engine.why`` has the reason). ``memory``: uint8[k * 4096], C-contiguous, page aligned, writable; any
    mapping will do, and it is kept alive by the engine. The number of slots is the file's size now, in whole
    blocks. Raises ValueError for bad arguments, `UringUnavailable` for ``uring`` where it is not permitted.
    Call after the last fork.
    """
    if kind not in ("auto", "uring", "pread"):
        raise ValueError(f"engine: kind {kind!r} is unknown (allowed: auto, uring, pread)")
    _check_memory(memory)
    frames, slots = len(memory) // BLOCK_BYTES, os.lseek(fd, 0, os.SEEK_END) // BLOCK_BYTES
    backend: Backend
    why = f"{kind} was asked for"
    if kind == "pread":
        backend = PreadPool(fd, memory, queue_depth)
    else:
        try:
            backend = Uring(fd, memory, queue_depth)
        except UringUnavailable as refused:
            if kind == "uring":
                raise
            backend, why = PreadPool(fd, memory, queue_depth), f"auto; io_uring is unavailable: {refused}"
    try:
        return Engine(backend, slots, frames, why=why)
    except BaseException:
        backend.close(0, CLOSE_TIMEOUT_NS)
        raise


def _check_memory(memory: np.ndarray) -> None:
    if (
        memory.dtype != np.uint8
        or memory.ndim != 1
        or not memory.flags.c_contiguous
        or not memory.flags.writeable
    ):
        access = "writable" if memory.flags.writeable else "read-only"
        raise ValueError(
            f"engine: memory is {access} {memory.dtype}{list(memory.shape)} "
            "(needed: a writable, C-contiguous 1-D uint8 array)"
        )
    if len(memory) == 0 or len(memory) % BLOCK_BYTES or memory.ctypes.data % BLOCK_BYTES:
        raise ValueError(
            f"engine: memory has {len(memory)} bytes at {memory.ctypes.data:#x} "
            f"(needed: whole, page-aligned blocks of {BLOCK_BYTES})"
        )


def warm() -> None:
    """Compile (or load) every kernel of the engine and its backends without opening anything."""
    uring.warm()
    pread_pool.warm()
    table, one = np.zeros((1, 5), dtype=np.uint64), np.zeros((1, 4), dtype=np.uint64)
    free, state, out = (
        np.zeros(1, dtype=np.int64),
        np.array([1, 0], dtype=np.int64),
        np.zeros((1, 2), dtype=np.int64),
    )
    _first_bad(one, 1)
    _start(one, 1, table, free, state, one.copy())
    _settle(np.array([[0, BLOCK_BYTES]], dtype=np.int64), table, free, state, out, one)
