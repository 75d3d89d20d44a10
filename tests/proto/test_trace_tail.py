"""The last events of a process: whole ones only, whatever state the file is in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from proto.events import Events, Kind
from proto.trace_tail import last_events
from proto.trace_writer import (
    COUNT_WORD,
    EVENT_BYTES,
    HEADER_BYTES,
    RING_WORD,
    SEGMENTS_MIN,
    TraceWriter,
)

RING = 64
PROC = 7


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[TraceWriter]:
    """Of a process that was killed: its file is never closed in order before it is read."""
    made = TraceWriter(tmp_path / "vcpu-3.bin", PROC, RING * EVENT_BYTES)
    yield made
    made.close()


def _record(writer: TraceWriter, number: int) -> None:
    """Each with its number as a field. The reader takes everything at once, so that the ring goes round."""
    for n in range(writer.count, writer.count + number):
        writer._words[80] = n
        writer.event(Kind.EXIT, vcpu=3, a=n)
    assert writer.dropped == 0


def _numbers(events: Events) -> list[int]:
    return [int(a) for a in events["a"]]


def _damage(path: Path, number: int, at: int = 0, value: bytes = b"\xff") -> None:
    """Overwrite bytes of record ``number``."""
    with path.open("r+b") as file:
        file.seek(HEADER_BYTES + number % RING * EVENT_BYTES + at)
        file.write(value)


def _set_word(path: Path, word: int, value: int) -> None:
    with path.open("r+b") as file:
        file.seek(8 * word)
        file.write(value.to_bytes(8, "little"))


@pytest.mark.parametrize("recorded", [1, 5, RING - 1, RING, RING + 1, 2 * RING, 3 * RING + 5])
@pytest.mark.parametrize("wanted", [1, 4, RING, 10 * RING])
def test_the_newest_ones_oldest_first(recorded: int, wanted: int, writer: TraceWriter) -> None:
    _record(writer, recorded)
    events, note = last_events(writer.path, wanted)
    # The place of the oldest in a full ring may be half overwritten already.
    number = min(wanted, recorded, RING - 1 if recorded >= RING else RING)
    assert _numbers(events) == list(range(recorded - number, recorded))
    assert note == ""


def test_of_a_closed_file_the_whole_ring_counts(writer: TraceWriter) -> None:
    _record(writer, 2 * RING + 3)
    writer.close()
    assert _numbers(last_events(writer.path, RING)[0]) == list(range(RING + 3, 2 * RING + 3))


def test_a_record_that_was_being_written_is_not_shown(writer: TraceWriter) -> None:
    _record(writer, RING + 10)
    _damage(writer.path, RING + 10, value=bytes(EVENT_BYTES // 2))
    events, note = last_events(writer.path, RING)
    assert (_numbers(events), note) == (list(range(11, RING + 10)), "")


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (0, bytes(8)),
        (0, b"\xff" * 8),
        (16, b"\x01\x02\x03\x04"),
        (20, b"\xff\xff"),
        (22, b"\x00\x01"),
        (0, bytes(64)),
    ],
    ids=["lamport 0", "lamport of the future", "number", "kind", "process", "nothing"],
)
def test_a_damaged_record_is_left_out_and_counted(at: int, value: bytes, writer: TraceWriter) -> None:
    _record(writer, RING + 20)
    _damage(writer.path, RING + 15, at, value)
    events, note = last_events(writer.path, 8)
    assert note == "1 of the last 8 events are damaged or missing"
    assert _numbers(events) == [n for n in range(RING + 12, RING + 20) if n != RING + 15]


def test_what_was_cut_off_is_missing(writer: TraceWriter) -> None:
    _record(writer, 20)
    with writer.path.open("r+b") as file:
        file.truncate(HEADER_BYTES + 15 * EVENT_BYTES + 10)
    events, note = last_events(writer.path, 10)
    assert _numbers(events) == list(range(10, 15))
    assert note == "5 of the last 10 events are damaged or missing"


@pytest.mark.parametrize(
    ("word", "value"),
    [(COUNT_WORD, (1 << 64) - 1), (RING_WORD, 0), (RING_WORD, (1 << 64) - 1), (RING_WORD, 1)],
)
def test_an_absurd_header_gives_no_nonsense(word: int, value: int, writer: TraceWriter) -> None:
    _record(writer, 20)
    _set_word(writer.path, word, value)
    events, _ = last_events(writer.path, 10)
    assert set(_numbers(events)) <= set(range(20))


def test_files_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "host.bin"
    for content, says in ((None, "cannot be read"), (b"text" * 2000, "not an event file"), (b"", "header")):
        if content is not None:
            path.write_bytes(content)
        events, note = last_events(path, 3)
        assert len(events) == 0
        assert says in note


def test_a_file_that_was_cut_in_its_header(writer: TraceWriter) -> None:
    _record(writer, 3)
    writer.path.write_bytes(writer.path.read_bytes()[: HEADER_BYTES - 1])
    assert last_events(writer.path, 3)[1] == "vcpu-3.bin is cut inside its header"


def test_a_process_that_recorded_nothing(writer: TraceWriter) -> None:
    events, note = last_events(writer.path, 3)
    assert (len(events), note) == (0, "")
    assert RING // SEGMENTS_MIN * SEGMENTS_MIN == RING
    assert events.dtype == np.empty(0, events.dtype).dtype
