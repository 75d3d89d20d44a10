"""Which process is signalled when, and whose end was ordered."""

from __future__ import annotations

import signal
from array import array
from pathlib import Path
from typing import Any

import pytest

from launcher import chaos_command
from launcher.chaos import MS, Chaos, Order, process_faults
from launcher.options import SIM_FAULTS
from proto.errors import UserError
from proto.faults import KINDS, LINK_KINDS, FaultMachine, target_code, words_needed
from proto.topology import Topology
from proto.topology_faults import schedule
from proto.trace import Kind, TraceWriter, read_file

S = 1000 * MS
START = 10 * S


def chaos_of(*faults: dict[str, Any], writer: TraceWriter | None = None) -> Chaos:
    values = {"run": {"seconds": 5.0}, "vm": [{"vcpus": 2}], "swapd": [{}, {}], "fault": list(faults)}
    topology = Topology.from_dict(values)
    specs = schedule(topology.fault, 2, 5.0, 1)
    words = memoryview(array("Q", [0] * words_needed(len(specs), 2)))
    made = Chaos(topology, FaultMachine(specs, words), writer)
    made.machine.start(START)
    return made


def obey(chaos: Chaos, now_ns: int, gone: tuple[str, ...] = ()) -> list[tuple[str, int]]:
    """What is done at a time, when those processes are not there."""
    done = []
    for order in chaos.due(now_ns):
        if f"{order.role}-{order.number}" in gone:
            chaos.missed(order, now_ns)
        else:
            chaos.take(order, now_ns)
            done.append((f"{order.role}-{order.number}", order.signal))
    return done


def test_nobody_is_killed_before_the_barrier() -> None:
    chaos = chaos_of({"do": "kill", "every_ms": 1000})
    chaos.machine.start(0)
    assert chaos.due(1 << 60) == []
    assert chaos.wakes_ns(1 << 60) is None


def test_daemons_take_turns_and_kills_end() -> None:
    chaos = chaos_of({"do": "kill", "every_ms": 1000, "until": 3.5})
    done = [(t, who) for t in range(90, 170) for who, _ in obey(chaos, t * 100 * MS)]
    assert done == [(110, "swapd-0"), (120, "swapd-1"), (130, "swapd-0")]
    assert chaos.kills == 3


def test_who_is_down_is_passed_over_and_the_next_one_has_its_turn() -> None:
    chaos = chaos_of({"do": "kill", "every_ms": 1000})
    assert obey(chaos, START + S, gone=("swapd-0",)) == []
    assert obey(chaos, START + S + 1) == [], "that time is over"
    assert obey(chaos, START + 2 * S) == [("swapd-1", signal.SIGKILL)]
    assert chaos.kills == 1


def test_what_happens_once_waits_for_its_target() -> None:
    chaos = chaos_of({"do": "kill", "on": "vcpu-1", "after": 1.0})
    assert obey(chaos, START + S, gone=("vcpu-1",)) == []
    assert obey(chaos, START + 9 * S) == [("vcpu-1", signal.SIGKILL)]
    assert obey(chaos, START + 10 * S) == []


def test_a_daemon_that_is_gone_for_good_is_nobodys_target() -> None:
    chaos = chaos_of(
        {"do": "kill", "every_ms": 1000}, {"do": "kill", "after": 0.5}, {"do": "kill", "on": "swapd-0"}
    )
    chaos.machine.gone(0)
    assert obey(chaos, START + S) == [("swapd-1", signal.SIGKILL), ("swapd-1", signal.SIGKILL)]
    assert obey(chaos, START + 2 * S) == [("swapd-1", signal.SIGKILL)]
    assert obey(chaos, START + 3 * S) == [("swapd-1", signal.SIGKILL)]


def test_whom_others_killed_is_known_also_when_one_was_gone() -> None:
    chaos = chaos_of({"do": "kill", "at": "read.done", "times": 9})
    (kill,) = chaos.machine.specs
    for gone, expected in ((False, [0]), (True, [1]), (False, [1, 1])):
        if gone:
            chaos.machine.gone(0)
        for _ in expected:
            chaos.machine.fire(kill, START + S)
        assert chaos.look() == [(kill, number) for number in expected]


def test_nobody_is_killed_after_the_measured_time() -> None:
    chaos = chaos_of({"do": "kill", "after": 4.99}, {"do": "stop", "after": 1.0, "for_ms": 9000})
    assert obey(chaos, START + S) == [("swapd-0", signal.SIGSTOP)]
    chaos.look()
    chaos.machine.stop(START + 5 * S)
    assert chaos.due(START + 5 * S) == []
    assert chaos.wakes_ns(START + 5 * S) == START + 10 * S, "who stands still goes on"
    assert chaos.over(START + 10 * S) == [("swapd", 0)]


def test_a_stopped_process_goes_on_and_the_later_of_two_stops_counts(tmp_path: Path) -> None:
    path = tmp_path / "launcher.bin"
    chaos = chaos_of(
        {"do": "stop", "on": "host", "after": 1.0, "for_ms": 300},
        {"do": "stop", "on": "host", "after": 1.2, "for_ms": 300},
        writer=TraceWriter(path, 3000, 1 << 16),
    )
    for ms in (1000, 1200):
        assert obey(chaos, START + ms * MS) == [("host-0", signal.SIGSTOP)]
        chaos.look()
    assert chaos.wakes_ns(START + 1200 * MS) == START + 1300 * MS
    assert chaos.over(START + 1300 * MS) == []
    assert chaos.over(START + 1499 * MS) == []
    assert chaos.over(START + 1500 * MS) == [("host", 0)]
    assert chaos.wakes_ns(START + 1500 * MS) is None
    chaos.close()
    events = read_file(path).events
    assert [(int(e["kind"]), int(e["a"]), int(e["b"]), int(e["c"]), int(e["token"])) for e in events] == [
        (Kind.FAULT, i, KINDS.index("stop"), target_code("host", 0), 1) for i in (0, 1)
    ]


def test_kills_by_another_hand_are_seen_each_with_its_target() -> None:
    chaos = chaos_of(
        {"do": "kill", "at": "read.done", "times": 3},
        {"do": "stop", "at": "daemon.hello", "times": 2, "for_ms": 5},
    )
    assert chaos.watches
    assert not process_faults(chaos.machine.specs), "the launcher does nothing at steps"
    assert chaos.due(START + S) == []
    kill, stop = chaos.machine.specs
    for _ in range(3):
        chaos.machine.fire(kill, START + S)
    for _ in range(2):
        chaos.machine.fire(stop, START + S)
    assert chaos.look() == [(kill, 0), (kill, 0), (kill, 1)]
    assert chaos.look() == []
    assert chaos.over(START + S + 5 * MS) == [("swapd", 0), ("swapd", 1)], "each that stands still"
    assert chaos.why(kill) == "as fault 0 of the schedule wants: kill 1st read.done, 3 times"


def test_the_launcher_leaves_what_is_not_a_process_alone() -> None:
    chaos = chaos_of({"do": "bit_flip", "after": 1.0}, {"do": "drop", "every_ms": 10})
    assert chaos.due(START + 4 * S) == []
    assert chaos.kills == 0
    assert isinstance(Order(chaos.machine.specs[0], "swapd", 0, 9), tuple)


@pytest.mark.parametrize(
    ("text", "table"),
    [
        ("kill", {"do": "kill"}),
        ("kill on=vcpu-1 after=1.5s", {"do": "kill", "on": "vcpu-1", "after": 1.5}),
        (
            "stop for=200ms every=1s until=2m",
            {"do": "stop", "for_ms": 200.0, "every_ms": 1000.0, "until": 120.0},
        ),
        ("slow for_ms=5 slower=20us", {"do": "slow", "for_ms": 5, "slower_ms": 0.02}),
        ("bit_flip nth=50 times=3", {"do": "bit_flip", "nth": 50, "times": 3}),
        ("drop rate=2.5", {"do": "drop", "rate_per_s": 2.5}),
    ],
)
def test_a_fault_of_the_command_line(text: str, table: dict[str, Any]) -> None:
    assert chaos_command.parse(text) == table


@pytest.mark.parametrize(
    "text", ["", "explode", "kill on", "kill =3", "kill on=", "stop for=5", "stop for=0ms"]
)
def test_what_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(UserError):
        chaos_command.parse(text)


def test_kills_are_the_default_only_where_there_is_nothing_else() -> None:
    def tables(*words: Any, by_default: bool = True) -> list[dict[str, Any]]:
        return [table for _, table in chaos_command.tables_of(*words, by_default=by_default)]

    usual = {"do": "kill", "on": "swapd", "every_ms": 500.0}
    assert tables(None, None, []) == [usual]
    assert tables(None, None, [], by_default=False) == []
    assert tables(None, None, ["drop nth=1"]) == [{"do": "drop", "nth": 1}]
    assert tables("swapd", None, ["drop nth=1"]) == [usual, {"do": "drop", "nth": 1}]
    assert tables(None, 100 * MS, []) == [{**usual, "every_ms": 100.0}]
    assert tables("host", S, []) == [{"do": "kill", "on": "host", "after": 1.0}]


def test_a_drawn_schedule_is_valid_has_every_kind_and_follows_from_the_seed() -> None:
    values = {"run": {"seconds": 5.0}, "vm": [{"vcpus": 2}], "swapd": [{}, {}]}
    plain = Topology.from_dict(values)
    for seed in range(50):
        drawn = chaos_command.drawn(plain, len(KINDS), seed)
        assert drawn == chaos_command.drawn(plain, len(KINDS), seed)
        assert {table["do"] for _, table in drawn} == set(KINDS)
        found = Topology.from_dict({**values, "fault": [table for _, table in drawn]})
        assert all(fault.do != "kill" or fault.on.startswith("swapd") for fault in found.fault)
    assert chaos_command.drawn(plain, 3, 1) != chaos_command.drawn(plain, 3, 2)


def test_real_and_simulated_faults_have_the_same_names() -> None:
    assert set(SIM_FAULTS) - set(KINDS) == {"restart", "gone"}


def test_of_a_daemon_elsewhere_only_the_link_is_drawn() -> None:
    far = {"connect": "tcp://127.0.0.1:7000"}
    for daemons in ([far], [far, {}]):
        values = {"run": {"seconds": 5.0}, "vm": [{"vcpus": 2}], "swapd": daemons}
        plain = Topology.from_dict(values)
        for seed in range(50):
            drawn = chaos_command.drawn(plain, len(KINDS), seed)
            Topology.from_dict({**values, "fault": [table for _, table in drawn]})
            others = {table["do"] for _, table in drawn} - {*LINK_KINDS, "stop"}
            assert bool(others) == (len(daemons) == 2)


def test_a_successor_does_not_stand_still_for_its_predecessor() -> None:
    chaos = chaos_of(
        {"do": "stop", "on": "swapd-0", "after": 0.5, "for_ms": 3000},
        {"do": "stop", "on": "swapd-0", "after": 1.5, "for_ms": 100},
        {"do": "stop", "on": "swapd-1", "after": 0.5, "for_ms": 3000},
    )
    assert len(obey(chaos, START + 500 * MS)) == 2
    chaos.look()
    chaos.ended("swapd", 0)
    assert len(obey(chaos, START + 1500 * MS)) == 1
    chaos.look()
    assert chaos.over(START + 1600 * MS) == [("swapd", 0)]
    assert chaos.over(START + 3500 * MS) == [("swapd", 1)]
