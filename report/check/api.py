"""Checking what a user names: a run directory, event files, recordings of kernels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from proto.errors import UserError
from proto.trace import SUFFIX as EVENTS_SUFFIX
from report.check import recorded
from report.check.checker import Checker
from report.check.source import DEFAULT_PROFILE, Source, open_files, open_run
from report.check.verdict import Verdict


def check_paths(paths: Sequence[Path], profile: str | None = None) -> Iterator[Verdict]:
    """One verdict per run directory and per recording; all event files given count as those of one run.

    ``profile`` overrides what a run says of itself. UserError for what is none of these.
    """
    files = [path for path in paths if path.suffix == EVENTS_SUFFIX]
    for path in paths:
        if path.is_dir():
            yield check_run(path, profile)
        elif path.suffix == recorded.SUFFIX:
            yield check_recording(path, profile or DEFAULT_PROFILE)
        elif path.suffix != EVENTS_SUFFIX or not path.is_file():
            raise UserError(
                "nothing that can be checked" if path.exists() else "no such file or directory",
                where=str(path),
                allowed=f"a run directory, event files (*{EVENTS_SUFFIX}), recordings (*{recorded.SUFFIX})",
            )
    if files:
        yield check_source(open_files(files), profile)


def check_run(run_dir: Path, profile: str | None = None) -> Verdict:
    """Check all events of a run directory. UserError when it has none."""
    return check_source(open_run(run_dir), profile)


def check_source(source: Source, profile: str | None = None) -> Verdict:
    """Check the events of a source."""
    checker = Checker(profile or source.profile, joined=source.first > 0 or source.joined)
    for window in source.windows():
        checker.feed(window)
    verdict = checker.finish(source.name, cut=source.cut)
    verdict.notes[:0] = source.notes
    verdict.note_stop(stopped=checker.stopped)
    return verdict


def check_recording(path: Path, profile: str = DEFAULT_PROFILE) -> Verdict:
    """Check one recording of a kernel; one in which not every task has ended is held to safety only."""
    recording = recorded.read_recording(path)
    checker = Checker(profile, recorded=True)
    checker.feed(recording.events)
    cut = "" if recording.finished else "not every task has ended in the recording"
    return checker.finish(str(path), cut=cut, finished=recording.finished)
