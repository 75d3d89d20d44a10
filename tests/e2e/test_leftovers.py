"""However a run of the real roles ends: no process, no socket, no file and no shared memory stays, and the summary says what happened.

tests/conftest.py looks for processes, files in the temporary directory and in /dev/shm after every test.
"""

from __future__ import annotations

import os
import re
import signal
import tempfile
import time
from pathlib import Path
from typing import Final

import pytest

from tests import processes
from tests.e2e.runs import BM, END_BOUND_S, Launched, Runner


def _running(runner: Runner, *words: str) -> Launched:
    path = runner.file(BM)
    run = runner.start("run", str(path), "--json", "--seconds", "120", *words)
    run.wait_for(": running")
    assert _run_directories(), "it has a temporary directory"
    return run


def _run_directories() -> list[Path]:
    return list(Path(tempfile.gettempdir()).glob("asyncpf*"))


def _all_gone(others: set[int]) -> None:
    assert processes.wait_gone(others, END_BOUND_S) == set()
    assert _run_directories() == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_in_order(number: signal.Signals, runner: Runner) -> None:
    run = _running(runner)
    others = run.descendants()
    run.process.send_signal(number)
    ended = run.end(END_BOUND_S)
    assert ended.code == 1
    assert ended.summary["ended"] == "interrupted"
    assert ended.summary["integrity"]["errors"] == 0
    assert processes.wait_gone(others, 0) == set(), "gone when the launcher has ended, not later"
    _all_gone(others)


def _reaped(pids: list[int]) -> None:
    """Wait until the zygote has reaped these."""
    deadline_s = time.monotonic() + END_BOUND_S
    while any(processes.state(pid) for pid in pids):
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


EVENT: Final = re.compile(r" *[+-][0-9.]+ us  [A-Z_0-9]+ +vm 0 vcpu \d+( \w+=\w+)*")


@pytest.mark.parametrize("victims", [("vcpu-1",), ("host-0",), ("zygote-0",), ("host-0", "vcpu-0", "vcpu-1")])
def test_killing_what_may_not_die_ends_the_run_and_tells_its_story(
    victims: tuple[str, ...], runner: Runner
) -> None:
    run = _running(runner)
    others = run.descendants()
    pids = {name: run.pid_of(name) for name in victims}
    # The launcher hears of all at once, however busy the machine is.
    run.process.send_signal(signal.SIGSTOP)
    for pid in pids.values():
        os.kill(pid, signal.SIGKILL)
    _reaped([pid for name, pid in pids.items() if name != "zygote-0"])
    run.process.send_signal(signal.SIGCONT)
    ended = run.end(END_BOUND_S)
    assert ended.code == 1
    names = ended.summary["ended"].removeprefix("failed:").split(", ")
    assert sorted(names) == sorted(f"{name} killed by SIGKILL" for name in victims)
    lines = ended.stderr.splitlines()
    for name, pid in pids.items():
        story = lines[lines.index(f"  {name} (process {pid}): killed by SIGKILL") + 1 :]
        if name == "zygote-0":
            assert story[0].strip() == "it records no events"
        else:
            assert story[0].strip() == "its last events, before its end was noticed:"
            assert EVENT.fullmatch(story[1]), story
            assert EVENT.fullmatch(story[2]), story
    assert processes.wait_gone(others, 0) == set()
    _all_gone(others)


def test_killing_the_launcher_takes_everything_along(runner: Runner) -> None:
    run = _running(runner)
    others = run.descendants()
    run.process.kill()
    run.process.wait(END_BOUND_S)
    _all_gone(others)


def test_a_named_run_directory_keeps_results_and_nothing_else(runner: Runner) -> None:
    path = runner.file(BM)
    out = runner.folder / "out"
    ended = runner.start("run", str(path), "--json", "--seconds", "0.3", out=out).end()
    assert ended.code == 0, ended.stderr
    assert sorted(entry.name for entry in out.iterdir()) == ["events", "logs", "run.json", "summary.json"]
    names = {entry.stem for entry in (out / "events").iterdir()}
    assert names == {"host", "vcpu-0", "vcpu-1", "swapd-0-0"}
    logs = {entry.name: entry.read_text() for entry in (out / "logs").iterdir()}
    assert logs == dict.fromkeys(logs, ""), "nobody had anything to complain about"
