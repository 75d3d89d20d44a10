"""Events of the simulated world as the checker reads them (report/check), and its verdict as complaints.

The guest of scenarios has no sleeper table and logs less than the guest kernel. What Linux would do at the same moments is put in here:
"not present" clears its word and links a node, "ready" takes the node out or, when nobody waits, leaves a dummy.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import numpy as np

from proto import kvm
from proto.events import EVENT, FIELDS, Events, Kind
from proto.profile import PROFILES
from proto.units import TOKEN_WAKE_ALL
from report.check.checker import Checker
from sim.events import Event
from sim.scenario_file import Scenario
from sim.scenario_run import Outcome

PF_VECTOR: Final = 14
SLEEPS, DUMMY = 0, 2
TAKEN, ADDED, ALL, AGAIN = 0, 1, 2, 3
"""`variant` of G_WAIT and of G_WAKE."""
Fields = dict[str, int]


class _Linux:
    """One guest's sleeper table, as it would be."""

    def __init__(self, by_interrupt: bool) -> None:
        self.by_interrupt = by_interrupt
        self.word = kvm.AREA_TOKEN if by_interrupt else kvm.AREA_FLAGS
        self.nodes: dict[int, tuple[int, int]] = {}
        self.dummies: set[int] = set()
        self.last_ready: dict[int, int] = {}

    def not_present(self, cpu: int, task: int, token: int) -> Iterable[tuple[Kind, Fields]]:
        yield Kind.G_CLEAR, {"token": token, "a": kvm.AREA_FLAGS, "b": kvm.REASON_NOT_PRESENT}
        yield Kind.G_NP, {"token": token, "a": task + 1, "b": token, "c": 3}
        variant = DUMMY if token in self.dummies else SLEEPS
        if variant == SLEEPS:
            self.nodes[token] = cpu, task
        self.dummies.discard(token)
        yield Kind.G_WAIT, {"token": token, "a": task + 1, "b": task, "c": variant}

    def ready(self, cpu: int, token: int) -> Iterable[tuple[Kind, Fields]]:
        self.last_ready[cpu] = token
        if not self.by_interrupt:
            yield Kind.G_IRQ, {"token": token, "a": PF_VECTOR}
        if token == TOKEN_WAKE_ALL:
            mine = [t for t, (owner, _) in self.nodes.items() if owner == cpu]
            for one in mine:
                yield Kind.G_WAKE, self._taken(one, ALL)
        elif token in self.nodes:
            yield Kind.G_WAKE, self._taken(token, TAKEN)
        else:
            variant = AGAIN if token in self.dummies else ADDED
            self.dummies.add(token)
            yield Kind.G_WAKE, {"token": token, "c": variant}

    def reset(self, cpu: int) -> None:
        """The kernel that knew these sleepers is gone."""
        gone = [token for token, (owner, _) in self.nodes.items() if owner == cpu]
        for token in gone:
            del self.nodes[token]

    def offline(self, cpu: int) -> Iterable[tuple[Kind, Fields]]:
        """Every sleeper of the CPU is woken."""
        for token in [t for t, (owner, _) in self.nodes.items() if owner == cpu]:
            yield Kind.G_WAKE, self._taken(token, ALL)

    def _taken(self, token: int, variant: int) -> Fields:
        _, task = self.nodes.pop(token)
        return {"token": token, "a": task + 1, "b": task, "c": variant}

    def clear(self, cpu: int) -> Iterable[tuple[Kind, Fields]]:
        token = self.last_ready.get(cpu, 0)
        yield Kind.G_CLEAR, {"token": token, "a": self.word, "b": token}


def to_records(events: Iterable[Event], by_interrupt: bool) -> Events:
    """Dtype EVENT, in the order of ``events``."""
    linux = _Linux(by_interrupt)
    rows: list[tuple[int, int, Kind, Fields]] = []
    for event in events:
        rows += [(event.t_ns, event.vcpu, kind, fields) for kind, fields in _understand(event, linux)]
    return as_array(rows)


def as_array(rows: list[tuple[int, int, Kind, Fields]]) -> Events:
    """Rows (ns, vcpu_id, kind, fields token a b c) as dtype EVENT."""
    out = np.zeros(len(rows), EVENT)
    for number, (t_ns, vcpu, kind, fields) in enumerate(rows):
        record = out[number]
        record["lamport"], record["seq"], record["t_ns"] = number + 1, number, t_ns
        record["kind"], record["vcpu"] = kind, vcpu
        record["proc"] = 1 + vcpu if 64 <= kind < 96 else 0
        for key, value in fields.items():
            record[key] = value & 0xFFFF_FFFF_FFFF_FFFF
    return out


def _understand(event: Event, linux: _Linux) -> Iterable[tuple[Kind, Fields]]:
    fields = event.fields
    if event.src == "host":
        kind = Kind[event.name]
        values = {key: int(fields[name]) for key, name in zip("abc", FIELDS[kind], strict=False)}
        if kind is Kind.RESET:
            linux.reset(event.vcpu)
        yield kind, {"token": fields.get("token", 0), **values}
    elif event.src == "guest":
        if event.name == "NOTPRES":
            yield from linux.not_present(event.vcpu, fields["task"], fields["token"])
        elif event.name == "READY":
            yield from linux.ready(event.vcpu, fields["token"])
        elif event.name == "OFFLINE":
            yield from linux.offline(event.vcpu)
        elif event.name == "CLEAR":
            yield from linux.clear(event.vcpu)
        elif event.name == "TASKEND":
            yield Kind.TASK_DONE, {"a": fields["task"] + 1}


def judge(outcome: Outcome, *, parked: bool) -> list[str]:
    """Invariants that the events of a run break. ``parked``: paths rested at steps, so a completion may be logged late.

    A run that the script ends, and one whose guest does not clear or acknowledge, is held to safety only.
    """
    scenario = outcome.scenario
    cut = "" if behaves(scenario) else "the script ends the run or the guest does not answer"
    records = to_records(outcome.events, PROFILES[scenario.profile].ready_by_interrupt)
    return broken(scenario.profile, records, cut=cut, unordered=parked)


def behaves(scenario: Scenario) -> bool:
    """Whether liveness is promised."""
    answers = ("clear", "ack") if PROFILES[scenario.profile].ready_by_interrupt else ("clear",)
    return scenario.on_ready == answers and all(step.do not in ("end", "disable") for step in scenario.script)


def broken(profile: str, records: Events, *, cut: str = "", unordered: bool = False) -> list[str]:
    """Numbers of the invariants that ``records`` break."""
    checker = Checker(profile, unordered=unordered)
    checker.feed(records)
    verdict: Any = checker.finish("zoo", cut=cut, finished=not cut)
    return [f"I{finding.number}" for finding in verdict.violated]
