"""Who is to blame for the end of a run, with what the process had done last.

Purpose: from the name of a process that died or stalled to what a user wants to read about it: how it ended, the last events of its
ring, the last lines of its log. The ring is a mapped file, so it holds what was recorded before the process was killed.

Not handled here: deciding who is to blame (launcher/lifecycle.py, launcher/supervisor.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from launcher.rundir import RunDir
from launcher.zygote_link import Child
from proto.trace import SUFFIX
from proto.trace_tail import last_events
from report.event_text import event_lines

EVENTS_SHOWN: Final = 12
STORIES_MAX: Final = 4
"""Of more processes that died together only the names are told."""


@dataclass(frozen=True, slots=True)
class Blamed:
    """A process and how it ended. how: "" for one that has not. at_ns: when that was noticed, monotonic."""

    child: Child
    how: str
    at_ns: int
    pid: int = 0

    @property
    def text(self) -> str:
        """As in: vcpu-3 killed by SIGKILL."""
        return f"{self.child.name} {self.how}".rstrip()


@dataclass(slots=True)
class Deaths:
    """Deaths that nobody had asked for. died: of processes that may not die, in order. leaving: set it when they are told to go."""

    died: list[Blamed] = field(default_factory=list)
    leaving: bool = False
    _daemons: dict[str, Blamed] = field(default_factory=dict)

    def note(self, death: Blamed) -> None:
        """A process has ended."""
        if death.child.role == "swapd":
            self._daemons[death.child.name] = death
        elif not self.leaving:
            self.died.append(death)

    def blamed(self, culprit: str, now_ns: int) -> list[Blamed]:
        """Whose stories are to be told. culprit: the process (vcpu-3) that made the run end, "" if none did; it may live."""
        if self.died:
            return list(self.died)
        if not culprit:
            return []
        role, _, number = culprit.rpartition("-")
        return [self._daemons.get(culprit) or Blamed(Child(role, int(number), 0), "", now_ns)]

    def text(self) -> str:
        """How the run ended, as in the summary."""
        more = len(self.died) - STORIES_MAX
        names = [one.text for one in self.died[:STORIES_MAX]] + ([f"{more} more"] if more > 0 else [])
        return f"failed:{', '.join(names)}"


@dataclass(frozen=True, slots=True)
class Story:
    """What there is to read about one process. events, log: lines, oldest first. note: what is missing in the events."""

    name: str
    pid: int
    how: str
    events: list[str] = field(default_factory=list)
    note: str = ""
    log: list[str] = field(default_factory=list)

    def plain(self) -> dict[str, Any]:
        """For run.json."""
        return asdict(self)

    def lines(self) -> list[str]:
        """For people."""
        who = f"{self.name} (process {self.pid})" if self.pid else self.name
        found = [f"{who}: {self.how}" if self.how else who]
        if self.events:
            found += [
                "  its last events, before its end was noticed:",
                *(f"    {line}" for line in self.events),
            ]
        if self.note:
            found.append(f"  {self.note}")
        if self.log:
            found += ["  last lines of its log:", *(f"    {line}" for line in self.log)]
        return found


def stories(run_dir: RunDir, events: str, blamed: Sequence[Blamed]) -> list[Story]:
    """The stories of the first few. events: the folder of the event files of the set of processes."""
    return [_story(run_dir, run_dir.path / events, one) for one in blamed[:STORIES_MAX]]


def _story(run_dir: RunDir, folder: Path, one: Blamed) -> Story:
    lines, note = _last_events(folder, one)
    return Story(one.child.name, one.pid, one.how, lines, note, run_dir.log_tail(one.child.name))


def _last_events(folder: Path, one: Blamed) -> tuple[list[str], str]:
    if one.child.role == "zygote":
        return [], "it records no events"
    path = folder / f"{file_stem(one.child)}{SUFFIX}"
    if not path.exists():
        return [], "it had not recorded any event"
    events, note = last_events(path, EVENTS_SHOWN)
    return list(event_lines(events, one.at_ns, vm=True)), note


def file_stem(child: Child) -> str:
    """Name of its event file, without the suffix."""
    names = {"host": "host", "swapd": f"swapd-{child.number}-{child.epoch}"}
    return names.get(child.role, child.name)
