"""What a summary says about its run: checks that did not hold (the command fails), and what a reader has to know (warnings).

Invariant: failures are found in the summary's figures alone, so whoever has summary.json comes to the same result.

Not handled here: the figures (report/summary.py), what was injected and explains them (report/injected.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from proto.topology import Topology
from report import injected
from report.pace import not_comparable

FINISHED: Final = "finished"
SAVED: Final = "saved"
"""A run that ended with an image of its guests, as it was to."""


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


def warnings(topology: Topology, summary: Mapping[str, Any]) -> list[str]:
    """What a reader of the figures has to know, in words; ``summary`` has all but its warnings."""
    found = []
    if reason := not_comparable(topology, summary):
        found.append(f"not comparable with other modes: {reason}")
    totals = summary["totals"]
    if totals["bad_messages"]:
        found.append(
            f"{totals['bad_messages']} messages to or from the host were dropped, because they break the contract"
            " (events BAD_MESSAGE and NACKED)"
        )
    if summary["integrity"]["checksum_errors"]:
        found.append(f"{summary['integrity']['checksum_errors']} pages came back with a wrong checksum")
    events = summary["events"]
    if events["done"] < events["scheduled"]:
        found.append(f"only {events['done']} of {events['scheduled']} scheduled events were done")
    if events["reboots"]:
        found.append(f"guests rebooted {events['reboots']} times, and their tasks began again")
    if totals["io_errors"]:
        found.append(f"{totals['io_errors']} reads or writes of swap daemons failed for good")
    if totals["quarantined"]:
        found.append(f"{totals['quarantined']} blocks of swap files proved bad and were not used any more")
    found += _replica_warnings(summary)
    found += [
        f"swapd-{d} adds a modelled service time ({daemon.model}) to the real reads"
        for d, daemon in enumerate(topology.swapd)
        if daemon.model != "none"
    ]
    return found


def _replica_warnings(summary: Mapping[str, Any]) -> list[str]:
    gone, replicas = summary["totals"]["daemons_gone"], summary["replicas"]
    single = replicas["single_copies"] if replicas else 0
    copies = f"{single} pages on swap had one copy only at the end"
    if gone:
        return [f"{gone} swap daemons did not come back" + (f"; {copies}" if replicas else "")]
    return [copies] if single else []
