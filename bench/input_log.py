"""What recording a host's inputs costs: the same run with and without `--log-inputs`, in turn.

    python bench/input_log.py [--topology NAME] [--seconds S] [--rounds N]

Prints faults per second of both and their ratio (medians), how much the log grows, how fast it is replayed, and the processor time
that writing down a call takes: the calls of the last log are recorded once more, from machines that do nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from host import logged
from proto.inputlog import InputLog, InputLogWriter
from proto.machine import Machine
from proto.rerun import InputRecorder

ROOT = Path(__file__).resolve().parent.parent


def launch(*words: str) -> dict[str, Any]:
    """A command's JSON; the bench ends when it fails."""
    command = [sys.executable, str(ROOT / "launch.py"), *words, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    if done.returncode:
        sys.exit(f"{' '.join(words)}: exit code {done.returncode}\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


class _Idle(Machine):
    """Has its effects ready."""

    effects: list[Any]

    def on(self, events: Iterable[Any], now_ns: int) -> list[Any]:
        """The recorded effects."""
        del events, now_ns
        return self.effects


def cost_of_a_call_us(path: Path, scratch: Path) -> float:
    """Processor time of `InputRecorder.on` beyond the machine's, acts included, in us: best of three."""
    log = InputLog(path)
    read = logged.TYPES.read
    calls = [
        (c.machine, c.now_ns, [read(p) for p in c.inputs], list(c.acts), [read(p) for p in c.effects]) for c in log.calls()
    ]  # fmt: skip
    log.close()
    best = float("inf")
    for number in range(3):
        writer = InputLogWriter(scratch / f"{number}.bin", log.description)
        recorder = InputRecorder(logged.TYPES, writer)
        machines = [_Idle() for _ in log.description.machines]
        recorder.watch(machines)
        began = time.process_time()
        for index, now_ns, events, acts, effects in calls:
            machine = machines[index]
            machine.effects = effects
            recorder.on(machine, events, now_ns)
            recorder.acts.extend(acts)
        best = min(best, time.process_time() - began)
        writer.close()
    return best / len(calls) * 1e6


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--topology", default="quickstart")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    rates: dict[str, list[float]] = {"plain": [], "recorded": []}
    sizes, replays, costs = [], [], []
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
                    costs.append(cost_of_a_call_us(log, Path(folder)))
    plain, recorded = (statistics.median(rates[what]) for what in ("plain", "recorded"))
    print(f"faults/s: plain {plain:,.0f}, recorded {recorded:,.0f}, ratio {recorded / plain:.3f}")
    print(
        f"log: {statistics.median(sizes):,.0f} bytes per fault; replay: {statistics.median(replays):,.0f} events/s"
    )
    print(f"{min(costs):.1f} us of processor time to write down a call")
    return 0


if __name__ == "__main__":
    sys.exit(main())
