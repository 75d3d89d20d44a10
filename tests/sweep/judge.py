"""One run with one failing call, judged; and the sweep over all of them.

A run ends in one of these, and everything else is a `Finding`:

* handled: the conversation went through, every page was right, no process ended;
* restarted: a daemon's process ended by the error, was fenced and succeeded, every page was right;
* ended: the host's process, or the set-up, ended by the error, and the run with it;
* failed: the host told the launcher why the run cannot go on.

In all of them no descriptor, thread or file is left, and whatever ended a process is the injected error, or follows from it.
"""

from __future__ import annotations

import shutil
import signal
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Final, NamedTuple

from host.image import FILE_NAME
from proto.errors import UserError
from swapd.swapfile import SwapFileError
from swapd.uring import UringUnavailable
from tests.sweep.calls import Injected
from tests.sweep.sites import Shot, Site, Sweep
from tests.sweep.talk import HangError, RunEndedError, Saved, Talk

HANDLED, RESTARTED, ENDED, FAILED = "handled", "restarted", "ended", "failed"
REASONS: Final = (UserError, SwapFileError, UringUnavailable)
"""What says in words why something cannot be done, and ends a process in the place of the error itself."""
LEAVE_S = 2.0
ALARM_S: Final = 100


@dataclass(slots=True)
class Finding:
    """A run that ended in nothing that is documented."""

    shot: Shot
    what: str


class Limits(NamedTuple):
    """At most so many kinds of errors for each site, and so many calls for each of them."""

    faults: int
    calls: int


@dataclass(slots=True)
class Result:
    """Of a sweep. ``fired``: injections that took place; ``sites``: where."""

    outcomes: Counter[str] = field(default_factory=Counter)
    findings: list[Finding] = field(default_factory=list)
    sites: set[Site] = field(default_factory=set)
    deepest: int = 0
    runs: int = 0

    @property
    def fired(self) -> int:
        return sum(self.outcomes.values())


class Court:
    """Runs conversations in a folder and judges them."""

    def __init__(self, sweep: Sweep, folder: Path, keys: Path, port: int) -> None:
        self.sweep = sweep
        self._folder = folder
        self._keys = keys
        self._port = port
        self._number = 0

    def save(self) -> Saved:
        """An undisturbed conversation, whose image the others may go on from."""
        self.sweep.shoot(None)
        folder = self._folder / "saved"
        folder.mkdir(mode=0o700)
        talk = Talk(folder, self._port, self._keys)
        talk.run()
        assert not talk.deaths
        return Saved(folder / FILE_NAME, talk.versions)

    def try_one(self, shot: Shot | None, saved: Saved | None = None) -> tuple[str, Talk]:
        """(outcome, the conversation). AssertionError for what must not be."""
        self._number += 1
        folder = self._folder / f"{self._number}"
        folder.mkdir(mode=0o700)
        before = _mine()
        self.sweep.shoot(shot)
        talk = Talk(folder, self._port, self._keys, saved)
        why = ""
        try:
            with _alarm():
                talk.run()
        except RunEndedError as ended:
            why = str(ended)
        finally:
            shutil.rmtree(folder)
        self.sweep.shoot(None)
        _assert_nothing_left(before)
        return _outcome(talk, why, shot), talk

    def reached(self, saved: Saved | None) -> dict[Site, int]:
        """How often an undisturbed conversation calls each site."""
        outcome, talk = self.try_one(None, saved)
        assert outcome == HANDLED, talk.deaths
        return dict(self.sweep.counts_of_last_run)

    def sweep_site(self, site: Site, result: Result, limits: Limits, saved: Saved | None) -> None:
        """Fail call 1, 2, ... at a site, until a run needs no injection or there were enough."""
        for fault in self.sweep.faults[site][: limits.faults]:
            for n in range(1, limits.calls + 1):
                shot = Shot(site, fault, n)
                result.runs += 1
                try:
                    outcome, _ = self.try_one(shot, saved)
                except AssertionError as error:
                    result.findings.append(Finding(shot, f"{type(error).__name__}: {error}"))
                    break
                if not self.sweep.fired:
                    break
                result.outcomes[outcome] += 1
                result.sites.add(site)
                result.deepest = max(result.deepest, n)


def _outcome(talk: Talk, why: str, shot: Shot | None) -> str:
    for who, error in talk.deaths:
        if shot is None or not _follows(error, shot):
            raise AssertionError(f"{who} ended by {error!r}, which is not what was injected") from error
    if why in ("host", "set-up", "the fence failed"):
        return ENDED
    if why:
        return FAILED
    return RESTARTED if talk.deaths else HANDLED


def _follows(error: BaseException, shot: Shot) -> bool:
    """Whether the injected error ended a process: as it is, in words, or as what the error of a C function is turned into."""
    if isinstance(error, (Injected, *REASONS)):
        return True
    return isinstance(error, OSError) and not shot.fault.raises


def _mine() -> tuple[dict[str, str], set[int]]:
    """Descriptors and threads of this process."""
    descriptors = {}
    for path in Path("/proc/self/fd").iterdir():
        try:
            descriptors[path.name] = str(path.readlink())
        except FileNotFoundError:
            continue  # the directory itself
    return descriptors, {int(task.name) for task in Path("/proc/self/task").iterdir()}


def _assert_nothing_left(before: tuple[dict[str, str], set[int]]) -> None:
    deadline_s = time.monotonic() + LEAVE_S
    while True:
        descriptors, threads = _mine()
        left = [
            f"{number} -> {target}"
            for number, target in descriptors.items()
            if before[0].get(number) != target
        ]
        more = threads - before[1]
        if not left and not more:
            return
        if time.monotonic() > deadline_s:
            raise AssertionError(
                f"left behind: descriptors {left}, {len(more)} threads {threading.enumerate()[1:]}"
            )
        time.sleep(0.002)


class _alarm:  # noqa: N801 - reads as a word
    """Whatever blocks for ever inside the product is interrupted."""

    def __enter__(self) -> None:
        self._before = signal.signal(signal.SIGALRM, _ring)
        signal.alarm(ALARM_S)

    def __exit__(self, *_: object) -> None:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, self._before)


def _ring(_number: int, _frame: FrameType | None) -> Any:
    raise HangError(f"something blocks for {ALARM_S} s")
