"""Runs one scenario in the simulated world and compares what came of it with what is expected."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from proto.layout import APF_AREA_GPA
from proto.port import ArrayPort
from proto.profile import PROFILES
from proto.stats import HostCounter
from proto.units import TOKEN_WAKE_ALL
from sim.events import Event
from sim.scenario_file import Scenario
from sim.scenario_guest import ScenarioCpu
from sim.scenario_tables import FIRST_GFN, LEVELS, contents, table_gfn
from sim.scenario_tasks import SHARED_WORDS
from sim.world import World, WorldConfig

LOGGED: Final = ("TOUCH", "NOTPRES", "READY", "DONE")
"""Events of the guest's log, as the recorded files write it."""
SHOWN: Final = (
    "not_present",
    "ready",
    "sync",
    "repeated",
    "tokens_not_present",
    "tokens_ready",
    "max_outstanding",
)
"""What every result shows, in this order."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a world made of a scenario. ``observed``: every quantity that a scenario may expect."""

    scenario: Scenario
    world: str
    observed: Mapping[str, Any]
    differences: tuple[str, ...]
    events: tuple[Event, ...] = field(repr=False)

    @property
    def passed(self) -> bool:
        """No difference."""
        return not self.differences

    def plain(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "name": self.scenario.name,
            "file": self.scenario.file,
            "world": self.world,
            "passed": self.passed,
            "differences": list(self.differences),
            "observed": {key: _plain(self.observed[key]) for key in SHOWN},
            "events": [event.plain() for event in self.events],
        }


def run(scenario: Scenario, park_ns: Callable[[str], int] | None = None) -> Outcome:
    """One scenario, from power-on to its end. Deterministic if ``park_ns`` is (see `WorldConfig`)."""
    world = World(
        WorldConfig(
            profile=PROFILES[scenario.profile],
            vcpu_ids=scenario.vcpu_ids,
            pages=FIRST_GFN + max(scenario.pages) + 1,
            service_ns=lambda gfn: scenario.service_of.get(gfn - FIRST_GFN, scenario.service_ns),
            park_ns=park_ns,
            moves=sum(step.do == "slot_move" for step in scenario.script),
            no_memory_for_items=scenario.no_memory_for_items,
        )
    )
    shared = ArrayPort(np.zeros(SHARED_WORDS, np.uint64))
    cpus = [ScenarioCpu(scenario, cpu, world.guest_memory, shared) for cpu in range(len(scenario.vcpu_ids))]
    for cpu in cpus:
        world.attach(cpu)
    if scenario.swapped_out:
        for page in scenario.pages:
            world.put_on_swap(FIRST_GFN + page)
    if scenario.tables_swapped_out is not None:
        for level in LEVELS:
            world.fill(table_gfn(level), contents(level, scenario.pages))
        for level in scenario.tables_swapped_out:
            world.put_on_swap(table_gfn(level))
    if scenario.area_swapped_out:
        for gfn in sorted({(APF_AREA_GPA + 64 * vcpu_id) >> 12 for vcpu_id in scenario.vcpu_ids}):
            world.put_on_swap(gfn)
    world.run()
    events = tuple(sorted(world.record.events, key=lambda event: event.t_ns))
    observed = observe(events, world.record.counts, world.max_outstanding)
    differences = compare(scenario.expect, observed)
    differences += [text for cpu in cpus for text in cpu.surprises]
    if not world.over:
        asleep = [str(t.task.number) for t in cpus[0].everybody if not t.finished]
        differences.append(f"the run did not end: tasks {', '.join(asleep) or 'none'} unfinished")
    return Outcome(scenario, "sim", observed, tuple(differences), events)


def observe(
    events: tuple[Event, ...], counts: Mapping[HostCounter, int], max_outstanding: int
) -> dict[str, Any]:
    """The quantities of docs/protocol-scenarios.md; ``counts``: the host's."""

    def tokens(name: str) -> tuple[int, ...]:
        return tuple(e.fields["token"] for e in events if e.src == "guest" and e.name == name)

    not_present, ready = tokens("NOTPRES"), tokens("READY")
    return {
        "not_present": len(not_present),
        "ready": len(ready),
        "sync": counts.get(HostCounter.FAULTS_SYNC, 0),
        "repeated": counts.get(HostCounter.FAULTS_REPEATED, 0),
        "tokens_not_present": not_present,
        "tokens_ready": ready,
        "max_outstanding": max_outstanding,
        "setup_failed": counts.get(HostCounter.SETUP_FAILED, 0),
        "halts": counts.get(HostCounter.FAULTS_HALT, 0),
        "elided": counts.get(HostCounter.ELIDED, 0),
        "cancelled": sum(e.name == "CANCEL" for e in events),
        "faulted_writes": sum(e.name == "GP" for e in events),
        "resets": sum(e.name == "RESET" for e in events),
        "moved": sum(e.name == "MOVED" for e in events),
        "log": log_lines(events),
    }


def log_lines(events: tuple[Event, ...]) -> tuple[str, ...]:
    """The guest's own log in the notation of the recorded files: event, task, page or token."""
    lines = []
    for event in events:
        if event.src == "guest" and event.name in LOGGED:
            page = event.fields.get("page")
            what = f"p{page}" if page is not None else f"{event.fields['token']:#x}"
            lines.append(f"{event.name} t{event.fields['task']} {what}")
    return tuple(lines)


def compare(expect: Mapping[str, Any], observed: Mapping[str, Any]) -> list[str]:
    """Each difference as a line."""
    found = []
    for key, wanted in expect.items():
        if key == "ready_first":
            found += _ready_in_any_order(wanted, observed)
        elif key == "burnt_token_ids_min":
            if observed["setup_failed"] < wanted:
                found.append(f"burnt token ids: {observed['setup_failed']}, expected at least {wanted}")
        elif key.startswith("tokens"):
            if observed[key] != wanted:
                found.append(f"{key}: {_hex(observed[key])}, expected {_hex(wanted)}")
        elif key == "log":
            found += _log_difference(wanted, observed["log"])
        elif observed[key] not in wanted:
            found.append(f"{key}: {observed[key]}, expected {' or '.join(map(str, wanted))}")
    return found


def _ready_in_any_order(first: int, observed: Mapping[str, Any]) -> list[str]:
    """The first ready token is given, the rest are announced ones, each at most once, in any order."""
    ready = observed["tokens_ready"]
    if not ready or ready[0] != first:
        return [f"first ready token: {_hex(ready[:1])}, expected {_hex((first,))}"]
    rest = [token for token in ready[1:] if token != TOKEN_WAKE_ALL]
    strange = sorted(set(rest) - set(observed["tokens_not_present"]))
    if strange or len(set(rest)) != len(rest):
        return [f"ready tokens {_hex(ready)}, expected each at most once, and announced ones only"]
    return []


def _log_difference(wanted: tuple[str, ...], got: tuple[str, ...]) -> list[str]:
    if got == wanted:
        return []
    at = next(
        (i for i, (a, b) in enumerate(zip(got, wanted, strict=False)) if a != b), min(len(got), len(wanted))
    )
    here = [lines[at] if at < len(lines) else "(end)" for lines in (got, wanted)]
    return [f"guest's log, line {at + 1}: {here[0]}, expected {here[1]}"]


def _hex(tokens: tuple[int, ...]) -> str:
    return "[" + ", ".join(f"{token:#x}" for token in tokens) + "]"


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
