"""`replay RUN_DIR --role host`: the machines of a recorded run once more, from what they were told and read.

Purpose: the machines are built from run.json as the run built them and fed from the input log. They must do the same in the same order:
reads, writes, observations (counters, latencies, events) and effects. With a changed rule the first difference is where behaviour departs.

Exit code 0: all the same; 1: something differs; bad input raises `UserError`.

Not handled here: what happened between the machines and the outside (that is in the log), other roles.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any, Final, NamedTuple

from host import logged
from proto import inputlog
from proto.errors import UserError
from proto.files import is_there, read_regular
from proto.inputlog import Call, InputLog, Op
from proto.machine import Machine
from proto.records import RecordTypes
from proto.rerun import Difference, Rerun, Tape
from proto.topology import Topology
from report.check.source import RUN_JSON_BYTES_MAX

OK, DIFFERENT = 0, 1
WIDTH: Final = 10
LINES_MAX: Final = 12
"""Lines of one part of a difference that are printed; JSON has them all."""


class Role(NamedTuple):
    """How to build a role's machines again: record types, acts, names of their numbers; names and machines from a topology and slots."""

    types: RecordTypes
    ops: tuple[Op, ...]
    words: Mapping[str, type[IntEnum]]
    names: Callable[[Topology], tuple[str, ...]]
    build: Callable[[Topology, Sequence[int], Tape], Sequence[Machine]]


ROLES: Final[Mapping[str, Role]] = {
    "host": Role(
        logged.TYPES,
        logged.OPS,
        logged.WORDS,
        logged.machine_names,
        lambda topology, slots, tape: logged.build_for_replay(topology, slots, tape).all(),
    )
}


class Replayed(NamedTuple):
    """What a replay found."""

    role: str
    machines: tuple[str, ...]
    status: str
    note: str
    rerun: Rerun
    difference: Difference | None
    seconds: float

    def plain(self) -> dict[str, Any]:
        """As a JSON object."""
        difference = self.difference
        return {
            "role": self.role,
            "machines": list(self.machines),
            "log": self.status,
            "note": self.note,
            "calls": self.rerun.calls,
            "events": self.rerun.events,
            "effects": self.rerun.effects,
            "acts": self.rerun.acts,
            "events_per_s": round(self.rerun.events / self.seconds) if self.seconds else 0,
            "raised": self.rerun.raised,
            "same": difference is None,
            "difference": None if difference is None else difference._asdict(),
        }


def cmd_replay(args: argparse.Namespace) -> int:
    """Replay and report."""
    shown = None if args.show is None or args.json else args.show
    found = replay(args.run_dir, args.role, args.until, shown, args.part)
    if args.json:
        print(json.dumps(found.plain(), indent=2))
    else:
        print(render(found), end="")
    return OK if found.difference is None else DIFFERENT


def replay(
    run_dir: Path, role_name: str, until: int | None = None, shown: range | None = None, part: int = 1
) -> Replayed:
    """Run the machines of a role again; prints the calls in ``shown``. ``part``: set of processes. Raises UserError."""
    role = ROLES[role_name]
    record = run_record(run_dir)
    topology, slots = _topology(run_dir, record), _slots(run_dir, record)
    log = InputLog(inputlog.path_of(run_dir, role_name, part))
    try:
        names = role.names(topology)
        _check(log, role, role_name, names, str(record.get("run_id")))
        tape = Tape(role.ops, role.words)
        machines = role.build(topology, slots, tape)
        rerun = Rerun(machines, names, role.types, tape, parks=log.description.parks)
        printer = None if shown is None else _printer(rerun, names, shown)
        began = time.perf_counter()
        difference = rerun.run(log.calls(), until, printer)
        seconds = time.perf_counter() - began
        return Replayed(role_name, names, log.status, log.note, rerun, difference, seconds)
    finally:
        log.close()


# -- the run that was recorded ------------------------------------------------------------------------------
def run_record(run_dir: Path) -> dict[str, Any]:
    """What run.json of a run says, with a topology. UserError for a file that is none."""
    path = run_dir / "run.json"
    if not is_there(path):
        raise UserError(
            "not a run directory", where=str(path), allowed="the directory of a run with --log-inputs"
        )
    data = read_regular(path, "run.json", RUN_JSON_BYTES_MAX, "that of a run with --log-inputs")
    try:
        record = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError("run.json is damaged", where=str(path)) from error
    if not isinstance(record, dict) or not isinstance(record.get("topology"), dict):
        raise UserError("run.json is damaged", where=str(path), key="topology")
    return record


def _topology(run_dir: Path, record: Mapping[str, Any]) -> Topology:
    try:
        return Topology.from_dict(record["topology"])
    except UserError as error:
        raise UserError(
            f"run.json has a topology that this version refuses: {error.message}",
            where=str(run_dir / "run.json"),
            key=error.key,
            found=error.found,
            allowed=error.allowed,
        ) from error


def _slots(run_dir: Path, record: Mapping[str, Any]) -> list[int]:
    """Blocks of each daemon's swap file: what the topology asked for is what was made."""
    topology = _topology(run_dir, record)
    expected = list(topology.swapd_pages())
    files = record.get("swap_files")
    found = [file.get("slots") for file in files if isinstance(file, dict)] if isinstance(files, list) else []
    if found != expected:
        raise UserError(
            "run.json is damaged", where=str(run_dir / "run.json"), key="swap_files", found=found, allowed=str(expected)
        )  # fmt: skip
    return expected


def _check(log: InputLog, role: Role, role_name: str, names: tuple[str, ...], run_id: str) -> None:
    """The log is of this run and of this version. Raises UserError."""
    said = log.description
    where = str(log.path)
    if said.role != role_name:
        raise UserError("the log of another role", where=where, found=said.role, allowed=role_name)
    if said.run_id != run_id:
        raise UserError("the log of another run", where=where, found=said.run_id, allowed=run_id)
    if said.machines != names:
        raise UserError("the log of another topology", where=where, found=said.machines, allowed=str(names))
    if said.shapes != tuple(role.types.shapes()) or said.ops != role.ops:
        raise UserError(
            "a log of another version: its records have other fields",
            where=where,
            found=_first_difference(said, role),
            allowed="the version that made the run",
        )


def _first_difference(said: inputlog.Description, role: Role) -> str:
    for found, here in zip([*said.shapes, *said.ops], [*role.types.shapes(), *role.ops], strict=False):
        if found != here:
            return f"{found[0]}({', '.join(found[1])})"
    return f"{len(said.shapes)} types of records and {len(said.ops)} of acts"


# -- text -----------------------------------------------------------------------------------------------------
def render(found: Replayed) -> str:
    """The report for people."""
    rerun = found.rerun
    rate = rerun.events / found.seconds if found.seconds else 0.0
    rows = [
        ("role", f"{found.role}: {len(found.machines)} machines"),
        ("log", found.note or found.status),
        ("same", f"{rerun.calls:,} calls, {rerun.effects:,} effects, {rerun.acts:,} reads, writes and observations"),
        ("speed", f"{rate:,.0f} events/s"),
    ]  # fmt: skip
    if rerun.raised:
        rows.append(("raised", f"then and now, in call {rerun.calls:,}: {rerun.raised}"))
    lines = [f"{name:<{WIDTH}}{text}" for name, text in rows]
    difference = found.difference
    if difference is None:
        lines.append("no difference")
    else:
        at_s = difference.since_start_ns / 1e9
        lines.append(
            f"\ndifferent at call {difference.number}: {difference.machine}, {at_s:.6f} s after the first"
        )
        lines += _part("input", difference.inputs)
        lines += _part("same", difference.same)
        lines += _part("expected", difference.expected)
        lines += _part("got", difference.got)
        lines.append(f"  earlier calls of {difference.machine}:")
        lines += [f"    {number}: {'; '.join(inputs)}" for number, inputs in difference.before]
        lines.append("  (fields that are 0 are left out)")
    return "\n".join(lines) + "\n"


def _part(title: str, texts: Sequence[str]) -> list[str]:
    shown = list(texts[:LINES_MAX])
    if len(texts) > LINES_MAX:
        shown.append(f"and {len(texts) - LINES_MAX} more")
    return [f"  {title if i == 0 else '':<{WIDTH}}{text}" for i, text in enumerate(shown)]


def _printer(rerun: Rerun, names: Sequence[str], shown: range) -> Callable[[Call], None]:
    def show(call: Call) -> None:
        if call.number not in shown:
            return
        lines = [f"call {call.number}: {names[call.machine]} at {call.now_ns} ns"]
        lines += _part("input", rerun.words(call))
        lines += _part("did", rerun.acts_of(call))
        lines += _part("effects", rerun.effects_of(call))
        print("\n".join(lines))

    return show
