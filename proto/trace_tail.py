"""The last events of a process, from its event file, whatever state its death left the file in.

Invariants: at most the places asked for are read, whatever the header says; an event is given only if it is as a writer leaves it, in
its own place and in order with those before it.

Not handled here: all events of a file (proto/trace.py), words for people (report/event_text.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np

from proto.errors import UserError
from proto.events import EVENT, Events, Kind
from proto.trace import SEQ_MASK, check_header
from proto.trace_writer import CLOSED_WORD, COUNT_WORD, EVENT_BYTES, FIXED, HEADER_BYTES, RING_WORD

_KINDS: Final = frozenset(map(int, Kind))
PLACE_MAX: Final = 1 << 52
"""No file is that long: a place beyond it reads as nothing."""


def last_events(path: Path, number: int) -> tuple[Events, str]:
    """At most the last ``number`` (1 or more) events of a file, dtype EVENT, oldest first; and what is wrong with it, or "".

    Damaged and missing records are left out and counted in the note; a file that cannot be read, or is something else, gives no
    events and a note.
    """
    assert number > 0
    try:
        with path.open("rb") as file:
            header = file.read(HEADER_BYTES)
            check_header(path, header)
            if len(header) < HEADER_BYTES:
                return np.empty(0, EVENT), f"{path.name} is cut inside its header"
            proc = int(FIXED.unpack_from(header)[4])
            words = np.frombuffer(header, "<u8")
            count, closed, ring = (int(words[w]) for w in (COUNT_WORD, CLOSED_WORD, RING_WORD))
            # The record behind the last one may be half written, in the place of the oldest.
            kept = ring if closed or count < ring else ring - 1
            first = count - min(number, count, max(0, kept))
            records = bytearray()
            for n in range(first, count):
                file.seek(HEADER_BYTES + min(n % ring, PLACE_MAX) * EVENT_BYTES)
                records += file.read(EVENT_BYTES).ljust(EVENT_BYTES, b"\0")
    except OSError as error:
        return np.empty(0, EVENT), f"{path.name} cannot be read: {error.strerror}"
    except UserError as error:
        return np.empty(0, EVENT), str(error)
    events = np.frombuffer(bytes(records), EVENT)
    good = _good(events, proc, first)
    lost = len(events) - len(good)
    return events[good], f"{lost} of the last {len(events)} events are damaged or missing" if lost else ""


def _good(events: Events, proc: int, first: int) -> list[int]:
    """Indices of the records that are whole. From the end: what is newest tells most."""
    found: list[int] = []
    later = 1 << 64
    for i in range(len(events) - 1, -1, -1):
        event = events[i]
        lamport = int(event["lamport"])
        whole = int(event["seq"]) == (first + i) & SEQ_MASK and int(event["proc"]) == proc
        if whole and 0 < lamport < later and int(event["kind"]) in _KINDS:
            found.append(i)
            later = lamport
    return found[::-1]
