"""Who is killed when, and which work counts as done during an outage."""

from __future__ import annotations

from launcher.chaos import MS, ChaosPlan, OutageMeter

S = 1000 * MS


def test_nobody_is_killed_before_the_barrier() -> None:
    plan = ChaosPlan(every_ns=S, for_ns=5 * S, daemons=1)
    assert plan.due(1 << 60) is None


def test_daemons_take_turns_and_kills_end() -> None:
    plan = ChaosPlan(every_ns=S, for_ns=5 * S, daemons=3)
    plan.begin(10 * S)
    killed = [(t, victim) for t in range(9 * 10, 17 * 10) if (victim := plan.due(t * S // 10)) is not None]
    assert killed == [(110, 0), (120, 1), (130, 2), (140, 0)]


def test_missed_times_are_not_made_up_for() -> None:
    plan = ChaosPlan(every_ns=S, for_ns=100 * S, daemons=1)
    plan.begin(S)
    assert plan.due(30 * S + 5) == 0
    assert plan.due(30 * S + 6) is None
    assert plan.due(31 * S) == 0


def test_work_is_split_by_outage() -> None:
    meter = OutageMeter()
    meter.begin(S, 1000)
    meter.sample(2 * S, 2000, connected=0)
    meter.down(0, 3 * S, 3000, connected=0)
    assert meter.is_down()
    meter.sample(3 * S + 100 * MS, 3050, connected=0)
    meter.sample(3 * S + 200 * MS, 3100, connected=1)
    assert not meter.is_down()
    meter.sample(4 * S + 200 * MS, 4100, connected=1)
    assert meter.summary() == {
        "count": 1,
        "total_ms": 200.0,
        "work_per_100ms_up": 100.0,
        "work_per_100ms_down": 50.0,
    }


def test_a_daemon_that_dies_again_before_it_was_back_is_one_outage() -> None:
    meter = OutageMeter()
    meter.begin(S, 0)
    meter.down(0, 2 * S, 0, connected=0)
    meter.down(0, 3 * S, 0, connected=0)
    assert meter.is_down()
    meter.sample(4 * S, 0, connected=1)
    assert not meter.is_down()
    assert meter.count == 1


def test_an_outage_lasts_until_all_daemons_are_back() -> None:
    meter = OutageMeter()
    meter.begin(S, 0)
    meter.down(0, 2 * S, 0, connected=4)
    meter.down(1, 3 * S, 0, connected=4)
    meter.sample(4 * S, 0, connected=5)
    assert meter.is_down()
    meter.sample(5 * S, 0, connected=6)
    assert not meter.is_down()


def test_a_run_without_outage_has_no_figure_for_it() -> None:
    meter = OutageMeter()
    assert meter.summary()["work_per_100ms_up"] is None
    meter.down(0, S, 0, connected=0)
    assert meter.count == 0, "before the barrier nothing is measured"
