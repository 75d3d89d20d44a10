"""The event file of a process that still runs, read piece by piece and given back to its writer.

`LiveFile.take` copies what is new and tells the writer that its places are free. `floor` says up to which Lamport counter nothing
more can come from this process; `want` asks the process to raise it. See proto/trace_writer.py for the words in the header.

Invariants: reads through the descriptor, not through a mapping, so that a file that shrinks does no harm; only CONSUMED_WORD and
WANTED_WORD are ever written.

Not handled here: several files and their order (report/check/online.py).
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import Final

import numpy as np

from proto.errors import UserError
from proto.events import EVENT, Events
from proto.trace import check_header, refuse_unknown_kinds, whole_prefix
from proto.trace_writer import (
    CLOSED_WORD,
    CONSUMED_WORD,
    COUNT_WORD,
    DROPPED_WORD,
    EVENT_BYTES,
    FIXED,
    FLOOR_WORD,
    HEADER_BYTES,
    RING_WORD,
    WANTED_WORD,
)

PLACE_MAX: Final = 1 << 52
TAKE_EVENTS: Final = 1 << 16
"""Most events taken at a time (4 MiB)."""


class LiveFile:
    """One event file that somebody may be writing. `last`: counter of the last event taken. `damaged`: what is wrong with it, or ""."""

    def __init__(self, path: Path) -> None:
        """Open a file whose header is complete. UserError as `proto.trace.read_file`; OSError when it cannot be opened."""
        self.path = path
        self.name = path.stem
        self.taken = 0
        self.last = 0
        self.damaged = ""
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            self.proc = _proc_of(path, os.pread(self._fd, HEADER_BYTES, 0))
            self._map = mmap.mmap(self._fd, HEADER_BYTES)
        except BaseException:
            os.close(self._fd)
            raise
        self._words = memoryview(self._map).cast("Q")

    @property
    def dropped(self) -> int:
        """Events that its writer had no room for."""
        return self._words[DROPPED_WORD]

    @property
    def closed(self) -> bool:
        """Its writer has closed it in order."""
        return self._words[CLOSED_WORD] != 0

    @property
    def left(self) -> int:
        """Events recorded and not taken that can be."""
        return 0 if self.damaged else self._words[COUNT_WORD] - self.taken

    @property
    def fill(self) -> float:
        """Share of the ring that holds events not taken."""
        return self.left / max(1, self._words[RING_WORD])

    def newest(self) -> int:
        """Counter of the last event recorded, 0 without one."""
        count = self._words[COUNT_WORD]
        if count <= self.taken or self.damaged:
            return self.last
        return int.from_bytes(os.pread(self._fd, 8, self._place(count - 1)), "little")

    def floor(self) -> int:
        """No event that `left` does not count yet will have a counter at or below this one. Read it before `left`."""
        floor = self._words[FLOOR_WORD]
        # What was dropped lies behind the last event recorded, whatever was promised since.
        return self.newest() if self.dropped or self.damaged else max(floor, self.newest())

    def want(self, lamport: int) -> None:
        """Ask the writer to raise its floor to this counter."""
        self._words[WANTED_WORD] = max(lamport, self._words[WANTED_WORD])

    def take(self, most: int = TAKE_EVENTS) -> Events:
        """The next events, dtype EVENT, at most so many; their places belong to the writer again.

        Behind the first record that is not as a writer leaves it nothing is taken any more, and `damaged` says where it is.
        UserError for kinds that this version does not know.
        """
        ring, start = self._words[RING_WORD], self.taken
        number = min(self.left, most, ring - start % ring if ring else 0)
        if number <= 0:
            return np.empty(0, EVENT)
        raw = os.pread(self._fd, number * EVENT_BYTES, self._place(start))
        events = np.frombuffer(raw[: len(raw) // EVENT_BYTES * EVENT_BYTES], EVENT)
        whole = whole_prefix(events, self.proc, start)
        if whole and events["lamport"][0] <= self.last:
            whole = 0
        if whole < number:
            self.damaged = f"damaged at byte {self._place(start + whole)}"
        events = events[:whole]
        refuse_unknown_kinds(self.path, events)
        if whole:
            self.last = int(events["lamport"][-1])
        self.taken = self._words[CONSUMED_WORD] = start + whole
        return events

    def close(self) -> None:
        """Let it go."""
        self._words.release()
        self._map.close()
        os.close(self._fd)

    def _place(self, number: int) -> int:
        # Beyond the end of any file when the header says so: nothing is read there, which shows as damage.
        return HEADER_BYTES + min(number % max(1, self._words[RING_WORD]), PLACE_MAX) * EVENT_BYTES


def _proc_of(path: Path, header: bytes) -> int:
    check_header(path, header)
    if len(header) < HEADER_BYTES:
        raise UserError("an event file without a complete header", where=str(path))
    return int(FIXED.unpack_from(header)[4])
