"""Invariants across a save and a restore into a fresh host: clean for the scenarios that move, and each rule can fire."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from proto.events import Events, Kind
from proto.kvm import MSR_ASYNC_PF_EN, MSR_ASYNC_PF_INT
from proto.profile import PROFILES
from report.check.checker import Checker
from report.check.verdict import HELD, Verdict
from sim.scenario_file import load
from sim.scenario_run import run
from tests.zoo.judge import behaves, to_records

SCENARIOS = sorted((Path(__file__).resolve().parents[2] / "scenarios").glob("move_*.toml"))
HALT, SLEEPERS = "move_halt_mainline", "move_sleepers_mainline"


def events_of(name: str) -> Events:
    """Events of a scenario, as the guest kernel would have logged them."""
    path = next(path for path in SCENARIOS if path.stem == name)
    return to_records(run(load(path)).events, by_interrupt="mainline" in name)


def check(events: Events, profile: str = "mainline") -> Verdict:
    checker = Checker(profile)
    checker.feed(events)
    return checker.finish("moved", finished=True)


def violated(verdict: Verdict) -> list[str]:
    return [f"I{one.number}" for one in verdict.violated]


def without(events: Events, kind: Kind, *, a: int | None = None, vcpu: int | None = None) -> Events:
    """The events behind the first restore without those."""
    first = int(np.flatnonzero(events["kind"] == Kind.STATE_RESTORE)[0])
    bad = (events["kind"] == kind) & (np.arange(len(events)) > first)
    if a is not None:
        bad &= events["a"] == a
    if vcpu is not None:
        bad &= events["vcpu"] == vcpu
    assert bad.any()
    kept: Events = events[~bad]
    return kept


@pytest.mark.parametrize("path", [p for p in SCENARIOS if behaves(load(p))], ids=lambda path: path.stem)
def test_a_move_breaks_nothing(path: Path) -> None:
    scenario = load(path)
    by_interrupt = PROFILES[scenario.profile].ready_by_interrupt
    verdict = check(to_records(run(scenario).events, by_interrupt), scenario.profile)
    assert violated(verdict) == []
    if scenario.profile != "v3":
        (saved,) = (one for one in verdict.findings if one.number == 37)
        assert (saved.status, saved.checks > 0) == (HELD, True)


def test_a_halt_that_shows_in_the_saved_state() -> None:
    events = events_of(HALT)
    halted = (events["kind"] == Kind.STATE_SAVE) & (events["b"] == 1)
    assert halted.any()
    events["a"][halted] = 3
    assert violated(check(events)) == ["I37"]


def test_a_fresh_host_that_begins_halted() -> None:
    events = events_of(HALT)
    events["b"][events["kind"] == Kind.STATE_RESTORE] = 1
    assert violated(check(events)) == ["I37"]


def test_a_guest_that_goes_on_without_its_broadcast() -> None:
    """EN is left out on one vCPU: its sleepers have nobody to wake them."""
    assert "I47" in violated(check(without(events_of(SLEEPERS), Kind.MSR_WR, a=MSR_ASYNC_PF_EN)))


def test_a_restore_without_the_vector() -> None:
    assert "I26" in violated(check(without(events_of(SLEEPERS), Kind.MSR_WR, a=MSR_ASYNC_PF_INT)))


def test_a_restore_without_the_lapic() -> None:
    assert "I26" in violated(check(without(events_of(SLEEPERS), Kind.MSR_WR, a=0x80F)))


def test_a_broadcast_that_forgets_a_sleeper() -> None:
    events = events_of(SLEEPERS)
    first = int(np.flatnonzero(events["kind"] == Kind.STATE_RESTORE)[0])
    wakes = np.flatnonzero(events["kind"] == Kind.G_WAKE)
    events = np.delete(events, int(wakes[wakes > first][0]))
    assert {"I43", "I47"} & set(violated(check(events)))


def test_what_was_cancelled_by_the_move_is_not_handed_over() -> None:
    """A host that carries its queue would send a ready event for a fault of the old one."""
    events = events_of(SLEEPERS)
    ready = np.flatnonzero((events["kind"] == Kind.ASYNC_PF_READY) & (events["token"] != 0xFFFF_FFFF))
    announced = np.flatnonzero(events["kind"] == Kind.ASYNC_PF_NOT_PRESENT)
    events["token"][ready[0]] = events["token"][announced[0]]
    assert {"I20", "I21", "I22", "I34"} & set(violated(check(events)))
