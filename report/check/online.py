"""Checking a run while it is under way: the event files of its processes are merged as they grow, checked, and given back.

Merging needs to know up to which Lamport counter nothing more can come: the least floor of all processes (proto/trace_writer.py),
exact whoever is idle and whatever is on its way. Events of swap daemons hold nothing up: no invariant looks at them.

Invariants: one `turn` does a bounded amount of work; beside the state of the checker there is in memory only what was taken and
lies above the least floor. What cannot be judged is said: a file that lost events ends the check at its last one, and so does an
event at or below a counter that was checked already, which a floor rules out.

Not handled here: when turns are made and by which thread (launcher/online.py), files of a run that has ended (source.py).
"""

from __future__ import annotations

import os
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Final

import numpy as np

from proto.errors import UserError
from proto.trace import EVENT, HEADER_BYTES, SUFFIX, Events, merge
from proto.trace_live import LiveFile
from report.check.checker import Checker
from report.check.source import FINISHED, SWAP_DAEMON, UNJUDGED
from report.check.verdict import Verdict
from report.resumes import ResumeWatch

EVENTS_PER_TURN: Final = 1 << 15
"""2 MiB: what is in hand at a time, taken and merged."""
LEAST_PER_FILE: Final = 1 << 6
EVERYTHING: Final = (1 << 64) - 1


class _File:
    """A file and what was taken of it and not checked yet, in order."""

    __slots__ = ("live", "orders", "waiting")

    def __init__(self, live: LiveFile) -> None:
        self.live = live
        self.orders = not live.name.startswith(UNJUDGED)
        self.waiting: Events = np.empty(0, EVENT)

    def upto(self, limit: int) -> Events:
        """Take what is at or below a counter out of what waits."""
        at = int(np.searchsorted(self.waiting["lamport"], np.uint64(limit), "right"))
        events, self.waiting = self.waiting[:at], self.waiting[at:]
        return events


class OnlineCheck:
    """The check of one run.

    Constructor: folder: where the event files will be. writers: names of the files without which nothing can be ordered. joined: as for
    `Checker`.
    """

    def __init__(self, folder: Path, profile: str, writers: Collection[str], *, joined: bool = False) -> None:
        self.checker = Checker(profile, joined=joined)
        self.resumes = ResumeWatch()
        self.checked_upto = 0
        """Lamport counter up to which everything was checked."""
        self._folder = folder
        self._writers = frozenset(writers)
        self._missing = set(writers)
        self._files: dict[str, _File] = {}
        self._seen: set[str] = set()
        self._cut = ""
        self._notes: list[str] = []
        self._online = 0
        self.behind_max = 0
        """Most events that were recorded and not checked at the beginning of a turn."""
        self.fullest = 0.0
        """Largest share of a ring that was recorded and not taken."""
        self.more = False
        """The last turn had its fill, and another one finds more to check."""

    # -- while the run is under way --------------------------------------------------------------------------------------
    def turn(self) -> int:
        """Check what can be checked now, at most about EVENTS_PER_TURN events; how many that were."""
        self._open_new()
        if self._cut:
            return 0
        newest = max((one.live.newest() for one in self._files.values()), default=0)
        for one in self._files.values():
            one.live.want(newest)
        self._note_behind()
        number = self._check_upto(self._floor())
        self._online += number
        return number

    def behind(self) -> int:
        """Events that are recorded and not checked; those of daemons do not count."""
        return sum(one.live.left + len(one.waiting) for one in self._files.values() if one.orders)

    def _note_behind(self) -> None:
        self.behind_max = max(self.behind_max, self.behind())
        self.fullest = max(self.fullest, max((one.live.fill for one in self._files.values()), default=0.0))

    def _floor(self) -> int:
        """Counter up to which nothing more can come."""
        if self._missing:
            return 0
        # A file is asked whether it is closed before its records are counted: a closed one gets no more.
        return min(
            (
                EVERYTHING if one.live.closed and not one.live.dropped else one.live.floor()
                for one in self._files.values()
                if one.orders
            ),
            default=0,
        )

    def _open_new(self) -> None:
        """Look for new files; of a daemon that has a successor nothing more will come."""
        for path in self._new_in_folder():
            if path.stat().st_size >= HEADER_BYTES:
                self._seen.add(path.stem)
                self._missing.discard(path.stem)
                self._files[path.stem] = _File(LiveFile(path))
                self._retire(path.stem)

    def _new_in_folder(self) -> list[Path]:
        """Event files that were not opened yet, those of a daemon in the order of its epochs."""
        # By name first: each restart of a daemon leaves a file, and each turn comes here.
        names: list[str] = []
        with suppress(FileNotFoundError), os.scandir(self._folder) as entries:
            names = [entry.name.removesuffix(SUFFIX) for entry in entries if entry.name.endswith(SUFFIX)]
        new = sorted((name for name in names if name not in self._seen), key=lambda name: (len(name), name))
        return [self._folder / f"{name}{SUFFIX}" for name in new]

    def _retire(self, name: str) -> None:
        """Close the files of earlier daemons of that number, whose last events are of no use to anybody."""
        if not name.startswith(SWAP_DAEMON):
            return
        number = name.rpartition("-")[0]
        for other in [one for one in self._files if one != name and one.rpartition("-")[0] == number]:
            self._files.pop(other).live.close()

    def _check_upto(self, limit: int) -> int:
        self.more = False
        if limit <= self.checked_upto:
            return 0
        for one, left, most in self._shares():
            taken = self._take(one, limit, most)
            # What came after the limit was read lies above it: only what was there before counts.
            # More of it may be below the limit: the next turn goes on here. Of a damaged one nothing more comes, and whoever it
            # orders cannot be judged beyond it.
            if one.live.last < limit and (one.orders if one.live.damaged else left > taken):
                limit = one.live.last
                self.more = not one.live.damaged
        if limit <= self.checked_upto or self._cut:
            return 0
        events = merge([one.upto(limit) for one in self._files.values()])
        self.checker.feed(events)
        self.resumes.feed(events)
        self.checked_upto = limit
        return len(events)

    def _shares(self) -> list[tuple[_File, int, int]]:
        """Each file with what it has to take and how much of that is taken now: all of it, or so that no file falls behind others."""
        left = [(one, one.live.left) for one in self._files.values()]
        total = sum(number for _, number in left)
        if total <= EVENTS_PER_TURN:
            return [(one, number, number) for one, number in left]
        return [(one, number, max(LEAST_PER_FILE, number * EVENTS_PER_TURN // total)) for one, number in left]

    def _take(self, one: _File, limit: int, most: int) -> int:
        """Take events of a file until its share is taken or the limit is reached; how many."""
        live, taken = one.live, 0
        while taken < most and live.last < limit and (len(events := live.take(most - taken))):
            if one.orders and int(events["lamport"][0]) <= self.checked_upto:
                self._cut = f"{live.name} recorded events at or below a counter that was checked before"
            one.waiting = np.concatenate([one.waiting, events]) if len(one.waiting) else events
            taken += len(events)
        return taken

    # -- the end ---------------------------------------------------------------------------------------------------------
    def finish(self, name: str, ended: str, misbehaves: str = "") -> Verdict:
        """Check what is left when every process has gone; the verdict on the whole run. ended: as in the summary. misbehaves: why
        liveness is not to be judged.
        """
        cut = self._check_rest() or ("" if ended == FINISHED else f"the run ended as {ended!r}") or misbehaves
        if not self._seen:
            cut = "no process recorded anything"
        verdict = self.checker.finish(name, cut=cut)
        verdict.notes[:0] = self._notes
        verdict.note_stop(stopped=self.checker.stopped)
        return verdict

    def go_on(self, folder: Path) -> int:
        """Every process has gone, and others that go on with the same guests will leave their files there.

        Returns the counter above which theirs have to begin, so that both are one history.
        """
        self._cut = self._check_rest()
        highest = max((one.live.last for one in self._files.values()), default=0)
        self.close()
        self._seen.clear()
        self._missing = set(self._writers)
        self._folder = folder
        self.checked_upto = highest
        return highest

    def _check_rest(self) -> str:
        """Check what files without a writer hold; why that is not all, "" if it is."""
        self._missing.clear()
        self._files_at_the_end()
        limit = self._last()
        self._check_upto(limit)
        while self.more and not self._cut:
            self._check_upto(limit)
        notes, cut = self._losses()
        self._notes += notes
        return self._cut or cut

    @property
    def online(self) -> int:
        """Events that were checked while the run was under way."""
        return self._online

    def close(self) -> None:
        """Let the files go."""
        for one in self._files.values():
            one.live.close()
        self._files.clear()

    def _files_at_the_end(self) -> None:
        for path in self._new_in_folder():
            self._seen.add(path.stem)
            try:
                self._files[path.stem] = _File(LiveFile(path))
            except UserError as error:
                if not path.stem.startswith(UNJUDGED):
                    self._cut = self._cut or str(error)

    def _last(self) -> int:
        """Up to which counter the events of all processes are there."""
        incomplete = [one.live for one in self._files.values() if one.orders and one.live.dropped]
        return min((live.newest() for live in incomplete), default=EVERYTHING)

    def _losses(self) -> tuple[list[str], str]:
        """Notes, and why the events do not reach the end of the run, "" if they do."""
        notes, cut = [], ""
        for one in self._files.values():
            live = one.live
            if live.dropped or live.damaged:
                why = live.damaged or f"full: {live.dropped} later events were not recorded"
                notes.append(f"{live.path.name}: {why}")
                if one.orders:
                    cut = f"{live.path.name} is incomplete, checked up to Lamport counter {self.checked_upto}"
            elif not live.closed and one.orders:
                cut = cut or f"{live.path.name} was not closed: its process was killed"
        return notes, cut
