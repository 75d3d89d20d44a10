"""Transition tables: what is on no arrow is refused, tables that contradict themselves do not come to be, the page is up to date."""

from __future__ import annotations

import re
from dataclasses import replace
from enum import IntEnum
from pathlib import Path
from typing import Any

import pytest

from host import kernels
from proto import protocol_page
from proto.lives import PAGE, TABLES, TASK, TOKEN, TokenState
from proto.machine import MachineError
from proto.profile import MAINLINE, PROFILES, V3, V7
from proto.transitions import Arrow, State, Transitions, profiles_of

PAGE_FILE = Path(__file__).resolve().parents[2] / "docs" / "protocol.md"


class Door(IntEnum):
    OPEN = 0
    SHUT = 1
    LOCKED = 2


STATES = [State(door, door.name.lower()) for door in Door]
ARROWS = [
    Arrow("push", Door.OPEN, Door.SHUT, "it falls shut"),
    Arrow("pull", Door.SHUT, Door.OPEN, ""),
    Arrow("key", Door.SHUT, Door.LOCKED, ""),
]


def table(arrows: list[Arrow[Door]], states: list[State[Door]] = STATES) -> Transitions[Door]:
    return Transitions("door", "A door", "", "", states, (Door.OPEN,), arrows)


def test_it_goes_along_arrows_and_nowhere_else() -> None:
    door = table(ARROWS)
    assert door.go(Door.OPEN, "push") is Door.SHUT
    assert door.go(1, "key") is Door.LOCKED
    with pytest.raises(MachineError, match=r"door: 'push' in state LOCKED \(allowed: OPEN\)"):
        door.go(Door.LOCKED, "push")
    with pytest.raises(KeyError):
        door.go(Door.OPEN, "kick")
    assert door.allows(Door.SHUT, "pull")
    assert not door.allows(Door.OPEN, "pull")
    assert not door.allows(Door.OPEN, "kick")
    assert door.arrow("key") == (Door.SHUT, Door.LOCKED)
    assert door.ends() == [Door.LOCKED]


@pytest.mark.parametrize(
    ("arrows", "states", "told"),
    [
        (ARROWS[:2], STATES, "nothing leads to LOCKED"),
        ([*ARROWS, Arrow("push", Door.OPEN, Door.LOCKED, "")], STATES, "two arrows 'push' from OPEN"),
        (ARROWS, STATES[::-1], "not numbered"),
        (ARROWS, [STATES[0], STATES[2]], "not numbered"),
    ],
)
def test_a_table_that_contradicts_itself_is_our_bug(
    arrows: list[Arrow[Door]], states: list[State[Door]], told: str
) -> None:
    with pytest.raises(MachineError, match=told):
        table(arrows, states)


def test_a_profile_has_its_own_arrows() -> None:
    assert TOKEN.under(MAINLINE).go(TokenState.ALLOCATED, "announce") is TokenState.ANNOUNCED
    assert TOKEN.under(V3).go(TokenState.ALLOCATED, "fetch") is TokenState.STARTED
    for profile, event in ((V3, "announce"), (V3, "setup_fail"), (MAINLINE, "fetch")):
        with pytest.raises(MachineError, match=event):
            TOKEN.under(profile).go(TokenState.ALLOCATED, event)
    assert TOKEN.under(V3).allows(TokenState.DONE, "elide")
    assert not TOKEN.under(V7).allows(TokenState.DONE, "elide")
    assert TOKEN.under(replace(MAINLINE, elide=True)).allows(TokenState.DONE, "elide")


def test_arrows_depend_on_fields_that_profiles_have() -> None:
    for one in TABLES:
        for arrow in one.arrows:
            assert profiles_of(arrow), (one.name, arrow)
    assert {tuple(profiles_of(arrow)) for arrow in TOKEN.arrows} == {
        tuple(PROFILES), ("v3",), ("v7", "mainline"),
    }  # fmt: skip


def test_every_table_has_words_for_everything() -> None:
    for one in TABLES:
        assert one.text
        assert one.code
        assert all(state.meaning for state in one.states)
        assert all(arrow.when for arrow in one.arrows)
        for file in one.code.split(", "):
            assert (PAGE_FILE.parents[1] / file).is_file(), file


def test_numbers_in_kernels_and_shared_memory_are_those_of_the_tables() -> None:
    assert {state.value.name: int(state.value) for state in PAGE.states} == {
        name.removeprefix("HPT_"): value for name, value in vars(kernels).items() if name.startswith("HPT_")
    }
    assert [state.value.name for state in TASK.states] == [
        "UNUSED", "RUNNABLE", "RUNNING", "SLEEPING", "HALTING", "BARRIER", "DONE", "KILLED",
    ]  # fmt: skip


def test_the_page_is_up_to_date() -> None:
    page = PAGE_FILE.read_text()
    assert protocol_page.with_tables(page) == page, "run: python -m proto.protocol_page docs/protocol.md"


@pytest.mark.parametrize("one", TABLES, ids=lambda one: str(one.name))
def test_the_diagram_has_every_arrow_and_is_mermaid(one: Transitions[Any]) -> None:
    lines = protocol_page.diagram(one)
    assert lines[:2] == ["```mermaid", "stateDiagram-v2"]
    assert lines[-1] == "```"
    names = {state.value.name for state in one.states} | {r"[*]"}
    found = set()
    for line in lines[2:-1]:
        match = re.fullmatch(r"    (\S+) --> (\S+?)(?:: ([a-z_, ]+))?", line)
        assert match is not None, line
        assert {match[1], match[2]} <= names
        found |= {(match[1], event, match[2]) for event in (match[3] or "").split(", ") if event}
    assert found == {(a.source.name, a.event, a.target.name) for a in one.arrows}
