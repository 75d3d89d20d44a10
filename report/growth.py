"""Does a run use ever more memory or descriptors? The judgement on samples taken while it ran.

What may grow, and how it is kept apart from a leak: while a run warms up everything is touched for the first time (work items, rings,
sockets, pages of the interpreter), so the first part is not judged. ZeroMQ keeps the messages of a connection in blocks of 256 places,
two of them in each direction, whose pages are touched one by one with the first 512 messages, and a vCPU's interpreter takes about as
long to have seen every path: with hundreds of vCPUs that takes minutes, so what is left of it when the judged time begins is allowed to
the host and to the vCPUs together. The check in the launcher has a window of events in hand, of which the allocator keeps more or less.
Otherwise allocators move by
some hundred KiB, and a daemon that has just been started is smaller than one that has worked for a second. A leak, in contrast, goes on
for as long as the run does. So each series gets a slope that single samples cannot bend (the median of the slopes of all pairs, Theil
and Sen), and the slope times the judged time must not exceed an allowance. Twice the time sees a leak of half the size.

Pure: samples in, plain values out.

Not handled here: taking samples (launcher/usage.py), memory that is shared: its size is fixed when a run begins.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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
"""Growth allowed to one process over the judged time, MiB."""
MIB_SUM_PER_PROCESS: Final = 0.03
"""And to the sum over many, for each of them."""
QUEUE_MESSAGES: Final = 512
QUEUE_MESSAGE_BYTES: Final = 2 * 64
"""A place in each direction (zmq_msg_t is 64 bytes, the blocks are ZeroMQ's `message_pipe_granularity`)."""
VCPU_WARM_BYTES: Final = 96 << 10
"""What the interpreter of a vCPU still allocates over its first QUEUE_MESSAGES exits (measured)."""
MIB_LAUNCHER: Final = 2.0 * EVENTS_PER_TURN * EVENT_BYTES / MIB
"""Events taken and events merged."""
DESCRIPTORS_EACH: Final = 4.0
"""Connections of a daemon that has just died and of its successor exist side by side for a moment."""

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
    """One look at all processes: by group of processes. room_mib: what queues between host and vCPUs will still take (`queue_room`)."""

    at_ns: int
    uses: Mapping[str, Use]
    room_mib: float = 0.0


def queue_room(exits: Iterable[int]) -> float:
    """MiB that the message queues at one end have not touched yet. exits: of each vCPU, each a message in both directions."""
    return sum(max(0, QUEUE_MESSAGES - number) for number in exits) * QUEUE_MESSAGE_BYTES / MIB


def _allowed(name: str, vcpus: int, room_mib: float) -> float:
    """MiB that a group may grow by over the judged time. room_mib: of its queues at the beginning of it."""
    if name == HOST:
        return MIB_EACH + room_mib
    if name == LAUNCHER:
        return MIB_EACH + MIB_LAUNCHER
    if name == VCPUS_SUM:
        warming = VCPU_WARM_BYTES / (QUEUE_MESSAGES * QUEUE_MESSAGE_BYTES)
        return MIB_EACH + vcpus * MIB_SUM_PER_PROCESS + room_mib * (1 + warming)
    return MIB_EACH


def groups(at_ns: int, uses: Mapping[str, Sequence[Use]], room_mib: float = 0.0) -> Sample:
    """A sample from the uses of single processes, by role: host, launcher, zygote, swapd, vcpu. Who is missing has just ended."""
    names = {"host": HOST, "launcher": LAUNCHER, "zygote": ZYGOTE, "swapd": DAEMONS, "vcpu": VCPUS_MAX}
    found = {names[role]: _largest(each) for role, each in uses.items() if each}
    if vcpus := uses.get("vcpu"):
        found[VCPUS_SUM] = Use(sum(use.mib for use in vcpus), sum(use.descriptors for use in vcpus))
    return Sample(at_ns, found, room_mib)


def table(samples: Sequence[Sample], vcpus: int) -> dict[str, Any]:
    """The `growth` table of the summary. samples: in order, the first at the start of the measured time, the last at its end."""
    span_s = (samples[-1].at_ns - samples[0].at_ns) / S if samples else 0.0
    begin_ns = samples[0].at_ns + int(max(WARM_UP_S, WARM_UP_SHARE * span_s) * S) if samples else 0
    tail = [sample for sample in samples if sample.at_ns >= begin_ns]
    judged = span_s >= JUDGED_FROM_S and len(tail) >= JUDGED_SAMPLES_MIN
    room_mib = tail[0].room_mib if tail else 0.0
    series = []
    for name in dict.fromkeys(name for sample in samples for name in sample.uses):
        points = [(sample.at_ns, sample.uses[name]) for sample in samples if name in sample.uses]
        mib = [(at_ns, use.mib) for at_ns, use in points]
        descriptors = [(at_ns, float(use.descriptors)) for at_ns, use in points]
        series.append(_row(name, "MiB", mib, begin_ns, _allowed(name, vcpus, room_mib)))
        series.append(_row(name, "descriptors", descriptors, begin_ns, DESCRIPTORS_EACH))
    return {
        "samples": len(samples),
        "judged": judged,
        "series": series,
        "failures": [_why(row) for row in series if row["grown"] > row["allowed"]] if judged else [],
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
    name: str, what: str, points: Sequence[tuple[int, float]], begin_ns: int, allowed: float
) -> dict[str, Any]:
    values = [value for _, value in points]
    tail = [point for point in points if point[0] >= begin_ns]
    slope = slope_per_s(tail)
    seconds = (tail[-1][0] - tail[0][0]) / S if tail else 0.0
    return {
        "of": name,
        "what": what,
        "start": round(values[0], 3),
        "end": round(values[-1], 3),
        "highest": round(max(values), 3),
        "per_minute": round(60 * slope, 3),
        "grown": round(slope * seconds, 3),
        "allowed": round(allowed, 3),
    }


def _why(row: Mapping[str, Any]) -> str:
    return (
        f"{row['of']}: {row['what']} grew by {row['per_minute']:g} a minute after the warm-up,"
        f" {row['grown']:g} in all ({row['allowed']:g} allowed), from {row['start']:g} to {row['end']:g}"
    )


def _largest(uses: Sequence[Use]) -> Use:
    return Use(max(use.mib for use in uses), max(use.descriptors for use in uses))
