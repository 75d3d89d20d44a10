"""Faults of a topology: which of them can happen at all, and when exactly.

Purpose: `check_faults` refuses what has no target, no time, or nobody who could do it. `schedule` makes `proto.faults.Spec`s of them; it
gives the same ones in every process.

Not handled here: types and ranges of single values (proto/schema.py), counting (proto/faults.py).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Final

from proto.faults import (
    BAD_WORDS,
    DEVICE_KINDS,
    FOREVER_NS,
    KINDS,
    LINK_KINDS,
    NATURAL,
    PROCESS_KINDS,
    STEPS,
    Spec,
)
from proto.schema import Source, refuse
from proto.topology_keys import FAULT_TIMES_MAX, Fault, Run, Swapd

NS: Final = 1_000_000_000
MS: Final = 1_000_000
FAULTS_MAX: Final = 256
"""Tables of one topology: far more than anybody writes, and small enough for the words of all of them."""
LASTING: Final = ("stop", "slow", "delay", "disconnect")
"""Kinds that are nothing without `for_ms`."""
WHEN: Final = "one of at, nth, every_ms, rate_per_s, or after alone"


def check_faults(
    run: Run, faults: Sequence[Fault], daemons: Sequence[Swapd], vcpus: int, source: Source
) -> None:
    """Raises UserError."""
    if len(faults) > FAULTS_MAX:
        refuse("too many faults", source, "fault", len(faults), f"at most {FAULTS_MAX}")
    bad_blocks = 0
    for i, fault in enumerate(faults):
        path = f"fault[{i}]"
        if not fault.do:
            refuse("what is to go wrong is missing", source, f"{path}.do", fault.do, ", ".join(KINDS))
        _check_target(fault, path, daemons, vcpus, source)
        _check_step(fault, path, daemons, source)
        _check_time(run, fault, path, source)
        if fault.do in LASTING and not fault.for_ms:
            refuse("how long is missing", source, f"{path}.for_ms", fault.for_ms, "above 0")
        if fault.do == "bad_block":
            bad_blocks += _scheduled(i, fault, run)
            if bad_blocks >= BAD_WORDS:
                refuse(
                    "too many bad blocks in all", source, f"{path}.times", bad_blocks, f"below {BAD_WORDS}"
                )


def role_of(fault: Fault) -> str:
    """The role it happens to."""
    return fault.on.partition("-")[0]


def targets_of(fault: Fault, daemons: int) -> tuple[int, ...]:
    """Their numbers, in turn."""
    number = fault.on.partition("-")[2]
    if number:
        return (int(number),)
    return tuple(range(daemons)) if fault.on == "swapd" else (0,)


def _check_target(fault: Fault, path: str, daemons: Sequence[Swapd], vcpus: int, source: Source) -> None:
    role, targets = role_of(fault), targets_of(fault, len(daemons))
    roles = {"kill": ("swapd", "vcpu", "host", "zygote"), "stop": ("swapd", "vcpu", "host")}.get(
        fault.do, ("swapd",)
    )
    if role not in roles:
        refuse(f"{fault.do} does not happen to it", source, f"{path}.on", fault.on, ", ".join(roles))
    count = {"swapd": len(daemons), "vcpu": vcpus}.get(role, 1)
    if max(targets) >= count:
        refuse("no such process", source, f"{path}.on", fault.on, f"{role}-0 to {role}-{count - 1}")
    elsewhere = [d for d in targets if role == "swapd" and daemons[d].connect]
    if elsewhere and fault.do not in LINK_KINDS:
        refuse(
            f"swapd-{elsewhere[0]} runs elsewhere and is not this run's to damage",
            source,
            f"{path}.do",
            fault.do,
            f"{', '.join(LINK_KINDS)}, or a daemon of this run",
        )


def _check_step(fault: Fault, path: str, daemons: Sequence[Swapd], source: Source) -> None:
    if not fault.at:
        if fault.nth and fault.do in PROCESS_KINDS:
            refuse("nth of what is missing", source, f"{path}.at", fault.at, ", ".join(STEPS))
        return
    step = STEPS[fault.at]
    if step.seen_by != "swapd":
        return
    if fault.do in PROCESS_KINDS and role_of(fault) != "swapd":
        host = ", ".join(name for name, one in STEPS.items() if one.seen_by == "host")
        refuse(
            "a step that only the daemon sees; it reaches nobody else", source, f"{path}.at", fault.at, host
        )
    if any(daemons[d].connect for d in targets_of(fault, len(daemons))):
        refuse(
            "nobody here sees this step of a daemon elsewhere",
            source,
            f"{path}.at",
            fault.at,
            "a step that the host sees",
        )


def _check_time(run: Run, fault: Fault, path: str, source: Source) -> None:
    given = {
        "at": bool(fault.at), "nth": bool(fault.nth and not fault.at), "every_ms": bool(fault.every_ms),
        "rate_per_s": bool(fault.rate_per_s),
    }  # fmt: skip
    named = [name for name, is_given in given.items() if is_given]
    if len(named) > 1:
        refuse("two ways to say when", source, f"{path}.{named[1]}", getattr(fault, named[1]), WHEN)
    if fault.times > 1 and not (fault.at or fault.nth):
        refuse("how often follows from the time", source, f"{path}.times", fault.times, "with at or nth")
    # In the nanoseconds of the schedule: what is less than one apart is at the same time.
    first_ns, end_ns = _window_ns(fault, run.seconds)
    run_ns = int(run.seconds * NS)
    if first_ns >= run_ns:
        refuse(
            "the run is over by then",
            source,
            f"{path}.after",
            fault.after,
            f"below run.seconds, which is {run.seconds}",
        )
    if end_ns > run_ns or end_ns <= first_ns:
        allowed = f"above after, at most run.seconds, which is {run.seconds}"
        refuse("ends when nothing can happen", source, f"{path}.until", fault.until, allowed)
    if fault.until and not named:
        refuse(
            "it happens once, at `after`",
            source,
            f"{path}.until",
            fault.until,
            "with at, nth, every_ms or rate_per_s",
        )
    if fault.every_ms and first_ns + _every_ns(fault) >= end_ns:
        refuse(
            "the first time is behind the last",
            source,
            f"{path}.every_ms",
            fault.every_ms,
            f"below {(end_ns - first_ns) / MS:g}",
        )
    # Compared before anything is drawn: that would take as long as it is wrong.
    often = (end_ns - first_ns) * max(fault.rate_per_s / NS, 1 / _every_ns(fault) if fault.every_ms else 0)
    if often > FAULT_TIMES_MAX:
        refuse(
            "too often",
            source,
            f"{path}.{named[0]}",
            getattr(fault, named[0]),
            f"at most {FAULT_TIMES_MAX} times in all, not {often:.0f}",
        )


# -- the schedule ------------------------------------------------------------------------------------------
def schedule(faults: Sequence[Fault], daemons: int, seconds: float, seed: int) -> tuple[Spec, ...]:
    """The faults of a checked topology, ready to be counted."""
    return tuple(_spec(i, fault, daemons, seconds, seed) for i, fault in enumerate(faults))


def _spec(number: int, fault: Fault, daemons: int, seconds: float, seed: int) -> Spec:
    step = fault.at or (NATURAL[fault.do] if fault.nth else "")
    times = () if step else _times_ns(number, fault, seconds, seed)
    first_ns, end_ns = _window_ns(fault, seconds)
    for_ns = int(fault.for_ms * MS)
    return Spec(
        number=number,
        kind=fault.do,
        role=role_of(fault),
        targets=targets_of(fault, daemons),
        step=step,
        nth=max(1, fault.nth),
        scheduled=fault.times if step else len(times),
        times_ns=times,
        merges=bool(fault.every_ms or fault.rate_per_s),
        from_ns=first_ns,
        until_ns=end_ns,
        for_ns=for_ns or (FOREVER_NS if fault.do == "device_gone" else 0),
        slower_ns=int(fault.slower_ms * MS) if fault.do == "slow" else 0,
    )


def _scheduled(number: int, fault: Fault, run: Run) -> int:
    """How often it is to happen, at most."""
    if fault.at or fault.nth:
        return fault.times
    return len(_times_ns(number, fault, run.seconds, run.seed))


def _window_ns(fault: Fault, seconds: float) -> tuple[int, int]:
    """From when on, and before when, it may happen."""
    return int(fault.after * NS), int((fault.until or seconds) * NS)


def _every_ns(fault: Fault) -> int:
    return max(1, int(fault.every_ms * MS))


def _times_ns(number: int, fault: Fault, seconds: float, seed: int) -> tuple[int, ...]:
    first, end = _window_ns(fault, seconds)
    if fault.every_ms:
        every = _every_ns(fault)
        return tuple(range(first + every, end, every))[:FAULT_TIMES_MAX]
    if not fault.rate_per_s:
        return (first,)
    rng = random.Random(f"fault {seed} {number}")
    times: list[int] = []
    at = float(first)
    while (at := at + rng.expovariate(fault.rate_per_s) * NS) < end and len(times) < FAULT_TIMES_MAX:
        times.append(int(at))
    # Once at least, and not only at the very end: that a seed leaves a fault out, or no time for it, is nothing to fail a run for.
    half = first + (end - first + 1) // 2
    if not times or times[0] >= half:
        times.insert(0, rng.randrange(first, half))
    return tuple(times[:FAULT_TIMES_MAX])


def _ordinal(number: int) -> str:
    ending = "th" if number // 10 % 10 == 1 else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def describe(fault: Fault) -> str:
    """When it is to happen, in words."""
    if fault.at or fault.nth:
        what = fault.at or {"io.done": "read or write", "link.message": "message"}.get(
            NATURAL[fault.do], NATURAL[fault.do].partition(".")[0]
        )
        nth = _ordinal(max(1, fault.nth))
        nth = f"every {nth}" if fault.times > 1 and fault.nth > 1 else nth
        text = f"{nth} {what}" + (f", {fault.times} times" if fault.times > 1 else "")
    elif fault.every_ms:
        text = f"every {fault.every_ms:g} ms"
    elif fault.rate_per_s:
        text = f"at random, {fault.rate_per_s:g} per s"
    else:
        return f"at {fault.after:g} s"
    window = (f", from {fault.after:g} s" if fault.after else "") + (
        f", until {fault.until:g} s" if fault.until else ""
    )
    return text + window


__all__ = ["DEVICE_KINDS", "check_faults", "describe", "role_of", "schedule", "targets_of"]
