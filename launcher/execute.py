"""One run from its topology to its summary: create, watch, take down, write down.

Purpose: `execute` is what every command that runs something calls.

Invariants: a `UserError` is raised before any role has started and leaves nothing behind; afterwards there is always a summary,
however the run ended; when it returns or raises, no process of the run exists, and no file beside those of a run directory that the
user named.

Not handled here: what is decided while the run is under way (launcher/lifecycle.py), what the figures mean (report/summary.py).
"""

from __future__ import annotations

import secrets
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from launcher import resources, rundir, runfile
from launcher.chaos import ChaosPlan
from launcher.lifecycle import Bounds
from launcher.online import RunCheck
from launcher.progress import Progress
from launcher.resources import Resources
from launcher.rundir import RunDir
from launcher.runfile import usable_cores, write_json
from launcher.signals import Signals
from launcher.supervisor import ZYGOTE_STOP_S, Outcome, Supervisor
from launcher.watch import Watch
from launcher.zygote_link import Zygote
from proto.topology import Topology
from proto.trace import FOLDER
from report import summary as summaries

ROLES: Final[Mapping[str, str]] = {
    "host": "host.shell:main",
    "vcpu": "guest.shell:main",
    "swapd": "swapd.shell:main",
}
"""Where the zygote finds the main function of each role."""
TRACE_BYTES: Final = 32 << 20
"""Ring of events of one process: what it records while the check of the run is behind."""


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How to run a topology. out: the run directory; None: a temporary one. roles: tests put others in."""

    out: Path | None = None
    chaos: ChaosPlan | None = None
    roles: Mapping[str, str] = field(default_factory=lambda: ROLES)
    bounds: Bounds = field(default_factory=Bounds)
    trace_bytes: int = TRACE_BYTES
    misbehaves: str = ""
    """What the guest does on purpose that liveness does not allow."""


@dataclass(frozen=True, slots=True)
class RunResult:
    """summary: contents of summary.json. log: last lines of the process that is to blame, if one is. run_dir: None if removed."""

    summary: dict[str, Any]
    details: list[str]
    log: list[str]
    run_dir: Path | None


def execute(topology: Topology, options: RunOptions, signals: Signals, progress: Progress) -> RunResult:
    """Run a topology. Raises UserError for what this machine or the input cannot provide."""
    began_ns = time.monotonic_ns()
    traces = resources.check_traces(topology)
    needs_disk = any(not daemon.directory and not daemon.allow_tmpfs for daemon in topology.swapd)
    run_dir = rundir.create(options.out, on_disk=needs_disk)
    zygote = made = supervisor = check = None
    refused = True
    try:
        # It imports and compiles while the memory is being prepared.
        zygote = Zygote(run_dir.log("zygote-0"), run_dir.cleanup)
        progress.phase("preparing")
        made = resources.prepare(topology, traces, run_dir.path)
        record = _describe(topology, made)
        write_json(run_dir.path / "run.json", record)
        refused = False
        supervisor = Supervisor(
            topology,
            zygote,
            run_dir,
            made,
            signals,
            progress,
            began_ns=began_ns,
            chaos=options.chaos,
            bounds=options.bounds,
        )
        zygote.send_setup(_config(topology, made, run_dir, record["run_id"], options), _descriptors(made))
        check = RunCheck(run_dir.path / FOLDER, topology)
        check.start()
        try:
            supervisor.run()
        finally:
            supervisor.tear_down()
        progress.phase("checking")
        checked = check.verdict(str(run_dir.path), supervisor.outcome.ended, options.misbehaves)
        return _write_down(topology, made, run_dir, record, supervisor.outcome, options.chaos, checked)
    finally:
        if check is not None:
            check.close()
        if zygote is not None:
            if supervisor is None:
                zygote.stop(ZYGOTE_STOP_S)
            zygote.close()
        if made is not None:
            made.close()
        progress.done()
        if refused:
            run_dir.discard()
        else:
            run_dir.remove()


def _describe(topology: Topology, made: Resources) -> dict[str, Any]:
    huge = made.segments["frames"].collapse_errno == 0
    return runfile.describe(secrets.token_hex(8), topology, made.swap_files, huge)


def _config(
    topology: Topology, made: Resources, run_dir: RunDir, run_id: str, options: RunOptions
) -> dict[str, Any]:
    """What the zygote builds the run context from (launcher/zygote.py `make_context`)."""
    return {
        "run_id": run_id,
        "run_dir": str(run_dir.path),
        "endpoint": run_dir.endpoint,
        "tcp_endpoint": _tcp_endpoint(topology),
        "topology": topology.to_dict(),
        "segments": [[name, segment.size_bytes] for name, segment in made.segments.items()],
        "swap_files": [[file.slots, file.direct, file.filesystem, file.engine] for file in made.swap_files],
        "traces": [[trace.path, trace.pages, trace.accesses] for trace in made.traces],
        "trace_bytes": options.trace_bytes,
        "roles": dict(options.roles),
    }


def _descriptors(made: Resources) -> list[int]:
    return [segment.fd for segment in made.segments.values()] + [file.fd for file in made.swap_files]


def _tcp_endpoint(topology: Topology) -> str:
    """A loopback endpoint for daemons behind tcp; "" when there are none.

    The port was free a moment ago. Should somebody take it before the host does, the run fails with the host's message.
    """
    if all(daemon.transport != "tcp" for daemon in topology.swapd):
        return ""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"


def _write_down(
    topology: Topology,
    made: Resources,
    run_dir: RunDir,
    record: dict[str, Any],
    outcome: Outcome,
    chaos: ChaosPlan | None,
    checked: dict[str, Any],
) -> RunResult:
    """Everything has ended: summary.json and the second version of run.json."""
    warnings = list(made.warnings)
    if outcome.bad_messages:
        warnings.append(f"the launcher dropped {outcome.bad_messages} messages that break the contract")
    warnings += outcome.details if outcome.orderly else []
    facts = summaries.RunFacts(
        ended=outcome.ended,
        start_ns=outcome.start_ns,
        end_ns=outcome.end_ns,
        started_in_s=outcome.started_in_s,
        restarts=outcome.restarts,
        usable_cores=usable_cores(),
        pcpus=topology.pcpus(usable_cores()),
        memory=outcome.memory,
        chaos=_chaos_facts(chaos, outcome),
        outage=outcome.outage.summary(),
        check=checked,
        warnings=warnings,
    )
    summary = summaries.build(
        topology,
        Watch(made.segments).snapshot(outcome.end_ns),
        [made.segments[f"kernel-{v}"].u64 for v in range(len(topology.vm))],
        facts,
        outcome.at_start,
        outcome.at_stop,
    )
    log = run_dir.log_tail(outcome.culprit) if outcome.culprit else []
    record |= {
        "ended": outcome.ended,
        "details": outcome.details,
        "log": log,
        "warnings": summary["warnings"],
    }
    write_json(run_dir.path / "summary.json", summary)
    write_json(run_dir.path / "run.json", record)
    return RunResult(summary, outcome.details, log, None if run_dir.temporary else run_dir.path)


def _chaos_facts(chaos: ChaosPlan | None, outcome: Outcome) -> dict[str, Any] | None:
    if chaos is None:
        return None
    return {"kills": outcome.kills, "every_ms": chaos.every_ns / 1e6, "for_s": chaos.for_ns / 1e9}
