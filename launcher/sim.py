"""The command `sim`: random runs of the whole emulator in virtual time, one per seed.

Purpose: draw a plan from each seed (or take it from a file, or from a topology), run it, say what it was and whether everything held, keep
its events where they are wanted, and make a failing one small.

Invariants: a seed's parameters are printed before its run when it runs alone; a failing seed prints the command that repeats it and the
file of the shrunk plan; the same seed gives the same lines and the same files; exit code 1 when one failed. A seed of which a planned
fault never happened does not count for that fault.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from launcher.commands import find_topology
from launcher.sim_verdict import SimOutcome, run_plan
from proto.errors import UserError
from proto.events import EVENT
from proto.topology import Topology
from proto.topology import load as load_topology
from proto.trace import event_dicts
from sim import plan as plans
from sim.draw import draw
from sim.from_topology import plan_of
from sim.plan import FAULTS, SimPlan
from sim.shrink import shrink

OK, FAILED = 0, 1
SHOWN_MAX: Final = 5
"""Failing seeds that are told in full and made small."""


@dataclass(slots=True)
class _Totals:
    """What a range of seeds came to."""

    seeds: int = 0
    faults: int = 0
    lifecycles: int = 0
    events: int = 0
    parks: int = 0
    reads_checked: int = 0
    oom_kills: int = 0
    oom_seeds: int = 0
    failed: list[int] = field(default_factory=list)
    passed_with: Counter[str] = field(default_factory=Counter)
    unfired: Counter[str] = field(default_factory=Counter)

    def take(self, outcome: SimOutcome) -> None:
        """Count one run."""
        self.seeds += 1
        self.faults += outcome.faults
        self.lifecycles += outcome.lifecycles
        self.events += outcome.events
        self.parks += outcome.parks
        self.reads_checked += outcome.reads_checked
        self.oom_kills += outcome.oom_kills
        self.oom_seeds += bool(outcome.oom_kills)
        if outcome.failures:
            self.failed.append(outcome.plan.seed)
            return
        # A seed counts once for a kind, and only where all that it planned of it has happened.
        self.passed_with.update(kind for kind in outcome.fired if not outcome.unfired[kind])
        self.unfired.update(outcome.unfired.keys())

    def plain(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "seeds": self.seeds, "faults": self.faults, "lifecycles": self.lifecycles, "events": self.events, "parks": self.parks,
            "reads_checked": self.reads_checked, "oom_kills": self.oom_kills, "oom_seeds": self.oom_seeds,
            "failed": self.failed, "passed": not self.failed,
            "passed_with": dict(sorted(self.passed_with.items())), "unfired": dict(sorted(self.unfired.items())),
        }  # fmt: skip


def cmd_sim(args: argparse.Namespace) -> int:
    """Run the seeds; a single one is shown in full, ranges as totals and failures."""
    totals = _Totals()
    alone = args.seeds is None and args.minutes is None
    # Machines make no cycles; a collection between two runs takes what an exception may have left.
    gc.disable()
    started = time.process_time()
    try:
        for number, plan in enumerate(_plans(args)):
            if alone and not args.json:
                _say(" ".join(f"{key}={value}" for key, value in plan.parameters().items()))
            outcome = run_plan(plan)
            totals.take(outcome)
            if args.out is not None:
                _keep(args.out if alone else args.out / str(plan.seed), outcome)
            if outcome.failures and len(totals.failed) <= SHOWN_MAX:
                _tell(outcome, args)
            if number % 64 == 0:
                gc.collect()
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
    seconds = time.process_time() - started
    if args.json:
        json.dump(totals.plain(), sys.stdout)
        sys.stdout.write("\n")
    else:
        _summary(totals, seconds)
    return FAILED if totals.failed or not totals.seeds else OK


def _plans(args: argparse.Namespace) -> Iterator[SimPlan]:
    """The plans to run, in order."""
    faults = FAULTS if args.faults is None else args.faults
    if args.plan is not None:
        yield plans.load(args.plan)
        return
    topology = None
    if args.topology is not None:
        topology = load_topology(
            find_topology(args.topology), (), mode=None, profile=args.profile, seconds=args.seconds, seed=None
        )
        _say_what_is_left_out(topology)
    for seed in _seeds(args):
        yield draw(seed, args.profile, faults) if topology is None else plan_of(topology, seed, faults)


def _say_what_is_left_out(topology: Topology) -> None:
    tables = (("fault", topology.fault), ("event", topology.event))
    if left := [f"{len(found)} [[{name}]]" for name, found in tables if found]:
        sys.stderr.write(
            f"{topology.file}: {' and '.join(left)} tables are for real processes and left out here;"
            " each seed draws what goes wrong (--faults)\n"
        )


def _seeds(args: argparse.Namespace) -> Iterable[int]:
    if args.minutes is not None:
        until = time.monotonic() + 60 * args.minutes
        return itertools.takewhile(lambda _: time.monotonic() < until, itertools.count(args.seed))
    return (args.seed,) if args.seeds is None else args.seeds


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _summary(totals: _Totals, seconds: float) -> None:
    rate = totals.lifecycles / seconds if seconds else 0.0
    _say(
        f"{totals.seeds} seeds, {len(totals.failed)} failed; {totals.lifecycles} fault lifecycles, {totals.faults} faults,"
        f" {totals.events} events, {totals.parks} parked steps, {totals.reads_checked} reads checked,"
        f" {seconds:.1f} s of CPU time ({rate:.0f} lifecycles/s)"
    )
    if totals.oom_kills:
        _say(f"swap was full in {totals.oom_seeds} seeds: {totals.oom_kills} kills for memory")
    if totals.passed_with:
        _say("passed with: " + ", ".join(f"{kind} {n}" for kind, n in sorted(totals.passed_with.items())))
    if totals.unfired:
        _say(
            "planned, never happened: "
            + ", ".join(f"{kind} {n}" for kind, n in sorted(totals.unfired.items()))
        )


def _tell(outcome: SimOutcome, args: argparse.Namespace) -> None:
    """A failing seed, how to repeat it, and a small plan that fails the same way. On standard error, so that --json stays JSON."""
    plan = outcome.plan
    sys.stderr.write(f"seed {plan.seed} failed:\n" + "".join(f"  {line}\n" for line in outcome.failures))
    sys.stderr.write("  " + " ".join(f"{key}={value}" for key, value in plan.parameters().items()) + "\n")
    sys.stderr.write(f"  again: python3 launch.py sim {_words(plan, args)}\n")
    small, failures = shrink(plan, lambda one: run_plan(one).failures)
    path = (args.out or Path()) / f"seed-{plan.seed}.toml"
    _write(path, "# " + "\n# ".join(failures) + "\n" + plans.to_toml(small))
    sys.stderr.write(
        f"  shrunk to {len(small.cpus)} vCPUs, {small.ops} operations, {len(small.faults)} faults: {failures[0]}\n"
    )
    sys.stderr.write(f"  shrunk: python3 launch.py sim --plan {path}\n")


def _words(plan: SimPlan, args: argparse.Namespace) -> str:
    """Arguments that give this plan again."""
    if args.plan is not None:
        return f"--plan {args.plan}"
    words = [f"--seed {plan.seed}"]
    words += [
        f"--{name} {value}"
        for name in ("topology", "profile", "seconds")
        if (value := getattr(args, name)) is not None
    ]
    if args.faults is not None:
        words.append(f"--faults {','.join(args.faults) or 'none'}")
    return " ".join(words)


def _keep(folder: Path, outcome: SimOutcome) -> None:
    """The plan and its events."""
    _write(folder / "plan.toml", plans.to_toml(outcome.plan))
    lines = (json.dumps(plain) for plain in event_dicts(np.frombuffer(outcome.raw, EVENT)))
    _write(folder / "events.jsonl", "".join(f"{line}\n" for line in lines))


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except OSError as error:
        raise UserError("cannot be written", where=str(path), found=error.strerror) from error
