"""Events of a topology: accepted in an order that makes sense, refused otherwise."""

from __future__ import annotations

from typing import Any

import pytest

from proto.errors import UserError
from proto.topology import Topology, pages_needed
from proto.topology_events import in_order

VM = {"vcpus": 2, "memory_mib": 64, "task": [{"workload": "stamp", "memory_kib": 4096}]}
FREE = 8_000
"""A page that no task of that guest can have."""


def topology(*events: dict[str, Any], vm: dict[str, Any] | None = None) -> Topology:
    values = {"run": {"seconds": 5.0}, "vm": [vm or VM], "event": [dict(event) for event in events]}
    return Topology.from_dict(values)


def test_there_are_none_unless_asked_for() -> None:
    assert Topology.from_dict({}).event == ()
    assert topology().event == ()


def test_a_life_with_everything_in_it() -> None:
    found = topology(
        {"at": 2.0, "do": "online", "vcpu": 1},
        {"at": 1.0, "do": "offline", "vcpu": 1},
        {"at": 1.5, "do": "slot_move", "page": 0, "pages": 64},
        {"at": 1.6, "do": "slot_delete", "page": FREE, "pages": 64},
        {"at": 3.0, "do": "slot_add", "page": FREE, "pages": 64},
        {"at": 4.0, "do": "reboot"},
    )
    assert pages_needed(found.vm[0]) < FREE
    assert [event.do for event in in_order(found.event)][:2] == ["offline", "slot_move"]
    again = Topology.from_dict(found.to_dict())
    assert again.event == found.event


@pytest.mark.parametrize(
    ("events", "key", "words"),
    [
        ([{"at": 1.0}], "event[0].do", "missing"),
        ([{"do": "explode"}], "event[0].do", "not a choice"),
        ([{"do": "reboot", "vcpu": 1}], "event[0].vcpu", "does not apply"),
        ([{"do": "offline", "page": 1}], "event[0].page", "does not apply"),
        ([{"do": "offline", "at": 5.0}], "event[0].at", "over by then"),
        ([{"do": "offline", "vcpu": 0}], "event[0].vcpu", "out of range"),
        ([{"do": "offline", "vcpu": 2}], "event[0].vcpu", "no such vCPU"),
        ([{"do": "offline", "vm": 1}], "event[0].vm", "no such guest"),
        ([{"do": "online"}], "event[0].do", "is online then"),
        ([{"do": "offline"}, {"do": "offline", "at": 2.0}], "event[1].do", "is offline then"),
        ([{"do": "slot_move", "page": 16_000, "pages": 1_000}], "event[0].pages", "beyond"),
        ([{"do": "slot_delete", "page": 40, "pages": 8}], "event[0].page", "tasks may use it"),
        ([{"do": "slot_add", "page": FREE, "pages": 8}], "event[0].page", "nothing was deleted"),
        (
            [
                {"do": "slot_delete", "page": FREE, "pages": 8},
                {"do": "slot_move", "page": FREE + 7, "at": 2.0},
            ],
            "event[1].page",
            "deleted then",
        ),
        (
            [
                {"do": "slot_delete", "page": FREE, "pages": 8},
                {"do": "slot_add", "page": FREE, "pages": 4, "at": 2.0},
            ],
            "event[1].page",
            "nothing was deleted",
        ),
        ([{"do": "offline", "when": 1}], "event[0].when", "unknown key"),
    ],
)
def test_what_makes_no_sense_is_refused(events: list[dict[str, Any]], key: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        topology(*events)
    assert caught.value.key == key


def test_a_guest_that_replays_keeps_its_memory() -> None:
    vm = {**VM, "task": [{"workload": "replay", "trace": "x.trc"}]}
    with pytest.raises(UserError, match="a trace may need any page"):
        topology({"do": "slot_delete", "page": FREE}, vm=vm)


def test_one_vcpu_has_nothing_to_take_offline() -> None:
    with pytest.raises(UserError, match="no such vCPU"):
        topology({"do": "offline"}, vm={**VM, "vcpus": 1})
