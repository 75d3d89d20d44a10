"""Whoever is killed, however a run is ended: nothing is left, and the summary says what happened.

The checks for processes, files in the temporary directory and in /dev/shm are those of tests/conftest.py, which look after every
test; here the launcher's end is waited for and what it says is looked at. Whoever may not die is killed with the real roles
(tests/e2e/test_leftovers.py); here are the moments and the deafness that those have not.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.zygote import LAUNCHER_DIED
from tests import processes
from tests.launcher.drive import ROOT

START_S = 40.0
END_S = 30.0
"""Bound on waiting, not on what is promised: the machine may be busy."""


class _Launched:
    """A launcher with fake roles, started with `_launched`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.said: list[str] = []

    def wait_for(self, line: str) -> None:
        """Read its progress until it says `line`."""
        assert self.process.stderr is not None
        deadline_s = time.monotonic() + START_S
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stderr, selectors.EVENT_READ)
            while line not in self.said:
                assert selector.select(deadline_s - time.monotonic()), f"never said {line!r}: {self.said}"
                text = self.process.stderr.readline()
                assert text, f"ended without saying {line!r}: {self.said}"
                self.said.append(text.rstrip("\n"))

    def pid_of(self, name: str) -> int:
        """The process with the title asyncpf:NAME among the descendants."""
        pids = [pid for pid in self.descendants() if processes.command_line(pid) == f"asyncpf:{name}"]
        assert len(pids) == 1, [processes.command_line(pid) for pid in self.descendants()]
        return pids[0]

    def descendants(self) -> set[int]:
        zygotes = processes.children(self.process.pid)
        return zygotes.union(*(processes.children(pid) for pid in zygotes))

    def summary(self) -> dict[str, Any]:
        """What it prints when it ends."""
        output, errors = self.process.communicate(timeout=END_S)
        assert self.process.returncode == 0, errors
        summary: dict[str, Any] = json.loads(output)
        return summary


@pytest.fixture
def launch() -> Iterator[Callable[..., _Launched]]:
    """Start launchers; whatever the test does, their processes are gone afterwards."""
    started: list[subprocess.Popen[str]] = []

    def start(script: str = "plain", seconds: float = 30.0, until: str = "running") -> _Launched:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.launcher.drive", script, str(seconds)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        started.append(process)
        launched = _Launched(process)
        launched.wait_for(until)
        return launched

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.communicate(timeout=END_S)


def test_killing_the_launcher_before_the_zygote_is_ready_leaves_nothing(
    launch: Callable[..., _Launched],
) -> None:
    launched = launch(until="preparing")
    others = launched.descendants()
    assert others
    launched.process.kill()
    launched.process.wait(END_S)
    assert processes.wait_gone(others, END_S) == set()
    assert list(Path(tempfile.gettempdir()).glob("asyncpf-*")) == []


def test_a_signal_ends_the_run_in_order(launch: Callable[..., _Launched]) -> None:
    launched = launch()
    launched.process.send_signal(signal.SIGINT)
    summary = launched.summary()
    assert summary["ended"] == "interrupted"
    assert summary["warnings"] == ["the launcher dropped 1 messages that break the contract"], (
        "all processes left by themselves"
    )


def test_a_signal_while_starting_ends_the_run(launch: Callable[..., _Launched]) -> None:
    launched = launch(until="starting")
    launched.process.send_signal(signal.SIGINT)
    assert launched.summary()["ended"] == "interrupted"


def test_a_second_signal_does_not_wait_for_a_host_that_is_deaf(launch: Callable[..., _Launched]) -> None:
    launched = launch("deaf")
    launched.process.send_signal(signal.SIGINT)
    launched.wait_for("stopping")
    launched.process.send_signal(signal.SIGINT)
    assert launched.summary()["ended"] == "interrupted"


def test_a_stopped_host_cannot_keep_the_run_from_ending(launch: Callable[..., _Launched]) -> None:
    launched = launch()
    os.kill(launched.pid_of("host-0"), signal.SIGSTOP)
    launched.process.send_signal(signal.SIGTERM)
    assert launched.summary()["ended"] == "interrupted"


def test_a_killed_daemon_is_replaced(launch: Callable[..., _Launched]) -> None:
    launched = launch(seconds=3.0)
    victim = launched.pid_of("swapd-0")
    os.kill(victim, signal.SIGKILL)
    summary = launched.summary()
    assert (summary["ended"], summary["restarts"]) == ("finished", 1)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (LAUNCHER_DIED, 75)])
def test_a_signal_to_the_zygote_alone_removes_nothing_of_the_launcher(
    number: signal.Signals, code: int, launch: Callable[..., _Launched]
) -> None:
    launched = launch()
    zygote = launched.pid_of("zygote-0")
    os.kill(zygote, signal.SIGINT)
    os.kill(zygote, number)
    # Without its run directory the launcher could not write the summary, and would say so by its exit code.
    assert launched.summary()["ended"] == f"failed:zygote-0 exit code {code}"
