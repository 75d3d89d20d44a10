"""Budgets of stays in guest mode."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from guest.pacing import CATCH_UP_NS, OPS_MAX, STAY_NS, Pacing

rates = st.integers(1, 10**10)
spans = st.integers(0, 10**12)


@given(rates, st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 10**9)), max_size=30))
def test_paced_guest_time_is_exact_over_many_stays(rate: int, stays: list[tuple[int, int]]) -> None:
    pacing = Pacing(rate)
    total_ns = sum(pacing.guest_ns(ops, wall_ns) for ops, wall_ns in stays)
    assert total_ns == sum(ops for ops, _ in stays) * 10**9 // rate


@given(rates, spans, spans, st.integers(0, 100))
def test_budget_stays_behind_the_wall_clock_and_within_the_bounds(
    rate: int, room_ns: int, max_ns: int, max_ops: int
) -> None:
    pacing = Pacing(rate)
    budget = pacing.budget(room_ns, max_ns, max_ops)
    assert 1 <= budget <= OPS_MAX
    assert budget == 1 or budget * 10**9 // rate <= room_ns
    assert not max_ops or budget <= max_ops
    # At most one operation beyond the scheduler's bound, so that the bound is reached.
    assert not max_ns or budget == 1 or (budget - 1) * 10**9 < max_ns * rate


@given(rates, spans)
def test_pause_leaves_something_to_catch_up(rate: int, room_ns: int) -> None:
    pacing = Pacing(rate)
    pause_ns = pacing.pause_ns(room_ns)
    if pause_ns:
        assert room_ns < pacing.op_ns
        assert pacing.pause_ns(room_ns + pause_ns) == 0
        assert room_ns + pause_ns >= CATCH_UP_NS
    else:
        assert pacing.budget(room_ns, 0, 0) * 10**9 // rate <= room_ns


def test_level_cpu_does_not_chase_the_wall_clock() -> None:
    pacing = Pacing(1_000_000)
    room_ns = 500_000
    assert pacing.pause_ns(room_ns) == 0
    assert pacing.guest_ns(pacing.budget(room_ns, 0, 0), 10_000) == room_ns
    # What the stay and its bookkeeping took is no reason to go on, before there is more to do or something happened.
    assert pacing.pause_ns(60_000) == CATCH_UP_NS - 60_000
    assert pacing.pause_ns(CATCH_UP_NS) == 0
    pacing.resume()
    assert pacing.pause_ns(60_000) == 0
    # A stay that ended early left something to do.
    pacing.guest_ns(pacing.budget(60_000, 0, 0) - 1, 10_000)
    assert pacing.pause_ns(60_000) == 0


def test_unpaced_budget_follows_the_measured_speed() -> None:
    pacing = Pacing(0)
    assert pacing.pause_ns(-5) == 0
    for op_ns in (2, 5000, 20):
        for _ in range(40):
            ops = pacing.budget(0, 0, 0)
            assert pacing.guest_ns(max(ops, 100), max(ops, 100) * op_ns) == max(ops, 100) * op_ns
        assert STAY_NS // 2 <= pacing.budget(0, 0, 0) * op_ns <= 2 * STAY_NS
    # A stay of a few operations measures the entry, not the operations.
    before = pacing.budget(0, 0, 0)
    pacing.guest_ns(1, 50_000)
    assert pacing.budget(0, 0, 0) == before
