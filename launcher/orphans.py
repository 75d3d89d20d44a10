"""Processes of a run whose zygote was killed: they become children of the launcher, which ends and reaps them.

Invariants: only processes of the zygote's group are ended. All that it forks are in it, and nobody else is: a launcher may have other
children, whose orphans become its children, too. Nothing is waited for longer than `ORPHANS_S`; afterwards orphans go where they went
before.

Not handled here: processes whose zygote is alive, which reaps them itself (launcher/zygote.py).
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from pathlib import Path
from typing import Any, Final

ORPHANS_S: Final = 5.0
ORPHAN_POLL_S: Final = 0.01
PR_SET_CHILD_SUBREAPER: Final = 36
PR_GET_CHILD_SUBREAPER: Final = 37


class Orphans:
    """From now until `reap`. ``zygote_pid``: of a group of its own; reaped by who started it."""

    def __init__(self, zygote_pid: int) -> None:
        self._zygote_pid = zygote_pid
        self._subreaper_before = _subreaper(on=True)

    def reap(self) -> None:
        """Processes of a zygote that was killed are ours now: they are dead or about to be, and must not stay as zombies."""
        deadline_s = time.monotonic() + ORPHANS_S
        while (left := self._left()) and time.monotonic() < deadline_s:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, os.WNOHANG)
            time.sleep(ORPHAN_POLL_S)
        _subreaper(on=self._subreaper_before)

    def _left(self) -> list[int]:
        # Nobody else reaps these, so their numbers are theirs.
        return [pid for pid in _children() - {self._zygote_pid} if _group(pid) == self._zygote_pid]


def _group(pid: int) -> int:
    """The process group; 0 when the process is gone."""
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return 0


def _children() -> set[int]:
    """Children of this process, zombies too."""
    found: set[int] = set()
    for path in Path("/proc/self/task").glob("*/children"):
        found.update(map(int, path.read_text().split()))
    return found


def _subreaper(*, on: bool) -> bool:
    """Whether orphaned descendants become children of this process, from now on; returns what was so before."""
    libc: Any = ctypes.CDLL(None, use_errno=True)
    before = ctypes.c_int()
    if (
        libc.prctl(PR_GET_CHILD_SUBREAPER, ctypes.byref(before), 0, 0, 0) != 0
        or libc.prctl(PR_SET_CHILD_SUBREAPER, int(on), 0, 0, 0) != 0
    ):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")
    return bool(before.value)
