"""Deadlines of vCPUs: told in order, once, and never more of them than the bound."""

from __future__ import annotations

from host.events import SetTimer, TimerDue
from host.timers import TIMERS_PER_VCPU, Timers


def test_the_earliest_comes_first_and_none_comes_twice() -> None:
    timers = Timers(2)
    for cpu, generation, deadline_ns in ((0, 1, 30), (1, 1, 10), (0, 2, 20)):
        timers.set(SetTimer(cpu, generation, deadline_ns))
    assert timers.next_ns() == 10
    assert list(timers.due(9)) == []
    assert list(timers.due(20)) == [TimerDue(1, 1), TimerDue(0, 2)]
    assert timers.next_ns() == 30
    assert list(timers.due(1 << 62)) == [TimerDue(0, 1)]
    assert timers.next_ns() is None


def test_of_too_many_the_last_of_each_vcpu_is_kept() -> None:
    timers = Timers(2)
    timers.set(SetTimer(1, 1, 5))
    most = 2 * TIMERS_PER_VCPU
    for generation in range(1, most):
        timers.set(SetTimer(0, generation, (1 << 60) - generation))
    assert len(timers) == most
    timers.set(SetTimer(0, most, 7))
    assert list(timers.due(1 << 62)) == [TimerDue(1, 1), TimerDue(0, most)]
