"""What a second copy of each page costs in faults per second, and what hedged reads buy when one of two daemons is slow.

    python bench/replicas.py [--rounds N] [--seconds S] [--slow-us US] [--sigma S] [--hedge-ms MS]
        [--threads N] [--rows unpaced|slow]

Real runs of topologies/replicas.toml, the rows in turn, several rounds over; the median of each is printed. In the rows "slow" one of the
two daemons answers reads after a lognormal time (median --slow-us). Reads go to the daemon with fewer requests to answer, with hedging or
without: rows two and three of these differ by the second request only.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, Final, NamedTuple

ROOT: Final = Path(__file__).resolve().parent.parent
RUN_BOUND_S: Final = 300
"""Far above what a run of a few seconds needs on a busy machine."""


class Sample(NamedTuple):
    """Figures of one run: faults and swap-ins per second, swap-in latency in us, hedges that were made and won."""

    faults_per_s: float
    reads_per_s: float
    p50_us: float
    p99_us: float
    hedged: float
    wins: float


def rows(args: argparse.Namespace) -> dict[str, list[str]]:
    """Name of each row and what it sets."""
    one = ["host.replicas=1", "host.hedge_ms=0"]
    two = ["host.replicas=2", "host.hedge_ms=0"]
    hedged = ["host.replicas=2", f"host.hedge_ms={args.hedge_ms:g}"]
    slow = [
        "swapd.1.model=lognormal",
        f"swapd.1.model_read_us={args.slow_us:g}",
        f"swapd.1.model_sigma={args.sigma:g}",
    ]
    slow += ["swapd.1.model_from_barrier=true", f"vm.0.task.0.fault_threads={args.threads}"]
    fast = ["vm.rate_ops_per_s=0"]
    found = {
        "unpaced, one copy": one + fast,
        "unpaced, two copies": two + fast,
        "slow, one copy": one + slow,
        "slow, two copies": two + slow,
        "slow, two copies, hedged": hedged + slow,
    }
    return {name: changes for name, changes in found.items() if name.startswith(args.rows)}


def run(changes: list[str], seconds: float) -> Sample:
    """One run. Raises when it did not finish as it should."""
    words = [word for change in changes for word in ("--set", change)]
    command = [
        sys.executable,
        str(ROOT / "launch.py"),
        "run",
        "replicas",
        "--json",
        "--seconds",
        f"{seconds:g}",
        *words,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=RUN_BOUND_S, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    summary: dict[str, Any] = json.loads(done.stdout)
    latency = summary["latency_us"]["swap_in"]
    replicas = summary["replicas"] or {"hedged": 0, "hedge_wins": 0}
    return Sample(
        summary["faults"]["nested"] / summary["seconds"],
        summary["swap"]["in_pages"] / summary["seconds"],
        latency["p50"],
        latency["p99"],
        replicas["hedged"],
        replicas["hedge_wins"],
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--slow-us", type=float, default=20_000.0)
    parser.add_argument("--sigma", type=float, default=1.5)
    parser.add_argument("--threads", type=int, default=16, help="fault threads in the rows 'slow'")
    parser.add_argument("--hedge-ms", type=float, default=50.0)
    parser.add_argument(
        "--rows", default="", choices=("", "unpaced", "slow"), help="only these; all by default"
    )
    args = parser.parse_args()
    found: dict[str, list[Sample]] = {name: [] for name in rows(args)}
    for _ in range(args.rounds):
        for name, changes in rows(args).items():
            found[name].append(run(changes, args.seconds))
    sys.stdout.write(
        f"{'':<26} {'faults/s':>9} {'reads/s':>9} {'p50 ms':>8} {'p99 ms':>8} {'hedged':>7} {'won':>6}\n"
    )
    for name, samples in found.items():
        middle = Sample(*(statistics.median(column) for column in zip(*samples, strict=True)))
        sys.stdout.write(
            f"{name:<26} {middle.faults_per_s:>9.0f} {middle.reads_per_s:>9.0f} {middle.p50_us / 1000:>8.2f}"
            f" {middle.p99_us / 1000:>8.2f} {middle.hedged:>7.0f} {middle.wins:>6.0f}\n"
        )


if __name__ == "__main__":
    main()
