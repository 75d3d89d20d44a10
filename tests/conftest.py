"""What holds for every test: the kernel cache of a normal start, and nothing left behind.

A test that leaves a running process, a file in /dev/shm or a file in the temporary directory fails. Fixtures
of a wider scope may keep theirs: what exists before a test is not its fault.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from launcher import kernel_cache, tempdirs
from tests import processes

ROOT = Path(__file__).resolve().parent.parent
SHM = Path("/dev/shm")
PREFIX = "apf-"
EXIT_GRACE_S = 2.0
RUNNERS_END_S = 60.0

# Before any test module imports numba, which reads the variable only once.
kernel_cache.prepare(ROOT, installed=False)


def pytest_sessionstart(session: pytest.Session) -> None:
    """SIGTERM and SIGHUP as Ctrl-C, so that fixtures are taken down and no folder or process stays; not in what tests fork.

    With pytest-xdist one process hands out the tests, and those that run them are told by it.
    """
    hands_out = session.config.pluginmanager.has_plugin("dsession")
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _pass_on if hands_out else _interrupt)
        os.register_at_fork(after_in_child=partial(signal.signal, number, signal.SIG_DFL))


def _interrupt(_number: int, _frame: object) -> None:
    # Whoever ends a group of processes tells those that run tests twice.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def _pass_on(number: int, frame: object) -> None:
    runners = processes.children()
    for pid in runners:
        os.kill(pid, signal.SIGTERM)
    # pytest-xdist would kill them after ten seconds.
    processes.wait_gone(runners, RUNNERS_END_S)
    _interrupt(number, frame)


@pytest.fixture(scope="session", autouse=True)
def _temporary_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A temporary directory of this session's own, for tests and their processes; short, since sockets live
    there.
    """
    tmp_path_factory.getbasetemp()  # pytest's own folders, which it keeps after failures, stay outside
    # Of test runs that were killed.
    tempdirs.sweep(PREFIX, [Path(tempfile.gettempdir())])
    held = tempdirs.make(PREFIX, Path(tempfile.gettempdir()))
    folder = held.path
    before = os.environ.get("TMPDIR")
    os.environ["TMPDIR"] = str(folder)
    tempfile.tempdir = None
    yield folder
    tempfile.tempdir = None
    if before is None:
        del os.environ["TMPDIR"]
    else:
        os.environ["TMPDIR"] = before
    held.remove()


@pytest.fixture(scope="session", autouse=True)
def _subreaper() -> None:
    processes.become_subreaper()


@pytest.fixture(autouse=True)
def _nothing_left_behind(_temporary_directory: Path, _subreaper: None) -> Iterator[None]:
    pids, shm, files = processes.children(), _names(SHM), _names(_temporary_directory)
    yield
    multiprocessing.active_children()  # waits for those that have ended
    left = _leftover_processes(pids)
    left += [f"file {SHM / name}" for name in _files_that_stay(SHM, shm)]
    left += [f"file {_temporary_directory / name}" for name in sorted(_names(_temporary_directory) - files)]
    if left:
        pytest.fail("the test left behind: " + "; ".join(left), pytrace=False)


def _leftover_processes(before: set[int]) -> list[str]:
    """Descriptions of the processes that outlived the test; they are killed, so that the next test starts
    clean.
    """
    trackers = {pid for pid in processes.children() if "resource_tracker" in processes.command_line(pid)}
    before |= trackers  # Python's own helper, which lives as long as this process
    left = processes.wait_gone(processes.children() - before, EXIT_GRACE_S)
    described = [f"process {pid} ({processes.command_line(pid)})" for pid in sorted(left)]
    processes.kill_descendants(before)
    return described


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def _files_that_stay(folder: Path, before: set[str]) -> list[str]:
    """New files of this user that are still there after a while; another session's come and go."""
    deadline_s = time.monotonic() + EXIT_GRACE_S
    while True:
        new = sorted(name for name in _names(folder) - before if _is_mine(folder / name))
        if not new or time.monotonic() > deadline_s:
            return new
        time.sleep(0.05)


def _is_mine(path: Path) -> bool:
    """Whether this user's process made a file; others use /dev/shm too."""
    try:
        return path.stat().st_uid == os.getuid()
    except FileNotFoundError:
        return False
