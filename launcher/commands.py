"""What the commands do, after the command line was understood.

Purpose: one function per command, `cmd_x(args) -> exit code`; launcher/cli.py says which arguments there are.

Invariants: results go to standard output, everything else to standard error; 0 = finished and every check held, 1 = it ran and
something failed (an interrupted run too); bad input raises `UserError` before anything has started.

Not handled here: how a run goes (launcher/execute.py) and what its figures mean (report/).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import setproctitle

from launcher import chaos_command, reuse, rundir, stress
from launcher import record as recorder
from launcher.execute import RunOptions, RunResult, execute
from launcher.progress import Progress
from launcher.restart import Moves
from launcher.runfile import write_json
from launcher.signals import Signals
from launcher.zygote_link import APP_DIR
from proto.errors import UserError
from proto.files import is_there
from proto.topology import Task, Topology, list_topologies, load
from report import compare as comparison
from report import judgement, outage_plot, text
from report import outage as outage_report
from report.pace import not_comparable

OK, FAILED = 0, 1
TOPOLOGIES: Final = APP_DIR / "topologies"
STRESS_TOPOLOGY: Final = TOPOLOGIES / "stress.toml"
CHAOS_STAMP_KIB: Final = 4096
TRACE_SUFFIX: Final = ".apft"


def cmd_run(args: argparse.Namespace) -> int:
    """One run: its summary as text or JSON."""
    topology = _load(args, mode=args.mode)
    options = dataclasses.replace(_options(args), moves=_moves(args))
    return _run_and_show(topology, options, args, must_check_reads=False)


def _moves(args: argparse.Namespace) -> Moves:
    """When the guests are saved, and what they go on from."""
    if bool(args.save_at_ns) != (args.image is not None):
        raise UserError(
            "--save-at and --image go together",
            where="run",
            allowed="both of them, or --restart-at without them",
        )
    paths = [path.absolute() if path is not None else None for path in (args.image, args.restore)]
    return Moves(tuple(args.restart_at_ns), args.save_at_ns, *paths)


def cmd_stress(args: argparse.Namespace) -> int:
    """Many vCPUs with a checked task on each, and guests that have more memory than the host gives."""
    size = stress.plan(args.vcpus, args.vms, args.overcommit)
    if args.every_ns is not None and not args.chaos:
        raise UserError("nothing is killed without --chaos", where="--every", allowed="--chaos --every TIME")
    every_ns = args.every_ns or stress.EVERY_NS
    topology = load(
        STRESS_TOPOLOGY,
        args.changes,
        profile=args.profile,
        seconds=args.seconds,
        seed=args.seed,
        reshape=lambda raw: stress.reshape(raw, size),
        faults=chaos_command.tables_of("swapd", every_ns, [], by_default=False) if args.chaos else (),
    )
    stress.check_machine(size)
    return _run_and_show(topology, _options(args), args, must_check_reads=True)


def cmd_chaos(args: argparse.Namespace) -> int:
    """A run with faults: those of the topology, and those of the options; a checked task is added if there is none."""
    if args.modes or args.plot is not None:
        return _chaos_under_modes(args)
    if args.repeat is not None:
        raise UserError(
            "repeats are compared mode by mode", where="--repeat", allowed="with --modes or --plot"
        )
    topology, options = _chaos(args, None)
    return _run_and_show(topology, options, args, must_check_reads=True)


def _chaos(args: argparse.Namespace, mode: str | None) -> tuple[Topology, RunOptions]:
    own = bool(_load(args, mode=mode).fault)
    tables = chaos_command.tables_of(
        args.kill, args.every_ns, args.faults, by_default=not own and not args.random
    )
    chaos_command.check_down(args.away_ns, tables)
    seconds, reshape = args.seconds, None
    if seconds is None and args.for_ns is not None:
        seconds = args.for_ns / 1e9
    elif not own:
        # Comes before what the user sets.
        reshape = chaos_command.for_a_while
    if args.random:
        plain = _load(args, mode=mode, seconds=seconds, reshape=reshape)
        tables += chaos_command.drawn(plain, args.random, plain.run.seed)
    if args.for_ns is not None and args.seconds is not None:
        tables = [(option, {**table, **_until(table, args)}) for option, table in tables]
    topology = with_stamp(_load(args, mode=mode, seconds=seconds, faults=tables, reshape=reshape))
    return topology, dataclasses.replace(_options(args), away_ns=args.away_ns)


def _until(table: Mapping[str, Any], args: argparse.Namespace) -> dict[str, float]:
    """Faults that come again and again end after --for, where the run is longer."""
    again = {"every_ms", "rate_per_s"} & table.keys() and "until" not in table
    return {"until": min(args.for_ns / 1e9, args.seconds)} if again else {}


def _chaos_under_modes(args: argparse.Namespace) -> int:
    """The guests' work around the outages, mode by mode: table, bars, and a figure if one is asked for."""
    if args.plot is not None:
        outage_plot.check_path(args.plot)
    name, default = (run := _load(args, mode=None).run).name, run.mode
    compared = _under_modes(
        args, args.modes or (default,), lambda mode: _chaos(args, mode), must_check_reads=True
    )
    report = outage_report.contrast(compared.runs)
    if args.plot is not None:
        outage_plot.write(report, f"{name}: guest work while swapd is killed", args.plot)
    compared.show(args, report, "outage", outage_report.render(report, compared.reasons))
    return _verdict(compared.failed)


def cmd_compare(args: argparse.Namespace) -> int:
    """The same work under several modes, the order of the modes rotated from repeat to repeat."""
    topologies = {mode: _load(args, mode=mode) for mode in args.modes}
    compared = _under_modes(args, args.modes, lambda mode: (topologies[mode], RunOptions()))
    rows = comparison.table(compared.runs)
    compared.show(args, rows, "rows", comparison.render(rows, compared.reasons))
    return _verdict(compared.failed)


def cmd_topologies(_args: argparse.Namespace) -> int:
    """The ready-made topologies, one line each."""
    found = list_topologies(TOPOLOGIES)
    width = max((len(name) for name, _ in found), default=0)
    for name, description in found:
        print(f"{name:<{width}}  {description}")
    return OK


def cmd_trace(args: argparse.Namespace) -> int:
    """What a recorded trace holds."""
    report = reuse.trace_report(args.file)
    if args.json:
        print(json.dumps(trace_figures(report), indent=2))
    else:
        print(reuse.format_report(report).rstrip("\n"))
    return OK


def cmd_record(args: argparse.Namespace) -> int:
    """The data accesses of a real program, in a trace file named after it unless the user names it."""
    name = f"{Path(args.rest[0]).name}{TRACE_SUFFIX}" if args.rest else f"trace{TRACE_SUFFIX}"
    recorder.record(args.rest, args.output if args.output is not None else Path(name))
    return OK


# -- parts ------------------------------------------------------------------------------------------------------------------


def find_topology(name: str) -> Path:
    """The file that a user means: a path, or the name of a ready-made topology. It may not exist: `load` tells."""
    for path in (Path(name), APP_DIR / name, TOPOLOGIES / f"{name}.toml", TOPOLOGIES / name):
        if is_there(path):
            return path
    return Path(name)


def with_stamp(topology: Topology) -> Topology:
    """The topology with a task that checks what it reads; UserError when the first guest has no room for one."""
    if any(task.workload == "stamp" for vm in topology.vm for task in vm.task):
        return topology
    first = topology.vm[0]
    task = Task(workload="stamp", memory_kib=CHAOS_STAMP_KIB)
    changed = dataclasses.replace(first, task=(*first.task, task))
    return Topology.from_dict(dataclasses.replace(topology, vm=(changed, *topology.vm[1:])).to_dict())


def rotation(modes: Sequence[str], repeats: int) -> list[tuple[int, str]]:
    """(repeat, mode) in the order of running: each repeat begins with the next mode, so that none always goes first."""
    return [(r, modes[(r + i) % len(modes)]) for r in range(repeats) for i in range(len(modes))]


def trace_figures(report: reuse.TraceReport) -> dict[str, Any]:
    """The figures of a trace as plain values."""
    info = report.info
    return {
        "path": str(info.path),
        "command": list(info.command),
        "tool": info.tool,
        "recorded": info.recorded,
        "ended": info.ended,
        "file_bytes": info.file_bytes,
        "accesses": info.accesses,
        "reads": info.reads,
        "writes": info.writes,
        "pages": info.pages,
        "written_pages": report.written_pages,
        "hot_percent": round(report.hot_percent, 3),
        "lru_faults": {str(percent): faults for percent, faults in report.lru_faults.items()},
    }


def _options(args: argparse.Namespace) -> RunOptions:
    if args.log_inputs and args.out is None:
        raise UserError(
            "the input log lies in the run directory, and without a name that one is removed",
            where="--log-inputs",
            allowed="together with --out DIR",
        )
    return RunOptions(out=args.out, log_inputs=args.log_inputs)


def _load(
    args: argparse.Namespace,
    *,
    mode: str | None,
    seconds: float | None = None,
    faults: chaos_command.Tables | None = None,
    reshape: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> Topology:
    return load(
        find_topology(args.topology),
        args.changes,
        mode=mode,
        profile=args.profile,
        seconds=args.seconds if seconds is None else seconds,
        seed=args.seed,
        faults=faults or (),
        reshape=reshape,
    )


def _run_and_show(
    topology: Topology, options: RunOptions, args: argparse.Namespace, *, must_check_reads: bool
) -> int:
    _title()
    progress = Progress(sys.stderr, f"{topology.run.name} {topology.run.mode}")
    with Signals() as signals:
        result = execute(topology, options, signals, progress)
    if args.json:
        print(json.dumps(result.summary, indent=2))
    else:
        print(text.render(result.summary), end="")
    if result.run_dir is not None:
        progress.say(f"everything is in {result.run_dir}")
    failed = judgement.failures(result.summary, must_check_reads=must_check_reads)
    if failed:
        _show_details(result)
    return _verdict(failed)


@dataclasses.dataclass(slots=True)
class _Compared:
    """Summaries by mode; failed: every check that did not hold; reasons: mode -> why it must not be compared, "" if it may."""

    base: Path | None
    runs: dict[str, list[dict[str, Any]]]
    reasons: dict[str, str] = dataclasses.field(default_factory=dict)
    failed: list[str] = dataclasses.field(default_factory=list)

    def show(self, args: argparse.Namespace, result: Any, name: str, lines: str) -> None:
        """As text, or as JSON, and in the run directory. result: the comparison, under that name."""
        report = {name: result, "not_comparable": self.reasons, "failures": self.failed, "runs": self.runs}
        if self.base is not None:
            write_json(self.base / "compare.json", report)
        if args.json:
            print(json.dumps(report, indent=2))
        else:
            print(lines, end="")


def _under_modes(
    args: argparse.Namespace,
    modes: Sequence[str],
    prepare: Callable[[str], tuple[Topology, RunOptions]],
    *,
    must_check_reads: bool = False,
) -> _Compared:
    """Run what `prepare` gives for each mode, `args.repeat` times, the modes interleaved."""
    for mode in modes:
        prepare(mode)  # what is wrong with the last one is told before the first one runs
    base = rundir.named(args.out)[0] if args.out is not None else None
    compared = _Compared(base, {mode: [] for mode in modes})
    _title()
    progress = Progress(sys.stderr)
    with Signals() as signals:
        repeats = args.repeat or 1
        for repeat, mode in rotation(modes, repeats):
            topology, options = prepare(mode)
            progress.prefix = f"{topology.run.name} {mode} {repeat + 1}/{repeats}"
            out = base / f"{mode}-{repeat + 1}" if base is not None else None
            result = execute(topology, dataclasses.replace(options, out=out), signals, progress)
            compared.runs[mode].append(result.summary)
            if found := judgement.failures(result.summary, must_check_reads=must_check_reads):
                compared.failed += [f"{mode}: {reason}" for reason in found]
                _show_details(result)
            else:
                progress.say(f"done, work {result.summary['work']['total']:,}")
            if signals.count:
                break
    compared.runs = {mode: found for mode, found in compared.runs.items() if found}
    compared.reasons = {mode: _first_reason(prepare(mode)[0], found) for mode, found in compared.runs.items()}
    return compared


def _first_reason(topology: Topology, runs: Sequence[Mapping[str, Any]]) -> str:
    return next(filter(None, (not_comparable(topology, run) for run in runs)), "")


def _show_details(result: RunResult) -> None:
    for line in result.details:
        sys.stderr.write(f"  {line}\n")
    for story in result.stories:
        sys.stderr.writelines(f"  {line}\n" for line in story.lines())


def _verdict(failed: Sequence[str]) -> int:
    for reason in failed:
        sys.stderr.write(f"asyncpf: failed: {reason}\n")
    return FAILED if failed else OK


def _title() -> None:
    setproctitle.setproctitle("asyncpf:launcher-0")
