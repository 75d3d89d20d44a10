"""Who is killed when."""

from __future__ import annotations

from launcher.chaos import ChaosPlan

S = 1_000_000_000


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
