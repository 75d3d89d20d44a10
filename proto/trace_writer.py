"""Event files, the writer's side: the format, and `TraceWriter`, which every process of a run has one of.

A file is one header page, then a ring of records of `EVENT`. It is written through a shared mapping, so what a process recorded
before it was killed is in the file. Record n lies at place n modulo the ring's size; the count word in the header is raised after the
record is complete, so a record below the count is whole.

Order across processes is by Lamport counter, never by clock: a process records an event *before* it publishes what happened (a
message, a shared word; it sends `TraceWriter.lamport` along) and calls `observe` with the received counter *before* it records what
it saw. Sorting by (lamport, proc, seq) then never puts an effect before its cause.

Recycling: the ring is cut into segments. Into one that was used before the writer goes only when the reader has taken all of it
(CONSUMED_WORD); without a reader that is never. A writer that finds no room stops for good and counts what it drops: after a gap
nothing could be judged.

How far a reader may go: no process records an event with a counter at or below that of its last one, nor at or below its floor
(FLOOR_WORD). A process that records nothing for long would hold up everybody, so the reader asks for a counter (WANTED_WORD) and the
process raises its own to it in `tick`, which its loop calls whatever it does. Raising a Lamport counter is always right.

Invariants of a file: records are numbered without gaps, counters rise strictly, one `proc`.

Not handled here: reading (proto/trace.py), what the fields mean for a rule (report/).
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from contextlib import suppress
from pathlib import Path
from typing import Final, Self

from proto.errors import UserError
from proto.events import EVENT
from proto.files import write_all
from proto.units import PAGE_SIZE

MAGIC: Final = b"\x89APFEV\r\n"
"""The first byte is not ASCII and a transfer in text mode changes the last two."""
VERSION: Final = 2
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
NAME_BYTES: Final = 64
# Words (u64) of the header. By the writer, a cache line of their own:
COUNT_WORD: Final = 64
"""Records that were completed, those that were overwritten since included."""
DROPPED_WORD: Final = 65
"""Events that found no room."""
CLOSED_WORD: Final = 66
"""1: closed in order."""
RING_WORD: Final = 67
"""Records the ring holds."""
FLOOR_WORD: Final = 68
"""No event will be recorded with a counter at or below this one."""
# By the reader:
CONSUMED_WORD: Final = 80
"""Records that the reader has taken: their places may be used again."""
WANTED_WORD: Final = 81
"""The counter that the floor should reach."""

SEGMENT_EVENTS: Final = 4096
"""256 KiB: the step in which room is looked for and disk blocks are allocated (writing to a hole of a full disk would kill the
process with SIGBUS).
"""
SEGMENTS_MIN: Final = 4
"""A small ring has shorter segments, so that the writer can use some while the reader works on others."""


class TraceWriter:
    """Writes the event file of one process; to be created after fork, by the process that writes.

    `lamport` is the counter of the last event; send it with whatever is published. `dropped` counts events
    that found no room.
    """

    __slots__ = (
        "_closed",
        "_count",
        "_fd",
        "_floor",
        "_full",
        "_limit",
        "_map",
        "_offset",
        "_ring",
        "_segment",
        "_words",
        "dropped",
        "lamport",
        "path",
        "proc",
    )

    def __init__(self, path: Path, proc: int, capacity_bytes: int = 32 << 20) -> None:
        """Create ``path`` (must not exist), sparse, with a ring of at most ``capacity_bytes``.

        The process name in the header is the file's stem. UserError when the file cannot be created.
        """
        self.path = path
        self.proc = proc
        self.lamport = 0
        self.dropped = 0
        self._count = self._limit = self._floor = 0
        self._offset = HEADER_BYTES
        self._closed = self._full = False
        room = max(1, capacity_bytes // EVENT_BYTES)
        self._segment = min(SEGMENT_EVENTS, max(1, room // SEGMENTS_MIN))
        self._ring = room // self._segment * self._segment
        name = path.stem.encode()[:NAME_BYTES]
        clocks = time.monotonic_ns(), time.time_ns()
        header = FIXED.pack(MAGIC, VERSION, HEADER_BYTES, EVENT_BYTES, proc, 0, *clocks, name)
        try:
            self._fd, self._map = _create_file(path, header, HEADER_BYTES + self._ring * EVENT_BYTES)
        except OSError as error:
            raise UserError(
                "the event file cannot be created",
                where=str(path),
                found=error.strerror,
                allowed="a new file",
            ) from error
        self._words = memoryview(self._map)[:HEADER_BYTES].cast("Q")
        if not self._allocate(0, HEADER_BYTES):
            self.close()
            raise UserError("no space left for the event file", where=str(path))
        self._words[RING_WORD] = self._ring

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
        if count == self._limit and not self._next_segment():
            self.dropped += 1
            self._words[DROPPED_WORD] = self.dropped
            return lamport
        offset = self._offset
        RECORD.pack_into(
            self._map,
            offset,
            lamport,
            time.monotonic_ns(),
            count & 0xFFFF_FFFF,
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
        self._offset = offset + EVENT_BYTES
        # After the record: a process killed in between leaves no half record below the count.
        self._count = self._words[COUNT_WORD] = count + 1
        return lamport

    def observe(self, lamport: int) -> None:
        """Take note of a counter that came with a message or beside a shared word: later events are ordered
        after it.
        """
        self.lamport = max(self.lamport, lamport)

    def tick(self) -> None:
        """Promise the reader that nothing comes at or below the counter it asks for; to be called now and then, also while idle."""
        wanted = self._words[WANTED_WORD]
        if wanted > self._floor:
            self.lamport = max(self.lamport, wanted)
            # After all records up to it, which are in the count by now.
            self._floor = self._words[FLOOR_WORD] = self.lamport

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
            os.ftruncate(self._fd, HEADER_BYTES + min(self._count, self._ring) * EVENT_BYTES)
        os.close(self._fd)

    def _next_segment(self) -> bool:
        """Go on in the next segment; False when it is not free or the disk is full, and from then on."""
        count, at = self._count, self._count % self._ring
        if self._full:
            return False
        start = HEADER_BYTES + at * EVENT_BYTES
        if count < self._ring:
            free = self._allocate(start, self._segment * EVENT_BYTES)
        else:
            free = self._words[CONSUMED_WORD] >= count - self._ring + self._segment
        if not free:
            self._full = True
            return False
        self._unmap_before(start if at else HEADER_BYTES + self._ring * EVENT_BYTES)
        self._offset = start
        self._limit = count + self._segment
        return True

    def _allocate(self, start: int, size: int) -> bool:
        try:
            os.posix_fallocate(self._fd, start, size)
        except OSError:
            return False
        return True

    def _unmap_before(self, end: int) -> None:
        """What was written is in the page cache: this process need not keep it mapped (it would count as its private memory)."""
        end = end // mmap.PAGESIZE * mmap.PAGESIZE
        start = end - self._segment * EVENT_BYTES // mmap.PAGESIZE * mmap.PAGESIZE - mmap.PAGESIZE
        if end > (start := max(HEADER_BYTES, start)):
            # Refused: then it stays mapped, and nothing else happens.
            with suppress(OSError):
                self._map.madvise(mmap.MADV_DONTNEED, start, end - start)


def _create_file(path: Path, header: bytes, size: int) -> tuple[int, mmap.mmap]:
    """A new sparse file with that header, open and mapped."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        # The header first: whenever the process is killed, the file is short or has one.
        write_all(fd, header)
        os.ftruncate(fd, size)
        return fd, mmap.mmap(fd, size)
    except OSError:
        os.close(fd)
        raise
