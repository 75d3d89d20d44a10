"""Transition tables: which states a thing has, and along which arrows it may go from one to another.

A table is data that the machines use: they change a state by ``state = TABLE.go(state, event)``, and by nothing else (tests/test_tables.py
looks for other assignments). An event for which no arrow leaves the state is our bug and raises `MachineError`. The protocol's tables
are in proto/lives.py; docs/protocol.md is made from them (proto/protocol_page.py).

An arrow that only some profiles have names the profile field that decides (``only="elide"``, or ``only="not elide"``); `under` gives the
table of one profile.

Not handled here: guards on anything but the state (a machine tests them before it names the event), effects.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Final, Generic, NamedTuple, NoReturn, TypeVar

from proto.machine import MachineError
from proto.profile import PROFILES, Profile

S = TypeVar("S", bound=IntEnum)

NOT: Final = "not "


class Arrow(NamedTuple, Generic[S]):
    """``event`` takes ``source`` to ``target``. ``when``: what happens, in a few words. ``only``: profile field, "" for all profiles."""

    event: str
    source: S
    target: S
    when: str
    only: str = ""

    def holds_in(self, profile: Profile) -> bool:
        """Whether a profile has this arrow."""
        if not self.only:
            return True
        field = self.only.removeprefix(NOT)
        return bool(getattr(profile, field)) != self.only.startswith(NOT)


class State(NamedTuple, Generic[S]):
    """A state and what it means."""

    value: S
    meaning: str


class _Row(dict[int, S]):
    """Where one event leads, by state; anything else is our bug."""

    def __init__(self, name: str, event: str) -> None:
        super().__init__()
        self.name = name
        self.event = event

    def __missing__(self, state: int) -> NoReturn:
        allowed = ", ".join(type(target)(source).name for source, target in self.items()) or "nowhere"
        shown = next((type(target)(state).name for target in self.values()), state)
        raise MachineError(f"{self.name}: {self.event!r} in state {shown} (allowed: {allowed})")


class Transitions(Generic[S]):
    """One table. ``name``: for messages; ``starts``: the states something may begin in. Values of states are 0, 1, 2, ...

    Raises MachineError when the table contradicts itself: two arrows for one event from one state, a state nobody can reach, a state
    without a meaning.
    """

    __slots__ = ("_pairs", "_rows", "arrows", "code", "name", "starts", "states", "text", "title")

    def __init__(
        self,
        name: str,
        title: str,
        text: str,
        code: str,
        states: Sequence[State[S]],
        starts: Sequence[S],
        arrows: Sequence[Arrow[S]],
    ) -> None:
        self.name = name
        self.title = title
        self.text = text
        self.code = code
        """Where the machines go along the arrows."""
        self.states = tuple(states)
        self.starts = tuple(starts)
        self.arrows = tuple(arrows)
        if [int(state.value) for state in self.states] != list(range(len(self.states))):
            raise MachineError(f"{name}: states are not numbered 0, 1, 2, ...")
        self._rows: dict[str, _Row[S]] = {}
        self._pairs: dict[str, tuple[S, S]] = {}
        for arrow in self.arrows:
            row = self._rows.setdefault(arrow.event, _Row(name, arrow.event))
            if arrow.source in row and not arrow.only:
                raise MachineError(f"{name}: two arrows {arrow.event!r} from {arrow.source.name}")
            row[arrow.source] = arrow.target
            self._pairs[arrow.event] = (arrow.source, arrow.target)
        if lost := {state.value for state in self.states} - self.reachable():
            raise MachineError(f"{name}: nothing leads to {', '.join(state.name for state in lost)}")

    def go(self, state: int, event: str) -> S:
        """Where ``event`` leads from ``state``. Raises MachineError when no arrow does."""
        return self._rows[event][state]

    def allows(self, state: int, event: str) -> bool:
        """Whether an arrow for ``event`` leaves ``state``."""
        return state in self._rows.get(event, ())

    def arrow(self, event: str) -> tuple[S, S]:
        """(source, target) of an event that has one arrow: for words that are changed by compare-and-exchange."""
        return self._pairs[event]

    def under(self, profile: Profile) -> Transitions[S]:
        """The table of one profile: arrows that it does not have are left out, states that it cannot reach stay."""
        arrows = [arrow._replace(only="") for arrow in self.arrows if arrow.holds_in(profile)]
        ways = {arrow.event: _Row[S](self.name, arrow.event) for arrow in self.arrows}
        table: Transitions[S] = object.__new__(Transitions)
        table.name, table.title, table.text, table.code = self.name, self.title, self.text, self.code
        table.states, table.starts, table.arrows = self.states, self.starts, tuple(arrows)
        table._rows, table._pairs = ways, {arrow.event: (arrow.source, arrow.target) for arrow in arrows}
        for arrow in arrows:
            if arrow.source in ways[arrow.event]:
                raise MachineError(
                    f"{self.name}, {profile.name}: two arrows {arrow.event!r} from {arrow.source.name}"
                )
            ways[arrow.event][arrow.source] = arrow.target
        return table

    def reachable(self) -> set[S]:
        """States that arrows lead to from the starts."""
        found = set(self.starts)
        while more := {arrow.target for arrow in self.arrows if arrow.source in found} - found:
            found |= more
        return found

    def ends(self) -> list[S]:
        """States that no arrow leaves."""
        return [
            state.value for state in self.states if all(arrow.source != state.value for arrow in self.arrows)
        ]


def profiles_of(arrow: Arrow[S]) -> list[str]:
    """Names of the profiles that have an arrow."""
    return [name for name, profile in PROFILES.items() if arrow.holds_in(profile)]
