"""Whether paced vCPUs kept their pace, and whether a run's figures may be compared with those of another mode.

Not handled here: keeping the pace (guest/pacing.py), the comparison (report/compare.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from proto.layout import (
    VC_BARRIER_VCLOCK_NS,
    VC_BARRIER_WALL_NS,
    VC_END_VCLOCK_NS,
    VC_END_WALL_NS,
    VC_PACE_LAG_MAX_NS,
    VP_COUNTERS,
)
from proto.topology import Topology

U64 = npt.NDArray[np.uint64]
PACE_KEPT_RATIO: Final = 0.98
"""A paced vCPU that executed less of the wall time than this did not keep its pace."""


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
