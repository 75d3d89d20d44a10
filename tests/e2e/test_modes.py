"""Every mode and profile end to end: the run finishes, nothing is lost, every invariant holds, and the counters and events are those of
the mode.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from proto.events import Events, Kind
from proto.kvm import MSR_ASYNC_PF_ACK, MSR_ASYNC_PF_EN, MSR_ASYNC_PF_EN_V3
from proto.units import TOKEN_WAKE_ALL
from proto.wire import Inject
from report.check.api import check_run
from tests.e2e.runs import BM, MIXED, Runner, assert_good, of_kind

TASK_OPS = {1: 1200, 2: 1200, 3: 1200}
"""Tasks of MIXED that do exactly their operations, by their number in events. System calls are only ended between two rounds."""


class Case(NamedTuple):
    """A delivery mode. words: how the user asks for it. profile: what the summary must call it."""

    mode: str
    profile: str
    words: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return "-".join([self.mode, self.profile, *(w.partition("=")[0] for w in self.words if "vm." in w)])


SYNC = Case("sync", "mainline")
HALT = Case("halt", "mainline")
HALT_V7 = Case("halt", "v7", ("--profile", "v7"))
EXCEPTION = Case("exception", "v7")
V3 = Case("exception", "v3", ("--profile", "v3"))
INTERRUPT = Case("interrupt", "mainline")
SEND_ALWAYS = Case("interrupt", "mainline", ("--set", "vm.send_always=true"))
PREEMPTIBLE = Case("exception", "v7", ("--set", "vm.send_always=true", "--set", "vm.preemptible=true"))


MORE_CALLS = ("--set", "vm.0.task.2.ops=15000")
"""Where something has to happen inside of system calls: of those of MIXED, few may find their page on swap."""


def _faults(case: Case, faults: dict[str, int]) -> None:
    """The counters that tell the modes apart."""
    assert faults["nested"] > 0
    assert faults["kernel_mode"] > 0
    assert faults["zero_fill"] > 0
    if case.mode == "sync":
        assert faults["sync"] > 0
        assert faults["async"] == faults["halt"] == faults["repeated"] == 0
    elif case.mode == "halt":
        assert faults["halt"] > 0
        assert faults["async"] == 0
    else:
        assert faults["async"] > 0
    if case is V3:
        assert faults["halt"] == 0, "a host of 2010 has no synthetic halt"


@pytest.mark.parametrize(
    "case",
    [SYNC, HALT, HALT_V7, EXCEPTION, V3, INTERRUPT, SEND_ALWAYS, PREEMPTIBLE],
    ids=lambda case: case.name,
)
def test_a_mode_end_to_end(case: Case, runner: Runner) -> None:
    more = MORE_CALLS if case in (SEND_ALWAYS, PREEMPTIBLE) else ()
    ended = runner.run(MIXED, "--mode", case.mode, *case.words, *more)
    summary = assert_good(ended)
    assert (summary["mode"], summary["profile"], summary["vcpus"]) == (case.mode, case.profile, 2)
    assert summary["tasks"]["done"] == 5
    _faults(case, summary["faults"])
    assert_documented(summary)
    assert ended.out is not None
    assert json.loads((ended.out / "summary.json").read_text()) == summary
    assert json.loads((ended.out / "run.json").read_text())["ended"] == "finished"
    _keeps_the_invariants(case, ended.out)
    events = ended.events()
    _every_task_did_its_operations(events, summary)
    _tokens_pair(case, events)
    if case.mode in ("sync", "halt"):
        _guest_knows_nothing(events)
    else:
        _guest_sees_what_the_host_says(case, events)
        _contexts(case, events)


ALWAYS = {1, 2, 7, 20, 21, 23, 35, 50}
"""What every run with async faults puts to the test."""
TOLD = {9, 10, 11, 13, 14, 15, 16, 17, 22, 39, 40, 44}
"""What needs announcements."""
TESTED = {
    SYNC: {35, 44, 47},
    HALT: ALWAYS | {36},
    V3: TOLD - {9} | {27},
    INTERRUPT: ALWAYS | TOLD | {12, 24, 25, 26, 43},
}
"""Where the guest is told, a synthetic halt (I36) is a matter of luck."""


def _keeps_the_invariants(case: Case, run_dir: Path) -> None:
    verdict = check_run(run_dir)
    assert verdict.ok, [(one.number, one.examples) for one in verdict.violated]
    # The work itself ended it, so that liveness is judged, too.
    assert (verdict.profile, verdict.liveness, verdict.notes) == (case.profile, True, [])
    assert TESTED.get(case, set()) <= {one.number for one in verdict.findings if one.checks}


# -- events -----------------------------------------------------------------------------------------------------------------


def _tokens(events: Events, kind: Kind) -> Counter[tuple[int, int, int]]:
    """(vm, vcpu, token) of the events of a kind; the wake-all token is nobody's."""
    found = of_kind(events, kind)
    found = found[found["token"] != TOKEN_WAKE_ALL]
    return Counter(zip(found["vm"].tolist(), found["vcpu"].tolist(), found["token"].tolist(), strict=True))


def _every_task_did_its_operations(events: Events, summary: dict[str, Any]) -> None:
    assert len(of_kind(events, Kind.STOP)) == 0, "the tasks ended, not the time"
    done = of_kind(events, Kind.TASK_DONE)
    ops = dict(zip(done["a"].tolist(), done["b"].tolist(), strict=True))
    assert len(ops) == len(done) == 5
    assert {task: ops[task] for task in TASK_OPS} == TASK_OPS
    assert sum(TASK_OPS.values()) < summary["work"]["total"] <= sum(ops.values())


def _tokens_pair(case: Case, events: Events) -> None:
    """Each page that was announced as missing is announced as there, once; after it, and unless the host forgot it."""
    missing, ready = _tokens(events, Kind.ASYNC_PF_NOT_PRESENT), _tokens(events, Kind.ASYNC_PF_READY)
    cancelled = _tokens(events, Kind.CANCEL)
    if case is V3:
        # What arrived before its event was injected is elided: neither event reaches the guest.
        announced = set(_injected(events, Inject.PF_NOT_PRESENT))
        cancelled.update(key for key in missing if key not in announced)
    assert set(missing.values()) | set(ready.values()) <= {1}
    assert not ready.keys() - missing.keys()
    assert not ready.keys() & cancelled.keys()
    assert missing.keys() == ready.keys() | cancelled.keys()
    assert bool(missing) == (case.mode != "sync")
    place = {_key(event): at for at, event in enumerate(events) if event["kind"] == Kind.ASYNC_PF_NOT_PRESENT}
    for at, event in enumerate(events):
        if event["kind"] == Kind.ASYNC_PF_READY and event["token"] != TOKEN_WAKE_ALL:
            assert place[_key(event)] < at


def _key(event: np.void) -> tuple[int, int, int]:
    return int(event["vm"]), int(event["vcpu"]), int(event["token"])


def _injected(events: Events, kind: Inject) -> Counter[tuple[int, int, int]]:
    found = of_kind(events, Kind.INJ)
    return _tokens(found[found["a"] == kind], Kind.INJ)


def _guest_knows_nothing(events: Events) -> None:
    for kind in (Kind.INJ, Kind.G_NP, Kind.G_SLEEP, Kind.ACK, Kind.APIC_ACCEPT_IRQ):
        assert len(of_kind(events, kind)) == 0
    registers = of_kind(events, Kind.MSR_WR)["a"].tolist()
    assert not {MSR_ASYNC_PF_EN, MSR_ASYNC_PF_EN_V3, MSR_ASYNC_PF_ACK} & set(registers)


def _guest_sees_what_the_host_says(case: Case, events: Events) -> None:
    """Every injected fault is taken, every sleeper wakes, every ready event goes the way of the profile."""
    taken = _tokens(events, Kind.G_NP)
    assert taken == _injected(events, Inject.PF_NOT_PRESENT)
    assert len(taken) > 0
    assert _tokens(events, Kind.G_WAIT) == taken
    assert _tokens(events, Kind.G_SLEEP).keys() <= taken.keys()
    woken = {token for _, _, token in _tokens(events, Kind.G_WAKE)}
    assert {token for _, _, token in taken} <= woken
    wrong = of_kind(events, Kind.MSR_WR)["c"]
    assert not wrong.any(), "no register write was refused"
    registers = of_kind(events, Kind.MSR_WR)["a"].tolist()
    assert (MSR_ASYNC_PF_EN_V3 if case is V3 else MSR_ASYNC_PF_EN) in registers
    if case.mode == "interrupt":
        assert len(_injected(events, Inject.PF_READY)) == 0
        assert len(of_kind(events, Kind.APIC_ACCEPT_IRQ)) > 0
        assert registers.count(MSR_ASYNC_PF_ACK) == len(of_kind(events, Kind.ACK)) > 0
    else:
        assert taken.keys() <= _injected(events, Inject.PF_READY).keys()
        assert len(of_kind(events, Kind.APIC_ACCEPT_IRQ)) == 0
        assert MSR_ASYNC_PF_ACK not in registers


def _contexts(case: Case, events: Events) -> None:
    """In kernel mode only guests that asked for it are told; only a preemptible kernel sleeps there."""
    taken = of_kind(events, Kind.G_NP)
    kernel = {_key(event) for event in taken[taken["c"] == 0]}
    asleep = set(_tokens(events, Kind.G_SLEEP))
    assert bool(kernel) == (case in (SEND_ALWAYS, PREEMPTIBLE))
    assert bool(kernel & asleep) == (case is PREEMPTIBLE)


# -- the summary ------------------------------------------------------------------------------------------------------------


def _count(value: object) -> bool:
    return type(value) is int and value >= 0


def _seconds(value: object) -> bool:
    return isinstance(value, float) and value >= 0


def _maybe_us(value: object) -> bool:
    return value is None or _seconds(value)


def _text(value: object) -> bool:
    return isinstance(value, str) and bool(value)


FIELDS: dict[str, Callable[[object], bool]] = {
    "mode": _text,
    "profile": _text,
    "ended": _text,
    "vcpus": _count,
    "seconds": _seconds,
    "work.total": _count,
    "work.per_vcpu": lambda value: isinstance(value, list) and all(map(_count, value)),
    **{f"faults.{n}": _count for n in ("nested", "async", "sync", "halt", "repeated", "kernel_mode")},
    **{
        f"latency_us.{name}.{point}": _maybe_us
        for name in ("fault_to_not_present", "fault_to_ready", "swap_in")
        for point in ("p50", "p99")
    },
    **{f"swap.{name}": _count for name in ("in_pages", "out_pages", "clean_drops")},
    "integrity.reads_checked": _count,
    "integrity.errors": _count,
    "pace.kept": lambda value: value is None or isinstance(value, bool),
    **{f"vcpu_time.{name}": _seconds for name in ("running", "blocked", "halted", "steal")},
    "restarts": _count,
    "warnings": lambda value: isinstance(value, list) and all(map(_text, value)),
}
"""Fields that every summary has, whatever the run was, and what may be in them."""


def assert_documented(summary: dict[str, Any]) -> None:
    for path, is_sane in FIELDS.items():
        value: Any = summary
        for part in path.split("."):
            value = value[part]
        assert is_sane(value), f"{path}: {value!r}"
    assert summary["work"]["total"] == sum(summary["work"]["per_vcpu"])
    assert len(summary["work"]["per_vcpu"]) == summary["vcpus"]
    latency = summary["latency_us"]
    announces = summary["mode"] in ("exception", "interrupt")
    for name in ("fault_to_not_present", "fault_to_ready"):
        assert (latency[name]["p50"] is not None) == announces
    assert 0 < latency["swap_in"]["p50"] <= latency["swap_in"]["p99"]
    assert summary["swap"]["in_pages"] > 0
    assert summary["swap"]["out_pages"] > 0
    time_in = summary["vcpu_time"]
    assert time_in["running"] > 0
    assert (time_in["halted"] > 0) == (summary["faults"]["halt"] + summary["faults"]["repeated"] > 0)
    assert summary["faults"]["sync"] == 0 or time_in["blocked"] > 0


def test_a_run_until_the_time_is_over(runner: Runner) -> None:
    """No task has an end of its own: the host ends the measured time."""
    ended = runner.run(BM, "--seconds", "0.5", "--mode", "interrupt")
    summary = assert_good(ended)
    assert summary["seconds"] >= 0.5
    assert summary["work"]["total"] > 0
    assert isinstance(summary["pace"]["kept"], bool)
    stop = of_kind(ended.events(), Kind.STOP)
    assert set(stop["a"].tolist()) == {0}, "stopped by the time, not by somebody"
