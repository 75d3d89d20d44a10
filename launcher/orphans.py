"""Processes of a run whose zygote was killed: they become children of the launcher, which ends and reaps them.

Invariants: children that the launcher had before are left alone; nothing is waited for longer than `ORPHANS_S`; afterwards orphans go
where they went before.

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
    """From now until `reap`. ``zygote_pid``: reaped by who started it."""

    def __init__(self, zygote_pid: int) -> None:
        self._not_ours = _children() | {zygote_pid}
        self._subreaper_before = _subreaper(on=True)

    def reap(self) -> None:
        """Processes of a zygote that was killed are ours now: they are dead or about to be, and must not stay as zombies."""
        deadline_s = time.monotonic() + ORPHANS_S
        while (left := _children() - self._not_ours) and time.monotonic() < deadline_s:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, os.WNOHANG)
            time.sleep(ORPHAN_POLL_S)
        _subreaper(on=self._subreaper_before)


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
