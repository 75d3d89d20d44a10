"""summary.json: the figures of one run.

Purpose: `build` turns what lies in shared memory at the end of a run (and at two moments before) into one table of plain values.
Every name is documented with its unit in docs/summary.md, and the names stay stable.

Invariants: `faults`, `latency_us`, `swap`, `vcpu_time` and `work` are about the measured time, from the start barrier to the stop
(to the end of the run where it never stopped, everything where the barrier never opened); `integrity`, `totals`, `tasks` and
`restarts` are about the whole run. A figure that does not exist is null, never 0.

Not handled here: what the guest's tasks did (report/tasks.py), pace (report/pace.py), what the figures say about the run
(report/judgement.py), reading shared memory of a run under way (launcher/watch.py), the text for people (report/text.py).
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
    VC_BLOCKED_NS,
    VC_EMULATION_NS,
    VC_HALTED_NS,
    VC_IDLE_NS,
    VC_INTEGRITY_ERRORS,
    VC_PAUSED_NS,
    VC_READS_CHECKED,
    VC_RUNNING_NS,
    VC_STEAL_NS,
    VP_COUNTERS,
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
from report import injected, judgement, pace, tasks

U64 = npt.NDArray[np.uint64]
NS_PER_S: Final = 1_000_000_000
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
    ended = tasks.count_tasks(kernels)
    per_vcpu = tasks.work_per_vcpu(topology, end.vcpus, kernels)
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
        "pace": pace.pace_of(topology, end.vcpus),
        "vcpu_time": {
            name: round(measured.vcpu_total(counter) / NS_PER_S, 6) for name, counter in VCPU_TIMES.items()
        },
        "tasks": ended,
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
    summary["warnings"] = [
        *facts.warnings,
        *tasks.victims(topology, kernels),
        *judgement.warnings(topology, summary),
    ]
    if lost := injected.lost_pages(ended["kill_reasons"]["machine_check"], summary["injected"]):
        summary["warnings"].append(lost)
    return summary


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
