"""Block reads and writes by a pool of threads: the engine where io_uring is refused or its kill fence cannot
be relied upon.

Purpose: the same interface as `swapd.uring.Uring`. The threads live in nopython code without the GIL for
their whole life: they take jobs from a ring in memory, call pread or pwrite, publish the result and ring an
eventfd. Python is entered once per batch, on the submitting side. (Threads that run Python per block convoy
on the GIL with the message loop and reach half of this.)

Invariants: at most `capacity` jobs are between submit and reap, so a row of either ring is never overwritten
while somebody needs it; a job is claimed by exactly one thread (compare-and-exchange on the claim counter); a
killed process is reaped only when its threads have left the kernel, so a synchronous read never lands after
waitpid and no fence is needed.

Deliberately not handled: queueing beyond the capacity, retries and bounds (`swapd.engine` does that). Threads
do not survive a fork: make the pool in the process that uses it.
"""

from __future__ import annotations

import os
import threading
import time

import numpy as np

from proto.atomics import add, cmpxchg, load, store
from proto.jit import inline, kernel
from swapd.syscall import (
    BLOCK_BYTES,
    FUTEX_WAIT_PRIVATE,
    FUTEX_WAKE_PRIVATE,
    NR_FUTEX,
    NR_PREAD,
    NR_PWRITE,
    NR_READ,
    NR_WRITE,
    syscall,
)

MAX_QUEUE_DEPTH = 4096
START_TIMEOUT_NS = 1_000_000_000
DEFAULT_THREADS = 16  # the best of 1, 4, 16 and 64 on a virtio disk with two cores

_BELL, _STOP = 0, 16  # indices of u32 words, each on a cache line of its own
_TAIL, _CLAIM, _DONE = 0, 8, 16  # indices of u64 counters, the same
_FILE_FD, _BASE, _EVENTFD, _ONE, _BELL_ADDR, _SCRATCH = range(6)  # columns of the geometry array


@inline
def _run_one(
    number: int, counters: np.ndarray, jobs: np.ndarray, done: np.ndarray, ready: np.ndarray, geo: np.ndarray
) -> None:
    """Perform claimed job ``number``, publish its (tag, res) and ring the eventfd."""
    mask = jobs.shape[0] - 1
    row = np.int64(number) & mask
    call = NR_PREAD if jobs[row, 1] == 0 else NR_PWRITE
    address = geo[_BASE] + np.int64(jobs[row, 3]) * BLOCK_BYTES
    offset = np.int64(jobs[row, 2]) * BLOCK_BYTES
    tag = np.int64(jobs[row, 0])
    res = syscall(call, geo[_FILE_FD], address, BLOCK_BYTES, offset, 0, 0)
    position = np.int64(add(counters, _DONE, 1))
    done[position & mask, 0] = tag
    done[position & mask, 1] = res
    store(ready, position & mask, position + 1)  # release: the row is complete before it is announced
    syscall(NR_WRITE, geo[_EVENTFD], geo[_ONE], 8, 0, 0, 0)


@kernel
def _worker(
    words: np.ndarray,
    counters: np.ndarray,
    jobs: np.ndarray,
    done: np.ndarray,
    ready: np.ndarray,
    geo: np.ndarray,
) -> None:
    """The life of a thread: run what can be claimed, sleep on the bell, return when told to stop and nothing
    is left.
    """
    while True:
        # Read before looking for work: a job published after this changes the word, and the futex then does
        # not sleep.
        bell = load(words, _BELL)
        while True:
            number = load(counters, _CLAIM)
            if number == load(counters, _TAIL):
                break
            if cmpxchg(counters, _CLAIM, number, number + np.uint64(1)) == number:
                _run_one(number, counters, jobs, done, ready, geo)
        if load(words, _STOP) != 0:
            return
        syscall(NR_FUTEX, geo[_BELL_ADDR], FUTEX_WAIT_PRIVATE, bell, 0, 0, 0)


@kernel
def _post(
    words: np.ndarray, counters: np.ndarray, jobs: np.ndarray, geo: np.ndarray, batch: np.ndarray, n: int
) -> None:
    """Publish ``n`` rows of ``batch`` and wake as many threads."""
    mask = jobs.shape[0] - 1
    tail = np.int64(counters[_TAIL])  # ours: no other writer
    for i in range(n):
        for column in range(4):
            jobs[(tail + i) & mask, column] = batch[i, column]
    store(counters, _TAIL, tail + n)
    _ring_bell(words, geo, n)


@inline
def _ring_bell(words: np.ndarray, geo: np.ndarray, n: int) -> None:
    add(words, _BELL, 1)
    syscall(NR_FUTEX, geo[_BELL_ADDR], FUTEX_WAKE_PRIVATE, n, 0, 0, 0)


@kernel
def _halt(words: np.ndarray, geo: np.ndarray) -> None:
    store(words, _STOP, 1)
    _ring_bell(words, geo, 0x7FFF_FFFF)


@kernel
def _collect(done: np.ndarray, ready: np.ndarray, geo: np.ndarray, taken: int, out: np.ndarray) -> int:
    """Move all results from position ``taken`` on into ``out``; returns how many. The eventfd is cleared
    first.
    """
    syscall(NR_READ, geo[_EVENTFD], geo[_SCRATCH], 8, 0, 0, 0)
    mask = done.shape[0] - 1
    n = 0
    while n < out.shape[0] and np.int64(load(ready, (taken + n) & mask)) == taken + n + 1:
        out[n, 0] = done[(taken + n) & mask, 0]
        out[n, 1] = done[(taken + n) & mask, 1]
        n += 1
    return n


class PreadPool:
    """``threads`` threads over one file and one memory region; arguments and results as in
    `swapd.uring.Uring`.
    """

    name = "pread"

    def __init__(self, fd: int, memory: np.ndarray, depth: int, threads: int = DEFAULT_THREADS) -> None:
        if not 1 <= depth <= MAX_QUEUE_DEPTH:
            raise ValueError(
                f"pread pool: queue depth {depth} is out of range (allowed: 1..{MAX_QUEUE_DEPTH})"
            )
        if threads < 1:
            raise ValueError(f"pread pool: {threads} threads (allowed: 1 or more)")
        self.capacity = depth
        self._memory: np.ndarray | None = memory
        self._taken = 0
        rows = 1 << (depth - 1).bit_length()
        self._words, self._counters, self._jobs, self._done, self._ready, self._geo = _rings(rows)
        self._scratch = np.ones(2, dtype=np.uint64)  # [0] stays 1 (what a completion adds), [1] is read into
        self._out = np.zeros((rows, 2), dtype=np.int64)
        self.eventfd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        geo = self._geo
        geo[_FILE_FD], geo[_BASE], geo[_EVENTFD] = fd, memory.ctypes.data, self.eventfd
        geo[_ONE], geo[_SCRATCH] = self._scratch.ctypes.data, self._scratch.ctypes.data + 8
        geo[_BELL_ADDR] = self._words.ctypes.data + 4 * _BELL
        # The threads hold the memory too: it must outlive an operation even if the pool is dropped without
        # `close`.
        life = (memory, self._scratch, self._words, self._counters, self._jobs, self._done, self._ready, geo)
        self._threads = [
            threading.Thread(target=_live, args=life, name=f"swapd-io-{i}", daemon=True)
            for i in range(min(threads, depth))
        ]
        try:
            warm()  # otherwise all threads would compile the same kernel at once
            for thread in self._threads:
                thread.start()
        except BaseException:
            self.close(0, START_TIMEOUT_NS)
            raise

    def submit(self, batch: np.ndarray, n: int) -> None:
        """Start the first ``n`` rows (tag, op 0 read / 1 write, slot, frame) of a C-contiguous u64[*, 4]. The
        caller bounds them.
        """
        _post(self._words, self._counters, self._jobs, self._geo, batch, n)

    def reap(self) -> np.ndarray:
        """Completions since the last call as a view, i64[n, 2] of (tag, res); it is overwritten by the next
        call.
        """
        n = _collect(self._done, self._ready, self._geo, self._taken, self._out)
        self._taken += n
        return self._out[:n]

    def close(self, in_flight: int, timeout_ns: int) -> int:
        """Let the threads finish what was submitted and join them; returns how many operations were still
        under way.

        When a thread is stuck in the kernel beyond the timeout, the eventfd stays open: the thread will still
        write to it.
        """
        if self.eventfd < 0:
            return 0
        deadline_ns = time.monotonic_ns() + timeout_ns
        _halt(self._words, self._geo)
        started = [thread for thread in self._threads if thread.ident is not None]
        for thread in started:
            thread.join(max(0, deadline_ns - time.monotonic_ns()) / 1e9)
        in_flight -= len(self.reap())
        if not any(thread.is_alive() for thread in started):
            fd, self.eventfd = self.eventfd, -1
            self._memory = None
            os.close(fd)
        return in_flight


def _live(_memory: np.ndarray, _scratch: np.ndarray, *rings: np.ndarray) -> None:
    _worker(*rings)


def _rings(rows: int) -> tuple[np.ndarray, ...]:
    return (
        np.zeros(32, dtype=np.uint32),
        np.zeros(24, dtype=np.uint64),
        np.zeros((rows, 4), dtype=np.uint64),
        np.zeros((rows, 2), dtype=np.int64),
        np.zeros(rows, dtype=np.uint64),
        np.zeros(6, dtype=np.int64),
    )


def warm() -> None:
    """Compile (or load) every kernel of this module without starting a thread: the zygote calls this before
    it forks.
    """
    words, counters, jobs, done, ready, geo = _rings(1)
    geo[_EVENTFD] = -1
    geo[_BELL_ADDR] = words.ctypes.data
    _post(words, counters, jobs, geo, jobs, 0)
    _halt(words, geo)
    _worker(words, counters, jobs, done, ready, geo)
    _collect(done, ready, geo, 0, done)
