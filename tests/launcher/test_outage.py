"""The guests' work around outages: which state each piece of it belongs to, slots, and the memory that all this takes."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from launcher import outage
from launcher.outage import HISTORY_SAMPLES, MS, OUTAGES_IN_FULL, SLOTS, History, OutageMeter, Reading
from proto.layout import DW_EPOCH, DW_GONE
from report.outage import FIRST_MS, LAST_MS, SLOT_MS

S = 1000 * MS
START = 3600 * S + 123_456_789


@dataclass
class Run:
    """Tells a meter about a made-up run: so much work per ms, looked at every so many ms."""

    meter: OutageMeter = field(default_factory=lambda: OutageMeter(expected=True))
    step_ms: int = 10
    vms: int = 1
    now_ns: int = START
    work: float = 5e9
    epochs: list[int] = field(default_factory=lambda: [0, 0, 0])
    """Of each daemon, the incarnation that the host has connected last."""
    newest: list[int] = field(default_factory=lambda: [0, 0, 0])
    """Of each daemon, the last incarnation that was started."""
    silences: int = 0
    silent_ns: int = 0
    heard_ns: int = 0

    @property
    def reading(self) -> Reading:
        work, epochs = (int(self.work),) * self.vms, tuple(self.epochs)
        return Reading(work, epochs, self.silences, self.silent_ns, self.heard_ns)

    def begin(self) -> Run:
        self.meter.begin(self.now_ns, self.reading)
        return self

    def go_on(self, ms: int, per_ms: float) -> None:
        for _ in range(ms // self.step_ms):
            self.now_ns += self.step_ms * MS
            self.work += per_ms * self.step_ms
            self.meter.sample(self.now_ns, self.reading)

    def down(self, daemon: int = 0) -> None:
        """It ends, and its successor is started."""
        self.meter.down(daemon, self.newest[daemon], self.now_ns, self.reading)
        self.newest[daemon] += 1

    def up(self, daemon: int = 0) -> None:
        """The successor is connected."""
        self.epochs[daemon] = self.newest[daemon]
        self.meter.sample(self.now_ns, self.reading)

    def gone(self, daemon: int = 0) -> None:
        """The host goes on without it for good."""
        self.epochs[daemon] = DW_GONE - DW_EPOCH
        self.meter.sample(self.now_ns, self.reading)

    def fresh(self) -> Run:
        """Another set of processes goes on from an image."""
        self.epochs, self.newest = [0, 0, 0], [0, 0, 0]
        return self.begin()


def test_work_is_split_by_outage() -> None:
    run = Run().begin()
    run.go_on(2000, 10)
    run.down()
    assert run.meter.is_down()
    run.go_on(200, 5)
    run.up()
    assert not run.meter.is_down()
    run.go_on(1000, 10)
    found = run.meter.summary()
    assert found["count"] == 1
    assert found["total_ms"] == 200
    assert found["down_ms"] == {"median": 200, "max": 200}
    assert found["work_per_100ms_up"] == found["work_per_100ms_before"] == 1000
    assert found["work_per_100ms_down"] == 500


def test_rows_are_relative_to_the_end_of_the_daemon() -> None:
    run = Run().begin()
    for _ in range(3):
        run.go_on(2000, 10)
        run.down()
        run.go_on(300, 2)
        run.up()
        run.go_on(200, 4)
    run.go_on(4000, 10)
    rows = run.meter.summary()["work_by_ms"]
    assert list(rows) == [str(ms) for ms in range(FIRST_MS, LAST_MS, 100)]
    assert [rows[str(ms)] for ms in range(-500, 600, 100)] == [1000] * 5 + [200] * 3 + [400] * 2 + [1000]
    assert rows["2400"] == 1000, "the next outage begins 2500 ms after this one"
    assert rows["2900"] == 1000, "that one has the last only, and it is full"


def test_slots_that_reach_into_another_outage_are_not_counted() -> None:
    run = Run().begin()
    for _ in range(4):
        run.go_on(300, 10)
        run.down()
        run.go_on(100, 0)
        run.up()
    found = run.meter.summary()
    rows = found["work_by_ms"]
    assert rows["-300"] == rows["-100"] == found["work_per_100ms_before"] == 1000
    assert rows["-400"] is None, "there the one before is under way, or nothing was measured"
    assert rows["0"] == 0
    assert rows["300"] == 1000
    assert rows["400"] is None
    details = run.meter.details()
    assert details is not None
    first, last = details["outages_per_slot"][-FIRST_MS // SLOT_MS], details["outages_per_slot"][-1]
    assert (first, last) == (4, 0)


def test_half_a_slot_belongs_to_no_average() -> None:
    run = Run(step_ms=1).begin()
    run.go_on(50, 10)
    run.down()
    run.go_on(30, 10)
    run.meter.stop(run.now_ns, run.reading)
    details = run.meter.details()
    assert details is not None
    at = -FIRST_MS // SLOT_MS
    assert details["outages_per_slot"][at - 3 : at + 2] == [0, 1, 1, 1, 0]


def test_work_between_two_samples_is_spread_evenly() -> None:
    run = Run(step_ms=100).begin()
    run.go_on(1000, 10)
    run.down()
    run.go_on(100, 3)
    run.up()
    run.go_on(4000, 10)
    details = run.meter.details()
    assert details is not None
    at = -FIRST_MS // SLOT_MS
    assert details["work_per_slot"][0][at - 1 : at + 6] == [200, 60, 60, 60, 60, 60, 200]


def test_each_vm_has_its_own_slots_and_the_rows_are_of_all() -> None:
    run = Run(vms=3).begin()
    run.go_on(1000, 10)
    run.down()
    run.go_on(100, 10)
    run.up()
    run.go_on(4000, 10)
    assert run.meter.summary()["work_by_ms"]["0"] == 3000
    details = run.meter.details()
    assert details is not None
    assert [slots[30] for slots in details["work_per_slot"]] == [200, 200, 200]
    assert len(details["run"]["work_per_slot"]) == 3


def test_a_daemon_that_dies_again_before_it_was_back_is_one_outage() -> None:
    run = Run().begin()
    run.go_on(100, 1)
    run.down()
    run.go_on(100, 1)
    run.down()
    run.go_on(100, 1)
    assert run.meter.is_down()
    run.up()
    assert not run.meter.is_down()
    assert run.meter.summary()["down_ms"] == {"median": 200, "max": 200}
    assert run.meter.count == 1


def test_an_outage_lasts_until_all_daemons_are_back() -> None:
    run = Run().begin()
    run.down(0)
    run.go_on(100, 1)
    run.down(1)
    run.go_on(100, 1)
    run.up(1)
    assert run.meter.is_down()
    run.go_on(100, 1)
    run.up(0)
    assert not run.meter.is_down()
    assert run.meter.summary()["total_ms"] == 300


def test_one_that_has_returned_is_not_awaited_again_when_another_goes() -> None:
    run = Run().begin()
    for _ in range(3):
        run.go_on(1000, 10)
        run.down(0)
        run.down(1)
        run.go_on(100, 1)
        run.up(0)
        run.down(2)
        run.go_on(100, 1)
        run.up(1)
        assert run.meter.is_down(), "daemon 2 is away"
        run.go_on(100, 1)
        run.up(2)
        assert not run.meter.is_down()
    found = run.meter.summary()
    assert (found["count"], found["total_ms"]) == (3, 900)
    assert found["down_ms"] == {"median": 300, "max": 300}


def test_a_successor_that_dies_before_it_was_connected_is_awaited_no_more() -> None:
    run = Run().begin()
    run.down(0)
    run.down(1)
    run.go_on(100, 1)
    run.down(0)
    run.up(1)
    run.go_on(100, 1)
    assert run.meter.is_down(), "it is the successor of the successor that is to come"
    run.up(0)
    assert run.meter.summary()["total_ms"] == 200


def test_one_that_was_back_between_two_looks_and_died_again_is_two_outages() -> None:
    run = Run().begin()
    run.down()
    run.go_on(100, 1)
    run.epochs[0] = 1
    run.down()
    run.go_on(50, 1)
    run.up()
    found = run.meter.summary()
    assert (found["count"], found["total_ms"], found["down_ms"]["max"]) == (2, 150, 100)


def test_an_outage_ends_when_the_host_goes_on_without_the_daemon() -> None:
    run = Run().begin()
    run.down(0)
    run.down(1)
    run.go_on(100, 1)
    run.gone(0)
    assert run.meter.is_down()
    run.go_on(100, 1)
    run.up(1)
    assert not run.meter.is_down()
    run.down(1)
    run.go_on(100, 1)
    run.up(1)
    found = run.meter.summary()
    assert (found["count"], found["total_ms"], found["down_ms"]["max"]) == (2, 300, 200)


def test_another_daemon_that_is_given_up_meanwhile_ends_no_outage() -> None:
    run = Run().begin()
    run.down(0)
    run.go_on(100, 1)
    run.gone(2)
    run.go_on(900, 1)
    assert run.meter.is_down()
    run.up(0)
    assert run.meter.summary()["down_ms"]["max"] == 1000


@pytest.mark.parametrize("seed", range(20))
def test_it_is_down_exactly_while_somebody_is_away(seed: int) -> None:
    rng = random.Random(seed)
    run, away = Run().begin(), set[int]()
    gone = set[int]()
    outages = 0
    for _ in range(200):
        run.go_on(10 * rng.randrange(3), 1)
        daemon = rng.choice([d for d in range(3) if d not in gone])
        if daemon not in away or rng.random() < 0.3:
            outages += not away
            away.add(daemon)
            run.down(daemon)
        elif len(gone) < 2 and rng.random() < 0.02:
            away.remove(daemon)
            gone.add(daemon)
            run.gone(daemon)
        else:
            away.remove(daemon)
            run.up(daemon)
        assert run.meter.is_down() == bool(away)
    assert run.meter.count == outages


def test_a_run_without_outage_has_no_figure_for_it() -> None:
    meter = OutageMeter()
    meter.down(0, 0, S, Reading((0,)))
    meter.sample(2 * S, Reading((0,)))
    meter.stop(3 * S, Reading((0,)))
    found = meter.summary()
    assert found["count"] == found["total_ms"] == 0, "before the barrier nothing is measured"
    assert found["down_ms"] == {"median": None, "max": None}
    assert [name for name, value in found.items() if value is None] == [
        "work_per_100ms_up",
        "work_per_100ms_down",
        "work_per_100ms_before",
        "work_by_ms",
        "sampled_every_ms",
    ]
    assert meter.details() is None


def test_an_outage_at_the_end_of_the_measured_time_has_no_length() -> None:
    run = Run().begin()
    run.go_on(1000, 10)
    run.down()
    run.go_on(100, 10)
    run.meter.stop(run.now_ns, run.reading)
    run.go_on(1000, 50)
    run.up()
    run.down()
    found = run.meter.summary()
    assert (found["count"], found["total_ms"], found["down_ms"]["max"]) == (1, 100, None)
    assert found["work_per_100ms_down"] == 1000, "what was done after the stop is not measured"


def test_time_in_which_the_guests_stood_still_is_left_out() -> None:
    run = Run().begin()
    run.go_on(1000, 10)
    run.down()
    run.go_on(100, 10)
    run.up()
    run.down()
    run.go_on(100, 10)
    run.now_ns += 7 * S
    run.fresh()
    assert not run.meter.is_down(), "the daemons of the next set of processes are fresh"
    run.go_on(1000, 10)
    run.down()
    run.go_on(50, 10)
    assert run.meter.is_down(), "that an incarnation of this number was there before does not count"
    run.up()
    found = run.meter.summary()
    assert (found["count"], found["total_ms"]) == (3, 250)
    assert found["work_per_100ms_up"] == found["work_per_100ms_down"] == 1000


# daemons elsewhere: told when it is over


def test_silence_of_a_daemon_elsewhere_is_an_outage_from_its_last_sign_of_life() -> None:
    run = Run().begin()
    run.go_on(2000, 10)
    run.silent_ns = run.now_ns
    run.go_on(1000, 1)
    run.heard_ns = run.now_ns
    assert run.meter.count == 0
    run.silences += 1
    run.go_on(4000, 10)
    found = run.meter.summary()
    assert found["count"] == 1
    assert found["down_ms"] == {"median": 1000, "max": 1000}
    assert found["work_per_100ms_down"] == 100
    assert [found["work_by_ms"][ms] for ms in ("-100", "0", "900", "1000")] == [1000, 100, 100, 1000]


def test_silences_that_overlap_are_one_outage() -> None:
    run = Run().begin()
    run.go_on(1000, 10)
    run.down()
    run.go_on(500, 1)
    run.silences, run.silent_ns, run.heard_ns = 1, run.now_ns - 200 * MS, run.now_ns
    run.go_on(100, 1)
    run.up()
    run.silences, run.silent_ns, run.heard_ns = 2, run.now_ns - 300 * MS, run.now_ns
    run.go_on(100, 1)
    assert run.meter.summary()["count"] == 1


def test_silence_that_began_before_the_barrier_counts_from_there() -> None:
    run = Run(silences=5).begin()
    run.silent_ns = run.now_ns - 3 * S
    run.go_on(100, 1)
    run.heard_ns, run.silences = run.now_ns, 6
    run.go_on(100, 1)
    assert run.meter.summary()["total_ms"] == 100


# how closely it looks, and what it remembers


def test_samples_are_taken_closely_where_outages_are_expected_or_have_happened() -> None:
    run = Run(OutageMeter()).begin()
    assert run.meter.tick_ms == outage.TICK_MS
    run.down()
    assert run.meter.tick_ms == outage.DOWN_TICK_MS
    run.up()
    assert run.meter.tick_ms == outage.CLOSE_TICK_MS
    run.meter.stop(run.now_ns, run.reading)
    assert run.meter.tick_ms == outage.TICK_MS
    assert Run().meter.tick_ms == outage.TICK_MS, "not before the barrier"
    assert Run().begin().meter.tick_ms == outage.CLOSE_TICK_MS


def test_the_resolution_is_what_was_reached() -> None:
    run = Run().begin()
    run.go_on(1000, 1)
    run.step_ms = 300
    run.go_on(300, 1)
    assert run.meter.summary()["sampled_every_ms"] == {"median": 10, "max": 300}


@pytest.mark.parametrize("late_ms", [0, -20])
def test_a_clock_that_stands_still_does_no_harm(late_ms: int) -> None:
    run = Run().begin()
    run.go_on(1000, 10)
    run.meter.sample(run.now_ns + late_ms * MS, run.reading)
    run.down()
    run.up()
    run.go_on(1000, 10)
    found = run.meter.summary()
    assert (found["count"], found["total_ms"], found["work_per_100ms_down"]) == (1, 0, None)


def test_memory_is_bounded_and_totals_stay_exact() -> None:
    history = History(2)
    rng = random.Random(7)
    now, work = START, [0, 10]
    for _ in range(3 * HISTORY_SAMPLES):
        history.add(now, work)
        now += rng.randrange(1, 20 * MS)
        work = [work[0] + rng.randrange(100), work[1] + 3]
        assert history.count <= HISTORY_SAMPLES
    assert history.first_ns == START
    last = history.at([history.last_ns])[0] - history.at([START])[0]
    assert last[1] == 3 * (3 * HISTORY_SAMPLES - 1)
    recent = history.at([history.last_ns - 100 * MS, history.last_ns])
    assert recent[1, 1] - recent[0, 1] == pytest.approx(30, abs=25), "the recent past is there in full"


def test_the_first_outages_are_kept_in_full_and_no_more() -> None:
    run = Run(step_ms=20).begin()
    for _ in range(OUTAGES_IN_FULL + 3):
        run.go_on(200, 10)
        run.down()
        run.go_on(20, 10)
        run.up()
    assert run.meter.summary()["count"] == OUTAGES_IN_FULL + 3
    details = run.meter.details()
    assert details is not None
    assert len(details["first_outages"]) == OUTAGES_IN_FULL
    first = details["first_outages"][0]
    assert (first["at_s"], first["down_ms"], len(first["work"])) == (0.2, 20, SLOTS)
    assert first["work"][0] is None, "0.3 s before it the run had not begun"
    assert len(details["run"]["work_per_slot"][0]) == 220 * (OUTAGES_IN_FULL + 3) // SLOT_MS
