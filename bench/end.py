"""How fast a run ends when a process of it is killed: to the message that says who it was, and to the end of the command.

    python bench/end.py --vcpus 256 --kill vcpu-100 --repeat 3

Each time a stress is started, a process is killed with SIGKILL some seconds after the barrier, and it is looked whether any process is
left. Prints one line per kill.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO, Final

LAUNCH: Final = Path(__file__).resolve().parent.parent / "launch.py"
START_BOUND_S: Final = 600.0
END_BOUND_S: Final = 120.0
RUNS_FOR_S: Final = 3.0


class Run:
    """A stress whose lines on standard error are noted with their times."""

    def __init__(self, vcpus: int, vms: int) -> None:
        """Start it."""
        words = ["stress", "--vcpus", str(vcpus), "--vms", str(vms), "--seconds", "600", "--json"]
        self.process = subprocess.Popen(
            [sys.executable, str(LAUNCH), *words],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: list[tuple[float, str]] = []
        self.running = threading.Event()
        assert self.process.stderr is not None
        self._listener = threading.Thread(target=self._listen, args=(self.process.stderr,), daemon=True)
        self._listener.start()

    def _listen(self, stream: IO[str]) -> None:
        for line in stream:
            self.lines.append((time.monotonic(), line.rstrip()))
            if line.rstrip().endswith(": running"):
                self.running.set()

    def processes(self) -> dict[str, int]:
        """Process ids by title, of all below the launcher."""
        found, todo = {}, [self.process.pid]
        while todo:
            for path in Path(f"/proc/{todo.pop()}/task").glob("*/children"):
                for pid in map(int, path.read_text().split()):
                    found[title(pid)] = pid
                    todo.append(pid)
        return found

    def kill(self, name: str) -> str:
        """Kill one and wait for the end of all; what is to be printed."""
        others = self.processes()
        began_s = time.monotonic()
        os.kill(others[f"asyncpf:{name}"], signal.SIGKILL)
        self.process.wait(END_BOUND_S)
        ended_s = time.monotonic() - began_s
        self._listener.join(END_BOUND_S)
        said_s = next(at for at, line in self.lines if f"{name} killed by SIGKILL" in line) - began_s
        left = sum(bool(title(pid)) for pid in others.values())
        return (
            f"{name} of {len(others)} processes: named after {1000 * said_s:.0f} ms, ended after {1000 * ended_s:.0f} ms,"
            f" {left} processes left, load {os.getloadavg()[0]:.1f}"
        )


def title(pid: int) -> str:
    """Title of a process, "" when it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def main() -> None:
    """Kill as often as asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vcpus", type=int, default=8)
    parser.add_argument("--vms", type=int, default=1)
    parser.add_argument("--kill", default="vcpu-1", metavar="NAME", help="host-0, vcpu-N or zygote-0")
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    for _ in range(args.repeat):
        run = Run(args.vcpus, args.vms)
        try:
            if not run.running.wait(START_BOUND_S):
                sys.exit("the run did not start")
            time.sleep(RUNS_FOR_S)
            print(run.kill(args.kill), flush=True)
        finally:
            run.process.kill()
            run.process.wait()


if __name__ == "__main__":
    main()
