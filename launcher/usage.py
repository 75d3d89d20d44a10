"""Memory and descriptors of the processes of a run, sampled while it runs.

Anonymous memory (RssAnon of /proc/PID/status, exact in current kernels): what a process allocated, and of the zygote's what it shares
since the fork. Neither shared segments nor the mapped event file count: their size is fixed.

Invariants: a sample is one small file and one stat per process; one is due every SAMPLES-th of the measured time, but not more often than
every EVERY_MIN_NS, and one more is taken at its end.

Not handled here: what the samples mean (report/growth.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from report.growth import S, Sample, Use, groups

SAMPLES: Final = 32
"""As many are due in the measured time, beside the one at its end."""
EVERY_MIN_NS: Final = 1 * S
"""Two samples of the same moment tell nothing."""
_ANON: Final = re.compile(rb"^RssAnon:\s+(\d+) kB", re.MULTILINE)
KIB_PER_MIB: Final = 1024


class Sampler:
    """When to look, and what was seen. Times are monotonic, ns."""

    def __init__(self) -> None:
        """Nothing is due before `begin`."""
        self.samples: list[Sample] = []
        self._every_ns = 0
        self._due_ns = 0

    def begin(self, start_ns: int, seconds: float) -> None:
        """The measured time begins, and will last that long. Later calls change nothing."""
        if not self._every_ns:
            self._every_ns = max(EVERY_MIN_NS, int(seconds * S) // SAMPLES)
            self._due_ns = start_ns

    def due(self, now_ns: int) -> bool:
        """Whether a sample is to be taken now."""
        return bool(self._every_ns) and now_ns >= self._due_ns

    def take(self, now_ns: int, pids: Mapping[str, Sequence[int]]) -> None:
        """Look at the processes, by role. One that has just ended is left out."""
        self._due_ns += (1 + max(0, now_ns - self._due_ns) // self._every_ns) * self._every_ns
        uses = {role: [use for pid in each if (use := use_of(pid))] for role, each in pids.items()}
        self.samples.append(groups(now_ns, uses))

    def end(self, now_ns: int, pids: Mapping[str, Sequence[int]]) -> None:
        """The measured time is over: the last sample."""
        if self._every_ns:
            self.take(now_ns, pids)
            self._due_ns = 1 << 63


def use_of(pid: int) -> Use | None:
    """What a process uses; None when it has ended."""
    try:
        anon = _ANON.search(Path(f"/proc/{pid}/status").read_bytes())
        return Use(int(anon[1]) / KIB_PER_MIB, _descriptors(pid)) if anon else None
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None


def _descriptors(pid: int) -> int:
    folder = Path(f"/proc/{pid}/fd")
    # The size of the folder is their number since Linux 6.2, and 0 before.
    return folder.stat().st_size or sum(1 for _ in folder.iterdir())
