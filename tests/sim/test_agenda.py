"""Schedules by priority: who is first, what a change point does, and that nobody is put off for ever."""

from __future__ import annotations

from collections.abc import Callable

from sim.agenda import CLOCK, FAIR_STEPS, PriorityAgenda


def run(agenda: PriorityAgenda, steps: int = 10_000) -> None:
    for _ in range(steps):
        if not agenda.step():
            return


def both(*actions: Callable[[], None]) -> Callable[[], None]:
    def act() -> None:
        for action in actions:
            action()

    return act


def test_the_highest_priority_goes_on_however_early_others_are_due() -> None:
    agenda = PriorityAgenda([3, 1, 2, CLOCK], [])
    seen: list[str] = []
    agenda.at(1, 1, lambda: seen.append("1 early"))
    agenda.at(50, 3, lambda: seen.append("3 late"))
    agenda.at(
        10,
        3,
        both(lambda: seen.append("3 first"), lambda: agenda.after(1, 3, lambda: seen.append("3 again"))),
    )
    agenda.at(5, 2, lambda: seen.append("2"))
    assert len(agenda) == 4
    run(agenda)
    assert seen == ["3 first", "3 again", "3 late", "1 early", "2"]
    assert agenda.now_ns == 50


def test_a_change_point_sends_the_one_that_runs_to_the_back() -> None:
    agenda = PriorityAgenda([1, 2, CLOCK], [2])
    seen: list[int] = []
    for actor in (1, 2):
        for _ in range(3):
            agenda.at(0, actor, lambda actor=actor: seen.append(actor))  # type: ignore[misc]
    run(agenda)
    assert seen == [1, 1, 2, 2, 2, 1]


def test_the_clock_waits_for_its_time_unless_nobody_else_acts() -> None:
    agenda = PriorityAgenda([CLOCK, 1], [])
    seen: list[str] = []
    agenda.at(100, CLOCK, lambda: seen.append("clock"))
    agenda.at(10, 1, both(lambda: seen.append("a"), lambda: agenda.at(200, 1, lambda: seen.append("b"))))
    agenda.at(300, CLOCK, lambda: seen.append("end"))
    run(agenda)
    assert seen == ["a", "b", "clock", "end"]


def test_nobody_is_put_off_for_ever() -> None:
    agenda = PriorityAgenda([1, 2, CLOCK], [])
    seen: list[int] = []

    def spin() -> None:
        agenda.after(1, 1, spin)

    spin()
    agenda.at(0, 2, lambda: seen.append(2))
    run(agenda, FAIR_STEPS)
    assert seen == [2]


def test_a_spinner_makes_way() -> None:
    agenda = PriorityAgenda([1, 2, CLOCK], [])
    seen: list[int] = []
    agenda.at(0, 1, both(lambda: agenda.demote(1), lambda: agenda.after(0, 1, lambda: seen.append(1))))
    agenda.at(0, 2, lambda: seen.append(2))
    run(agenda)
    assert seen == [2, 1]


def test_when_it_is_calm_everybody_has_a_turn_at_their_time() -> None:
    agenda = PriorityAgenda([1, 2, CLOCK], [])
    seen: list[str] = []

    def busy() -> None:
        seen.append("busy")
        agenda.after(10, 1, busy)

    agenda.at(0, 1, busy)
    agenda.at(25, 2, lambda: seen.append("put off"))
    run(agenda, FAIR_STEPS - 1)
    assert "put off" not in seen
    agenda.calm_down()
    run(agenda, 1)
    assert seen[-1] == "put off"
