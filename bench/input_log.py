"""What recording a host's inputs costs: the same run with and without `--log-inputs`, in turn.

    python bench/input_log.py [--topology NAME] [--seconds S] [--rounds N]

Prints faults per second of both and their ratio (medians), how much the log grows, and how fast it is replayed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def launch(*words: str) -> dict[str, Any]:
    """A command's JSON; the bench ends when it fails."""
    command = [sys.executable, str(ROOT / "launch.py"), *words, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    if done.returncode:
        sys.exit(f"{' '.join(words)}: exit code {done.returncode}\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--topology", default="quickstart")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    rates: dict[str, list[float]] = {"plain": [], "recorded": []}
    sizes, replays = [], []
    for number in range(args.rounds):
        order = ("plain", "recorded") if number % 2 == 0 else ("recorded", "plain")
        for what in order:
            with tempfile.TemporaryDirectory(prefix="asyncpf-bench-") as folder:
                out = Path(folder) / "run"
                words = ["--log-inputs"] if what == "recorded" else []
                summary = launch(
                    "run", args.topology, "--seconds", str(args.seconds), "--out", str(out), *words
                )
                rates[what].append(summary["faults"]["nested"] / summary["seconds"])
                if words:
                    log = out / "inputs" / "host.bin"
                    replayed = launch("replay", str(out))
                    sizes.append(log.stat().st_size / summary["faults"]["nested"])
                    replays.append(replayed["events_per_s"])
    plain, recorded = (statistics.median(rates[what]) for what in ("plain", "recorded"))
    print(f"faults/s: plain {plain:,.0f}, recorded {recorded:,.0f}, ratio {recorded / plain:.3f}")
    print(
        f"log: {statistics.median(sizes):,.0f} bytes per fault; replay: {statistics.median(replays):,.0f} events/s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
