"""Events of a topology: which of them a guest survives, in which order.

Purpose: `check_events` refuses what could only break a run: a vCPU that does not exist or is offline already, memory taken away that tasks
may use, an event that the run is too short for.

Not handled here: types and ranges of single values (proto/schema.py), carrying events out (host/schedule.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from proto.schema import Source, refuse
from proto.topology_keys import CPU_EVENTS, EVENTS, SLOT_EVENTS, Event, Run, Vm

PAGES_PER_MIB = 256


def in_order(events: Iterable[Event]) -> list[Event]:
    """By time; those of the same time as they stand in the file."""
    return sorted(events, key=lambda event: event.at)


def check_events(
    run: Run, vms: Sequence[Vm], events: Sequence[Event], needed: Sequence[int], source: Source
) -> None:
    """Raises UserError. ``needed``: pages of each guest, from the first, that its tasks may use."""
    number = {id(event): f"event[{i}]" for i, event in enumerate(events)}
    for event in events:
        at = number[id(event)]
        if not event.do:
            refuse("what is to happen is missing", source, f"{at}.do", event.do, ", ".join(EVENTS))
        if event.at >= run.seconds:
            refuse(
                "the run is over by then",
                source,
                f"{at}.at",
                event.at,
                f"below run.seconds, which is {run.seconds}",
            )
        if event.vm >= len(vms):
            refuse("no such guest", source, f"{at}.vm", event.vm, f"0 to {len(vms) - 1}")
    for v, vm in enumerate(vms):
        mine = [(number[id(event)], event) for event in in_order(events) if event.vm == v]
        _check_cpus(vm, [pair for pair in mine if pair[1].do in CPU_EVENTS], source)
        _check_slots(vm, [pair for pair in mine if pair[1].do in SLOT_EVENTS], needed[v], source)


def _check_cpus(vm: Vm, events: Sequence[tuple[str, Event]], source: Source) -> None:
    offline: set[int] = set()
    for at, event in events:
        if event.vcpu >= vm.vcpus:
            allowed = f"1 to {vm.vcpus - 1}" if vm.vcpus > 1 else "a guest with more than one vCPU"
            refuse("no such vCPU", source, f"{at}.vcpu", event.vcpu, allowed)
        if (event.vcpu in offline) == (event.do == "offline"):
            other = "online" if event.do == "offline" else "offline"
            refuse(f"vCPU {event.vcpu} is {event.do} then", source, f"{at}.do", event.do, other)
        offline ^= {event.vcpu}


def _check_slots(vm: Vm, events: Sequence[tuple[str, Event]], needed: int, source: Source) -> None:
    """Memory may move at any time; only what no task can have may go, and only what is gone may come."""
    size = vm.memory_mib * PAGES_PER_MIB
    replays = any(task.workload == "replay" for task in vm.task)
    gone: set[tuple[int, int]] = set()
    for at, event in events:
        part = event.page, event.pages
        if sum(part) > size:
            refuse(
                "beyond the guest's memory",
                source,
                f"{at}.pages",
                event.pages,
                f"page + pages at most {size}",
            )
        missing = any(first < sum(part) and event.page < first + count for first, count in gone)
        if event.do == "slot_add":
            if part not in gone:
                found = f"page {event.page}, pages {event.pages}"
                refuse(
                    "nothing was deleted there",
                    source,
                    f"{at}.page",
                    found,
                    "what a slot_delete before it names",
                )
            gone.discard(part)
            continue
        if missing:
            refuse("a part of it is deleted then", source, f"{at}.page", event.page, "memory that is there")
        if event.do == "slot_delete":
            if replays:
                refuse(
                    "a trace may need any page", source, f"{at}.do", event.do, "guests without a replay task"
                )
            if event.page < needed:
                refuse("tasks may use it", source, f"{at}.page", event.page, f"{needed} or more")
            gone.add(part)
