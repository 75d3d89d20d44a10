"""The summary: its names are documented, its figures come from where they should, its checks catch bad runs."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from proto import stats
from proto.faults import FaultMachine, words_needed
from proto.layout import (
    K_TASKS,
    K_VCPUS,
    KILL_OOM,
    P_BM_FAULT,
    P_BM_WORK,
    T_CPU,
    T_KILL_REASON,
    T_PROGRAM,
    T_STATE,
    T_WORK,
    TASK_WORDS,
    TS_DONE,
    TS_KILLED,
    TS_RUNNABLE,
    VC_BARRIER_VCLOCK_NS,
    VC_BARRIER_WALL_NS,
    VC_END_VCLOCK_NS,
    VC_END_WALL_NS,
    VC_INTEGRITY_ERRORS,
    VC_PACE_LAG_MAX_NS,
    VC_READS_CHECKED,
    VC_RUNNING_NS,
    VC_WORK,
    VP_COUNTERS,
    kernel_words,
    task_base,
)
from proto.stats import HostCounter, HostHist, VcpuHist
from proto.topology import Fault, Topology
from proto.topology_faults import schedule
from proto.units import WORDS_PER_PAGE
from report import growth, judgement, text
from report.check.checker import Checker
from report.pace import pace_of
from report.summary import U64, RunFacts, Snapshot, build
from report.tasks import count_tasks, work_per_vcpu

DOCS = Path(__file__).resolve().parents[2] / "docs" / "summary.md"
S = 1_000_000_000
PROMISED = [
    "mode",
    "profile",
    "vcpus",
    "seconds",
    "ended",
    "work.total",
    "work.per_vcpu",
    "faults.nested",
    "faults.async",
    "faults.sync",
    "faults.halt",
    "faults.repeated",
    "faults.kernel_mode",
    "latency_us.fault_to_not_present.p50",
    "latency_us.fault_to_not_present.p99",
    "latency_us.fault_to_ready.p50",
    "latency_us.fault_to_ready.p99",
    "latency_us.swap_in.p50",
    "latency_us.swap_in.p99",
    "swap.in_pages",
    "swap.out_pages",
    "swap.clean_drops",
    "integrity.reads_checked",
    "integrity.errors",
    "pace.kept",
    "vcpu_time.running",
    "vcpu_time.blocked",
    "vcpu_time.halted",
    "vcpu_time.steal",
    "restarts",
    "warnings",
]


def _topology(rate: int = 1000, workload: str = "uniform", vcpus: int = 2, **more: Any) -> Topology:
    task = {"workload": workload, "memory_kib": 4096}
    vm = {"vcpus": vcpus, "memory_mib": 64, "rate_ops_per_s": rate, "task": [task]}
    return Topology.from_dict({"host": {"allowance_mib": 8}, "vm": [vm], **more})


def _snapshot(topology: Topology, at_ns: int = 0) -> Snapshot:
    words = stats.stats_words(topology.total_vcpus, len(topology.swapd))
    return Snapshot(
        at_ns, np.zeros(words, np.uint64), np.zeros((topology.total_vcpus, WORDS_PER_PAGE), np.uint64)
    )


def _kernel(tasks: list[dict[int, int]], vcpus: int = 2) -> U64:
    kernel = np.zeros(kernel_words(len(tasks), vcpus, 0), np.uint64)
    kernel[K_TASKS], kernel[K_VCPUS] = len(tasks), vcpus
    for i, task in enumerate(tasks):
        for word, value in task.items():
            kernel[task_base(len(tasks), vcpus) + i * TASK_WORDS + word] = value
    return kernel


def _paced(end: Snapshot, cpu: int, executed: float, wall_ns: int = 10 * S) -> None:
    page = end.vcpus[cpu]
    page[VP_COUNTERS + VC_BARRIER_WALL_NS] = 5 * S
    page[VP_COUNTERS + VC_END_WALL_NS] = 5 * S + wall_ns
    page[VP_COUNTERS + VC_BARRIER_VCLOCK_NS] = 3 * S
    page[VP_COUNTERS + VC_END_VCLOCK_NS] = 3 * S + int(executed * wall_ns)


def _fired(machine: FaultMachine) -> FaultMachine:
    """Every fault once."""
    machine.start(1)
    for spec in machine.specs:
        machine.fire(spec, 2)
    return machine


def full_summary() -> dict[str, Any]:
    """A summary in which every table is there."""
    plain = _topology(host={"allowance_mib": 8, "replicas": 2}, swapd=[{}, {}])
    topology = dataclasses.replace(plain, fault=(Fault(do="kill"),))
    specs = schedule(topology.fault, 2, 5.0, 1)
    facts = RunFacts(
        "finished",
        memory={"uss": 2.0, "mapped_alone": 2.5},
        faults=_fired(FaultMachine(specs, [0] * words_needed(1, 2))),
        outage={
            "count": 1,
            "total_ms": 2.0,
            "down_ms": {"median": 2.0, "max": 2.0},
            "work_per_100ms_up": None,
            "work_per_100ms_down": 1.0,
            "work_per_100ms_before": 2.0,
            "work_by_ms": {},
            "sampled_every_ms": {"median": 10.0, "max": 11.0},
            "pages_ms": {"median": 2.0, "max": 2.5},
            "resume_ms": {"median": 3.0, "max": 4.5},
            "resumes_cut": 2,
            "waited": 1234,
        },
        growth=growth.table([], 2),
        check={
            **Checker("mainline").finish("x").summary(),
            "online_events": 0,
            "behind_max": 0,
            "behind_end": 0,
            "ring_fullest_percent": 0.0,
        },
        save_restore={"planned": 1, "done": 1, "down_ms": 2.0, "image_pages": 3},
    )
    return build(topology, _snapshot(topology), [_kernel([])], facts)


def _names(table: dict[str, Any], prefix: str = "") -> set[str]:
    found: set[str] = set()
    for name, value in table.items():
        rows = isinstance(value, list) and value and isinstance(value[0], dict)
        part = value[0] if rows else value
        found |= _names(part, f"{prefix}{name}.") if isinstance(part, dict) and part else {prefix + name}
    return found


def test_every_name_is_documented_and_every_documented_name_exists() -> None:
    documented = set()
    for line in DOCS.read_text().splitlines():
        if line.startswith("| `"):
            documented |= set(re.findall(r"`([^`]+)`", line.split("|")[1]))
    tables = {"chaos", "check", "injected", "replicas", "save_restore"}
    assert documented - tables == _names(full_summary())


def test_the_promised_names_exist() -> None:
    assert set(PROMISED) <= _names(full_summary())


def test_figures_of_the_measured_time_are_differences() -> None:
    topology = _topology()
    start, stop, end = (_snapshot(topology, at_ns) for at_ns in (S, 3 * S, 9 * S))
    for factor, snapshot in ((1, start), (3, stop), (10, end)):
        host = stats.host_block(snapshot.stats)
        host.set(HostCounter.NESTED_FAULTS, 100 * factor)
        host.set(HostCounter.SWAP_IN_PAGES, 7 * factor)
        snapshot.vcpus[0, VP_COUNTERS + VC_RUNNING_NS] = factor * S
        snapshot.vcpus[1, VP_COUNTERS + VC_READS_CHECKED] = factor
    summary = build(topology, end, [_kernel([])], RunFacts("finished", start_ns=S, end_ns=9 * S), start, stop)
    assert summary["faults"]["nested"] == 200
    assert summary["swap"]["in_pages"] == 14
    assert summary["vcpu_time"]["running"] == 2.0
    assert summary["totals"]["nested_faults"] == 1000
    assert summary["integrity"]["reads_checked"] == 10
    assert summary["seconds"] == 2.0
    without_stop = build(topology, end, [_kernel([])], RunFacts("finished", start_ns=S, end_ns=9 * S), start)
    assert without_stop["faults"]["nested"] == 900
    assert without_stop["seconds"] == 8.0
    never_started = build(topology, end, [_kernel([])], RunFacts("failed:x"))
    assert never_started["faults"]["nested"] == 1000
    assert never_started["seconds"] == 0.0


def test_latencies_are_those_recorded_after_the_start() -> None:
    topology = _topology()
    start, end = _snapshot(topology), _snapshot(topology)
    for snapshot in (start, end):
        stats.host_block(snapshot.stats).record(HostHist.SWAP_IN, 900_000_000)
        stats.vcpu_block(snapshot.stats, 0).record(VcpuHist.READY, 5_000)
    for cpu, value_ns in ((0, 100_000), (1, 300_000), (1, 310_000)):
        stats.vcpu_block(end.stats, cpu).record(VcpuHist.READY, value_ns)
    latency = build(topology, end, [_kernel([])], RunFacts("finished"), start)["latency_us"]
    assert latency["swap_in"] == {"p50": None, "p99": None}
    assert latency["fault_to_not_present"] == {"p50": None, "p99": None}
    assert latency["fault_to_ready"]["p50"] == pytest.approx(300, rel=0.04)
    assert latency["fault_to_ready"]["p99"] == pytest.approx(310, rel=0.04)


def test_work_is_that_of_the_work_threads_where_there_are_any() -> None:
    kernel = _kernel(
        [
            {T_PROGRAM: P_BM_FAULT, T_CPU: 0, T_WORK: 5},
            {T_PROGRAM: P_BM_WORK, T_CPU: 0, T_WORK: 70},
            {T_PROGRAM: P_BM_WORK, T_CPU: 1, T_WORK: 200},
            {T_PROGRAM: P_BM_WORK, T_CPU: 1, T_WORK: 3},
        ]
    )
    topology = _topology(workload="bm")
    end = _snapshot(topology)
    end.vcpus[:, VP_COUNTERS + VC_WORK] = 1000
    work = build(topology, end, [kernel], RunFacts("finished"))["work"]
    assert work == {"total": 273, "per_vcpu": [70, 203]}
    work = build(_topology(), end, [kernel], RunFacts("finished"))["work"]
    assert work == {"total": 2000, "per_vcpu": [1000, 1000]}


def test_work_of_a_second_guest_belongs_to_its_own_vcpus() -> None:
    plain = _topology(workload="bm").to_dict()
    plain["vm"] = [plain["vm"][0], {**plain["vm"][0], "name": "b"}]
    topology = Topology.from_dict(plain)
    kernels = [_kernel([{T_PROGRAM: P_BM_WORK, T_CPU: cpu, T_WORK: 10 + cpu}]) for cpu in (0, 1)]
    assert work_per_vcpu(topology, _snapshot(topology).vcpus, kernels) == [10, 0, 0, 11]


@pytest.mark.parametrize(("slowest", "kept"), [(1.0, True), (0.981, True), (0.979, False), (0.4, False)])
def test_pace_is_kept_when_every_vcpu_executed_its_time(slowest: float, kept: bool) -> None:
    topology = _topology()
    end = _snapshot(topology)
    _paced(end, 0, 1.0)
    _paced(end, 1, slowest)
    end.vcpus[1, VP_COUNTERS + VC_PACE_LAG_MAX_NS] = 12_345_000
    pace = pace_of(topology, end.vcpus)
    assert pace == {"kept": kept, "lag_max_ms": 12.345, "executed_ratio": slowest}


def test_pace_of_vcpus_that_saw_no_end_or_have_none_is_unknown() -> None:
    end = _snapshot(_topology())
    end.vcpus[:, VP_COUNTERS + VC_BARRIER_WALL_NS] = S
    assert pace_of(_topology(), end.vcpus)["kept"] is None
    _paced(end, 0, 0.1)
    assert pace_of(_topology(rate=0), end.vcpus) == {
        "kept": None,
        "lag_max_ms": None,
        "executed_ratio": None,
    }


def test_not_comparable_runs_are_marked() -> None:
    few = RunFacts("finished", usable_cores=2, pcpus=2)
    unpaced = _topology(rate=0, vcpus=3)
    summary = build(unpaced, _snapshot(unpaced), [_kernel([])], few)
    assert "3 vCPUs are not paced and 3 share 2 cores" in summary["warnings"][0]
    fits = _topology(rate=0, vcpus=2)
    assert build(fits, _snapshot(fits), [_kernel([])], few)["warnings"] == []
    paced = _topology()
    end = _snapshot(paced)
    _paced(end, 0, 0.5)
    summary = build(paced, end, [_kernel([])], few)
    assert "a vCPU executed 50.0 % of its time" in summary["warnings"][0]


def test_what_makes_figures_doubtful_becomes_a_warning() -> None:
    topology = _topology(swapd=[{"model": "hdd"}])
    end = _snapshot(topology)
    host = stats.host_block(end.stats)
    for counter in (HostCounter.BAD_MESSAGES, HostCounter.CHECKSUM_ERRORS, HostCounter.IO_ERRORS):
        host.set(counter, 3)
    facts = RunFacts("finished", usable_cores=2, pcpus=2, warnings=["given"])
    warnings = build(topology, end, [_kernel([])], facts)["warnings"]
    assert warnings[0] == "given"
    assert len(warnings) == 5


@pytest.mark.parametrize("replicas", [1, 2])
def test_lost_daemons_and_copies_become_warnings(replicas: int) -> None:
    topology = _topology(host={"allowance_mib": 8, "replicas": replicas}, swapd=[{}, {}])
    end = _snapshot(topology)
    facts = RunFacts("finished", usable_cores=2, pcpus=2)
    host = stats.host_block(end.stats)
    assert build(topology, end, [_kernel([])], facts)["warnings"] == []
    host.set(HostCounter.SINGLE_COPIES, 7)
    copies = "7 pages on swap had one copy only at the end"
    assert build(topology, end, [_kernel([])], facts)["warnings"] == ([copies] if replicas == 2 else [])
    host.set(HostCounter.DAEMONS_GONE, 1)
    host.set(HostCounter.QUARANTINED, 3)
    summary = build(topology, end, [_kernel([])], facts)
    bad, gone = summary["warnings"]
    assert bad.startswith("3 blocks")
    assert gone == "1 swap daemons did not come back" + (f"; {copies}" if replicas == 2 else "")
    assert (summary["replicas"] is None) == (replicas == 1)


def _bad(**changes: Any) -> dict[str, Any]:
    summary = full_summary()
    for path, value in changes.items():
        table, _, name = path.partition("__")
        if name:
            summary[table][name] = value
        else:
            summary[table] = value
    return summary


@pytest.mark.parametrize(
    ("summary", "said"),
    [
        (_bad(ended="interrupted"), "the run ended: interrupted"),
        (_bad(ended="failed:host-0 exit code 1"), "failed:host-0"),
        (_bad(integrity__errors=2), "2 reads found a lost or stale word"),
        (_bad(tasks__killed=1), "1 guest tasks were killed"),
        (_bad(growth__failures=["host: MiB grew"]), "host: MiB grew"),
        (
            _bad(check__violations={"I22": 3}, check__examples={"I22": ["told", "vm 0 vcpu 1"]}),
            "I22 is violated, 3 times: told; vm 0 vcpu 1",
        ),
    ],
)
def test_failures_are_found(summary: dict[str, Any], said: str) -> None:
    (failure,) = judgement.failures(summary)
    assert said in failure


def test_a_run_without_a_check_has_none_to_fail() -> None:
    summary = full_summary() | {"check": None}
    assert judgement.failures(summary) == []
    assert "invariants held" not in text.render(summary)


def test_a_good_run_has_no_failures_unless_nothing_was_checked() -> None:
    summary = full_summary()
    assert judgement.failures(summary) == []
    (failure,) = judgement.failures(summary, must_check_reads=True)
    assert "no read was checked" in failure
    summary["integrity"]["reads_checked"] = 1
    assert judgement.failures(summary, must_check_reads=True) == []


def test_a_stress_whose_events_were_not_all_checked_proves_nothing() -> None:
    summary = _bad(check__liveness=False, check__notes=["host.bin: full"], integrity__reads_checked=1)
    assert judgement.failures(summary) == []
    (failure,) = judgement.failures(summary, must_check_reads=True)
    assert failure == "not all events could be checked: host.bin: full"
    summary["ended"] = "saved"
    assert judgement.failures(summary, must_check_reads=True) == [], "its events go on elsewhere"


def test_tasks_are_counted_by_their_end() -> None:
    states = [TS_DONE, TS_DONE, TS_KILLED, TS_RUNNABLE]
    kernel = _kernel(
        [{T_STATE: state, T_KILL_REASON: KILL_OOM if state == TS_KILLED else 0} for state in states]
    )
    assert count_tasks([kernel]) == {
        "done": 2,
        "killed": 1,
        "unfinished": 1,
        "kill_reasons": {"segv": 0, "oom": 1, "machine_check": 0, "swap_full": 0},
    }


def test_errors_of_all_vcpus_are_added() -> None:
    topology = _topology()
    end = _snapshot(topology)
    end.vcpus[:, VP_COUNTERS + VC_INTEGRITY_ERRORS] = (2, 3)
    assert build(topology, end, [_kernel([])], RunFacts("finished"))["integrity"]["errors"] == 5


def test_the_text_shows_what_matters() -> None:
    summary = full_summary()
    summary["restarts"] = 3
    summary["latency_us"]["swap_in"] = {"p50": 90.0, "p99": 1234.0}
    summary["pace"] = {"kept": False, "lag_max_ms": 3.0, "executed_ratio": 0.9}
    summary["warnings"] = ["first", "second"]
    summary["check"] |= {
        "events": 12345,
        "violations": {"I22": 3},
        "examples": {"I22": ["what it says", "the event"]},
        "notes": ["a note"],
    }
    row = {"of": "host", "what": "MiB", "start": 80.5, "end": 81.25}
    summary["growth"] |= {"judged": True, "series": [row], "failures": ["host: why"]}
    shown = text.render(summary)
    for part in (
        "MiB: host 80.5 to 81.25",
        "GROWS host: why",
        "interrupt (mainline), 2 vCPUs",
        "finished",
        "swap in 90 us (p99 1.23 ms)",
        "NOT KEPT, the slowest vCPU executed 90.0 % of its time",
        "3 restarts",
        "work per 100 ms: - up, 1.0 down",
        "12,345 events (0 during the run, at most 0 behind): 48 invariants held, 1 violated, 1 skipped",
        "1 of 1 restores, the guests stood still for 2 ms",
        "VIOLATED I22 (3): what it says",
        "the event",
        "a note",
        "first",
        "second",
    ):
        assert part in shown
    assert "not paced" in text.render(full_summary())
