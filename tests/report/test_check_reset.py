"""Reset and reboot as the checker sees them: what was outstanding or asleep is gone, and nothing of it may come afterwards."""

from __future__ import annotations

from proto.trace import Kind
from tests.report.check_story import Story, numbers

CANCEL_RESET = 2


def rebooted(*, cancel: bool = True) -> tuple[Story, int]:
    """A task sleeps, its vCPU is reset, the guest boots again; returns the token, too."""
    s = Story()
    s.boot()
    token = s.asleep(1, 10)
    if cancel:
        s.cancel(token, why=CANCEL_RESET)
    s.add(Kind.RESET)
    s.boot()
    return s, token


def test_sleepers_of_a_vcpu_that_was_reset_need_no_wake_up() -> None:
    s, _ = rebooted()
    s.life(2, 11)
    assert numbers(s.check()) == set()


def test_without_the_reset_they_do() -> None:
    s = Story()
    s.boot()
    s.cancel(s.asleep(1, 10), why=CANCEL_RESET)
    s.life(2, 11, task=2)
    assert 47 in numbers(s.check())


def test_what_a_reset_leaves_behind_is_seen() -> None:
    s, _ = rebooted(cancel=False)
    assert 34 in numbers(s.check())


def test_a_ready_event_after_the_reset_is_seen() -> None:
    s, token = rebooted()
    s.ready(token)
    s.deliver(0, token)
    assert numbers(s.check()) & {20, 21, 22}


def test_a_write_to_the_area_after_the_reset_is_seen() -> None:
    """BZ-40: the host keeps writing into memory that the next kernel uses for something else."""
    s = Story()
    s.boot()
    s.cancel(s.asleep(1, 10), why=CANCEL_RESET)
    s.add(Kind.RESET)
    s.add(Kind.SLOT_WRITE, 0, 1, a=0, b=1)
    assert 30 in numbers(s.check())


def test_tokens_go_on_over_a_reset() -> None:
    s, _ = rebooted()
    s.life(1, 11)
    assert 2 in numbers(s.check()), "the number starts again"
