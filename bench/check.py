"""Events per second of the checker, as `launch.py check` reads and checks a run: files, merge and rules.

    python bench/check.py [--events N] [--vcpus N] [--rounds N] [--run RUN_DIR]

Without a run directory it writes one: whole lives of faults on every vCPU, as a run in mode interrupt logs them, memory events
between them. The first check of a process loads the compiled rules; it is not counted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from proto.trace import Kind, TraceWriter
from report.check.api import check_run
from report.check.checker import Checker
from report.check.online import OnlineCheck
from report.check.source import open_run

LIFE = (
    (Kind.TRY_ASYNC_GET_PAGE, 0, 0x1000, None, 0), (Kind.ASYNC_PF_NOT_PRESENT, 1, 0x1000, 0, 0), (Kind.SLOT_WRITE, 0, 0, 1, 0),
    (Kind.INJ, 1, 1, 0, 23), (Kind.SWAP_IN, 0, 0, 0, 0), (Kind.G_CLEAR, 1, 0, 1, 0), (Kind.G_NP, 1, 1, None, 3),
    (Kind.G_WAIT, 1, 1, 0, 0), (Kind.G_SLEEP, 1, 1, 0, 0), (Kind.SWAP_IN_DONE, 0, 0, 0, 0),
    (Kind.ASYNC_PF_COMPLETED, 1, 0, 0, 0), (Kind.REQ, 0, 2, 0, 0), (Kind.SLOT_READ0, 0, 4, 0, 0), (Kind.PREFAULT, 1, 0, 1, 0),
    (Kind.ASYNC_PF_READY, 1, 0, 0, 0), (Kind.SLOT_WRITE, 1, 4, None, 0), (Kind.APIC_ACCEPT_IRQ, 1, 0xF3, 0, 0),
    (Kind.G_IRQ, 0, 0xF3, 0, 0), (Kind.G_WAKE, 1, 1, 0, 0), (Kind.G_CLEAR, 1, 4, None, 0), (Kind.ACK, 0, 1, 0, 0),
    (Kind.MSR_WR, 0, 0x4B564D07, 1, 0), (Kind.SWITCH, 0, 1, 1, 1), (Kind.G_RESUME, 1, 1, 0, 0),
)  # fmt: skip
"""(kind, has the token, a, b, c); b None: the token."""
BOOT = ((0x80F, 0x1FF), (0x4B564D06, 0xF3), (0x4B564D02, 0x9009))


def write_run(run_dir: Path, events: int, vcpus: int) -> None:
    """A run directory with about that many events."""
    folder = run_dir / "events"
    folder.mkdir()
    size = 64 * (events + 1000)
    writers = [TraceWriter(folder / "host.bin", 0, size)]
    writers += [TraceWriter(folder / f"vcpu-{cpu}.bin", 1 + cpu, size) for cpu in range(vcpus)]
    lamport = 0
    for cpu in range(vcpus):
        for index, value in BOOT:
            lamport = writers[0].event(Kind.MSR_WR, cpu, a=index, b=value)
    for number in range(1, 1 + events // (len(LIFE) * vcpus)):
        for cpu in range(vcpus):
            token = (number & 0xFFFFF) << 12 | cpu
            for kind, with_token, a, b, c in LIFE:
                writer = writers[1 + cpu if 64 <= kind < 96 else 0]
                writer.observe(lamport)
                lamport = writer.event(
                    kind, cpu, 0, token if with_token else 0, a, token if b is None else b, c
                )
    for writer in writers:
        writer.close()
    record = {"topology": {"run": {"profile": "mainline"}}, "ended": "finished"}
    (run_dir / "run.json").write_text(json.dumps(record))


def check_online(run_dir: Path, profile: str) -> float:
    """Events per second as a run's own check takes them: read, merge, rules, and back to the writer."""
    check = OnlineCheck(run_dir / "events", profile, ["host"])
    began = time.perf_counter()
    while check.turn():
        pass
    rate = check.online / (time.perf_counter() - began)
    check.close()
    return rate


def main() -> int:
    """Measure and print; 1 when the run does not keep the invariants (then the figure is of another path)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=1_000_000)
    parser.add_argument("--vcpus", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--run", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="asyncpf-bench-") as folder:
        run_dir = args.run or Path(folder)
        if args.run is None:
            write_run(run_dir, args.events, args.vcpus)
        began = time.perf_counter()
        verdict = check_run(run_dir)
        first_s = time.perf_counter() - began
        whole, rules, online = [], [], []
        for _ in range(args.rounds):
            began = time.perf_counter()
            check_run(run_dir)
            whole.append(verdict.events / (time.perf_counter() - began))
            online.append(check_online(run_dir, verdict.profile))
            windows = list(open_run(run_dir).windows())
            checker = Checker(verdict.profile)
            began = time.perf_counter()
            for window in windows:
                checker.feed(window)
            rules.append(verdict.events / (time.perf_counter() - began))
    print(f"events   {verdict.events:,}, {len(verdict.violated)} invariants violated")
    print(f"first    {first_s:.2f} s, compiled rules loaded or made")
    print(f"check    {statistics.median(whole) / 1e6:.1f} M events/s: files, merge, rules")
    print(f"online   {statistics.median(online) / 1e6:.1f} M events/s: as while a run is under way")
    print(f"rules    {statistics.median(rules) / 1e6:.1f} M events/s: rules alone")
    return 0 if verdict.ok else 1


if __name__ == "__main__":
    sys.exit(main())
