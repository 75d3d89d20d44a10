"""Event files, the reader's side: one file, all files of a run, events as plain values. The format is in proto/trace_writer.py.

A reader takes the longest run of records without a gap and says where it was cut. Of a ring that was written more than once it takes
the last records, from the oldest that cannot have been overwritten half.

Not handled here: files of a run under way (proto/trace_live.py), what the fields mean for a rule (report/), JSON on disk.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from proto.errors import UserError
from proto.events import EVENT, FIELDS, Events, Kind, event_id
from proto.trace_writer import (
    CLOSED_WORD,
    COUNT_WORD,
    DROPPED_WORD,
    EVENT_BYTES,
    FIXED,
    FOLDER,
    HEADER_BYTES,
    MAGIC,
    RING_WORD,
    SUFFIX,
    VERSION,
    TraceWriter,
)

__all__ = [
    "EVENT",
    "FIELDS",
    "FOLDER",
    "HEADER_BYTES",
    "SUFFIX",
    "VERSION",
    "Events",
    "Kind",
    "RunEvents",
    "TraceFile",
    "TraceWriter",
    "event_dicts",
    "event_files",
    "event_id",
    "events_folder",
    "merge",
    "read_events",
    "read_file",
    "read_run",
]

SEQ_MASK: Final = 0xFFFF_FFFF


def events_folder(number: int) -> str:
    """Folder of the event files of a run's set of processes number 1, 2, ...

    Lamport counters go on from set to set, so that the files of all of them are one history.
    """
    return FOLDER if number == 1 else f"{FOLDER}-{number}"


def event_files(run_dir: Path) -> list[Path]:
    """The event files of a run directory, of all its sets of processes."""
    return sorted(run_dir.glob(f"{FOLDER}/*{SUFFIX}")) + sorted(run_dir.glob(f"{FOLDER}-*/*{SUFFIX}"))


class TraceFile(NamedTuple):
    """One event file as read. `note` is empty, or says what is missing and why."""

    path: Path
    name: str
    proc: int
    begin: int
    """Number of its first event: those before were overwritten."""
    ring: int
    """Places for records: record n lies at place n modulo this."""
    events: Events
    dropped: int
    closed: bool
    start_ns: int
    start_wall_ns: int
    note: str


class RunEvents(NamedTuple):
    """The merged events of a run and the notes of its files."""

    events: Events
    notes: list[str]
    files: list[TraceFile]


def read_file(path: Path) -> TraceFile:
    """Read one event file, of a live, closed or killed process; a cut file gives the events before the cut
    and a note.

    UserError for a file of something else, of another version, or with kinds that this version does not know.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        header = file.read(HEADER_BYTES)
        check_header(path, header)
        if len(header) < HEADER_BYTES:
            note = f"{path.name}: cut at byte {size}, inside the header: no events"
            return TraceFile(path, path.stem, 0, 0, 0, np.empty(0, EVENT), 0, False, 0, 0, note)
        _, _, _, _, proc, _, start_ns, wall_ns, name = FIXED.unpack_from(header)
        words = np.frombuffer(header, "<u8")
        count, dropped, closed, ring = (
            int(words[w]) for w in (COUNT_WORD, DROPPED_WORD, CLOSED_WORD, RING_WORD)
        )
        # By the file's size as it was: a live writer's file only grows below its count.
        extent = _extent(count, ring, closed != 0, (size - HEADER_BYTES) // EVENT_BYTES)
        parts = []
        for first, last in extent.places:
            file.seek(HEADER_BYTES + first * EVENT_BYTES)
            parts.append(np.frombuffer(file.read((last - first) * EVENT_BYTES), EVENT))
        lost = 0
        if extent.begin and not closed:
            # Its writer went on meanwhile, over the oldest records.
            file.seek(8 * COUNT_WORD)
            lost = max(0, int.from_bytes(file.read(8), "little") + 1 - ring - extent.begin)
    events = np.concatenate(parts)[lost:]
    begin = extent.begin + lost
    whole = whole_prefix(events, proc, begin)
    notes = []
    if begin + len(events) < count:
        notes.append(f"cut at byte {size}: {len(events)} of {count} events")
    if whole < len(events):
        place = (begin + whole) % max(1, ring)
        notes.append(f"damaged at byte {HEADER_BYTES + place * EVENT_BYTES}: {whole} of {count} events")
    if dropped:
        notes.append(f"full: {dropped} later events were not recorded")
    events = events[:whole]
    refuse_unknown_kinds(path, events)
    note = f"{path.name}: {'; '.join(notes)}" if notes else ""
    return TraceFile(
        path,
        name.rstrip(b"\0").decode(errors="replace"),
        proc,
        begin,
        ring,
        events,
        dropped,
        closed != 0,
        start_ns,
        wall_ns,
        note,
    )


class _Extent(NamedTuple):
    """Which records of a file are to be read: number of the first, and their places in order, [first, last) each."""

    begin: int
    places: list[tuple[int, int]]


def _extent(count: int, ring: int, closed: bool, present: int) -> _Extent:
    """The last records without a gap. present: places that the file has."""
    if not ring or count <= ring:
        return _Extent(0, [(0, min(count, present))])
    # The writer may have been killed inside the record after the last, whose place is that of the oldest.
    oldest = count - ring + (0 if closed else 1)
    # Places from 0 on hold the records from ``turn`` on, the places behind them what is left of the turn before.
    turn = (count - 1) // ring * ring
    end = min(count - turn, present)
    # A file that was cut may end before the oldest of them.
    newer = (min(max(0, oldest - turn), end), end)
    if present < ring or oldest >= turn:
        return _Extent(turn + newer[0], [newer])
    return _Extent(oldest, [(oldest % ring, ring), newer])


def read_run(run_dir: Path) -> RunEvents:
    """All event files of a run, merged by (lamport, proc, seq). UserError as `read_file`, and when there are
    no files.
    """
    paths = sorted((run_dir / FOLDER).glob(f"*{SUFFIX}"))
    if not paths:
        raise UserError(
            "no event files", where=str(run_dir), allowed=f"a run directory with {FOLDER}/*{SUFFIX}"
        )
    files = [read_file(path) for path in paths]
    return RunEvents(merge([f.events for f in files]), [f.note for f in files if f.note], files)


def read_events(run_dir: Path) -> Events:
    """The merged events of a run, dtype EVENT; `read_run` also says what is missing."""
    return read_run(run_dir).events


def merge(parts: list[Events]) -> Events:
    """One array ordered by (lamport, proc, seq)."""
    events = np.concatenate([np.empty(0, EVENT), *parts])
    merged: Events = events[np.lexsort((events["seq"], events["proc"], events["lamport"]))]
    return merged


def event_dicts(events: Events) -> Iterator[dict[str, Any]]:
    """Events as plain values with the fields' names, for JSON lines."""
    names = EVENT.names
    assert names is not None
    for record in events:
        values = dict(zip(names, record.item(), strict=True))
        kind = Kind(values["kind"])
        plain = {key: values[key] for key in ("lamport", "t_ns", "proc", "seq", "vm", "vcpu")}
        plain["kind"] = kind.name
        plain |= {key: values[key] for key in ("token", "cause") if values[key]}
        yield plain | dict(zip(FIELDS[kind], (values[key] for key in "abc"), strict=False))


def check_header(path: Path, header: bytes) -> None:
    """Refuse what is not an event file of this version, as far as the header is there."""
    if header[: len(MAGIC)] != MAGIC[: len(header)]:
        raise UserError(
            "not an event file", where=str(path), found=header[: len(MAGIC)], allowed="an event file"
        )
    if len(header) < FIXED.size:
        return
    _, version, header_bytes, record_bytes, *_ = FIXED.unpack_from(header)
    if (version, header_bytes, record_bytes) != (VERSION, HEADER_BYTES, EVENT_BYTES):
        raise UserError(
            f"an event file of another version ({record_bytes} bytes per event)",
            where=str(path),
            found=version,
            allowed=f"version {VERSION} ({EVENT_BYTES} bytes per event)",
        )


def whole_prefix(events: Events, proc: int, begin: int = 0) -> int:
    """How many records from the start are as a writer leaves them; ``begin``: number of the first."""
    lamport = events["lamport"]
    numbers = (np.arange(len(events), dtype=np.uint64) + np.uint64(begin)) & np.uint64(SEQ_MASK)
    good = (events["seq"] == numbers) & (events["proc"] == proc)
    good[:1] &= lamport[:1] > 0
    good[1:] &= lamport[1:] > lamport[:-1]
    return int(np.argmin(good)) if not good.all() else len(events)


def refuse_unknown_kinds(path: Path, events: Events) -> None:
    """UserError for kinds that this version does not know."""
    unknown = np.setdiff1d(events["kind"], np.array(Kind, np.uint16))
    if len(unknown):
        raise UserError(
            f"unknown kind of event in a file of version {VERSION}",
            where=str(path),
            found=int(unknown[0]),
            allowed=f"kinds of version {VERSION}, {min(Kind)} to {max(Kind)}; read it with its own release",
        )
