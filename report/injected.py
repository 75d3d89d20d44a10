"""What a schedule of faults has come to: the `injected` table of the summary, and what it means for the run.

A run in which a fault did not happen proves nothing about it, so it fails. A guest task that was killed because its page could not be
brought back does not fail a run whose schedule damages pages, and the summary says so.

Not handled here: when a fault counts as happened (proto/faults.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from proto.faults import FIRED, FaultMachine, may_lose_pages, outcome
from proto.topology import Topology
from proto.topology_faults import describe

Row = Mapping[str, Any]


def table(topology: Topology, machine: FaultMachine | None) -> list[dict[str, Any]]:
    """One row for each ``[[fault]]``, in their order; none for a run that ended before it began."""
    if machine is None or not machine.specs:
        return []
    losing = {spec.number for spec in may_lose_pages(machine)}
    rows = []
    for spec, fault in zip(machine.specs, topology.fault, strict=True):
        fired = machine.word(spec, FIRED)
        rows.append(
            {
                "do": fault.do,
                "on": fault.on,
                "when": describe(fault),
                "scheduled": spec.scheduled,
                "fired": fired,
                "passed_over": max(0, spec.scheduled - fired) if spec.merges else 0,
                "may_lose_pages": spec.number in losing,
                "failed": outcome(spec, machine),
            }
        )
    return rows


def chaos(machine: FaultMachine | None) -> dict[str, int] | None:
    """The `chaos` table: processes that the schedule killed; None without a schedule."""
    if machine is None or not machine.specs:
        return None
    return {"kills": sum(machine.word(spec, FIRED) for spec in machine.specs if spec.kind == "kill")}


def failures(rows: Sequence[Row]) -> list[str]:
    """Why the schedule fails a run that finished."""
    return [f"{_name(i, row)} {row['failed']}" for i, row in enumerate(rows) if row["failed"]]


def explains_lost_pages(rows: Sequence[Row]) -> bool:
    """Whether a task may be killed by a machine check in this run."""
    return any(row["may_lose_pages"] for row in rows)


def lost_pages(killed: int, rows: Sequence[Row]) -> str:
    """What is to be said about tasks that were killed by a machine check; "" if there is nothing."""
    names = [_name(i, row) for i, row in enumerate(rows) if row["may_lose_pages"]]
    if not killed or not names:
        return ""
    return f"pages were lost on purpose, which cost {killed} guest tasks: {'; '.join(names)}"


def lines(rows: Sequence[Row]) -> Iterator[str]:
    """For people."""
    for i, row in enumerate(rows):
        over = f", {row['passed_over']} passed over" if row["passed_over"] else ""
        failed = ", NOT AS SCHEDULED" if row["failed"] else ""
        yield f"{_name(i, row)}: {row['fired']} of {row['scheduled']}{over}{failed}"


def _name(number: int, row: Row) -> str:
    return f"fault {number}, {row['do']} {row['on']} {row['when']}"
