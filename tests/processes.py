"""Looking at processes through /proc, for tests: who is alive, who is whose child."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36
POLL_S = 0.02


def become_subreaper() -> None:
    """Have orphaned descendants become children of this process, where leftovers can be found."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def state(pid: int) -> str:
    """The state letter of a process (Z: dead but not waited for), or "" if there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return text.rpartition(")")[2].split()[0]


def alive(pid: int) -> bool:
    """Whether a process exists and runs; a zombie does not."""
    return state(pid) not in {"", "Z", "X"}


def command_line(pid: int) -> str:
    """The command line, or the title that the process gave itself."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def children(pid: int | None = None) -> set[int]:
    """The children of a process (default: this one), zombies too."""
    found: set[int] = set()
    for path in Path(f"/proc/{pid or os.getpid()}/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that has just ended
            found.update(map(int, path.read_text().split()))
    return found


def wait_gone(pids: Iterable[int], timeout_s: float) -> set[int]:
    """Wait until none of the processes is alive; returns those that still are after `timeout_s`."""
    deadline_s = time.monotonic() + timeout_s
    left = {pid for pid in pids if alive(pid)}
    while left and time.monotonic() < deadline_s:
        time.sleep(POLL_S)
        left = {pid for pid in left if alive(pid)}
    return left


def reap(pids: Iterable[int]) -> None:
    """Wait for children that are dead already, so that no zombie stays."""
    for pid in pids:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)


def kill_descendants(keep: set[int], rounds: int = 50) -> None:
    """Kill every child that is not in `keep`; what it leaves behind becomes our child and follows."""
    for _ in range(rounds):
        rest = children() - keep
        if not rest:
            return
        for pid in rest:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_gone(rest, 1.0)
        reap(rest)
