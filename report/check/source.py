"""Event files of a run, merged by Lamport counter in windows of bounded size.

Files are mapped, not read: beside one window nothing of them is kept in memory. Every file is first gone through once by
proto.trace.read_file, which refuses what is no event file and says where a damaged one ends.

A file that lost events (cut, damaged, full) cuts the whole check at its last event: what others did behind that would be judged
without its causes. Files of swap daemons and of the launcher do not: no invariant looks at their events.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from proto.errors import UserError
from proto.files import read_regular
from proto.trace import EVENT, FOLDER, HEADER_BYTES, SUFFIX, Events, event_files, merge, read_file

WINDOW_EVENTS: Final = 1 << 17
DEFAULT_PROFILE: Final = "mainline"
SWAP_DAEMON: Final = "swapd"
UNJUDGED: Final = (SWAP_DAEMON, "launcher")
"""Whose events no invariant looks at."""
RUN_JSON_BYTES_MAX: Final = 16 << 20
Counters = Any
"""Column of Lamport counters of a mapped file, u64, rising."""
FINISHED: Final = "finished"


@dataclass(slots=True)
class Source:
    """Event files of one run, a recycled one in two parts. cut: why they do not reach its end, "" if they do. first, last: the lowest
    and the highest counter that is checked; first 0: from the beginning.
    """

    name: str
    files: list[Events]
    profile: str = DEFAULT_PROFILE
    cut: str = ""
    first: int = 0
    last: int | None = None
    notes: list[str] = field(default_factory=list)
    joined: bool = False
    """What happened before the first event is not in these files."""

    def windows(self, window_events: int = WINDOW_EVENTS) -> Iterator[Events]:
        """The merged events, dtype EVENT, in windows of at most ``window_events``, or as many as share one counter."""
        files = [f for f in self.files if len(f)]
        counters = [f["lamport"] for f in files]
        at = [0] * len(files)
        while any(i < len(f) for i, f in zip(at, files, strict=True)):
            ends = _next_ends(counters, at, window_events)
            yield merge([f[i:end] for i, end, f in zip(at, ends, files, strict=True)])
            at = ends


def _upto(counters: Counters, limit: int, start: int = 0) -> int:
    """How many are at most ``limit``. Not np.searchsorted: that would copy a column of records."""
    return bisect_right(counters, limit, start)


def _next_ends(counters: list[Counters], at: list[int], window_events: int) -> list[int]:
    """Where the next window ends in each file: at the highest counter that does not make it too long."""
    left = [(c, i) for c, i in zip(counters, at, strict=True) if i < len(c)]
    low, high = min(int(c[i]) for c, i in left), max(int(c[-1]) for c, _ in left)
    while low < high:
        middle = (low + high + 1) // 2
        if sum(_upto(c, middle, i) - i for c, i in left) <= window_events:
            low = middle
        else:
            high = middle - 1
    return [_upto(c, low, i) for c, i in zip(counters, at, strict=True)]


def open_run(run_dir: Path) -> Source:
    """The run of a run directory. UserError when there are no event files, or bad ones."""
    paths = event_files(run_dir)
    if not paths:
        raise UserError(
            "no event files", where=str(run_dir), allowed=f"a run directory with {FOLDER}/*{SUFFIX}"
        )
    source = open_files(paths, name=str(run_dir))
    _take_run_json(source, run_dir / "run.json")
    return source


def open_files(paths: Sequence[Path], name: str = "") -> Source:
    """Event files of one run. UserError as `proto.trace.read_file`."""
    source = Source(name or str(paths[0]), [])
    for path in paths:
        try:
            file = read_file(path)
        except OSError as error:
            raise UserError("the event file cannot be read", where=str(path), found=error.strerror) from error
        count = len(file.events)
        daemon = file.name.startswith(UNJUDGED)
        if file.note:
            source.notes.append(file.note)
        if file.note and not daemon:
            last = int(file.events["lamport"][-1]) if count else 0
            source.last = last if source.last is None else min(source.last, last)
            source.cut = f"{path.name} is incomplete"
        elif not file.closed and not daemon:
            source.cut = source.cut or f"{path.name} was not closed: its process was killed, or still runs"
        if file.begin and count and not daemon:
            source.first = max(source.first, int(file.events["lamport"][0]))
        begin, ring = file.begin, file.ring
        del file
        if count:
            source.files += _mapped(path, begin, count, ring)
    if source.first:
        source.files = [f[_upto(f["lamport"], source.first - 1) :] for f in source.files]
        source.notes.append(
            f"the run was recycled: checked from Lamport counter {source.first} on, what was under way then only in part"
        )
    if source.last is not None:
        source.files = [f[: _upto(f["lamport"], source.last)] for f in source.files]
        source.notes.append(f"checked up to Lamport counter {source.last}, where the first file ends")
    return source


def _mapped(path: Path, begin: int, count: int, ring: int) -> list[Events]:
    """Records ``begin`` to ``begin + count`` of a file, in at most two parts."""
    start = begin % ring if ring else 0
    behind = min(count, ring - start) if begin else count
    parts = [(start, behind), (0, count - behind)]
    return [
        np.memmap(path, EVENT, "r", HEADER_BYTES + EVENT.itemsize * at, (number,))
        for at, number in parts
        if number
    ]


def _take_run_json(source: Source, path: Path) -> None:
    """Profile and end of the run, if it says so."""
    if not path.exists():
        source.notes.append(f"no run.json: taken for a {source.profile} run")
        return
    try:
        record: dict[str, Any] = json.loads(read_regular(path, "run.json", RUN_JSON_BYTES_MAX, "a run.json"))
        source.profile = record["topology"]["run"]["profile"]
        ended = record.get("ended")
        restored = record.get("restored", False)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            "not the run.json of a run", where=str(path), found=str(error), allowed="topology.run.profile"
        ) from error
    if restored:
        source.joined = True
        source.notes.append("the guests go on from an image: what was under way then is judged only in part")
    if ended != FINISHED:
        source.cut = source.cut or f"the run ended as {ended!r}"
