"""Events that begin in the middle of a run: nothing is blamed on what was before, and what happens later is judged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from proto.trace import Events, Kind, TraceWriter
from proto.trace_live import LiveFile
from report.check.api import check_run
from report.check.checker import Checker
from report.check.verdict import Verdict
from tests.report.check_story import MSR_EN, USER, Story, numbers
from tests.report.stories import STORIES


def _from(events: Events, start: int, profile: str) -> Verdict:
    checker = Checker(profile, joined=True)
    checker.feed(events[start:])
    return checker.finish("story")


def _long_story(profile: str) -> Story:
    """What a run does, twice over: faults one after the other, several at a time, halts, repeats, off and on again."""
    story = Story(profile)
    story.boot()
    story.boot(1)
    number = 1
    story.life(1, 10, 1)
    for _ in range(3):
        number += 1
        story.life(number, 10 + number)
        first, second = story.asleep(number + 1, 100), story.asleep(number + 2, 101, task=2)
        number += 2
        if profile != "v3":
            story.add(Kind.TRY_ASYNC_GET_PAGE, a=100 << 12, b=100)
            story.add(Kind.ASYNC_PF_REPEATED_FAULT, a=100 << 12, b=100)
            story.halt()
        story.done(second)
        story.add(Kind.HALT_OFF, a=1)
        story.told(second, task=2)
        story.done(first)
        story.told(first)
        number += 1
        early = story.fault(number, 102)
        story.inject(early)
        story.handle(early)
        story.finds_nobody(early)
        story.sleep(early, variant=2)
        if profile != "v3":
            number += 1
            token = story.asleep(number, 103)
            story.cancel(token, why=1)
            story.add(Kind.MSR_WR, a=MSR_EN, b=0)
            story.wake(token, variant=2)
            story.add(Kind.MSR_WR, a=MSR_EN, b=0x9001 | (8 if profile == "mainline" else 0))
            story.broadcast()
    return story


def _with_contexts(story: Story) -> Story:
    """The MMU context is logged before each prefault, as the host does it."""
    rows = []
    for row in story.rows:
        if row["kind"] == Kind.ASYNC_PF_NOT_PRESENT:
            row["b"] = 0x5000
        elif row["kind"] == Kind.PREFAULT:
            rows.append({**row, "kind": Kind.MMU, "a": 0x5000, "b": 0})
        rows.append(row)
    story.rows = rows
    return story


@pytest.mark.parametrize("profile", ["v3", "v7", "mainline"])
def test_a_good_run_is_good_from_wherever_it_is_seen(profile: str) -> None:
    story = _with_contexts(_long_story(profile))
    events = story.events()
    whole = Checker(profile)
    whole.feed(events)
    assert numbers(whole.finish("story")) == set()
    for start in range(len(events)):
        assert numbers(_from(events, start, profile)) == set(), start


def test_a_bad_event_behind_the_beginning_is_found() -> None:
    """The stories of single invariants, seen from behind a boot and a first fault: what is broken later is seen."""
    missed = set()
    for number, (profile, recorded, tell) in STORIES.items():
        if recorded:
            continue
        story = Story(profile)
        story.boot(5)
        start = len(story.rows)
        tell(story, True)
        if number not in numbers(_from(story.events(), start, profile)):
            missed.add(number)
    # Whether it was enabled, the limit was reached, or a page was in the hash depends on what was before.
    assert missed == {5, 6, 8, 30, 36}


@pytest.mark.parametrize(
    ("story", "expected"),
    [("twice", 21), ("kernel", 11), ("word", 25), ("later", 20)],
)
def test_rules_that_are_as_strict_as_ever(story: str, expected: int) -> None:
    told = Story()
    told.life(1, 10)
    token = told.asleep(2, 11)
    if story == "twice":
        told.done(token)
        told.told(token)
        told.add(Kind.ASYNC_PF_READY, 0, token)
    elif story == "kernel":
        told.add(Kind.MSR_WR, a=MSR_EN, b=0x9009)
        told.inject(told.fault(3, 12), state=USER & ~3)
    elif story == "word":
        told.done(token)
        told.ready(token)
        told.deliver(0, token)
        told.deliver(0, token)
    else:
        told.ready(token)
    assert expected in numbers(_from(told.events(), 0, "mainline"))


def test_a_recycled_directory_says_where_it_begins(tmp_path: Path) -> None:
    """Of the file of each process the last records are left, the host's begin latest."""
    story = Story()
    story.boot()
    for number in range(1, 60):
        story.life(number, 10 + number)
    folder = tmp_path / "events"
    folder.mkdir()
    writers = {
        0: TraceWriter(folder / "host.bin", 0, 128 * 64),
        1: TraceWriter(folder / "vcpu-0.bin", 1, 1 << 20),
    }
    files = [LiveFile(writer.path) for writer in writers.values()]
    for row in story.rows:
        writer = writers[row["proc"]]
        writer.observe(row["lamport"] - 1)
        writer.event(row["kind"], row["vcpu"], 0, row["token"], row["a"], row["b"], row["c"])
        for file in files:
            file.take()
    for writer, file in zip(writers.values(), files, strict=True):
        file.close()
        writer.close()
    (tmp_path / "run.json").write_text('{"topology": {"run": {"profile": "mainline"}}, "ended": "finished"}')
    verdict = check_run(tmp_path)
    host = [row["lamport"] for row in story.rows if row["proc"] == 0][-128]
    assert verdict.ok, verdict.violated
    assert verdict.liveness
    assert verdict.events == len(story.rows) - host + 1
    assert verdict.notes == [
        f"the run was recycled: checked from Lamport counter {host} on, what was under way then only in part"
    ]
    assert np.all(np.diff([row["lamport"] for row in story.rows]) > 0)
