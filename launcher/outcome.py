"""What becomes of a run: how it ended, and what its summary needs of the time while it went on.

Invariants: what is sampled belongs to the measured time, from the barrier to the stop, and not to the time in which guests are saved and
restored; a run in several sets of processes has one outcome.

Not handled here: when the measured time begins and what ends a run (launcher/supervisor.py), how figures are read (launcher/watch.py) and
what is made of them (report/).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from launcher.blame import Blamed
from launcher.outage import OutageMeter
from launcher.usage import Sampler
from launcher.watch import Watch, private_memory_mib
from launcher.zygote_link import Child
from report.summary import Snapshot

S: Final = 1_000_000_000
USS_SAMPLES_MAX: Final = 16


@dataclass(slots=True)
class Outcome:
    """What became of a run, beside the figures in shared memory."""

    ended: str = ""
    orderly: bool = False
    blamed: list[Blamed] = field(default_factory=list)
    """Who ended the run, first things first: those that died, or one that hangs or gave up."""
    details: list[str] = field(default_factory=list)
    start_ns: int = 0
    end_ns: int = 0
    started_in_s: float | None = None
    restarts: int = 0
    bad_messages: int = 0
    memory: dict[str, float] | None = None
    usage: Sampler = field(default_factory=Sampler)
    at_start: Snapshot | None = None
    at_stop: Snapshot | None = None
    outage: OutageMeter = field(default_factory=OutageMeter)
    saved_pages: int = 0
    """With contents, in the last image."""


class Samples:
    """Fills an outcome while a set of processes runs. ``pids``: of those that are there; ``began_ns``: when the user's wait began."""

    def __init__(
        self,
        outcome: Outcome,
        watch: Watch,
        pids: Callable[[], Mapping[Child, int]],
        zygote_pid: int,
        began_ns: int,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._outcome = outcome
        self._watch = watch
        self._pids = pids
        self._zygote_pid = zygote_pid
        self._began_ns = began_ns
        self._clock = clock
        self._memory_due_ns = 0
        self._begun = False

    def started(self, now_ns: int) -> None:
        """Every vCPU has booted: the wait is over."""
        if self._outcome.started_in_s is None:
            self._outcome.started_in_s = (now_ns - self._began_ns) / S

    def begin(self, now_ns: int, start_ns: int, seconds: float) -> None:
        """The measured time runs since ``start_ns``, for ``seconds``."""
        outcome = self._outcome
        self._begun = True
        if outcome.at_start is None:
            outcome.at_start = self._watch.snapshot(now_ns)
        outcome.outage.begin(now_ns, self._watch.outage_reading())
        if outcome.memory is None:
            self._memory_due_ns = max(now_ns + S // 10, start_ns + int(seconds * S / 2))
        self.started(now_ns)
        outcome.usage.begin(now_ns, seconds)

    def turn(self, now_ns: int, *, saving: bool = False) -> None:
        """Take what is due; nothing before `begin`. saving: the order to save was given, the guests stand still or are about to."""
        if not self._begun:
            return
        outcome = self._outcome
        if not saving:
            outcome.outage.sample(now_ns, self._watch.outage_reading())
        if outcome.at_stop is None and self._watch.stopped():
            # The flag may be younger than the round's time, and the measured time is not over before its end.
            now_ns = max(now_ns, self._clock())
            # Before the copy of all figures, which is the launcher's own and only made now.
            outcome.usage.end(now_ns, self._pids_by_role())
            outcome.at_stop = self._watch.snapshot(now_ns)
            outcome.outage.stop(now_ns, self._watch.outage_reading())
        if outcome.usage.due(now_ns):
            outcome.usage.take(now_ns, self._pids_by_role())
        if self._memory_due_ns and now_ns >= self._memory_due_ns:
            self._memory_due_ns = 0
            vcpus = [pid for child, pid in self._pids().items() if child.role == "vcpu"]
            outcome.memory = private_memory_mib(vcpus[:: -(-len(vcpus) // USS_SAMPLES_MAX)])

    def daemon_down(self, daemon: int, epoch: int, now_ns: int, *, saving: bool = False) -> None:
        """An incarnation has died: an outage begins, unless no guest could notice it."""
        if self._begun and not saving:
            self._outcome.outage.down(daemon, epoch, now_ns, self._watch.outage_reading())

    def _pids_by_role(self) -> dict[str, list[int]]:
        """Process ids of this run, the launcher's and the zygote's too."""
        found = {"host": [], "swapd": [], "vcpu": [], "launcher": [os.getpid()], "zygote": [self._zygote_pid]}
        for child, pid in self._pids().items():
            found[child.role].append(pid)
        return found
