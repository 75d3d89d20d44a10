"""The engine over both backends: contents, bounds, order of nothing lost, and what happens when the device
misbehaves.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swapd import engine as engine_module
from swapd.engine import MAX_TRIES, READ, WRITE, Engine, QueueFullError, open_engine
from swapd.swapfile import SwapFile
from swapd.syscall import BLOCK_BYTES
from swapd.uring import UringUnavailable

Region = Callable[[int], np.ndarray]
Stamp = Callable[[np.ndarray, int], np.ndarray]


def ops_of(tags: object, op: object, slots: object, frames: object) -> np.ndarray:
    columns = np.broadcast_arrays(*(np.asarray(part, dtype=np.uint64) for part in (tags, op, slots, frames)))
    return np.ascontiguousarray(np.stack(columns, axis=1))


def drain(engine: Engine, rounds: int = 2000) -> dict[int, int]:
    """Everything in flight as {tag: res}; fails on a tag seen twice and on an engine that does not finish."""
    results: dict[int, int] = {}
    for _ in range(rounds):
        if engine.in_flight == 0:
            break
        assert engine.wait(10_000_000_000), f"nothing in 10 s, {engine.in_flight} in flight"
        for tag, res in engine.reap().tolist():
            assert tag not in results
            results[tag] = res
    assert engine.in_flight == 0
    return results


def open_fds() -> list[str]:
    return sorted(entry.name for entry in Path("/proc/self/fd").iterdir())


def words(memory: np.ndarray) -> np.ndarray:
    return memory.view(np.uint64).reshape(-1, BLOCK_BYTES // 8)


def contents(swap: SwapFile, region: Region) -> np.ndarray:
    buffer = region(swap.slots)
    assert os.preadv(swap.fd, [buffer.data], 0) == swap.size_bytes
    return words(buffer)


@pytest.mark.parametrize("depth", [1, 5, 32])
def test_reads_land_in_their_frames(
    swap: SwapFile, region: Region, stamp: Stamp, kind: str, depth: int
) -> None:
    memory = region(200)
    rng = np.random.default_rng(depth)
    slots, frames = rng.permutation(256)[:150], rng.permutation(200)[:150]
    tags = (1 << 63) + slots.astype(np.uint64)  # tags use all 64 bits
    with open_engine(kind, swap.fd, memory, depth) as engine:
        assert (engine.name, engine.queue_depth) == (kind, depth)
        engine.submit(ops_of(tags, READ, slots, frames))
        assert engine.in_flight == 150
        assert engine.at_device <= depth
        results = drain(engine)
    assert results == dict.fromkeys(tags.tolist(), BLOCK_BYTES)
    assert np.array_equal(words(memory)[frames], stamp(slots, 0))
    untouched = np.setdiff1d(np.arange(200), frames)
    assert not words(memory)[untouched].any()


def test_writes_reach_their_slots(swap: SwapFile, region: Region, stamp: Stamp, kind: str) -> None:
    memory = region(100)
    words(memory)[:] = stamp(np.arange(100), 7)
    slots = np.random.default_rng(1).permutation(256)[:100]
    with open_engine(kind, swap.fd, memory, 16) as engine:
        engine.submit(ops_of(np.arange(100), WRITE, slots, np.arange(100)))
        assert set(drain(engine).values()) == {BLOCK_BYTES}
    expected = stamp(np.arange(256), 0)
    expected[slots] = stamp(np.arange(100), 7)
    assert np.array_equal(contents(swap, region), expected)


@pytest.mark.usefixtures("uring_here")
def test_engines_agree_on_mixed_plans(disk_dir: Path, region: Region, stamp: Stamp) -> None:
    """The same plan of batches, disjoint within a batch, leaves the same memory, file and results behind."""
    from swapd import swapfile

    outcomes = []
    for kind in ("uring", "pread"):
        file = swapfile.create(disk_dir, 64)
        memory = region(64)
        words(memory)[:] = stamp(np.arange(64), 1)
        rng = np.random.default_rng(42)
        tallies = []
        with open_engine(kind, file.fd, memory, 8) as engine:
            for _ in range(30):
                n = int(rng.integers(1, 40))
                slots, frames = rng.permutation(66)[:n], rng.permutation(64)[:n]  # two slots do not exist
                engine.submit(ops_of(np.arange(n), rng.integers(0, 2, n), slots, frames))
                tallies.append(sorted(drain(engine).items()))
        outcomes.append((tallies, memory.copy(), contents(file, region).copy()))
        file.close()
    assert outcomes[0][0] == outcomes[1][0]
    assert any(res == -errno.EIO for tally in outcomes[0][0] for _, res in tally)
    assert np.array_equal(outcomes[0][1], outcomes[1][1])
    assert np.array_equal(outcomes[0][2], outcomes[1][2])


def test_many_small_submissions(swap: SwapFile, region: Region, stamp: Stamp, kind: str) -> None:
    """A depth that is no power of two, and several times around every ring."""
    memory = region(8)
    with open_engine(kind, swap.fd, memory, 3) as engine:
        for start in range(0, 256, 8):
            engine.submit(
                ops_of(np.arange(start, start + 4), READ, np.arange(start, start + 4), np.arange(4))
            )
            engine.submit(
                ops_of(
                    np.arange(start + 4, start + 8), READ, np.arange(start + 4, start + 8), np.arange(4, 8)
                )
            )
            assert len(drain(engine)) == 8
            assert np.array_equal(words(memory), stamp(np.arange(start, start + 8), 0))


def test_slot_beyond_the_file_is_an_io_error(swap: SwapFile, region: Region, kind: str) -> None:
    memory = region(4)
    with open_engine(kind, swap.fd, memory, 4) as engine:
        engine.submit(
            ops_of([1, 2, 3, 4], [READ, WRITE, READ, WRITE], [255, 256, 2**64 - 1, 2**52], [0, 1, 2, 3])
        )
        assert drain(engine) == {1: BLOCK_BYTES, 2: -errno.EIO, 3: -errno.EIO, 4: -errno.EIO}
        assert engine.out_of_range == 3
    assert os.fstat(swap.fd).st_size == swap.size_bytes


def test_file_cut_short_is_reported_short(swap: SwapFile, region: Region, kind: str) -> None:
    memory = region(4)
    with open_engine(kind, swap.fd, memory, 4) as engine:
        os.ftruncate(swap.fd, 10 * BLOCK_BYTES)
        engine.submit(ops_of([1, 2], READ, [9, 10], [0, 1]))
        assert drain(engine) == {1: BLOCK_BYTES, 2: 0}
        assert engine.retried == MAX_TRIES - 1


def test_refused_write_is_reported_with_its_errno(swap: SwapFile, region: Region, kind: str) -> None:
    read_only = os.open(f"/proc/self/fd/{swap.fd}", os.O_RDONLY)
    try:
        with open_engine(kind, read_only, region(2), 4) as engine:
            engine.submit(ops_of([1, 2], [WRITE, READ], 0, [0, 1]))
            assert drain(engine) == {1: -errno.EBADF, 2: BLOCK_BYTES}
            assert engine.retried == 0
    finally:
        os.close(read_only)


@pytest.mark.parametrize(
    "ops",
    [
        ops_of([1, 2], READ, 0, [0, 4]),
        ops_of([1, 2], READ, 0, [0, 2**64 - 1]),
        ops_of([1, 2], [READ, 2], 0, 0),
        np.zeros((2, 3), dtype=np.uint64),
        np.zeros(4, dtype=np.uint64),
        np.zeros((2, 4), dtype=np.int64),
    ],
)
def test_bad_operations_are_refused_as_a_whole(
    swap: SwapFile, region: Region, kind: str, ops: np.ndarray
) -> None:
    with open_engine(kind, swap.fd, region(4), 4) as engine:
        with pytest.raises(ValueError, match="engine:"):
            engine.submit(ops)
        assert engine.in_flight == 0


def test_bad_memory_is_refused(swap: SwapFile, region: Region) -> None:
    memory = region(4)
    read_only = memory.view()
    read_only.flags.writeable = False
    for bad in (
        memory[8:],
        memory[:100],
        memory[:0],
        memory.view(np.uint64),
        memory.reshape(4, -1),
        read_only,
    ):
        with pytest.raises(ValueError, match="memory"):
            open_engine("pread", swap.fd, bad)
    with pytest.raises(ValueError, match="allowed: auto, uring, pread"):
        open_engine("aio", swap.fd, memory)


@pytest.mark.parametrize("depth", [0, -1, 4097])
def test_bad_depth_is_refused(swap: SwapFile, region: Region, kind: str, depth: int) -> None:
    with pytest.raises(ValueError, match="queue depth"):
        open_engine(kind, swap.fd, region(1), depth)


def test_close_leaves_nothing_behind(swap: SwapFile, region: Region, kind: str) -> None:
    before = open_fds()
    threads = threading.active_count()
    engine = open_engine(kind, swap.fd, region(64), 8)
    engine.submit(ops_of(np.arange(64), READ, np.arange(64), np.arange(64)))
    engine.close()
    engine.close()
    assert open_fds() == before
    assert threading.active_count() == threads
    with pytest.raises(ValueError, match="after close"):
        engine.submit(ops_of([1], READ, 0, 0))


def test_auto_says_why_it_fell_back(swap: SwapFile, region: Region, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise UringUnavailable("io_uring_setup: EPERM")

    monkeypatch.setattr(engine_module, "Uring", refuse)
    with open_engine("auto", swap.fd, region(1), 4) as engine:
        assert engine.name == "pread"
        assert "EPERM" in engine.why
        engine.submit(ops_of([1], READ, 0, 0))
        assert drain(engine) == {1: BLOCK_BYTES}
    with pytest.raises(UringUnavailable):
        open_engine("uring", swap.fd, region(1), 4)


class ScriptedBackend:
    """Completes what it was given in a scripted order with scripted results, and checks what it is given."""

    name = "scripted"

    def __init__(self, depth: int, results: list[int], picks: list[int]) -> None:
        self.capacity = depth
        self.eventfd = os.eventfd(0, os.EFD_NONBLOCK)
        self.started: list[int] = []  # slots in order of their first start
        self.busy: list[tuple[int, int]] = []
        self.results, self.picks = results, picks
        self.turn = 0

    def submit(self, batch: np.ndarray, n: int) -> None:
        for place, _, slot, _ in batch[:n].tolist():
            assert place not in [one for one, _ in self.busy]
            if slot not in self.started:
                self.started.append(slot)
            self.busy.append((place, slot))
        assert len(self.busy) <= self.capacity

    def reap(self) -> np.ndarray:
        rows = []
        for _ in range(min(len(self.busy), 1 + self.turn % 3)):
            place, _ = self.busy.pop(self.picks[self.turn % len(self.picks)] % len(self.busy))
            rows.append((place, self.results[self.turn % len(self.results)]))
            self.turn += 1
        return np.array(rows, dtype=np.int64).reshape(-1, 2)

    def close(self, in_flight: int, timeout_ns: int) -> int:
        assert timeout_ns > 0
        os.close(self.eventfd)
        return in_flight


RESULTS = st.sampled_from([BLOCK_BYTES, BLOCK_BYTES, 0, 512, -errno.EAGAIN, -errno.EINTR, -errno.EIO])


@settings(deadline=None, max_examples=60)
@given(
    depth=st.integers(1, 5),
    batches=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    results=st.lists(RESULTS, min_size=1, max_size=12),
    picks=st.lists(st.integers(0, 4), min_size=1, max_size=7),
)
def test_no_tag_is_lost_or_doubled(
    depth: int, batches: list[int], results: list[int], picks: list[int]
) -> None:
    """Whatever the device answers in whatever order: every tag once, starts in order, tries bounded."""
    backend = ScriptedBackend(depth, results, picks)
    engine = Engine(backend, slots=60, frames=1)
    seen: list[int] = []
    slot = 0
    for n in batches:
        engine.submit(ops_of(np.arange(slot, slot + n), READ, np.arange(slot, slot + n), 0))
        slot += n
        seen += engine.reap()["tag"].tolist()
    for _ in range(MAX_TRIES * slot + 1):
        seen += engine.reap()["tag"].tolist()
    assert engine.in_flight == 0
    assert sorted(seen) == list(range(slot))
    assert backend.started == list(range(slot))
    assert backend.turn <= MAX_TRIES * slot
    assert backend.turn == slot + engine.retried
    engine.close()


def test_transient_errors_are_retried_and_then_reported() -> None:
    backend = ScriptedBackend(1, [-errno.EAGAIN, -errno.EINTR, 512, BLOCK_BYTES], [0])
    engine = Engine(backend, slots=2, frames=1)
    engine.submit(ops_of([5], READ, 0, 0))
    answers = [row for _ in range(4) for row in engine.reap().tolist()]
    assert answers == [(5, BLOCK_BYTES)]
    backend.results = [-errno.EAGAIN]
    engine.submit(ops_of([6], READ, 1, 0))
    assert [row for _ in range(MAX_TRIES) for row in engine.reap().tolist()] == [(6, -errno.EAGAIN)]
    engine.close()


def test_full_queue_refuses_a_batch_as_a_whole() -> None:
    backend = ScriptedBackend(2, [BLOCK_BYTES], [0])
    engine = Engine(backend, slots=100, frames=1, queue_limit=10)
    engine.submit(ops_of(np.arange(10), READ, np.arange(10), 0))  # two of them start
    with pytest.raises(QueueFullError, match="8 operations wait, 3 more exceed 10"):
        engine.submit(ops_of(np.arange(10, 13), READ, 0, 0))
    assert engine.in_flight == 10
    engine.submit(ops_of([10, 11], READ, [10, 11], 0))
    seen = [tag for _ in range(12) for tag in engine.reap()["tag"].tolist()]
    assert seen == list(range(12))
    engine.close()


def test_device_that_keeps_operations_is_reported_on_close() -> None:
    backend = ScriptedBackend(2, [BLOCK_BYTES], [0])
    engine = Engine(backend, slots=4, frames=1)
    engine.submit(ops_of([1, 2, 3], READ, [1, 2, 3], 0))
    with pytest.raises(TimeoutError, match="2 operations still at the device"):
        engine.close()
