"""Scenarios in the real world: the same files as processes, with the host of every run and the times the files name.

Purpose: `run` starts one host, one process per vCPU (launcher/scenario_real_cpu.py) and a page server (launcher/scenario_real_pages.py)
through the machinery of every run, and puts what they left together.

Invariants: what cannot be scripted to a process is refused before anything starts (`refusal`); nothing is left behind.

Not handled here: several scenarios at a time; they would disturb each other's times.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, Final

from launcher import rundir, tempdirs
from launcher import scenario_real_part as part
from launcher.execute import RunOptions, RunResult, execute
from launcher.progress import Progress
from launcher.signals import Signals
from proto.errors import UserError
from proto.profile import PROFILES
from proto.stats import HostCounter
from proto.topology import PAGES_PER_MIB, Topology
from sim.events import Event
from sim.scenario_file import Scenario
from sim.scenario_run import Outcome, compare, observe
from sim.scenario_tables import FIRST_GFN

ROLES: Final = {
    "host": "launcher.scenario_real_host:main",
    "vcpu": "launcher.scenario_real_cpu:main",
    "swapd": "launcher.scenario_real_pages:main",
}
MEMORY_MIB_MIN: Final = 8
"""Enough for the window of requests of 16 vCPUs; a scenario needs its pages and no more, so nothing is reclaimed."""


def refusal(scenario: Scenario) -> str:
    """Why a scenario cannot run as processes, "" if it can."""
    steps = {step.do for step in scenario.script}
    if "save_restore" in steps:
        return "its host is exchanged under its guests, which have to live on in virtual time"
    if "page_out" in steps and len(scenario.vcpu_ids) > 1:
        return "its script pages out, which needs the other vCPUs to stand still meanwhile"
    if "elided" in scenario.expect:
        return "whether a page comes before an entry is a matter of microseconds there"
    return ""


def check(scenario: Scenario) -> None:
    """Raises UserError for a scenario that cannot run as processes."""
    if reason := refusal(scenario):
        raise UserError(
            f"this scenario cannot run as processes: {reason}",
            where=scenario.file,
            found="--world real",
            allowed="--world sim",
        )


def topology_of(scenario: Scenario) -> Topology:
    """A topology with the scenario's vCPUs and enough memory for its pages; its file is the scenario's."""
    memory_mib = max(MEMORY_MIB_MIN, -(-(FIRST_GFN + max(scenario.pages) + 1) // PAGES_PER_MIB) + 1)
    mode = "interrupt" if PROFILES[scenario.profile].ready_by_interrupt else "exception"
    return Topology.from_dict(
        {
            "file": scenario.file,
            "run": {"name": "scenario", "mode": mode, "profile": scenario.profile, "seconds": 86_400.0},
            "host": {"allowance_mib": memory_mib, "populate_pages": 1},
            # The guest runs its scenario; the task is there because a guest has one.
            "vm": [
                {
                    "vcpus": len(scenario.vcpu_ids),
                    "memory_mib": memory_mib,
                    "task": [{"workload": "uniform", "memory_kib": 4}],
                }
            ],
            "event": [
                # Room in the host's memory for pages that the script moves; the script says when.
                {"at": 86_000.0, "do": "slot_move", "pages": 1}
                for step in scenario.script
                if step.do == "slot_move"
            ],
            "swapd": [{"allow_tmpfs": True, "restart_limit": 0}],
        }
    )


def misbehaves(scenario: Scenario) -> str:
    """Why the guest is not held to liveness, "" if it is: those rules assume one that clears, acknowledges, wakes and goes on."""
    if scenario.script:
        return "the scenario has a script"
    needed = {"clear", "ack"} if PROFILES[scenario.profile].ready_by_interrupt else {"clear"}
    return "" if needed <= set(scenario.on_ready) else "the scenario's guest leaves out a step"


def run(scenario: Scenario, signals: Signals, progress: Progress) -> Outcome:
    """One scenario, from the start of its processes to their end. Raises UserError for what this machine cannot provide."""
    check(scenario)
    with tempdirs.make(rundir.PREFIX, Path(tempfile.gettempdir())) as folder:
        run_dir = folder / "run"
        options = RunOptions(out=run_dir, roles=ROLES, misbehaves=misbehaves(scenario))
        result = execute(topology_of(scenario), options, signals, progress)
        return _put_together(scenario, result, run_dir)


def _put_together(scenario: Scenario, result: RunResult, run_dir: Path) -> Outcome:
    ended = str(result.summary["ended"])
    cpus = [f"vcpu-{cpu}" for cpu in range(len(scenario.vcpu_ids))]
    try:
        parts = {name: part.read(run_dir, name) for name in (part.HOST, part.PAGES, *cpus)}
    except FileNotFoundError:
        story = "; ".join(
            [ended, *result.details, *(line for one in result.stories for line in one.log[-1:])]
        )
        return Outcome(scenario, "real", observe((), Counter(), 0), (f"the run failed: {story}",), ())
    facts = [parts[name][1] for name in cpus]
    events = _events([event for found, _ in parts.values() for event in found], facts)
    host = parts[part.HOST][1]
    counts = Counter({HostCounter[name]: n for name, n in host["counts"].items()})
    observed = observe(events, counts, host["max_outstanding"])
    differences = compare(scenario.expect, observed)
    differences += [text for fact in facts for text in fact["surprises"]]
    if not all(fact["over"] for fact in facts) and not any(fact["ended_ns"] for fact in facts):
        unfinished = ", ".join(str(number) for fact in facts for number in fact["unfinished"])
        differences.append(f"the run did not end: tasks {unfinished or 'none'} unfinished")
    differences += [
        f"{name} is violated: {'; '.join(examples)}"
        for name, examples in result.summary["check"]["examples"].items()
    ]
    if ended != "finished":
        differences.append(f"the run ended: {ended}")
    return Outcome(scenario, "real", observed, tuple(differences), events)


def _events(events: list[Event], facts: list[dict[str, Any]]) -> tuple[Event, ...]:
    """In order, from the first event to the script's end; what is cancelled after that is the processes' own end."""
    ends = [fact["ended_ns"] for fact in facts if fact["ended_ns"]]
    if ends:
        events = [event for event in events if event.t_ns <= min(ends)]
    ordered = sorted(events, key=lambda event: event.t_ns)
    start_ns = ordered[0].t_ns if ordered else 0
    return tuple(event._replace(t_ns=event.t_ns - start_ns) for event in ordered)
