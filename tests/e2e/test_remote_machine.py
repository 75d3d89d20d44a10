"""A daemon on another machine, which is a network namespace here: its link goes down and comes back during a run."""

from __future__ import annotations

import functools
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from proto import curve
from tests import processes
from tests.e2e import netns
from tests.e2e.netns import Network
from tests.e2e.runs import END_BOUND_S, MIXED, POLL_S, RUN_BOUND_S, Launched, Runner
from tests.e2e.test_remote import LONG, SIZE, assert_survived, locked

PORT = 7070


@functools.cache
def reason() -> str:
    return netns.why_not()


@pytest.fixture
def machine() -> Iterator[Network]:
    if reason():
        pytest.skip(reason())
    with netns.network() as made:
        yield made


@pytest.fixture
def far(machine: Network, runner: Runner) -> Iterator[Launched]:
    """A daemon over there, with keys."""
    curve.make_keys(runner.folder / "keys", ["daemon", "host"])
    words = (
        "swapd",
        "--listen",
        f"tcp://{machine.there}:{PORT}",
        "--file",
        str(runner.folder / "swap"),
        *SIZE,
    )
    started = Launched([*words, *locked(runner.folder)], before=machine.inside)
    deadline_s = time.monotonic() + RUN_BOUND_S
    while not any("listening" in line for line in started.said):
        assert started.process.poll() is None, started.said
        assert time.monotonic() < deadline_s, started.said
        time.sleep(POLL_S)
    yield started
    started.stop()


def connect(machine: Network, folder: Path) -> str:
    return (
        f'\n[[swapd]]\nconnect = "tcp://{machine.there}:{PORT}"\n'
        f'key = "{folder}/keys/host.key"\nserver_key = "{folder}/keys/daemon.pub"\n'
    )


@pytest.mark.usefixtures("far")
def test_the_link_goes_down_and_comes_back(machine: Network, runner: Runner) -> None:
    path = runner.file(LONG + connect(machine, runner.folder))
    run = runner.start("run", str(path), "--json", out=runner.folder / "out")
    run.wait_for(": running")
    for down_s in (0.5, 5.0):
        machine.down()
        time.sleep(down_s)
        machine.up()
        time.sleep(1.0)
    summary = assert_survived(run.end())
    assert summary["totals"]["resent"] > 0, "requests were under way while it was down"
    assert summary["totals"]["fences"] == 0, "it was the same incarnation all the time"


def test_the_process_dies_while_the_link_is_down(machine: Network, far: Launched, runner: Runner) -> None:
    path = runner.file(LONG + connect(machine, runner.folder))
    run = runner.start("run", str(path), "--json", out=runner.folder / "out")
    run.wait_for(": running")
    machine.down()
    pid = far.pid_of("swapd-0")
    os.kill(pid, signal.SIGKILL)
    assert processes.wait_gone([pid], END_BOUND_S) == set()
    time.sleep(1.0)
    machine.up()
    summary = assert_survived(run.end())
    assert summary["totals"]["fences"] == 1


def test_without_the_link_the_run_ends(machine: Network, far: Launched, runner: Runner) -> None:
    path = runner.file(MIXED + connect(machine, runner.folder) + "give_up_seconds = 2\n")
    machine.down()
    ended = runner.start("run", str(path), "--json", out=runner.folder / "out").end()
    assert ended.code == 1
    assert "cannot be reached within 2 s" in ended.stderr
    assert far.process.poll() is None
