"""Faults of a topology: accepted where somebody can do them at some time, refused otherwise; the schedule is the same everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from proto.errors import UserError
from proto.faults import BAD_WORDS, FOREVER_NS, KINDS
from proto.topology import Topology, load
from proto.topology_faults import describe, schedule

MS = 1_000_000
ELSEWHERE = {"connect": "tcp://127.0.0.1:5000"}


def topology(*faults: dict[str, Any], daemons: int = 2, **more: Any) -> Topology:
    values = {
        "run": {"seconds": 5.0}, "vm": [{"vcpus": 2}], "swapd": [{}] * daemons, "fault": list(faults), **more,
    }  # fmt: skip
    return Topology.from_dict(values)


def specs(*faults: dict[str, Any], seed: int = 1) -> Any:
    found = topology(*faults)
    return schedule(found.fault, len(found.swapd), found.run.seconds, seed)


def test_there_are_none_unless_asked_for() -> None:
    assert Topology.from_dict({}).fault == ()
    assert topology().fault == ()


def test_every_kind_is_accepted_and_survives_plain_values() -> None:
    lasting = ("stop", "slow", "delay", "disconnect")
    found = topology(
        *({"do": kind, "after": 1.0, **({"for_ms": 5} if kind in lasting else {})} for kind in KINDS)
    )
    assert [fault.do for fault in found.fault] == list(KINDS)
    assert Topology.from_dict(found.to_dict()).fault == found.fault


def test_times() -> None:
    once, again, window, step, counted, gone = specs(
        {"do": "kill", "after": 1.5},
        {"do": "kill", "every_ms": 1000},
        {"do": "drop", "every_ms": 400, "after": 1.0, "until": 2.0},
        {"do": "stop", "on": "vcpu-1", "at": "fault.announced", "for_ms": 10},
        {"do": "bit_flip", "on": "swapd-1", "nth": 7, "times": 2},
        {"do": "device_gone"},
    )
    assert (once.times_ns, once.merges, once.targets) == ((1500 * MS,), False, (0, 1))
    assert (again.times_ns, again.merges) == (tuple(s * 1000 * MS for s in (1, 2, 3, 4)), True)
    assert window.times_ns == (1400 * MS, 1800 * MS)
    assert (step.step, step.nth, step.scheduled, step.role, step.targets) == (
        "fault.announced",
        1,
        1,
        "vcpu",
        (1,),
    )
    assert (counted.step, counted.nth, counted.scheduled, counted.targets) == ("read.done", 7, 2, (1,))
    assert (gone.times_ns, gone.for_ns) == ((0,), FOREVER_NS)


def test_random_times_follow_from_the_seed_and_are_never_none() -> None:
    fault = {"do": "drop", "rate_per_s": 20.0, "after": 1.0, "until": 3.0}
    (one,), (same,), (other,) = specs(fault), specs(fault), specs(fault, seed=2)
    assert one == same
    assert one.times_ns != other.times_ns
    assert 20 < len(one.times_ns) < 70
    assert list(one.times_ns) == sorted(one.times_ns)
    assert 1000 * MS <= one.times_ns[0] <= one.times_ns[-1] < 3000 * MS
    for seed in range(20):
        (rare,) = specs({"do": "drop", "rate_per_s": 0.001, "until": 0.5}, seed=seed)
        assert len(rare.times_ns) == rare.scheduled == 1
        assert 0 <= rare.times_ns[0] <= 250 * MS


def test_random_times_are_never_only_at_the_end() -> None:
    """Or whether a run fails would hang on its seed: too late is not at all."""
    firsts = []
    for seed in range(200):
        (spec,) = specs({"do": "drop", "rate_per_s": 0.3, "after": 1.0}, seed=seed)
        assert list(spec.times_ns) == sorted(spec.times_ns)
        assert spec.scheduled == len(spec.times_ns) >= 1
        firsts.append(spec.times_ns[0])
    assert 1000 * MS <= min(firsts) < max(firsts) <= 3000 * MS


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"do": "kill", "after": 2.0}, "at 2 s"),
        ({"do": "kill", "every_ms": 500, "until": 4.0}, "every 500 ms, until 4 s"),
        ({"do": "kill", "at": "read.done", "nth": 9}, "9th read.done"),
        ({"do": "kill", "at": "read.done", "nth": 9, "times": 2}, "every 9th read.done, 2 times"),
        ({"do": "bit_flip", "nth": 1, "times": 3}, "1st read, 3 times"),
        ({"do": "drop", "rate_per_s": 2, "after": 1}, "at random, 2 per s, from 1 s"),
        ({"do": "drop", "nth": 4}, "4th message"),
    ],
)
def test_words_for_people(fault: dict[str, Any], words: str) -> None:
    assert describe(topology(fault).fault[0]) == words


@pytest.mark.parametrize(
    ("fault", "key", "words"),
    [
        ({}, "do", "missing"),
        ({"do": "explode"}, "do", "not a choice"),
        ({"do": "kill", "on": "swapd-2"}, "on", "no such process"),
        ({"do": "kill", "on": "vcpu-2"}, "on", "no such process"),
        ({"do": "kill", "on": "vcpu"}, "on", "not allowed here"),
        ({"do": "kill", "on": "launcher"}, "on", "not allowed here"),
        ({"do": "stop", "on": "zygote", "for_ms": 5}, "on", "does not happen to it"),
        ({"do": "drop", "on": "host"}, "on", "does not happen to it"),
        ({"do": "kill", "at": "read.finished"}, "at", "did you mean"),
        ({"do": "kill", "on": "host", "at": "read.done"}, "at", "only the daemon sees"),
        ({"do": "kill", "nth": 4}, "at", "nth of what"),
        ({"do": "kill", "at": "read.done", "every_ms": 5}, "every_ms", "two ways"),
        ({"do": "drop", "rate_per_s": 1, "every_ms": 5}, "rate_per_s", "two ways"),
        ({"do": "drop", "nth": 3, "rate_per_s": 1}, "rate_per_s", "two ways"),
        ({"do": "drop", "every_ms": 5, "times": 2}, "times", "follows from the time"),
        ({"do": "drop", "after": 5.0}, "after", "over by then"),
        ({"do": "drop", "nth": 1, "until": 6.0}, "until", "nothing can happen"),
        ({"do": "drop", "nth": 1, "after": 2, "until": 2}, "until", "nothing can happen"),
        ({"do": "drop", "after": 1, "until": 2}, "until", "happens once"),
        ({"do": "drop", "every_ms": 5000}, "every_ms", "behind the last"),
        ({"do": "drop", "every_ms": 2000, "until": 2.0000000005}, "every_ms", "behind the last"),
        ({"do": "drop", "rate_per_s": 5, "after": 1.0, "until": 1.0000000001}, "until", "nothing can happen"),
        (
            {"do": "bad_block", "rate_per_s": 5, "after": 1.0, "until": 1.0000000001},
            "until",
            "nothing can happen",
        ),
        ({"do": "drop", "nth": 1, "after": 1.0, "until": 1.0000000001}, "until", "nothing can happen"),
        ({"do": "drop", "rate_per_s": 10_000, "until": 5.0, "times": 1, "after": 0, "nth": 0}, None, ""),
        ({"do": "stop"}, "for_ms", "how long is missing"),
        ({"do": "delay"}, "for_ms", "how long is missing"),
        ({"do": "kill", "for_ms": 5}, "for_ms", "does not apply"),
        ({"do": "drop", "slower_ms": 5}, "slower_ms", "does not apply"),
        ({"do": "bad_block", "every_ms": 1}, "times", "too many bad blocks"),
        ({"do": "kill", "when": 1}, "when", "unknown key"),
    ],
)
def test_what_makes_no_sense_is_refused(fault: dict[str, Any], key: str | None, words: str) -> None:
    if key is None:
        topology(fault)
        return
    with pytest.raises(UserError, match=words) as caught:
        topology({"do": "kill"}, fault)
    assert caught.value.key == f"fault[1].{key}"
    assert caught.value.allowed


def test_the_shortest_times_that_are_accepted_can_come() -> None:
    for fault in (
        {"do": "drop", "every_ms": 2000, "until": 2.000000002},
        {"do": "bad_block", "rate_per_s": 5, "after": 1.0, "until": 1.000000002},
        {"do": "drop", "after": 4.9999999},
    ):
        (spec,) = specs(fault)
        assert spec.scheduled == len(spec.times_ns) == 1
        assert spec.from_ns <= spec.times_ns[0] < spec.until_ns <= 5000 * MS


def test_bad_blocks_are_bounded_by_what_is_really_drawn() -> None:
    """Each fault draws from a stream of its own: no schedule that is accepted has more than the daemon has words for."""
    accepted = 0
    for seed in range(60):
        faults = ({"do": "drop", "after": 0.5}, {"do": "bad_block", "rate_per_s": 500.0})
        values = {"run": {"seconds": 1.0, "seed": seed}, "fault": list(faults)}
        try:
            found = Topology.from_dict(values)
        except UserError:
            continue
        accepted += 1
        assert schedule(found.fault, 1, 1.0, seed)[1].scheduled < BAD_WORDS
    assert accepted > 10


def test_more_than_can_be_counted_is_refused_before_it_is_drawn() -> None:
    with pytest.raises(UserError, match="too often") as caught:
        topology({"do": "drop", "rate_per_s": 10_000}, run={"seconds": 86_400.0})
    assert caught.value.key == "fault[0].rate_per_s"
    with pytest.raises(UserError, match="too many faults"):
        topology(*({"do": "kill"},) * 257)


@pytest.mark.parametrize(
    ("fault", "key"),
    [
        ({"do": "kill"}, "do"),
        ({"do": "bit_flip", "on": "swapd-1", "nth": 3}, "do"),
        ({"do": "drop", "on": "swapd-1", "at": "read.done"}, "at"),
    ],
)
def test_a_daemon_elsewhere_is_not_ours_to_damage(fault: dict[str, Any], key: str) -> None:
    with pytest.raises(UserError, match="elsewhere") as caught:
        topology(fault, swapd=[{}, ELSEWHERE])
    assert caught.value.key == f"fault[0].{key}"
    topology(
        {"do": "drop", "on": "swapd-1", "nth": 3}, {"do": "kill", "on": "swapd-0"}, swapd=[{}, ELSEWHERE]
    )


def test_a_fault_from_the_command_line_is_refused_by_its_option() -> None:
    path = Path(__file__).parents[2] / "topologies" / "quickstart.toml"
    option = "--fault 'kill on=swapd-9'"
    with pytest.raises(UserError, match="no such process") as caught:
        load(path, faults=[("--random 1", {"do": "kill"}), (option, {"do": "kill", "on": "swapd-9"})])
    assert (caught.value.where, caught.value.key) == (option, "fault[1].on")


def test_numbers_in_words() -> None:
    found = [
        describe(topology({"do": "drop", "nth": n}).fault[0]) for n in (1, 2, 3, 4, 11, 12, 13, 21, 102, 113)
    ]
    ordinals = ["1st", "2nd", "3rd", "4th", "11th", "12th", "13th", "21st", "102nd", "113th"]
    assert found == [f"{ordinal} message" for ordinal in ordinals]
