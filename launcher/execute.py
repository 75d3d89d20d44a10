"""One run from its topology to its summary: create, watch, take down, write down.

Purpose: `execute` is what every command that runs something calls. A run that is saved and restored on its way consists of several
sets of processes, one after the other.

Invariants: a `UserError` is raised before any role has started and leaves nothing behind; afterwards there is always a summary,
however the run ended; when it returns or raises, no process of the run exists, and no file beside those of a run directory that the
user named.

Not handled here: what is decided while the run is under way (launcher/lifecycle.py), what the figures mean
(report/summary.py, report/judgement.py).
"""

from __future__ import annotations

import dataclasses
import secrets
import shutil
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from launcher import resources, restart, rundir, runfile
from launcher.allocator import keep_memory_small
from launcher.blame import Story, stories
from launcher.chaos import Chaos, process_faults
from launcher.lifecycle import SAVED, Bounds
from launcher.online import RunCheck
from launcher.outcome import Outcome
from launcher.progress import Progress
from launcher.resources import Resources
from launcher.restart import Carried, Moves
from launcher.rundir import RunDir
from launcher.runfile import usable_cores, write_json
from launcher.signals import Signals
from launcher.supervisor import ZYGOTE_STOP_S, Supervisor
from launcher.watch import Watch
from launcher.zygote_link import Zygote
from proto import inputlog, link
from proto.errors import UserError
from proto.faults import FaultMachine
from proto.image import ImageReader
from proto.run import PROC_LAUNCHER
from proto.topology import Topology
from proto.topology_faults import schedule
from proto.trace import SUFFIX, TraceWriter, events_folder
from proto.tracefile import TraceInfo
from report import growth
from report import summary as summaries
from report.summary import Snapshot

ROLES: Final[Mapping[str, str]] = {
    "host": "host.shell:main",
    "vcpu": "guest.shell:main",
    "swapd": "swapd.shell:main",
}
"""Where the zygote finds the main function of each role."""
TRACE_BYTES: Final = 32 << 20
"""Ring of events of one process: what it records while the check of the run is behind."""
DESCRIPTORS_PER_PROCESS: Final = 3
DESCRIPTORS_SPARE: Final = 200
KIB_PER_PAGE: Final = 4
FILL_PAGE_NS: Final = 2_000_000
SWEEP_PAGE_NS: Final = 5_000_000
"""Time allowed to one page at the start and at the end: ten times what a busy machine was seen to need."""


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How to run a topology. out: the run directory; None: a temporary one. log_inputs: so that `replay` can run it again; wants a
    run directory that stays. moves: saves and restores. roles: tests put others in.
    """

    out: Path | None = None
    log_inputs: bool = False
    roles: Mapping[str, str] = field(default_factory=lambda: ROLES)
    bounds: Bounds | None = None
    """None: as the topology needs (`bounds_for`)."""
    away_ns: int = 0
    """How long a daemon that ended stays away, beside the time that its start takes."""
    trace_bytes: int = TRACE_BYTES
    misbehaves: str = ""
    """What the guest does on purpose that liveness does not allow."""
    moves: Moves = field(default_factory=Moves)


@dataclass(frozen=True, slots=True)
class RunResult:
    """summary: contents of summary.json. stories: of the processes that are to blame, if any are. run_dir: None if removed."""

    summary: dict[str, Any]
    details: list[str]
    stories: list[Story]
    run_dir: Path | None


def execute(topology: Topology, options: RunOptions, signals: Signals, progress: Progress) -> RunResult:
    """Run a topology. Raises UserError for what this machine or the input cannot provide."""
    began_ns = time.monotonic_ns()
    keep_memory_small()
    traces = resources.check_traces(topology)
    options.moves.check(topology)
    _raise_descriptor_limit(topology)
    if swept := rundir.sweep():
        progress.say(f"removed what runs that were killed had left: {', '.join(map(str, swept))}")
    needs_disk = any(not (d.directory or d.allow_tmpfs or d.connect) for d in topology.swapd)
    run_dir = rundir.create(options.out, on_disk=needs_disk)
    run = _Run(topology, traces, options, run_dir, signals, progress, began_ns)
    try:
        run.all_sets()
        progress.phase("checking")
        checked = run.check.verdict(str(run_dir.path), run.outcome.ended, options.misbehaves)
        return _write_down(run, checked)
    finally:
        run.check.close()
        progress.done()
        if run.begun:
            run_dir.remove()
        else:
            run_dir.discard()


class _Run:
    """One run: a set of processes, and after each restore another one (launcher/restart.py).

    begun: a role may have started. events: where the last set records. end, kernels: figures and guest kernels as the last set left them.
    """

    def __init__(
        self,
        topology: Topology,
        traces: Mapping[str, TraceInfo],
        options: RunOptions,
        run_dir: RunDir,
        signals: Signals,
        progress: Progress,
        began_ns: int,
    ) -> None:
        self.topology = topology
        self.options = options
        self.run_dir = run_dir
        self.begun = False
        self.events = events_folder(1)
        self.record: dict[str, Any] = {}
        self.outcome = Outcome()
        self.check = RunCheck(
            run_dir.path / events_folder(1), topology, joined=options.moves.restore is not None
        )
        self.carried = Carried()
        self.warnings: list[str] = []
        self.end = Snapshot(0, np.zeros(0, np.uint64), np.zeros(0, np.uint64))
        self.kernels: list[npt.NDArray[np.uint64]] = []
        self.faults = FaultMachine((), [])
        """The schedule as it was left."""
        self._traces = traces
        self._signals = signals
        self._signals_seen = signals.count
        self._progress = progress
        self._began_ns = began_ns

    def all_sets(self) -> None:
        """Until the run is over. UserError when it never began."""
        moves = self.options.moves
        image = moves.restore
        for number, save_at_ns in enumerate((*moves.times_ns, 0), start=1):
            self._one_set(number, image, save_at_ns)
            if self.outcome.ended != SAVED or save_at_ns not in moves.restart_at_ns:
                break
            image = self.run_dir.image
        if self.outcome.ended == SAVED and moves.image is not None:
            self._keep_image(moves.image)

    def _one_set(self, number: int, image: Path | None, save_at_ns: int) -> None:
        topology, options, run_dir = self.topology, self.options, self.run_dir
        made = supervisor = chaos = None
        # It imports and compiles while the memory is being prepared.
        zygote = Zygote(run_dir.log("zygote-0"), run_dir.cleanup)
        try:
            self._progress.phase("preparing")
            made = self._prepare(image)
            if made is None:
                return
            self._begin(number, made)
            self.events = events_folder(number)
            key = link.new_key()
            chaos = self._chaos(made)
            supervisor = Supervisor(
                topology,
                zygote,
                run_dir,
                made,
                self._signals,
                self._progress,
                began_ns=self._began_ns,
                key=key,
                chaos=chaos,
                bounds=dataclasses.replace(options.bounds or bounds_for(topology), away_ns=options.away_ns),
                save_at_ns=save_at_ns,
                before=self.outcome if image is not None else None,
                signals_seen=self._signals_seen,
            )
            self.outcome = supervisor.outcome
            start_ns = self.outcome.start_ns
            try:
                config = _config(topology, made, run_dir, self.record["run_id"], options)
                config |= {
                    "events": self.events,
                    "lamport": self.carried.lamport,
                    "image": str(image or ""),
                    "log_inputs": inputlog.folder(number) if options.log_inputs else "",
                    "key": key,
                }
                zygote.send_setup(config, _descriptors(made))
                supervisor.run()
            finally:
                supervisor.tear_down()
            self._signals_seen = supervisor.signals_seen
            self.carried.went_on(start_ns, self.outcome.start_ns, resumed=image is not None)
            self._take_figures(made)
        finally:
            if supervisor is None:
                zygote.stop(ZYGOTE_STOP_S)
            zygote.close()
            if chaos is not None:
                chaos.close()
            if made is not None:
                made.close()

    def _chaos(self, made: Resources) -> Chaos | None:
        """The schedule of faults; such a run is one set of processes."""
        if (segment := made.segments.get("faults")) is None:
            return None
        topology = self.topology
        run = topology.run
        specs = schedule(topology.fault, len(topology.swapd), run.seconds, run.seed)
        writer = None
        if process_faults(specs):
            path = self.run_dir.path / events_folder(1) / f"launcher{SUFFIX}"
            writer = TraceWriter(path, PROC_LAUNCHER, self.options.trace_bytes)
        return Chaos(topology, FaultMachine(specs, segment.u64.data), writer)

    def _begin(self, number: int, made: Resources) -> None:
        """A set has what it needs; its processes come next."""
        if number == 1:
            self.record = _describe(self.topology, made)
            self.record["restored"] = self.options.moves.restore is not None
            write_json(self.run_dir.path / "run.json", self.record)
            self.begun = True
            self.check.start()
        else:
            highest = self.check.go_on(self.run_dir.path / events_folder(number))
            self.carried.lamport = max(self.carried.lamport, highest)

    def _prepare(self, image: Path | None) -> Resources | None:
        """Fresh resources, with what an image holds of them. None, and the run has failed, when a later set cannot have them."""
        made = None
        try:
            made = resources.prepare(self.topology, self._traces, self.run_dir.path)
            if image is not None:
                with ImageReader(image) as reader:
                    restart.fill(reader, made.segments, len(self.topology.vm))
                    self.carried.lamport = reader.meta["lamport"]
                self.carried.put(made.segments)
        except UserError as error:
            if made is not None:
                made.close()
            if not self.begun:
                raise
            self.outcome.ended = f"failed:restart: {error}"
            return None
        return made

    def _take_figures(self, made: Resources) -> None:
        self.end = Watch(made.segments).snapshot(self.outcome.end_ns)
        if "faults" in made.segments:
            # A copy: the segment goes.
            specs = schedule(
                self.topology.fault,
                len(self.topology.swapd),
                self.topology.run.seconds,
                self.topology.run.seed,
            )
            self.faults = FaultMachine(specs, made.segments["faults"].u64.tolist())
        self.kernels = [made.segments[f"kernel-{v}"].u64.copy() for v in range(len(self.topology.vm))]
        self.carried.take(made.segments)
        self.warnings += [warning for warning in made.warnings if warning not in self.warnings]

    def _keep_image(self, target: Path) -> None:
        try:
            shutil.move(self.run_dir.image, target)
        except OSError as error:
            self.outcome.ended = f"failed:the image cannot be put to {target}: {error.strerror}"


def bounds_for(topology: Topology) -> Bounds:
    """How long the phases of a run may take: its memory is filled at the start, and swept at the end where it is checked."""
    tasks = [task for vm in topology.vm for task in vm.task if task.workload != "replay"]
    filled = sum(task.count * task.memory_kib for task in tasks)
    swept = sum(task.count * task.memory_kib for task in tasks if task.workload == "stamp")
    plain = Bounds()
    return dataclasses.replace(
        plain,
        setup_ns=plain.setup_ns + filled // KIB_PER_PAGE * FILL_PAGE_NS,
        drain_ns=plain.drain_ns + swept // KIB_PER_PAGE * SWEEP_PAGE_NS,
    )


def _raise_descriptor_limit(topology: Topology) -> None:
    """The launcher reads the event file of every process, the zygote has an eventfd of every vCPU; those it starts inherit the limit."""
    wanted = DESCRIPTORS_SPARE + DESCRIPTORS_PER_PROCESS * (topology.total_vcpus + len(topology.swapd))
    try:
        link.raise_descriptor_limit(wanted)
    except OSError as error:
        raise UserError(
            f"too few file descriptors for {topology.total_vcpus} vCPUs",
            where="ulimit -n",
            found=str(error),
            allowed=f"a hard limit of {wanted} or more (ulimit -Hn), or fewer vCPUs",
        ) from error


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
    return [segment.fd for segment in made.segments.values()] + [
        file.fd for file in made.files if file is not None
    ]


def _tcp_endpoint(topology: Topology) -> str:
    """A loopback endpoint for daemons behind tcp; "" when there are none.

    The port was free a moment ago. Should somebody take it before the host does, the run fails with the host's message.
    """
    if all(daemon.transport != "tcp" for daemon in topology.swapd):
        return ""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"


def _write_down(run: _Run, checked: dict[str, Any]) -> RunResult:
    """Everything has ended: summary.json and the second version of run.json."""
    topology, run_dir, outcome = run.topology, run.run_dir, run.outcome
    warnings = [*run.warnings, *_log_warnings(run_dir)]
    if outcome.bad_messages:
        warnings.append(f"the launcher dropped {outcome.bad_messages} messages that break the contract")
    warnings += outcome.details if outcome.orderly else []
    start_ns = outcome.start_ns
    if run.options.moves.restore is not None and outcome.at_start is not None:
        # What was measured before the image is another run's.
        start_ns = outcome.at_start.at_ns + run.carried.down_ns
    facts = summaries.RunFacts(
        ended=outcome.ended,
        start_ns=start_ns,
        end_ns=outcome.end_ns,
        started_in_s=outcome.started_in_s,
        restarts=outcome.restarts,
        usable_cores=usable_cores(),
        pcpus=topology.pcpus(usable_cores()),
        memory=outcome.memory,
        faults=run.faults,
        outage=outcome.outage.summary() | run.check.resumes(),
        growth=growth.table(outcome.usage.samples, topology.total_vcpus),
        check=checked,
        save_restore=run.carried.facts(run.options.moves, outcome.saved_pages),
        warnings=warnings,
    )
    summary = summaries.build(topology, run.end, run.kernels, facts, outcome.at_start, outcome.at_stop)
    told = stories(run_dir, run.events, outcome.blamed)
    record = run.record | {
        "ended": outcome.ended,
        "details": outcome.details,
        "blamed": [story.plain() for story in told],
        "warnings": summary["warnings"],
    }
    write_json(run_dir.path / "summary.json", summary)
    if (slots := outcome.outage.details()) is not None:
        write_json(run_dir.path / "outages.json", slots)
    write_json(run_dir.path / "run.json", record)
    return RunResult(summary, outcome.details, told, None if run_dir.temporary else run_dir.path)


def _log_warnings(run_dir: RunDir) -> list[str]:
    """Which input logs do not reach the end of the run."""
    found = [(path, inputlog.ended_early(path)) for path in inputlog.logs(run_dir.path)]
    return [f"the input log {path.parent.name}/{path.name} ends early: {why}" for path, why in found if why]
