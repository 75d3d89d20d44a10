"""Event files: what every process of a run did, in 64-byte records that survive the process.

A file is one header page, then records of `EVENT`. It is written through a shared mapping, so what a process
recorded before it was killed is in the file. The count word in the header is raised after the record is
complete: a record below the count is whole.

Order across processes is by Lamport counter, never by clock: a process records an event *before* it publishes
what happened (a message, a shared word; it sends `TraceWriter.lamport` along) and calls `observe` with the
received counter *before* it records what it saw. Sorting by (lamport, proc, seq) then never puts an effect
before its cause.

Invariants of a file: records are numbered from 0 without gaps, counters rise strictly, one `proc`. A reader
takes the longest prefix for which that holds and says where it was cut.

Not handled here: recycling (a full file stops recording and counts what it drops), what the fields mean for a
rule (report/), JSON on disk.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, NamedTuple, Self

import numpy as np

from proto.errors import UserError
from proto.events import EVENT, FIELDS, Events, Kind, event_id
from proto.units import PAGE_SIZE

__all__ = [
    "EVENT",
    "FIELDS",
    "Events",
    "Kind",
    "RunEvents",
    "TraceFile",
    "TraceWriter",
    "event_dicts",
    "event_id",
    "merge",
    "read_events",
    "read_file",
    "read_run",
]

MAGIC: Final = b"\x89APFEV\r\n"
"""The first byte is not ASCII and a transfer in text mode changes the last two."""
VERSION: Final = 1
SUFFIX: Final = ".bin"
FOLDER: Final = "events"

RECORD: Final = struct.Struct("<QQIHHHHIQQQQ")
EVENT_BYTES: Final = 64
assert RECORD.size == EVENT.itemsize == EVENT_BYTES

HEADER_BYTES: Final = PAGE_SIZE
FIXED: Final = struct.Struct("<8sIIIHHQQ64s")
"""magic, version, header bytes, record bytes, proc, 0, start (monotonic ns), start (wall clock ns), process
name.
"""
COUNT_WORD: Final = 64
"""Words (u64) of the header: complete records, dropped records, 1 = closed in order."""
DROPPED_WORD: Final = 65
CLOSED_WORD: Final = 66
NAME_BYTES: Final = 64
GROW_BYTES: Final = 1 << 18
"""Disk blocks are allocated in steps of this size: writing to a hole of a full disk would kill the process
with SIGBUS.
"""


class TraceWriter:
    """Writes the event file of one process; to be created after fork, by the process that writes.

    `lamport` is the counter of the last event; send it with whatever is published. `dropped` counts events
    that found no room.
    """

    __slots__ = (
        "_allocated",
        "_capacity",
        "_closed",
        "_count",
        "_fd",
        "_map",
        "_words",
        "dropped",
        "lamport",
        "path",
        "proc",
    )

    def __init__(self, path: Path, proc: int, capacity_bytes: int = 32 << 20) -> None:
        """Create ``path`` (must not exist), sparse, for at most ``capacity_bytes`` of records.

        The process name in the header is the file's stem. UserError when the file cannot be created.
        """
        self.path = path
        self.proc = proc
        self.lamport = 0
        self.dropped = 0
        self._count = 0
        self._closed = False
        self._capacity = HEADER_BYTES + capacity_bytes // EVENT_BYTES * EVENT_BYTES
        self._allocated = 0
        name = path.stem.encode()[:NAME_BYTES]
        clocks = time.monotonic_ns(), time.time_ns()
        header = FIXED.pack(MAGIC, VERSION, HEADER_BYTES, EVENT_BYTES, proc, 0, *clocks, name)
        try:
            self._fd, self._map = _create_file(path, header, self._capacity)
        except OSError as error:
            raise UserError(
                "the event file cannot be created",
                where=str(path),
                found=error.strerror,
                allowed="a new file",
            ) from error
        self._words = memoryview(self._map)[:HEADER_BYTES].cast("Q")
        if not self._grow(HEADER_BYTES):
            self.close()
            raise UserError("no space left for the event file", where=str(path))

    def __enter__(self) -> Self:
        """The writer itself; leaving the block closes it."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    @property
    def count(self) -> int:
        """Events recorded."""
        return self._count

    def event(
        self,
        kind: int,
        vcpu: int = 0,
        vm: int = 0,
        token: int = 0,
        a: int = 0,
        b: int = 0,
        c: int = 0,
        cause: int = 0,
    ) -> int:
        """Record an event now; returns its Lamport counter, also when there was no room for the record.

        ``vcpu``, ``vm`` < 2**16, ``token`` < 2**32, the rest < 2**64; struct.error otherwise.
        """
        self.lamport = lamport = self.lamport + 1
        count = self._count
        offset = HEADER_BYTES + count * EVENT_BYTES
        if offset + EVENT_BYTES > self._allocated and not self._grow(offset + EVENT_BYTES):
            self.dropped += 1
            self._words[DROPPED_WORD] = self.dropped
            return lamport
        RECORD.pack_into(
            self._map,
            offset,
            lamport,
            time.monotonic_ns(),
            count,
            kind,
            self.proc,
            vcpu,
            vm,
            token,
            a,
            b,
            cause,
            c,
        )
        # After the record: a process killed in between leaves no half record below the count.
        self._count = self._words[COUNT_WORD] = count + 1
        return lamport

    def observe(self, lamport: int) -> None:
        """Take note of a counter that came with a message or beside a shared word: later events are ordered
        after it.
        """
        self.lamport = max(self.lamport, lamport)

    def close(self) -> None:
        """Cut the file to what was written and let it go; safe to call twice."""
        if self._closed:
            return
        self._closed = True
        self._words[CLOSED_WORD] = 1
        self._words.release()
        self._map.close()
        # If the disk refuses even this, the file is still valid, only longer.
        with suppress(OSError):
            os.ftruncate(self._fd, HEADER_BYTES + self._count * EVENT_BYTES)
        os.close(self._fd)

    def _grow(self, needed: int) -> bool:
        """Make sure that disk blocks exist up to ``needed``; False when the file is full or the disk is.

        After the first refusal nothing is tried again: a record after a gap would not be worth a system call
        per event.
        """
        if needed > self._capacity:
            return False
        size = min(GROW_BYTES, self._capacity - self._allocated)
        try:
            os.posix_fallocate(self._fd, self._allocated, size)
        except OSError:
            self._capacity = self._allocated
            return False
        # What was written is in the page cache: this process need not keep it mapped (it would count as its private memory).
        done = needed // mmap.PAGESIZE * mmap.PAGESIZE
        if done > HEADER_BYTES:
            start = max(HEADER_BYTES, done - GROW_BYTES - mmap.PAGESIZE)
            start = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
            self._map.madvise(mmap.MADV_DONTNEED, start, done - start)
        self._allocated += size
        return True


def _create_file(path: Path, header: bytes, size: int) -> tuple[int, mmap.mmap]:
    """A new sparse file with that header, open and mapped."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        # The header first: whenever the process is killed, the file is short or has one.
        os.write(fd, header)
        os.ftruncate(fd, size)
        return fd, mmap.mmap(fd, size)
    except OSError:
        os.close(fd)
        raise


class TraceFile(NamedTuple):
    """One event file as read. `note` is empty, or says what is missing and why."""

    path: Path
    name: str
    proc: int
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
        _check_header(path, header)
        if len(header) < HEADER_BYTES:
            note = f"{path.name}: cut at byte {size}, inside the header: no events"
            return TraceFile(path, path.stem, 0, np.empty(0, EVENT), 0, False, 0, 0, note)
        _, _, _, _, proc, _, start_ns, wall_ns, name = FIXED.unpack_from(header)
        words = np.frombuffer(header, "<u8")
        count, dropped, closed = (int(words[w]) for w in (COUNT_WORD, DROPPED_WORD, CLOSED_WORD))
        # By the file's size as it was: a live writer's file only grows below its count.
        present = min(count, (size - HEADER_BYTES) // EVENT_BYTES)
        events = np.frombuffer(file.read(present * EVENT_BYTES), EVENT)
    whole = _whole_prefix(events, proc)
    notes = []
    if present < count:
        notes.append(f"cut at byte {size}: {present} of {count} events")
    if whole < present:
        notes.append(f"damaged at byte {HEADER_BYTES + whole * EVENT_BYTES}: {whole} of {count} events")
    if dropped:
        notes.append(f"full: {dropped} later events were not recorded")
    events = events[:whole]
    _refuse_unknown_kinds(path, events)
    note = f"{path.name}: {'; '.join(notes)}" if notes else ""
    return TraceFile(
        path,
        name.rstrip(b"\0").decode(errors="replace"),
        proc,
        events,
        dropped,
        closed != 0,
        start_ns,
        wall_ns,
        note,
    )


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


def _check_header(path: Path, header: bytes) -> None:
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


def _whole_prefix(events: Events, proc: int) -> int:
    """How many records from the start are as a writer leaves them."""
    lamport = events["lamport"]
    good = (events["seq"] == np.arange(len(events), dtype=np.uint32)) & (events["proc"] == proc)
    good[:1] &= lamport[:1] > 0
    good[1:] &= lamport[1:] > lamport[:-1]
    return int(np.argmin(good)) if not good.all() else len(events)


def _refuse_unknown_kinds(path: Path, events: Events) -> None:
    unknown = np.setdiff1d(events["kind"], np.array(Kind, np.uint16))
    if len(unknown):
        raise UserError(
            f"unknown kind of event in a file of version {VERSION}",
            where=str(path),
            found=int(unknown[0]),
            allowed=f"kinds of version {VERSION}, {min(Kind)} to {max(Kind)}; read it with its own release",
        )
