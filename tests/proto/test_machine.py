"""Paths, asks, parking."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest

from proto.machine import Machine, MachineError, Path


class Start(NamedTuple):
    name: str


class Reply(NamedTuple):
    ask: int
    value: int


class Toy(Machine):
    def __init__(self) -> None:
        super().__init__()
        self.settled = 0

    def path_for(self, event: Any) -> Path | None:
        if isinstance(event, Reply):
            self.answer(event.ask, event.value)
            return None
        return self._work(event.name)

    def settle(self) -> None:
        self.settled += 1

    def _work(self, name: str) -> Path:
        yield "first"
        self.emit(("one", name))
        ask = self.new_ask()
        self.emit(("ask", ask.ask_id))
        value = yield ask
        yield "second"
        self.emit(("got", name, value))


def test_runs_through_to_the_ask_and_on_after_the_answer() -> None:
    toy = Toy()
    assert toy.on([Start("a"), Start("b")], 5) == [("one", "a"), ("ask", 1), ("one", "b"), ("ask", 2)]
    assert toy.waiting == 2
    assert toy.on([Reply(2, 7)], 6) == [("got", "b", 7)]
    assert toy.on([Reply(1, 8)], 6) == [("got", "a", 8)]
    assert toy.waiting == 0
    assert toy.settled == 3


def test_answer_to_nobody_is_our_bug() -> None:
    with pytest.raises(MachineError, match="unknown request 9"):
        Toy().on([Reply(9, 0)], 0)


def test_a_simulated_world_parks_and_resumes_in_any_order() -> None:
    toy = Toy()
    toy.park_with(lambda step: step == "first")
    assert toy.on([Start("a"), Start("b")], 0) == []
    assert toy.parked == ["first", "first"]
    assert toy.resume(1, 1) == [("one", "b"), ("ask", 1)]
    toy.park_with(None)
    assert toy.resume(0, 1) == [("one", "a"), ("ask", 2)]
    assert toy.parked == []
