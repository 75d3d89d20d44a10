"""Does a run use ever more memory or descriptors? The judgement on samples taken while it ran.

What may grow, and how it is kept apart from a leak. While a run warms up, everything is touched for the first time: work items, pages of
the interpreter, a vCPU's TLB; ZeroMQ keeps the messages of a connection in blocks of 256 places, two of them in each direction, whose
pages are touched one by one with the first 512 messages, which takes minutes where there are hundreds of vCPUs; the check in the
launcher loads its rules and has a window of events in hand. All that is bounded, and the bounds are below (ONCE_*). A leak, in contrast,
goes on for as long as the run does. So a series grows only if both holds: its level at the end is above what it had at the start, what
may be taken once, and an allowance for the moves of allocators; and after the first part of the run, which is not judged, it still rises
by more than that allowance (the median of the slopes of all pairs of samples, Theil and Sen, which single samples cannot bend, times the
judged time). Twice the time sees a leak of half the size.

Pure: samples in, plain values out.

Not handled here: taking samples (launcher/usage.py), memory that is shared: its size is fixed when a run begins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import median
from typing import Any, Final, NamedTuple

from proto.trace_writer import EVENT_BYTES
from report.check.online import EVENTS_PER_TURN

S: Final = 1_000_000_000
MIB: Final = 1 << 20
JUDGED_FROM_S: Final = 57.0
"""Between the first and the last sample; a run of 60 s has hardly less. A shorter one is not judged."""
WARM_UP_S: Final = 20.0
WARM_UP_SHARE: Final = 0.25
"""The longer of the two is not judged."""
JUDGED_SAMPLES_MIN: Final = 6
MIB_EACH: Final = 2.0
"""Moves of an allocator in one process, MiB."""
MIB_SUM_PER_PROCESS: Final = 0.03
"""And in the sum over many, for each of them."""
DESCRIPTORS_EACH: Final = 4.0
"""Connections of a daemon that has just died and of its successor exist side by side for a moment."""
ONCE_PER_CONNECTION_MIB: Final = 2 * 512 * 64 / MIB
"""Host, for each vCPU: places of 512 messages in both directions (zmq_msg_t is 64 bytes, `message_pipe_granularity` 256)."""
ONCE_PER_VCPU_MIB: Final = 0.5
"""vCPU: its end of the same, its TLB, its interpreter. Measured: 0.44 MiB over the first 2200 exits, nothing in the 9600 after them."""
ONCE_LAUNCHER_MIB: Final = 10.0 + 2.0 * EVENTS_PER_TURN * EVENT_BYTES / MIB
"""Launcher: the rules of the check, loaded when the first events come; events taken and events merged."""

HOST: Final = "host"
LAUNCHER: Final = "launcher"
ZYGOTE: Final = "zygote"
DAEMONS: Final = "daemons, largest"
VCPUS_MAX: Final = "vCPUs, largest"
VCPUS_SUM: Final = "vCPUs, sum"


class Use(NamedTuple):
    """What one process uses, or several: anonymous memory in MiB, descriptors."""

    mib: float
    descriptors: int


@dataclass(frozen=True, slots=True)
class Sample:
    """One look at all processes: by group of processes."""

    at_ns: int
    uses: Mapping[str, Use]


def groups(at_ns: int, uses: Mapping[str, Sequence[Use]]) -> Sample:
    """A sample from the uses of single processes, by role: host, launcher, zygote, swapd, vcpu. Who is missing has just ended."""
    names = {"host": HOST, "launcher": LAUNCHER, "zygote": ZYGOTE, "swapd": DAEMONS, "vcpu": VCPUS_MAX}
    found = {names[role]: _largest(each) for role, each in uses.items() if each}
    if vcpus := uses.get("vcpu"):
        found[VCPUS_SUM] = Use(sum(use.mib for use in vcpus), sum(use.descriptors for use in vcpus))
    return Sample(at_ns, found)


def table(samples: Sequence[Sample], vcpus: int) -> dict[str, Any]:
    """The `growth` table of the summary. samples: in order, the first at the start of the measured time, the last at its end."""
    span_s = (samples[-1].at_ns - samples[0].at_ns) / S if samples else 0.0
    begin_ns = samples[0].at_ns + int(max(WARM_UP_S, WARM_UP_SHARE * span_s) * S) if samples else 0
    enough = sum(sample.at_ns >= begin_ns for sample in samples) >= JUDGED_SAMPLES_MIN
    judged = span_s >= JUDGED_FROM_S and enough
    once = {
        HOST: vcpus * ONCE_PER_CONNECTION_MIB,
        LAUNCHER: ONCE_LAUNCHER_MIB,
        VCPUS_MAX: ONCE_PER_VCPU_MIB,
        VCPUS_SUM: vcpus * ONCE_PER_VCPU_MIB,
    }
    series = []
    for name in dict.fromkeys(name for sample in samples for name in sample.uses):
        points = [(sample.at_ns, sample.uses[name]) for sample in samples if name in sample.uses]
        mib = [(at_ns, use.mib) for at_ns, use in points]
        descriptors = [(at_ns, float(use.descriptors)) for at_ns, use in points]
        allowed = MIB_EACH + (vcpus * MIB_SUM_PER_PROCESS if name == VCPUS_SUM else 0)
        series.append(_row(name, "MiB", mib, begin_ns, once.get(name, 0.0), allowed))
        series.append(_row(name, "descriptors", descriptors, begin_ns, 0.0, DESCRIPTORS_EACH))
    return {
        "samples": len(samples),
        "judged": judged,
        "series": series,
        "failures": [_why(row) for row in series if _grows(row)] if judged else [],
    }


def slope_per_s(points: Sequence[tuple[int, float]]) -> float:
    """Median of the slopes of all pairs of points (time in ns, value), per second; 0 for fewer than two."""
    slopes = [
        (later[1] - earlier[1]) * S / (later[0] - earlier[0])
        for earlier, later in combinations(points, 2)
        if later[0] > earlier[0]
    ]
    return median(slopes) if slopes else 0.0


def _row(
    name: str, what: str, points: Sequence[tuple[int, float]], begin_ns: int, once: float, allowed: float
) -> dict[str, Any]:
    values = [value for _, value in points]
    tail = [point for point in points if point[0] >= begin_ns]
    slope = slope_per_s(tail)
    seconds = (tail[-1][0] - tail[0][0]) / S if tail else 0.0
    level = median(values[-max(1, len(values) // 4) :])
    return {
        "of": name,
        "what": what,
        "start": round(values[0], 3),
        "end": round(values[-1], 3),
        "highest": round(max(values), 3),
        "above_start": round(level - values[0], 3),
        "per_minute": round(60 * slope, 3),
        "grown": round(slope * seconds, 3),
        "once": round(once, 3),
        "allowed": round(allowed, 3),
    }


def _grows(row: Mapping[str, Any]) -> bool:
    return bool(row["above_start"] > row["once"] + row["allowed"] and row["grown"] > row["allowed"])


def _why(row: Mapping[str, Any]) -> str:
    return (
        f"{row['of']}: {row['what']} grew by {row['per_minute']:g} a minute after the warm-up,"
        f" {row['grown']:g} in all ({row['allowed']:g} allowed), from {row['start']:g} to {row['end']:g}"
        f" (of which {row['once']:g} may be taken once)"
    )


def _largest(uses: Sequence[Use]) -> Use:
    return Use(max(use.mib for use in uses), max(use.descriptors for use in uses))
