"""What the guests got done while swap daemons were away: samples of their work, cut into slots around each outage.

Purpose: `OutageMeter` is told now and then how much the guests have done and which daemons are away. It keeps the samples
(`History`), splits the work into that done while every daemon was there and that done while one was away, and lays the slots around
the beginnings of all outages on top of each other (`Slots`).

Two kinds of outages: of a daemon of this machine, which begins when its end is known here (`down`) and ends when the host has connected
its successor, or goes on without it for good; and of a daemon elsewhere, which the host reports when it is over, with the last sign of
life as its beginning.

Invariants: memory is bounded, however long the run and however many the outages; work between two samples counts as done evenly between
them; a slot that reaches into a neighbouring outage, or beyond what was measured, belongs to no average. Pure: every call is told the
time and the figures.

Not handled here: reading the figures (launcher/watch.py), when tasks went on (report/resumes.py), tables and figures (report/outage.py).
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from report.outage import FIRST_MS, LAST_MS, ROW_MS, SLOT_MS

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
MS: Final = 1_000_000
TICK_MS: Final = 100
"""Between two samples of a run that expects no outage: the launcher looks around as often anyway."""
CLOSE_TICK_MS: Final = 10
"""Where outages are expected: half a slot, so that a slot holds two samples."""
DOWN_TICK_MS: Final = 5
"""While a daemon is away, whose return is to be noticed soon."""
HISTORY_SAMPLES: Final = 1 << 14
"""Of 8 bytes and 8 more per VM; in full resolution for at least 40 s, longer than any window around an outage."""
SLOTS: Final = (LAST_MS - FIRST_MS) // SLOT_MS
SLOTS_PER_ROW: Final = ROW_MS // SLOT_MS
OUTAGES_IN_FULL: Final = 8
"""So many outages are kept slot by slot; the others are in the averages."""
LENGTHS: Final = 1 << 12
"""Lengths of the last outages, for their median."""
RUN_SLOTS_MAX: Final = 1000
"""Slots into which the whole run is cut."""


class Reading(NamedTuple):
    """Figures of one moment, which only grow while one set of processes runs.

    work: of each VM. epochs: of each daemon, the incarnation that the host connected last, -1 before the first, more than any epoch when it
    is gone for good. silences: outages of daemons elsewhere that are over; silent_ns, heard_ns: the last one of them, from the last sign of
    life to its end, monotonic.
    """

    work: tuple[int, ...]
    epochs: tuple[int, ...] = ()
    silences: int = 0
    silent_ns: int = 0
    heard_ns: int = 0


class History:
    """Samples of work that only grows, `HISTORY_SAMPLES` of them at most: when it is full, every second one of the older half goes."""

    __slots__ = ("_times", "_work", "count")

    def __init__(self, vms: int) -> None:
        self.count = 0
        self._times: I64 = np.zeros(HISTORY_SAMPLES, np.int64)
        self._work: I64 = np.zeros((HISTORY_SAMPLES, vms), np.int64)

    def add(self, now_ns: int, work: Sequence[int]) -> int:
        """Append; returns the time since the sample before, 0 for the first. A sample that is not later replaces the last one."""
        since_ns = now_ns - self.last_ns if self.count else 0
        if self.count and since_ns <= 0:
            self._work[self.count - 1] = work
            return 0
        if self.count == HISTORY_SAMPLES:
            half = HISTORY_SAMPLES // 2
            kept = np.concatenate([np.arange(0, half, 2), np.arange(half, HISTORY_SAMPLES)])
            self.count = len(kept)
            self._times[: self.count] = self._times[kept]
            self._work[: self.count] = self._work[kept]
        self._times[self.count] = now_ns
        self._work[self.count] = work
        self.count += 1
        return since_ns

    @property
    def first_ns(self) -> int:
        """Time of the first sample."""
        return int(self._times[0])

    @property
    def last_ns(self) -> int:
        """Time of the last sample."""
        return int(self._times[self.count - 1])

    def at(self, times_ns: Sequence[int] | I64) -> F64:
        """Work done until each of these times, one row per time, one column per VM; between samples, in proportion."""
        # Relative to the first sample: nanoseconds since the start of the machine do not fit into a float's 53 bits with all digits.
        origin = self.first_ns
        times = (self._times[: self.count] - origin).astype(np.float64)
        wanted = (np.asarray(times_ns, np.int64) - origin).astype(np.float64)
        return np.stack([np.interp(wanted, times, column) for column in self._work[: self.count].T], axis=1)

    def between(self, first_ns: int, last_ns: int) -> float:
        """Work of all VMs from one time to another."""
        done = self.at([first_ns, last_ns])
        return float((done[1] - done[0]).sum())


@dataclass(slots=True)
class Slots:
    """Work per slot of SLOT_MS around the beginnings of outages: sums, and how many outages have each slot. First ones in full."""

    vms: int
    sums: F64 = field(init=False)
    outages: I64 = field(init=False)
    in_full: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.sums = np.zeros((SLOTS, self.vms))
        self.outages = np.zeros(SLOTS, np.int64)

    def add(self, history: History, first_ns: int, last_ns: int, left_ns: int, right_ns: int) -> None:
        """An outage from first_ns to last_ns. Slots outside left_ns..right_ns are not counted."""
        edges = first_ns + MS * (FIRST_MS + SLOT_MS * np.arange(SLOTS + 1, dtype=np.int64))
        known = (edges[:-1] >= left_ns) & (edges[1:] <= right_ns)
        done = np.diff(history.at(edges), axis=0)
        self.sums[known] += done[known]
        self.outages[known] += 1
        if len(self.in_full) < OUTAGES_IN_FULL:
            work = [
                round(float(total), 1) if ok else None
                for total, ok in zip(done.sum(axis=1), known, strict=True)
            ]
            self.in_full.append(
                {"at_ns": first_ns, "down_ms": round((last_ns - first_ns) / MS, 3), "work": work}
            )

    def rows(self) -> dict[str, float | None]:
        """Mean work of all VMs per ROW_MS, by the row's beginning in ms relative to that of the outage; None where a slot is missing."""
        means = self.means().sum(axis=1).reshape(-1, SLOTS_PER_ROW).sum(axis=1)
        begins = range(FIRST_MS, LAST_MS, ROW_MS)
        return {str(ms): _number(value) for ms, value in zip(begins, means, strict=True)}

    def means(self) -> F64:
        """Mean work per slot and VM; NaN where no outage has the slot."""
        with np.errstate(invalid="ignore"):
            return self.sums / self.outages[:, None]

    def before(self) -> float | None:
        """Mean work per ROW_MS before an outage, from all slots there that some outage has."""
        count = -FIRST_MS // SLOT_MS
        slots = int(self.outages[:count].sum())
        return _number(float(self.sums[:count].sum()) / slots * SLOTS_PER_ROW) if slots else None


@dataclass(slots=True)
class OutageMeter:
    """See the module. `expected`: outages are likely, so look closely from the beginning on."""

    expected: bool = False
    count: int = 0
    _history: History | None = None
    _slots: Slots | None = None
    _down: dict[int, int] = field(default_factory=dict)
    """Daemons of this machine that are away, each with the epoch that is awaited. Not how many: others may return, or go, meanwhile."""
    _since_ns: int = 0
    """Beginning of the outage under way; 0: there is none."""
    _over: tuple[int, int] | None = None
    """The last outage, as long as its slots are not complete."""
    _left_ns: int = 0
    """Where the slots of the next outage may begin: at the end of the one before."""
    _silences: int = 0
    _moved_ns: int = 0
    """How long the guests stood still between sets of processes; all times are kept without that."""
    _stopped: bool = False
    _down_ns: int = 0
    _down_work: float = 0.0
    _lengths: deque[int] = field(default_factory=lambda: deque(maxlen=LENGTHS))
    _gaps: I64 = field(default_factory=lambda: np.zeros(1001, np.int64))
    """Samples by the time since the one before, ms rounded up; the last entry: 1 s and more."""

    def is_down(self) -> bool:
        """Whether a daemon of this machine is away."""
        return bool(self._down)

    @property
    def tick_ms(self) -> int:
        """How long the next sample may wait."""
        if self._down:
            return DOWN_TICK_MS
        return CLOSE_TICK_MS if (self.expected or self.count) and self._samples else TICK_MS

    @property
    def _samples(self) -> bool:
        return self._history is not None and not self._stopped

    def begin(self, now_ns: int, reading: Reading) -> None:
        """The barrier has opened; again after a restore, when the guests stood still meanwhile."""
        if self._history is None:
            self._history, self._slots = History(len(reading.work)), Slots(len(reading.work))
            self._left_ns = now_ns
        else:
            self._close(self._history.last_ns)
            self._moved_ns = now_ns - self._history.last_ns
        self._silences = reading.silences
        self._history.add(now_ns - self._moved_ns, reading.work)

    def sample(self, now_ns: int, reading: Reading) -> None:
        """Take the figures of now, and see who is back."""
        if not self._samples:
            return
        assert self._history is not None
        at_ns = now_ns - self._moved_ns
        gap_ns = self._history.add(at_ns, reading.work)
        if self.expected or self.count:
            self._gaps[min(-(-gap_ns // MS), len(self._gaps) - 1)] += 1
        if reading.silences > self._silences:
            self._silences = reading.silences
            self._was_silent(reading.silent_ns - self._moved_ns, reading.heard_ns - self._moved_ns)
        if self._down:
            self._down = {d: epoch for d, epoch in self._down.items() if reading.epochs[d] < epoch}
            if not self._down:
                self._close(at_ns)
        if self._over is not None and at_ns >= self._over[0] + LAST_MS * MS:
            self._complete(at_ns)

    def down(self, daemon: int, epoch: int, now_ns: int, reading: Reading) -> None:
        """An incarnation of a daemon of this machine ended; the next one is awaited."""
        if not self._samples:
            return
        self.sample(now_ns, reading)
        if not self._down:
            self._open(now_ns - self._moved_ns)
        # A daemon that died again before it was connected is still the same one that is missing.
        self._down[daemon] = epoch + 1

    def stop(self, now_ns: int, reading: Reading) -> None:
        """The measured time is over, and with it an outage that is not."""
        if not self._samples:
            return
        self.sample(now_ns, reading)
        self._end()
        self._stopped = True

    def _end(self) -> None:
        assert self._history is not None
        self._close(self._history.last_ns, whole=False)
        self._complete(self._history.last_ns)

    def _open(self, at_ns: int) -> None:
        self.count += 1
        self._complete(at_ns)
        self._since_ns = at_ns

    def _close(self, at_ns: int, *, whole: bool = True) -> None:
        """The outage under way is over. whole: and this is its end, not that of the measured time."""
        if not self._since_ns:
            return
        assert self._history is not None
        self._down.clear()
        since_ns, self._since_ns = self._since_ns, 0
        self._down_ns += at_ns - since_ns
        self._down_work += self._history.between(since_ns, at_ns)
        if whole:
            self._lengths.append(at_ns - since_ns)
        self._over = since_ns, at_ns

    def _was_silent(self, silent_ns: int, heard_ns: int) -> None:
        """An outage of a daemon elsewhere; what overlaps with one before, or with one under way, is that one's."""
        assert self._history is not None
        begin_ns = max(silent_ns, self._history.first_ns, self._over[1] if self._over else 0, self._left_ns)
        if self._since_ns or begin_ns >= heard_ns:
            return
        self._open(begin_ns)
        self._close(heard_ns)

    def _complete(self, right_ns: int) -> None:
        """Nothing more of the last outage's slots will come: the next one begins, or the time is up."""
        if self._over is None:
            return
        assert self._history is not None
        assert self._slots is not None
        (first_ns, last_ns), self._over = self._over, None
        self._slots.add(self._history, first_ns, last_ns, self._left_ns, right_ns)
        self._left_ns = last_ns

    def summary(self) -> dict[str, Any]:
        """The `outage` table of the summary, without what the events tell."""
        if self._samples:
            self._end()
        history, slots = self._history, self._slots
        up_ns = up_work = 0.0
        if history is not None and history.count:
            up_ns = history.last_ns - history.first_ns - self._down_ns
            up_work = history.between(history.first_ns, history.last_ns) - self._down_work
        return {
            "count": self.count,
            "total_ms": round(self._down_ns / MS, 3),
            "down_ms": median_and_max([length / MS for length in self._lengths]),
            "work_per_100ms_up": _rate(up_work, up_ns),
            "work_per_100ms_down": _rate(self._down_work, self._down_ns),
            "work_per_100ms_before": slots.before() if slots else None,
            "work_by_ms": slots.rows() if slots and self.count else None,
            "sampled_every_ms": self._resolution(),
        }

    def _resolution(self) -> dict[str, float] | None:
        total = int(self._gaps.sum())
        if not total:
            return None
        median = int(np.searchsorted(np.cumsum(self._gaps), (total + 1) // 2))
        return {"median": float(median), "max": float(np.flatnonzero(self._gaps)[-1])}

    def details(self) -> dict[str, Any] | None:
        """Contents of outages.json: everything that is kept, slot by slot; None for a run without outage. After `summary`."""
        history, slots = self._history, self._slots
        if history is None or slots is None or not self.count:
            return None
        total_ns = history.last_ns - history.first_ns
        slot_ms = max(SLOT_MS, -(-total_ns // (RUN_SLOTS_MAX * MS)))
        edges = history.first_ns + slot_ms * MS * np.arange(total_ns // (slot_ms * MS) + 1, dtype=np.int64)
        return {
            "slot_ms": SLOT_MS,
            "first_ms": FIRST_MS,
            "outages_per_slot": [int(count) for count in slots.outages],
            "work_per_slot": [[_number(value) for value in slot] for slot in slots.means().T],
            "first_outages": [
                {"at_s": round((one["at_ns"] - history.first_ns) / 1e9, 6)}
                | {name: value for name, value in one.items() if name != "at_ns"}
                for one in slots.in_full
            ],
            "run": {
                "slot_ms": slot_ms,
                "work_per_slot": [
                    [_number(v) for v in column] for column in np.diff(history.at(edges), axis=0).T
                ],
            },
        }


def median_and_max(values: Sequence[float]) -> dict[str, float | None]:
    """Of some times, ms."""
    if not values:
        return {"median": None, "max": None}
    return {"median": round(statistics.median(values), 3), "max": round(max(values), 3)}


def _rate(work: float, time_ns: float) -> float | None:
    return round(work * 100 * MS / time_ns, 1) if time_ns > 0 else None


def _number(value: float) -> float | None:
    return None if np.isnan(value) else round(float(value), 1)
