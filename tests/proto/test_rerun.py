"""Recording and running again: the same machine does the same; another one is found at the right call."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from proto.inputlog import InputLog, Op
from proto.machine import MachineError
from proto.rerun import Difference, Rerun, op_table
from tests.proto.rerun_machine import Add, Adder, Sum, Told, rerun, tell_story

CALLS = 8


def run_again(path: Path, until: int | None = None) -> tuple[Rerun, Difference | None]:
    log = InputLog(path)
    try:
        again = rerun(log)
        return again, again.run(log.calls(), until)
    finally:
        log.close()


def difference(path: Path) -> Difference:
    found = run_again(path)[1]
    assert found is not None
    return found


@pytest.fixture
def story(tmp_path: Path) -> Path:
    tell_story(tmp_path / "log.bin")
    return tmp_path / "log.bin"


def test_the_same_machines_do_the_same(story: Path) -> None:
    again, found = run_again(story)
    assert found is None
    assert (again.calls, again.events) == (CALLS, 6)
    # 10 sums; 10 reads and, at the 6 steps of the paths, the question whether to rest.
    assert (again.effects, again.acts) == (10, 16)


def test_the_recorder_returns_what_the_machine_returns(tmp_path: Path) -> None:
    told = Told(tmp_path / "log.bin")
    assert told.recorder.on(told.machines[1], [Add(0), Add(0)], 1) == [Sum(1), Sum(2)]
    told.log.close()


def test_until_stops_there(story: Path) -> None:
    again, found = run_again(story, until=3)
    assert (again.calls, found) == (3, None)


def test_what_the_machine_raised_is_part_of_the_log_and_survives_without_closing(tmp_path: Path) -> None:
    told = Told(tmp_path / "log.bin")
    told.recorder.on(told.machines[1], [Add(0)], 1)
    told.memory.extra = 11
    with pytest.raises(MachineError, match="thirteen"):
        told.recorder.on(told.machines[1], [Add(0)], 2)
    again, found = run_again(tmp_path / "log.bin")
    assert (again.calls, found, again.raised) == (2, None, "MachineError: thirteen")
    told.log.close()


def change(name: str, changed: Callable[..., Any], patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Adder, name, changed)


def test_another_effect_is_found(story: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def add(self: Adder, address: int) -> None:
        self.total += self.port.read(address)
        self.emit(Sum(self.total + (self.total > 50)))

    change("add", add, monkeypatch)
    found = difference(story)
    # "two" comes to 48 by call 3; "one" to 1, 17, 43 in calls 2 and 4, and to 81 in call 6.
    assert (found.number, found.machine, found.inputs) == (6, "one", ["resume parked path 0"])
    assert (found.expected, found.got) == (["Sum(total=81)"], ["Sum(total=82)"])
    assert found.before == [(2, ["Slowly(times=4)"]), (4, ["resume parked path 0"])]
    assert found.since_start_ns == 300


def test_another_read_is_found_with_what_was_the_same_before(
    story: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slowly(self: Adder, times: int) -> Any:
        for i in range(times):
            self.add(i if i < 2 else i + 1)
            yield f"step {i}"

    change("slowly", slowly, monkeypatch)
    found = difference(story)
    assert (found.number, found.machine) == (4, "one")
    assert found.inputs == ["resume parked path 0"]
    assert found.same[-2:] == ["read(address=1) -> 16", "park(step='step 1') -> False"]
    assert found.expected == ["read(address=2) -> 26"]
    assert found.got == ["read(address=3)"]


def test_fewer_and_more_of_everything_are_found(story: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_effect(self: Adder, address: int) -> None:
        self.total += self.port.read(address)

    def no_read(self: Adder, address: int) -> None:
        self.emit(Sum(self.total + address))

    def twice(self: Adder, address: int) -> None:
        self.port.read(address)
        self.port.read(address)

    def two_effects(self: Adder, address: int) -> None:
        self.total += self.port.read(address)
        self.emit(Sum(self.total))
        self.emit(Sum(0))

    expected_got = []
    for changed in (no_effect, no_read, twice, two_effects):
        change("add", changed, monkeypatch)
        found = difference(story)
        assert found.number == 1
        expected_got.append((found.expected[0], found.got[0]))
    assert expected_got == [
        ("Sum(total=11)", "no more effects"),
        ("read(address=1) -> 11", "the end of the call"),
        ("read(address=2) -> 21", "read(address=1)"),
        ("Sum(total=32)", "Sum()"),
    ]


def test_a_crash_and_a_missing_crash_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tell_story(tmp_path / "fine.bin")
    told = Told(tmp_path / "crash.bin")
    told.memory.extra = 12
    with pytest.raises(MachineError):
        told.recorder.on(told.machines[0], [Add(0)], 1)
    told.log.close()

    def add(self: Adder, address: int) -> None:
        self.total += self.port.read(address)
        if self.total == 32:
            raise KeyError(address)
        self.emit(Sum(self.total))

    change("add", add, monkeypatch)
    found = difference(tmp_path / "fine.bin")
    assert (found.number, found.got) == (1, ["raised KeyError: 2"])
    found = difference(tmp_path / "crash.bin")
    assert (found.expected, found.got) == (["raised MachineError: thirteen"], ["Sum(total=13)"])


def test_a_missing_step_is_found(story: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slowly(self: Adder, times: int) -> Any:
        for i in range(times):
            self.add(i)
            if i != 1:
                yield f"step {i}"

    change("slowly", slowly, monkeypatch)
    found = difference(story)
    assert (found.number, found.expected) == (4, ["park(step='step 1') -> False"])


def test_acts_have_consecutive_codes() -> None:
    with pytest.raises(MachineError, match="code 2, 1 is next"):
        op_table(((2, Op("read", ("address",), "i")),))
    with pytest.raises(MachineError, match="read"):
        op_table(((1, Op("read", ("address",), "x")),))


def test_inputs_of_a_story_are_what_was_told(story: Path) -> None:
    log = InputLog(story)
    again = rerun(log)
    words = [again.words(call) for call in log.calls()]
    log.close()
    assert words[0] == ["Add(address=1)", "Add(address=2)"]
    assert words[3] == ["resume parked path 0"]
    assert words[6] == ["Slowly(times=2)"]
