"""summary.json: the figures of one run.

Purpose: `build` turns what lies in shared memory at the end of a run (and at two moments before) into one table of plain values.
Every name is documented with its unit in docs/summary.md, and the names stay stable.

Invariants: `faults`, `latency_us`, `swap`, `vcpu_time` and `work` are about the measured time, from the start barrier to the stop
(to the end of the run where it never stopped, everything where the barrier never opened); `integrity`, `totals`, `tasks` and
`restarts` are about the whole run. A figure that does not exist is null, never 0.

Not handled here: reading shared memory of a run under way (launcher/watch.py), the text for people (report/text.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from proto import stats
from proto.faults import FaultMachine
from proto.layout import (
    K_TASKS,
    K_VCPUS,
    KILL_MACHINE_CHECK,
    KILL_OOM,
    KILL_SEGV,
    KILL_SWAP_FULL,
    P_BM_WORK,
    T_CPU,
    T_CR3,
    T_GROUP,
    T_KILL_PAGES,
    T_KILL_REASON,
    T_PROGRAM,
    T_STATE,
    T_WORK,
    TASK_WORDS,
    TS_DONE,
    TS_KILLED,
    VC_BARRIER_VCLOCK_NS,
    VC_BARRIER_WALL_NS,
    VC_BLOCKED_NS,
    VC_EMULATION_NS,
    VC_END_VCLOCK_NS,
    VC_END_WALL_NS,
    VC_HALTED_NS,
    VC_IDLE_NS,
    VC_INTEGRITY_ERRORS,
    VC_PACE_LAG_MAX_NS,
    VC_PAUSED_NS,
    VC_READS_CHECKED,
    VC_RUNNING_NS,
    VC_STEAL_NS,
    VC_WORK,
    VP_COUNTERS,
    task_base,
)
from proto.stats import (
    BLOCK_WORDS,
    COUNTERS,
    H_MAX_NS,
    H_MIN_NS,
    HIST_WORDS,
    HISTOGRAMS,
    HostCounter,
    HostHist,
    StatsBlock,
    VcpuHist,
)
from proto.topology import Topology
from report import injected

U64 = npt.NDArray[np.uint64]
NS_PER_S: Final = 1_000_000_000
FINISHED: Final = "finished"
SAVED: Final = "saved"
"""A run that ended with an image of its guests, as it was to."""
PACE_KEPT_RATIO: Final = 0.98
"""A paced vCPU that executed less of the wall time than this did not keep its pace."""
KILL_NAMES: Final = {
    KILL_SEGV: "segv",
    KILL_OOM: "oom",
    KILL_MACHINE_CHECK: "machine_check",
    KILL_SWAP_FULL: "swap_full",
}
VCPU_TIMES: Final = {
    "running": VC_RUNNING_NS,
    "blocked": VC_BLOCKED_NS,
    "halted": VC_HALTED_NS,
    "steal": VC_STEAL_NS,
    "idle": VC_IDLE_NS,
    "emulation": VC_EMULATION_NS,
    "paused": VC_PAUSED_NS,
}
FAULTS: Final = {
    "nested": HostCounter.NESTED_FAULTS,
    "async": HostCounter.FAULTS_ASYNC,
    "sync": HostCounter.FAULTS_SYNC,
    "halt": HostCounter.FAULTS_HALT,
    "repeated": HostCounter.FAULTS_REPEATED,
    "kernel_mode": HostCounter.FAULTS_KERNEL_MODE,
    "fast": HostCounter.FAULTS_FAST,
    "zero_fill": HostCounter.FAULTS_ZERO_FILL,
    "swap_cache": HostCounter.FAULTS_SWAP_CACHE,
    "swap_in": HostCounter.FAULTS_SWAP_IN,
}
SWAP: Final = {
    "in_pages": HostCounter.SWAP_IN_PAGES,
    "out_pages": HostCounter.SWAP_OUT_PAGES,
    "clean_drops": HostCounter.CLEAN_DROPS,
    "zero_in": HostCounter.ZERO_IN,
    "zero_out": HostCounter.ZERO_OUT,
    "frame_waits": HostCounter.FRAME_WAITS,
}
EVENTS: Final = {
    "scheduled": HostCounter.EVENTS_SCHEDULED,
    "done": HostCounter.EVENTS_DONE,
    "reboots": HostCounter.REBOOTS,
}
TOTALS: Final = {
    "nested_faults": HostCounter.NESTED_FAULTS,
    "swap_in_pages": HostCounter.SWAP_IN_PAGES,
    "swap_out_pages": HostCounter.SWAP_OUT_PAGES,
    "flushes": HostCounter.FLUSHES,
    "kicks": HostCounter.KICKS,
    "resent": HostCounter.RESENT,
    "stale_replies": HostCounter.STALE_REPLIES,
    "fences": HostCounter.FENCES,
    "io_retries": HostCounter.IO_RETRIES,
    "io_errors": HostCounter.IO_ERRORS,
    "machine_checks": HostCounter.MACHINE_CHECKS,
    "oom_notices": HostCounter.OOM_NOTICES,
    "oom_kills": HostCounter.OOM_KILLS,
    "pages_released": HostCounter.PAGES_RELEASED,
    "bad_messages": HostCounter.BAD_MESSAGES,
    "quarantined": HostCounter.QUARANTINED,
    "daemons_gone": HostCounter.DAEMONS_GONE,
}
REPLICAS: Final = {
    "replica_reads": HostCounter.REPLICA_READS,
    "hedged": HostCounter.HEDGED,
    "hedge_wins": HostCounter.HEDGE_WINS,
    "frames_refused": HostCounter.FRAMES_REFUSED,
    "rewritten": HostCounter.REWRITTEN,
    "single_copies": HostCounter.SINGLE_COPIES,
}


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Figures of one moment: u64 copies of the stats segment and, one row per vCPU, of the vCPU pages."""

    at_ns: int
    stats: U64
    vcpus: U64


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What is not in shared memory. `ended`: finished, saved, interrupted or failed:WHY. Times are monotonic ns, 0 = never."""

    ended: str
    start_ns: int = 0
    end_ns: int = 0
    started_in_s: float | None = None
    restarts: int = 0
    usable_cores: int = 1
    pcpus: int = 1
    memory: Mapping[str, float] | None = None
    faults: FaultMachine | None = None
    """The schedule of faults and its words as they were at the end."""
    outage: Mapping[str, Any] | None = None
    growth: Mapping[str, Any] | None = None
    """As `report.growth.table`."""
    check: Mapping[str, Any] | None = None
    """As `report.check.verdict.Verdict.summary`, and how many of its events were checked while the run was under way."""
    save_restore: Mapping[str, Any] | None = None
    """Restores planned and done, ms in which the guests stood still, pages with contents in the last image."""
    warnings: Sequence[str] = field(default=())


def build(
    topology: Topology,
    end: Snapshot,
    kernels: Sequence[U64],
    facts: RunFacts,
    at_start: Snapshot | None = None,
    at_stop: Snapshot | None = None,
) -> dict[str, Any]:
    """The summary.

    end: figures when every process had gone; kernels: the guest kernel segment of each VM; at_start, at_stop: figures when the
    barrier opened and when the measured time was over, where that happened.
    """
    measured = _Measured(topology, end, at_start, at_stop)
    pace = pace_of(topology, end.vcpus)
    tasks = count_tasks(kernels)
    per_vcpu = work_per_vcpu(topology, end.vcpus, kernels)
    host_end = stats.host_block(end.stats)
    summary: dict[str, Any] = {
        "name": topology.run.name,
        "mode": topology.run.mode,
        "profile": topology.run.profile,
        "seed": topology.run.seed,
        "vcpus": topology.total_vcpus,
        "seconds": _seconds(facts, at_stop),
        "ended": facts.ended,
        "started_in_s": _rounded(facts.started_in_s),
        "work": {"total": sum(per_vcpu), "per_vcpu": per_vcpu},
        "faults": {name: measured.host.get(counter) for name, counter in FAULTS.items()},
        "latency_us": {
            "fault_to_not_present": _percentiles(measured.vcpus, VcpuHist.NOT_PRESENT),
            "fault_to_ready": _percentiles(measured.vcpus, VcpuHist.READY),
            "fault_to_mapped": _percentiles(measured.host, HostHist.FAULT),
            "swap_in": _percentiles(measured.host, HostHist.SWAP_IN),
        },
        "swap": {name: measured.host.get(counter) for name, counter in SWAP.items()},
        "integrity": {
            "reads_checked": _total(end.vcpus, VC_READS_CHECKED),
            "errors": _total(end.vcpus, VC_INTEGRITY_ERRORS),
            "checksum_errors": host_end.get(HostCounter.CHECKSUM_ERRORS),
        },
        "pace": pace,
        "vcpu_time": {
            name: round(measured.vcpu_total(counter) / NS_PER_S, 6) for name, counter in VCPU_TIMES.items()
        },
        "tasks": tasks,
        "events": {name: host_end.get(counter) for name, counter in EVENTS.items()},
        "totals": {name: host_end.get(counter) for name, counter in TOTALS.items()},
        "replicas": (
            {name: host_end.get(counter) for name, counter in REPLICAS.items()}
            if topology.host.replicas > 1
            else None
        ),
        "restarts": facts.restarts,
        "uss_mib_per_vcpu": facts.memory["uss"] if facts.memory else None,
        "mapped_alone_mib_per_vcpu": facts.memory["mapped_alone"] if facts.memory else None,
        "usable_cores": facts.usable_cores,
        "pcpus": facts.pcpus,
        "chaos": injected.chaos(facts.faults),
        "injected": injected.table(topology, facts.faults),
        "outage": dict(facts.outage) if facts.outage else None,
        "growth": dict(facts.growth) if facts.growth else None,
        "check": dict(facts.check) if facts.check else None,
        "save_restore": dict(facts.save_restore) if facts.save_restore else None,
    }
    summary["warnings"] = [*facts.warnings, *victims(topology, kernels), *_warnings(topology, summary)]
    if lost := injected.lost_pages(tasks["kill_reasons"]["machine_check"], summary["injected"]):
        summary["warnings"].append(lost)
    return summary


def failures(summary: Mapping[str, Any], *, must_check_reads: bool = False) -> list[str]:
    """Every check that the run did not hold, in words; none for a good run.

    must_check_reads: a run in which no read was checked proves nothing (stress, chaos), and none in which events were lost.
    """
    found = [] if summary["ended"] in (FINISHED, SAVED) else [f"the run ended: {summary['ended']}"]
    moved = summary["save_restore"]
    if moved is not None and summary["ended"] == FINISHED and moved["done"] < moved["planned"]:
        found.append(
            f"{moved['planned']} restores were asked for, {moved['done']} took place: the run was over before"
        )
    integrity, tasks = summary["integrity"], summary["tasks"]
    if integrity["errors"]:
        found.append(f"{integrity['errors']} reads found a lost or stale word")
    if must_check_reads and not integrity["reads_checked"]:
        found.append("no read was checked, so nothing is known about lost pages")
    reasons, killed = dict(tasks["kill_reasons"]), tasks["killed"]
    if injected.explains_lost_pages(summary["injected"]):
        # As promised: a page that is damaged on purpose costs the task that needs it, and nobody else.
        killed -= reasons.pop("machine_check")
    if killed:
        why = ", ".join(f"{count} by {name}" for name, count in reasons.items() if count)
        found.append(f"{killed} guest tasks were killed ({why})")
    if summary["ended"] == FINISHED:
        found += injected.failures(summary["injected"])
    if summary["growth"] is not None:
        found += summary["growth"]["failures"]
    check = summary["check"]
    if check is not None:
        if must_check_reads and summary["ended"] == FINISHED and not check["liveness"]:
            found.append(f"not all events could be checked: {'; '.join(check['notes'])}")
        found += [
            f"{name} is violated, {times} times: {'; '.join(check['examples'][name])}"
            for name, times in check["violations"].items()
        ]
    return found


class _Measured:
    """Figures of the measured time only: differences of snapshots."""

    def __init__(
        self, topology: Topology, end: Snapshot, at_start: Snapshot | None, at_stop: Snapshot | None
    ) -> None:
        last = at_stop or end
        words = last.stats.copy()
        self._pages = last.vcpus.copy()
        if at_start is not None:
            words -= at_start.stats
            self._pages -= at_start.vcpus
        self.host = _repaired(stats.host_block(words), stats.host_block(last.stats))
        cpus = range(topology.total_vcpus)
        self.vcpus = stats.merge(
            _repaired(stats.vcpu_block(words, cpu), stats.vcpu_block(last.stats, cpu)) for cpu in cpus
        )

    def vcpu_total(self, counter: int) -> int:
        """Sum of a vCPU counter over all vCPUs."""
        return _total(self._pages, counter)


def _repaired(difference: StatsBlock, last: StatsBlock) -> StatsBlock:
    """A difference of blocks whose histograms have bounds again: smallest and largest values cannot be subtracted."""
    for h in range(HISTOGRAMS):
        base = COUNTERS + h * HIST_WORDS
        difference.view[base + H_MIN_NS] = 0
        difference.view[base + H_MAX_NS] = last.view[base + H_MAX_NS]
    assert len(difference.view) == BLOCK_WORDS
    return difference


def work_per_vcpu(topology: Topology, vcpus: U64, kernels: Sequence[U64]) -> list[int]:
    """Work units of each vCPU: increments of the benchmark's work threads where there are any, else operations completed."""
    if not any(task.workload == "bm" and task.work_threads for vm in topology.vm for task in vm.task):
        return [int(n) for n in vcpus[:, VP_COUNTERS + VC_WORK]]
    work = [0] * topology.total_vcpus
    first = 0
    for vm, kernel in zip(topology.vm, kernels, strict=True):
        for task in task_records(kernel):
            if int(task[T_PROGRAM]) == P_BM_WORK:
                work[first + int(task[T_CPU])] += int(task[T_WORK])
        first += vm.vcpus
    return work


def task_records(kernel: U64) -> U64:
    """The task records of a guest kernel segment, one row each."""
    tasks, vcpus = int(kernel[K_TASKS]), int(kernel[K_VCPUS])
    base = task_base(tasks, vcpus)
    return kernel[base : base + tasks * TASK_WORDS].reshape(tasks, TASK_WORDS)


def count_tasks(kernels: Sequence[U64]) -> dict[str, Any]:
    """Guest tasks of all VMs by how they ended."""
    records = [task for kernel in kernels for task in task_records(kernel)]
    states = [int(task[T_STATE]) for task in records]
    reasons = [int(task[T_KILL_REASON]) for task in records if int(task[T_STATE]) == TS_KILLED]
    return {
        "done": states.count(TS_DONE),
        "killed": states.count(TS_KILLED),
        "unfinished": len(states) - states.count(TS_DONE) - states.count(TS_KILLED),
        "kill_reasons": {name: reasons.count(reason) for reason, name in KILL_NAMES.items()},
    }


def victims(topology: Topology, kernels: Sequence[U64]) -> list[str]:
    """One line for every address space whose tasks were killed for memory: who, and how much it had."""
    found: dict[tuple[int, int], list[int]] = {}
    said: dict[tuple[int, int], str] = {}
    for v, (vm, kernel) in enumerate(zip(topology.vm, kernels, strict=True)):
        for number, task in enumerate(task_records(kernel)):
            if int(task[T_STATE]) != TS_KILLED or int(task[T_KILL_REASON]) != KILL_SWAP_FULL:
                continue
            space = v, int(task[T_CR3])
            found.setdefault(space, []).append(number)
            said[space] = f"({vm.task[int(task[T_GROUP])].workload}, {int(task[T_KILL_PAGES])} guest pages)"
    return [
        f"host memory and swap were full: VM {v} had to kill {'tasks' if len(numbers) > 1 else 'task'}"
        f" {', '.join(map(str, numbers))} {said[v, root]} (raise swapd.size_mib or host.allowance_mib)"
        for (v, root), numbers in found.items()
    ]


def pace_of(topology: Topology, vcpus: U64) -> dict[str, Any]:
    """Whether paced vCPUs kept their pace: guest time executed between barrier and stop, as a share of the wall time between them.

    ``kept`` and ``executed_ratio`` are null when no vCPU is paced or none saw both moments.
    """
    ratios: list[float] = []
    lag_ns = 0
    cpu = 0
    for vm in topology.vm:
        for _ in range(vm.vcpus if vm.rate_ops_per_s else 0):
            words = [int(word) for word in vcpus[cpu, VP_COUNTERS : VP_COUNTERS + 64]]
            cpu += 1
            lag_ns = max(lag_ns, words[VC_PACE_LAG_MAX_NS])
            wall_ns = words[VC_END_WALL_NS] - words[VC_BARRIER_WALL_NS]
            if words[VC_BARRIER_WALL_NS] and wall_ns > 0:
                ratios.append((words[VC_END_VCLOCK_NS] - words[VC_BARRIER_VCLOCK_NS]) / wall_ns)
        cpu += 0 if vm.rate_ops_per_s else vm.vcpus
    paced = any(vm.rate_ops_per_s for vm in topology.vm)
    return {
        "kept": min(ratios) >= PACE_KEPT_RATIO if ratios else None,
        "lag_max_ms": round(lag_ns / 1e6, 3) if paced else None,
        "executed_ratio": round(min(ratios), 4) if ratios else None,
    }


def not_comparable(topology: Topology, summary: Mapping[str, Any]) -> str:
    """Why the figures of a run must not be compared with those of another mode; "" when they may."""
    cores = min(summary["usable_cores"], summary["pcpus"])
    unpaced = sum(vm.vcpus for vm in topology.vm if not vm.rate_ops_per_s)
    if unpaced and topology.total_vcpus > cores:
        return (
            f"{unpaced} vCPUs are not paced and {topology.total_vcpus} share {cores} cores:"
            " a vCPU that waits lends its core to the others (set vm.rate_ops_per_s)"
        )
    if summary["pace"]["kept"] is False:
        ratio = summary["pace"]["executed_ratio"]
        return (
            f"the pace was not kept: a vCPU executed {100 * ratio:.1f} % of its time"
            " (lower vm.rate_ops_per_s or the number of vCPUs)"
        )
    return ""


def _warnings(topology: Topology, summary: Mapping[str, Any]) -> list[str]:
    warnings = []
    if reason := not_comparable(topology, summary):
        warnings.append(f"not comparable with other modes: {reason}")
    totals = summary["totals"]
    if totals["bad_messages"]:
        warnings.append(f"the host dropped {totals['bad_messages']} messages that break the contract")
    if summary["integrity"]["checksum_errors"]:
        warnings.append(f"{summary['integrity']['checksum_errors']} pages came back with a wrong checksum")
    events = summary["events"]
    if events["done"] < events["scheduled"]:
        warnings.append(f"only {events['done']} of {events['scheduled']} scheduled events were done")
    if events["reboots"]:
        warnings.append(f"guests rebooted {events['reboots']} times, and their tasks began again")
    if totals["io_errors"]:
        warnings.append(f"{totals['io_errors']} reads or writes of swap daemons failed for good")
    if totals["quarantined"]:
        warnings.append(f"{totals['quarantined']} blocks of swap files proved bad and were not used any more")
    warnings += _replica_warnings(summary)
    warnings += [
        f"swapd-{d} adds a modelled service time ({daemon.model}) to the real reads"
        for d, daemon in enumerate(topology.swapd)
        if daemon.model != "none"
    ]
    return warnings


def _replica_warnings(summary: Mapping[str, Any]) -> list[str]:
    gone, replicas = summary["totals"]["daemons_gone"], summary["replicas"]
    single = replicas["single_copies"] if replicas else 0
    copies = f"{single} pages on swap had one copy only at the end"
    if gone:
        return [f"{gone} swap daemons did not come back" + (f"; {copies}" if replicas else "")]
    return [copies] if single else []


def _seconds(facts: RunFacts, at_stop: Snapshot | None) -> float:
    if not facts.start_ns:
        return 0.0
    end_ns = at_stop.at_ns if at_stop is not None else facts.end_ns
    return round(max(0, end_ns - facts.start_ns) / NS_PER_S, 6)


def _percentiles(block: StatsBlock, hist: int) -> dict[str, float | None]:
    found = {name: block.percentile(hist, q) for name, q in (("p50", 50), ("p99", 99))}
    return {name: None if value is None else round(value / 1000, 3) for name, value in found.items()}


def _total(vcpus: U64, counter: int) -> int:
    return int(vcpus[:, VP_COUNTERS + counter].sum())


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
