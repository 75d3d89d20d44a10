"""Event files as rings: what a reader gets while the writer goes on, what stays in the file, what is promised about counters."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proto.errors import UserError
from proto.trace import HEADER_BYTES, Kind, TraceWriter, read_file
from proto.trace_live import LiveFile
from proto.trace_writer import CONSUMED_WORD

RING = 64


@contextmanager
def opened(folder: Path, ring: int = RING) -> Iterator[tuple[TraceWriter, LiveFile]]:
    """A writer and a reader of the same file, both closed at the end."""
    path = folder / "host.bin"
    with ExitStack() as stack:
        writer = stack.enter_context(TraceWriter(path, 3, ring * 64))
        live = LiveFile(path)
        stack.callback(live.close)
        yield writer, live


def record(writer: TraceWriter, number: int) -> None:
    for _ in range(number):
        writer.event(Kind.KICK, a=writer.count)


def test_what_was_taken_is_recycled_and_nothing_is_lost(tmp_path: Path) -> None:
    with opened(tmp_path) as (writer, live):
        got = []
        for _ in range(40):
            record(writer, 13)
            while len(events := live.take(10)):
                got += events["a"].tolist()
        assert got == list(range(40 * 13))
        assert (writer.dropped, live.left, live.last) == (0, 0, 40 * 13)
    file = read_file(tmp_path / "host.bin")
    assert (file.begin, file.dropped, file.note) == (40 * 13 - RING, 0, "")
    assert file.events["a"].tolist() == list(range(40 * 13 - RING, 40 * 13))
    assert (tmp_path / "host.bin").stat().st_size == HEADER_BYTES + RING * 64


def test_a_reader_that_is_behind_makes_the_writer_stop_for_good(tmp_path: Path) -> None:
    with opened(tmp_path) as (writer, live):
        record(writer, RING)
        assert len(live.take(RING // 4 - 1)) == RING // 4 - 1, "not yet a whole segment"
        record(writer, 5)
        assert (writer.count, writer.dropped) == (RING, 5)
        assert len(live.take()) == RING // 4 * 3 + 1
        record(writer, 5)
        assert (writer.count, live.dropped) == (RING, 10), "after a gap nothing could be judged"
    assert read_file(tmp_path / "host.bin").note == "host.bin: full: 10 later events were not recorded"


def test_the_floor_rises_to_what_is_wanted_and_is_kept(tmp_path: Path) -> None:
    with opened(tmp_path) as (writer, live):
        assert live.floor() == 0
        record(writer, 3)
        assert (live.newest(), live.floor()) == (3, 3)
        live.want(100)
        assert live.floor() == 3, "nothing was promised yet"
        writer.tick()
        assert live.floor() == 100
        assert writer.event(Kind.KICK) == 101
        writer.observe(500)
        live.want(200)
        writer.tick()
        assert live.floor() == 500, "the counter itself is ahead of what was wanted"
        live.want(150)
        writer.tick()
        assert (live.floor(), writer.lamport) == (500, 500)


def test_a_promise_does_not_cover_what_was_dropped(tmp_path: Path) -> None:
    with opened(tmp_path) as (writer, live):
        record(writer, RING + 1)
        live.want(1000)
        writer.tick()
        assert live.floor() == RING


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**32), ring=st.integers(1, 40))
def test_a_promise_is_never_broken(tmp_path_factory: pytest.TempPathFactory, seed: int, ring: int) -> None:
    rng = random.Random(seed)
    with opened(tmp_path_factory.mktemp("floor"), ring) as (writer, live):
        floor, floored_at, seen = 0, 0, []
        for _ in range(300):
            match rng.randrange(6):
                case 0:
                    writer.tick()
                case 1:
                    writer.observe(writer.lamport + rng.randrange(-20, 20))
                case 2:
                    live.want(rng.randrange(writer.lamport + 50))
                case 3:
                    record(writer, rng.randrange(2 * ring))
                case 4:
                    seen += live.take(rng.randrange(1, 9))["lamport"].tolist()
                case _:
                    assert live.floor() >= floor or live.dropped
                    assert all(counter > floor for counter in seen[floored_at:])
                    floor, floored_at = live.floor(), live.taken + live.left
        while len(events := live.take()):
            seen += events["lamport"].tolist()
        assert all(counter > floor for counter in seen[floored_at:])
        assert len(seen) == writer.count
        assert not live.damaged


def test_damage_ends_what_is_taken_and_is_told(tmp_path: Path) -> None:
    with opened(tmp_path) as (writer, live):
        record(writer, 10)
        fd = os.open(writer.path, os.O_WRONLY)
        os.pwrite(fd, b"\xff\xff", HEADER_BYTES + 4 * 64 + 16)
        os.close(fd)
        assert live.take()["a"].tolist() == [0, 1, 2, 3]
        assert live.damaged == f"damaged at byte {HEADER_BYTES + 4 * 64}"
        assert (live.left, live.floor(), len(live.take())) == (0, 4, 0)


def test_a_file_that_shrinks_does_no_harm(tmp_path: Path) -> None:
    with opened(tmp_path) as (writer, live):
        record(writer, 10)
        os.truncate(writer.path, HEADER_BYTES + 2 * 64 + 9)
        assert live.take()["a"].tolist() == [0, 1]
        assert live.damaged
        os.truncate(writer.path, HEADER_BYTES + RING * 64)


def test_what_is_no_event_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(b"hello" * 2000)
    with pytest.raises(UserError, match="not an event file"):
        LiveFile(path)
    TraceWriter(tmp_path / "y.bin", 1, 640).close()
    os.truncate(tmp_path / "y.bin", 200)
    with pytest.raises(UserError, match="without a complete header"):
        LiveFile(tmp_path / "y.bin")


def _ring_on_disk(path: Path, total: int, ring: int, *, closed: bool) -> bytes:
    """A file whose ring was written more than once."""
    with opened(path.parent, ring) as (writer, live):
        for _ in range(total):
            record(writer, 1)
            live.take()
        if not closed:
            path.write_bytes(writer.path.read_bytes())
    if closed:
        path.write_bytes((path.parent / "host.bin").read_bytes())
    (path.parent / "host.bin").unlink()
    return path.read_bytes()


@pytest.mark.parametrize("closed", [True, False])
@pytest.mark.parametrize("total", [8, 9, 11, 15, 16, 17, 24])
def test_a_recycled_file_gives_its_last_events(tmp_path: Path, total: int, closed: bool) -> None:
    path = tmp_path / "copy.bin"
    _ring_on_disk(path, total, 8, closed=closed)
    got = read_file(path)
    begin = max(0, total - 8 + (0 if closed or total == 8 else 1))
    assert (got.begin, got.note) == (begin, "")
    assert got.events["a"].tolist() == list(range(begin, total))


@pytest.mark.parametrize("total", [5, 8, 11, 16, 19])
def test_a_file_cut_at_any_byte_gives_what_is_left_without_a_gap(tmp_path: Path, total: int) -> None:
    path = tmp_path / "copy.bin"
    data = _ring_on_disk(path, total, 8, closed=True)
    for size in [*range(200), *range(200, HEADER_BYTES, 97), *range(HEADER_BYTES, len(data))]:
        path.write_bytes(data[:size])
        got = read_file(path)
        numbers = got.events["a"].tolist()
        assert numbers == list(range(got.begin, got.begin + len(numbers)))
        assert "cut at byte" in got.note or got.begin + len(numbers) == total
        assert len(numbers) <= max(0, size - HEADER_BYTES) // 64
    path.write_bytes(data)
    assert read_file(path).events["a"].tolist() == list(range(max(0, total - 8), total))


def test_numbers_of_records_may_pass_32_bits(tmp_path: Path) -> None:
    with opened(tmp_path, 8) as (writer, live):
        writer._count = writer._limit = 1 << 32
        live.taken = 1 << 32
        writer._words[CONSUMED_WORD] = 1 << 32
        record(writer, 3)
        assert live.take()["seq"].tolist() == [0, 1, 2]
