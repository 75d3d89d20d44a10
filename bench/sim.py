"""How fast the simulated world is: fault lifecycles, faults and events per second of CPU time, with rules, event log and checker on.

    python bench/sim.py [--seeds A..B] [--longer N] [--repeat N]

A lifecycle is a fault that needed a page from swap, from its exit to its end, however it was served; faults are all exits to the host for
a missing page, those that only wanted a page of zeros among them. Drawn plans are short, and most of their faults fill memory for the first
time; `--longer` multiplies the operations of every task, so that paging dominates. Medians over the repeats; CPU time, so other load on the
machine counts only through caches and clock rates.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launcher.sim_verdict import run_plan
from sim.draw import draw
from sim.plan import SimPlan


def _longer(plan: SimPlan, times: int) -> SimPlan:
    vms = tuple(
        replace(vm, tasks=tuple(replace(task, ops=task.ops * times) for task in vm.tasks)) for vm in plan.vms
    )
    return replace(plan, vms=vms)


def main() -> int:
    """Print one line per repeat and the medians."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", default="0..199", help="A..B (default: 0..199)")
    parser.add_argument(
        "--longer", type=int, default=1, metavar="N", help="operations per task, times this (default: 1)"
    )
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    first, last = (int(word) for word in args.seeds.split(".."))
    plans = [_longer(draw(seed), args.longer) for seed in range(first, last + 1)]
    run_plan(plans[0])
    rates = []
    for _ in range(args.repeat):
        gc.collect()
        gc.disable()
        began = time.process_time()
        outcomes = [run_plan(plan) for plan in plans]
        seconds = time.process_time() - began
        gc.enable()
        failed = sum(bool(outcome.failures) for outcome in outcomes)
        sums = [sum(getattr(one, name) for one in outcomes) for name in ("lifecycles", "faults", "events")]
        rates.append([n / seconds for n in sums])
        print(
            f"{len(plans)} seeds, {failed} failed, {seconds:.1f} s CPU: {sums[0]} lifecycles, {sums[1]} faults, {sums[2]} events"
        )
    medians = [statistics.median(column) for column in zip(*rates, strict=True)]
    print(
        f"per second of CPU time: {medians[0]:,.0f} lifecycles, {medians[1]:,.0f} faults, {medians[2]:,.0f} events"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
