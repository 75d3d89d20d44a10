"""A daemon's faults on a real file: what the service is told, what lies in the frame, and what stays as it was."""

from __future__ import annotations

import errno
import select
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from proto.events import Kind
from proto.faults import FIRED, KINDS, FaultMachine, Spec, words_needed
from proto.trace import TraceWriter, read_file
from swapd.engine import READ, WRITE, open_engine
from swapd.faulty import DaemonFaults, FaultyEngine
from swapd.swapfile import SwapFile
from swapd.syscall import BLOCK_BYTES
from tests.swapd.conftest import stamped

FRAMES = 8
START = 1_000


class Bench:
    """An engine on a real file with the faults of a schedule; the time stands still unless it is moved."""

    def __init__(self, swap: SwapFile, memory: np.ndarray, path: Path) -> None:
        self.swap, self.memory, self.path = swap, memory, path
        self.now_ns = START + 1
        self.signals: list[int] = []
        self.engine = open_engine("pread", swap.fd, memory, 4)
        self.writer = TraceWriter(path, 2000, 1 << 16)

    def with_faults(self, *specs: Spec, words: Any = None) -> FaultyEngine:
        self.machine = FaultMachine(specs, words or memoryview(array("Q", [0] * words_needed(len(specs), 1))))
        self.machine.start(START)
        faults = DaemonFaults(self.machine, 0, 1, self.writer, self.signals.append)
        self.faulty = FaultyEngine(self.engine, self.memory, faults, lambda: self.now_ns)
        return self.faulty

    def io(self, op: int, slot: int, frame: int = 0, tag: int = 7) -> int:
        self.start(op, slot, frame, tag)
        return self.result(tag)

    def start(self, op: int, slot: int, frame: int = 0, tag: int = 7) -> None:
        self.faulty.submit(np.array([[tag, op, slot, frame]], np.uint64))

    def result(self, tag: int = 7) -> int:
        poller = select.poll()
        poller.register(self.faulty.eventfd, select.POLLIN)
        for _ in range(100):
            found = dict(self.faulty.reap().tolist())
            if found:
                assert list(found) == [tag]
                return int(found[tag])
            poller.poll(100)
        raise AssertionError("no answer in 10 s")

    def events(self) -> list[tuple[int, str, int, int]]:
        self.writer.close()
        found = read_file(self.path).events
        faults = found[found["kind"] == Kind.FAULT]
        return [(int(e["a"]), KINDS[int(e["b"])], int(e["token"]), int(e["cause"])) for e in faults]

    def frame(self, number: int = 0) -> np.ndarray:
        return self.memory[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES].copy()


def fault(number: int, kind: str, step: str, **more: Any) -> Spec:
    return Spec(number, kind, "swapd", (0,), step=step, **more)


@pytest.fixture
def bench(swap: SwapFile, region: Callable[[int], np.ndarray], tmp_path: Path) -> Iterator[Bench]:
    made = Bench(swap, region(FRAMES), tmp_path / "swapd-0-0.bin")
    yield made
    made.engine.close()
    made.writer.close()


def good(slot: int) -> np.ndarray:
    """What a slot holds."""
    page: np.ndarray = stamped(np.arange(slot, slot + 1), 0).view(np.uint8).reshape(-1)
    return page


@pytest.mark.parametrize(
    ("kind", "op", "error"),
    [
        ("read_error", READ, errno.EIO),
        ("bad_block", READ, errno.EIO),
        ("write_error", WRITE, errno.EIO),
        ("no_space", WRITE, errno.ENOSPC),
        ("device_gone", READ, errno.ENODEV),
        ("device_gone", WRITE, errno.ENODEV),
    ],
)
def test_one_operation_fails_and_the_others_do_not(bench: Bench, kind: str, op: int, error: int) -> None:
    bench.with_faults(fault(0, kind, "io.done", nth=2))
    results = [bench.io(op, slot, tag=10 + slot) for slot in (0, 1, 2)]
    assert results == [BLOCK_BYTES, -error, BLOCK_BYTES]
    assert bench.events() == [(0, kind, 1, 11)]


def test_an_error_of_reads_leaves_writes_alone_and_waits_for_one(bench: Bench) -> None:
    bench.with_faults(fault(0, "read_error", "write.done"))
    assert bench.io(WRITE, 3) == BLOCK_BYTES
    assert bench.io(READ, 3) == -errno.EIO, "due since the write, it happens to the next read"
    assert bench.io(READ, 3) == BLOCK_BYTES


def test_a_bit_is_flipped_in_the_landed_page_only(bench: Bench) -> None:
    bench.with_faults(fault(0, "bit_flip", "read.done"))
    before = bench.frame(1)
    assert bench.io(READ, 5, 0) == BLOCK_BYTES
    wrong = bench.frame() ^ good(5)
    assert np.unpackbits(wrong).sum() == 1
    assert (bench.frame(1) == before).all(), "nobody else's frame"
    assert bench.io(READ, 5, 0) == BLOCK_BYTES
    assert (bench.frame() == good(5)).all(), "the file is as it was"


def test_a_short_read_brings_half_a_page(bench: Bench) -> None:
    bench.with_faults(fault(0, "short_read", "read.done"))
    half = BLOCK_BYTES // 2
    assert bench.io(READ, 5) == half
    assert (bench.frame()[:half] == good(5)[:half]).all()
    assert (bench.frame()[half:] != good(5)[half:]).all()


def test_a_bad_block_stays_bad_whatever_is_written_and_whoever_reads(bench: Bench) -> None:
    bench.with_faults(fault(0, "bad_block", "read.done"))
    assert bench.io(READ, 5) == -errno.EIO
    assert bench.io(WRITE, 5) == BLOCK_BYTES
    assert bench.io(READ, 5) == -errno.EIO
    assert bench.io(READ, 6) == BLOCK_BYTES
    bench.with_faults(*bench.machine.specs, words=bench.machine.words)
    assert bench.io(READ, 5) == -errno.EIO, "the next incarnation"
    assert bench.events() == [(0, "bad_block", 1, 7)]


def test_of_several_faults_at_one_read_each_has_one_of_its_own(bench: Bench) -> None:
    kinds = ("bit_flip", "bit_flip", "short_read", "read_error", "bad_block")
    bench.with_faults(*(fault(n, kind, "read.done") for n, kind in enumerate(kinds)))
    results = [bench.io(READ, 5, tag=7), *(bench.io(READ, 6, tag=8 + n) for n in range(5))]
    half = BLOCK_BYTES // 2
    assert results == [-errno.EIO, -errno.EIO, half, BLOCK_BYTES, BLOCK_BYTES, BLOCK_BYTES]
    assert (bench.frame() == good(6)).all(), "the last read is as it should be"
    assert bench.events() == [
        (4, "bad_block", 1, 7), (3, "read_error", 1, 8), (2, "short_read", 1, 9), (0, "bit_flip", 1, 10), (1, "bit_flip", 1, 11),
    ]  # fmt: skip


def test_a_read_that_fails_anyway_is_no_occasion_for_more(bench: Bench) -> None:
    bench.with_faults(
        fault(0, "bad_block", "read.done"),
        fault(1, "bad_block", "read.done", nth=2),
        fault(2, "bit_flip", "read.done", nth=2),
    )
    assert [bench.io(READ, 5) for _ in range(3)] == [-errno.EIO] * 3
    assert [bench.machine.word(spec, FIRED) for spec in bench.machine.specs] == [1, 0, 0]
    assert bench.io(READ, 6) == -errno.EIO, "a second block goes bad"
    assert bench.io(READ, 7) == BLOCK_BYTES
    assert np.unpackbits(bench.frame() ^ good(7)).sum() == 1


def test_a_device_that_is_gone_comes_back(bench: Bench) -> None:
    bench.with_faults(fault(0, "device_gone", "io.done", for_ns=100))
    results = []
    for now_ns in (1, 100, 101, 102):
        bench.now_ns = START + now_ns
        results.append(bench.io(READ, 5))
    assert results == [-errno.ENODEV, -errno.ENODEV, BLOCK_BYTES, BLOCK_BYTES]
    assert len(bench.events()) == 1, "one fault, however many operations it costs"


def test_a_slow_device_holds_answers_back(bench: Bench) -> None:
    bench.with_faults(Spec(0, "slow", "swapd", (0,), times_ns=(0,), for_ns=50, slower_ns=1_000))
    bench.start(READ, 5)
    poller = select.poll()
    poller.register(bench.engine.eventfd, select.POLLIN)
    assert poller.poll(10_000)
    due_ns = None
    for _ in range(1000):
        assert len(bench.faulty.reap()) == 0
        if (due_ns := bench.faulty.next_ns) is not None:
            break
        poller.poll(10)
    assert due_ns == START + 1_001
    bench.now_ns = START + 1_000
    assert len(bench.faulty.reap()) == 0
    bench.now_ns = START + 1_001
    assert bench.faulty.reap().tolist() == [(7, BLOCK_BYTES)]
    assert bench.io(READ, 6, tag=8) == BLOCK_BYTES, "it is over"


@pytest.mark.parametrize(
    ("step", "op"),
    [("read.started", READ), ("write.started", WRITE), ("read.done", READ), ("io.done", WRITE)],
)
def test_a_kill_at_a_step_comes_at_once_and_after_its_record(bench: Bench, step: str, op: int) -> None:
    bench.with_faults(fault(0, "kill", step, nth=2), fault(1, "stop", "daemon.hello", for_ns=5))
    assert bench.io(op, 1) == BLOCK_BYTES
    assert bench.signals == []
    bench.start(op, 2, tag=8)
    assert bench.signals == ([9] if step.endswith("started") else [])
    bench.result(8)
    assert bench.signals == [9]
    assert bench.machine.word(bench.machine.specs[0], FIRED) == 1
    assert bench.events() == [(0, "kill", 1, 8)]


def test_the_hosts_steps_are_the_hosts_to_act_at(bench: Bench) -> None:
    bench.with_faults(fault(0, "kill", "swap_in.sent"))
    bench.machine.step("swap_in.sent", "swapd", 0, START + 1)
    assert bench.io(READ, 1) == BLOCK_BYTES
    assert bench.signals == []
