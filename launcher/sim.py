"""The command `sim`: random runs in virtual time, one per seed.

Purpose: run seeds (sim/seeds.py), print what each drew and whether everything held, keep the events where they are wanted.

Invariants: a seed's parameters are printed before its run; a failing seed prints the command that repeats it; exit code 1 when one
failed; the same seed gives the same lines and the same events file.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Final

from proto.errors import UserError
from proto.machine import MachineError
from sim import seeds
from sim.events import Event
from sim.world import SimulationError

OK, FAILED = 0, 1
FAILURES_SHOWN: Final = 10


def cmd_sim(args: argparse.Namespace) -> int:
    """Run the seeds; single ones are shown in full, ranges as a line of totals and the failures."""
    wanted = range(args.seed, args.seed + 1) if args.seeds is None else args.seeds
    alone = len(wanted) == 1
    started = time.monotonic()
    failed: list[int] = []
    totals = {"seeds": len(wanted), "faults": 0, "events": 0, "parks": 0}
    for seed in wanted:
        drawn = seeds.draw(seed, args.profile)
        if alone and not args.json:
            sys.stdout.write(" ".join(f"{k}={v}" for k, v in drawn.parameters().items()) + "\n")
            sys.stdout.flush()
        failures = _one(seed, args, totals, alone=alone)
        if failures:
            failed.append(seed)
            if len(failed) <= FAILURES_SHOWN:
                _tell(drawn, failures, args)
    seconds = time.monotonic() - started
    if args.json:
        json.dump({**totals, "failed": failed, "passed": not failed}, sys.stdout)
        sys.stdout.write("\n")
    else:
        rate = totals["faults"] / seconds if seconds else 0.0
        sys.stdout.write(
            f"{totals['seeds']} seeds, {len(failed)} failed; {totals['faults']} faults, {totals['events']} events, "
            f"{totals['parks']} parked steps in {seconds:.1f} s ({rate:.0f} faults/s)\n"
        )
    return FAILED if failed else OK


def _one(seed: int, args: argparse.Namespace, totals: dict[str, int], *, alone: bool) -> list[str]:
    """Run one seed; returns what failed."""
    try:
        got = seeds.run_seed(seed, args.profile)
    except (MachineError, SimulationError) as error:
        return [f"{type(error).__name__}: {error}"]
    totals["faults"] += sum(event.name == "request" for event in got.outcome.events)
    totals["events"] += len(got.outcome.events)
    totals["parks"] += got.parks.total()
    if args.out is not None:
        _write(
            args.out / "events.jsonl" if alone else args.out / str(seed) / "events.jsonl", got.outcome.events
        )
    return list(got.failures)


def _tell(drawn: seeds.Draw, failures: list[str], args: argparse.Namespace) -> None:
    """On standard error, so that --json stays JSON."""
    profile = f" --profile {args.profile}" if args.profile else ""
    sys.stderr.write(f"seed {drawn.seed} failed: {'; '.join(failures)}\n")
    sys.stderr.write("  " + " ".join(f"{k}={v}" for k, v in drawn.parameters().items()) + "\n")
    sys.stderr.write(f"  again: python3 launch.py sim --seed {drawn.seed}{profile} --out DIR\n")


def _write(path: Path, events: tuple[Event, ...]) -> None:
    """One JSON object per line."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(event.plain()) + "\n" for event in events))
    except OSError as error:
        raise UserError("cannot be written", where=str(path), found=error.strerror) from error
