"""Runs of the real emulator through its command line, as a user starts it, and what is looked at in them.

Every run is small: the amount of work is given in operations, so that nothing depends on how fast the machine is. Waits are bounded;
the bounds are for a busy machine and say nothing about what is promised.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest

from launcher import cli
from proto.trace import Events, Kind, read_run
from tests import processes

ROOT: Final = Path(__file__).resolve().parents[2]
LAUNCH: Final = ROOT / "launch.py"
RUN_BOUND_S: Final = 240.0
"""The first run on a machine compiles every kernel."""
END_BOUND_S: Final = 30.0
POLL_S: Final = 0.01
TIMEOUT_S: Final = 300
"""Of a whole test."""

HOST: Final = """
[host]
allowance_mib = 8
zero_pages = false
"""

MIXED: Final = (
    "[run]\nseconds = 40.0\n"
    + HOST.replace("allowance_mib = 8", "allowance_mib = 3")
    + """
[[vm]]
vcpus = 2
memory_mib = 32
rate_ops_per_s = 200_000

[[vm.task]]
workload = "uniform"
count = 2
memory_kib = 4096
ops = 1200

[[vm.task]]
workload = "stamp"
memory_kib = 1024
ops = 1200

[[vm.task]]
workload = "syscalls"
count = 2
memory_kib = 3072
ops = 3000
"""
)
"""User-mode and kernel-mode faults, five times the memory that the host gives; ends when every task has done its operations."""

BM: Final = (
    HOST
    + """
[[vm]]
vcpus = 2
memory_mib = 32
rate_ops_per_s = 50_000

[[vm.task]]
workload = "bm"
memory_kib = 16_384
fault_threads = 2
work_threads = 2

[[vm.task]]
workload = "stamp"
memory_kib = 2048
"""
)
"""The benchmark of 2010 and a checked task: runs until it is stopped."""


@dataclass(frozen=True, slots=True)
class Ended:
    """A command that has ended. `out`: its run directory, if it was given one."""

    code: int
    stdout: str
    stderr: str
    out: Path | None = None

    @property
    def summary(self) -> dict[str, Any]:
        """What `--json` printed."""
        found: dict[str, Any] = json.loads(self.stdout)
        return found

    def events(self) -> Events:
        """Every event of the run; all files must be whole."""
        assert self.out is not None
        run = read_run(self.out)
        assert run.notes == []
        return run.events


class Launched:
    """A command that runs; `said` grows with what it writes to standard error."""

    def __init__(
        self,
        words: Sequence[str],
        out: Path | None = None,
        program: Path = LAUNCH,
        before: Sequence[str] = (),
    ) -> None:
        """before: words in front of the command, of a program that then becomes it."""
        self.out = out
        self.said: list[str] = []
        self.process = subprocess.Popen(
            [*before, sys.executable, str(program), *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._heard = threading.Condition()
        self._deaf = False
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._heard:
                self.said.append(line.rstrip("\n"))
                self._heard.notify_all()
        with self._heard:
            self._deaf = True
            self._heard.notify_all()

    def wait_for(self, ending: str, timeout_s: float = RUN_BOUND_S) -> None:
        """Until it has said a line that ends so."""
        with self._heard:
            self._heard.wait_for(lambda: self._has_said(ending) or self._deaf, timeout_s)
            assert self._has_said(ending), f"never said {ending!r}: {self.said}"

    def _has_said(self, ending: str) -> bool:
        return any(line.endswith(ending) for line in self.said)

    def descendants(self) -> set[int]:
        """Every process below the launcher."""
        found: set[int] = set()
        todo = [self.process.pid]
        while todo:
            new = processes.children(todo.pop()) - found
            found |= new
            todo += new
        return found

    def pid_of(self, name: str, timeout_s: float = END_BOUND_S) -> int:
        """The living process with the title asyncpf:NAME; it may be about to be forked."""
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            found = [pid for pid in self.descendants() if processes.command_line(pid) == f"asyncpf:{name}"]
            if found:
                assert len(found) == 1
                return found[0]
            time.sleep(POLL_S)
        titles = {pid: processes.command_line(pid) for pid in self.descendants()}
        raise AssertionError(f"there is no {name}: {titles}")

    def end(self, timeout_s: float = RUN_BOUND_S) -> Ended:
        """Wait for its end."""
        assert self.process.stdout is not None
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"did not end in {timeout_s} s: {self.said}") from None
        self._listener.join(END_BOUND_S)
        text = self.process.stdout.read()
        return Ended(self.process.returncode, text, "\n".join(self.said) + "\n", self.out)

    def stop(self) -> None:
        """Whatever state it is in: gone afterwards, with what it started."""
        below = self.descendants()
        self.process.kill()
        self.process.wait(END_BOUND_S)
        processes.wait_gone(below, END_BOUND_S)
        self._listener.join(END_BOUND_S)
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()


@dataclass(slots=True)
class Runner:
    """Starts commands for one test and sees to their end."""

    folder: Path
    _started: list[Launched] = field(default_factory=list)

    def file(self, text: str, name: str = "small") -> Path:
        """A topology file."""
        path = self.folder / f"{name}.toml"
        path.write_text(text)
        return path

    def start(self, *words: str, out: Path | None = None, program: Path = LAUNCH) -> Launched:
        """Start a command and do not wait for it."""
        extra = ["--out", str(out)] if out is not None else []
        launched = Launched([*words, *extra], out, program)
        self._started.append(launched)
        return launched

    def command(self, *words: str) -> Ended:
        """Run a command to its end."""
        return self.start(*words).end()

    def run(self, text: str, *words: str, command: str = "run", name: str = "small") -> Ended:
        """Run a topology to its end, with a run directory and `--json`."""
        path = self.file(text, name)
        return self.start(command, str(path), "--json", *words, out=self.folder / f"{name}-out").end()

    def stop_all(self) -> None:
        """No process of this test stays."""
        for launched in self._started:
            launched.stop()


class Caller:
    """Calls commands that start nothing, in this process. folder: for files."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self._capsys = capsys

    def command(self, *words: str) -> Ended:
        """Call a command."""
        code = cli.main(words)
        shown = self._capsys.readouterr()
        return Ended(code, shown.out, shown.err)

    def run(self, path: Path, out: Path, *words: str) -> Ended:
        """Call `run` with a run directory."""
        return self.command("run", str(path), *words, "--out", str(out))

    def file(self, text: str) -> Path:
        """A topology file."""
        path = self.folder / "small.toml"
        path.write_text(text)
        return path


def of_kind(events: Events, kind: Kind) -> Events:
    """The events of one kind, in order."""
    found: Events = events[events["kind"] == kind]
    return found


def assert_good(ended: Ended) -> dict[str, Any]:
    """The run finished, everything that was checked held, and something was checked; returns the summary."""
    assert ended.code == 0, ended.stderr
    summary = ended.summary
    assert summary["ended"] == "finished"
    assert summary["integrity"]["reads_checked"] > 0
    assert summary["integrity"]["errors"] == 0
    assert summary["tasks"]["killed"] == summary["tasks"]["unfinished"] == 0
    assert summary["totals"]["bad_messages"] == 0
    return summary


def open_files(pid: int) -> dict[int, str]:
    """Descriptors of a process and what they lead to."""
    found = {}
    for path in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found[int(path.name)] = os.readlink(path)  # noqa: PTH115 - the target is text, not a path
        except FileNotFoundError:
            continue
    return found


def mapped_files(pid: int) -> set[str]:
    """Names of the files that a process maps."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return {fields[5] for line in lines if len(fields := line.split(maxsplit=5)) == 6}
