"""What is sampled while a run goes on, set of processes by set of processes."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np

from launcher.outage import Reading
from launcher.outcome import Outcome, Samples
from launcher.watch import Watch
from report.summary import Snapshot

MS = 1_000_000
S = 1000 * MS
START = 7200 * S
PER_MS = 10
"""Work that the guests do."""


@dataclass
class Figures:
    """What a set of processes shows: a made-up `Watch`."""

    work: int = 0
    epochs: tuple[int, ...] = (0, 0)
    stop: bool = False

    def outage_reading(self) -> Reading:
        return Reading((self.work,), self.epochs)

    def stopped(self) -> bool:
        return self.stop

    def snapshot(self, now_ns: int) -> Snapshot:
        return Snapshot(now_ns, np.zeros(0, np.uint64), np.zeros(0, np.uint64))


@dataclass
class Run:
    """One outcome, one clock, one set of processes after the other."""

    outcome: Outcome = field(default_factory=Outcome)
    figures: Figures = field(default_factory=Figures)
    now_ns: int = START
    late_ns: int = 0
    """The clock, beyond the time of the round."""

    def __post_init__(self) -> None:
        self.next_set()

    def next_set(self) -> None:
        """Fresh processes with the same guests."""
        self.figures = Figures(self.figures.work, (-1, -1))
        self.samples = Samples(
            self.outcome,
            cast(Watch, self.figures),
            dict,
            os.getpid(),
            self.now_ns,
            lambda: self.now_ns + self.late_ns,
        )

    def begin(self) -> None:
        self.figures.epochs = (0, 0)
        self.samples.begin(self.now_ns, self.now_ns, 3600)

    def go_on(self, ms: int, per_ms: int = PER_MS, *, saving: bool = False) -> None:
        for _ in range(ms // 10):
            self.now_ns += 10 * MS
            self.figures.work += 10 * per_ms
            self.samples.turn(self.now_ns, saving=saving)

    def restart(self) -> None:
        """Saved for 2 s, restored for 3 s, in which the guests stand still."""
        self.go_on(2000, 0, saving=True)
        self.next_set()
        self.go_on(3000, 0)
        self.begin()

    def found(self) -> dict[str, Any]:
        self.figures.stop = True
        self.samples.turn(self.now_ns)
        return self.outcome.outage.summary()


def test_time_of_saving_and_restoring_is_no_time_of_the_guests() -> None:
    run = Run()
    run.begin()
    for _ in range(2):
        run.go_on(1000)
        run.restart()
    run.go_on(1000)
    found = run.found()
    assert (found["count"], found["work_per_100ms_up"]) == (0, 100 * PER_MS)


def test_a_daemon_that_dies_while_the_guests_stand_still_is_no_outage() -> None:
    run = Run()
    run.samples.daemon_down(0, 0, run.now_ns)
    run.begin()
    run.go_on(1000)
    run.samples.daemon_down(1, 0, run.now_ns, saving=True)
    run.go_on(2000, 0, saving=True)
    run.next_set()
    run.samples.daemon_down(1, 0, run.now_ns)
    run.go_on(3000, 0)
    run.begin()
    run.go_on(1000)
    assert run.found()["count"] == 0
    assert run.outcome.at_stop is not None


def test_an_outage_ends_where_the_guests_begin_to_stand_still() -> None:
    run = Run()
    run.begin()
    run.go_on(1000)
    run.samples.daemon_down(0, 0, run.now_ns)
    run.go_on(200)
    run.restart()
    assert not run.outcome.outage.is_down()
    run.samples.daemon_down(0, 0, run.now_ns)
    run.go_on(50)
    assert run.outcome.outage.is_down(), "the incarnation before this one was one of other processes"
    run.figures.epochs = (1, 0)
    run.go_on(1000)
    found = run.found()
    assert (found["count"], found["total_ms"]) == (2, 260)
    assert found["work_per_100ms_up"] == found["work_per_100ms_down"] == 100 * PER_MS


def test_the_end_of_the_measured_time_is_seen_while_the_guests_are_saved() -> None:
    run = Run()
    run.begin()
    run.go_on(1000)
    run.figures.stop = True
    run.samples.turn(run.now_ns, saving=True)
    assert run.outcome.at_stop is not None


def test_the_measured_time_is_not_over_before_its_end() -> None:
    run = Run(late_ns=3)
    run.begin()
    run.figures.stop = True
    run.samples.turn(run.now_ns)
    assert run.outcome.at_stop is not None
    assert run.outcome.at_stop.at_ns == run.now_ns + 3, "the flag was set after the round had begun"
