"""Whose story is told when a run ends, and what is in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher import rundir
from launcher.blame import EVENTS_SHOWN, STORIES_MAX, Blamed, Deaths, stories
from launcher.zygote_link import Child
from proto.events import Kind
from proto.trace_writer import TraceWriter

HOST = Blamed(Child("host", 0, 0), "killed by SIGKILL", 5, 100)
VCPU = Blamed(Child("vcpu", 3, 0), "exit code 70", 6, 103)
ZYGOTE = Blamed(Child("zygote", 0, 0), "killed by SIGKILL", 7, 99)


def _daemon(epoch: int) -> Blamed:
    return Blamed(Child("swapd", 1, epoch), "killed by SIGABRT", 8, 200 + epoch)


def test_all_that_died_are_named_in_order() -> None:
    deaths = Deaths()
    deaths.note(HOST)
    deaths.note(VCPU)
    assert deaths.blamed("host-0", 9) == [HOST, VCPU]
    assert deaths.text() == "failed:host-0 killed by SIGKILL, vcpu-3 exit code 70"


def test_who_was_told_to_leave_did_not_die() -> None:
    deaths = Deaths()
    deaths.note(HOST)
    deaths.leaving = True
    deaths.note(VCPU)
    assert deaths.died == [HOST]


def test_a_crowd_is_counted() -> None:
    deaths = Deaths([Blamed(Child("vcpu", n, 0), "exit code 1", n) for n in range(STORIES_MAX + 3)])
    assert deaths.text().endswith("vcpu-3 exit code 1, 3 more")


def test_daemons_die_every_day_and_are_blamed_only_when_they_end_the_run() -> None:
    deaths = Deaths()
    deaths.note(_daemon(4))
    deaths.note(_daemon(5))
    assert deaths.blamed("", 9) == []
    assert deaths.blamed("swapd-1", 9) == [_daemon(5)]


def test_who_hangs_is_blamed_alive() -> None:
    (one,) = Deaths().blamed("vcpu-17", 9)
    assert (one.child.name, one.how, one.text) == ("vcpu-17", "", "vcpu-17")


def _write(folder: Path, name: str, number: int) -> None:
    with TraceWriter(folder / f"{name}.bin", 4, 1 << 16) as writer:
        for n in range(number):
            writer.event(Kind.SWAP_IN, vcpu=3, vm=1, token=0x2003, a=n, b=300)


def test_a_story_has_the_last_events_and_the_last_lines(tmp_path: Path) -> None:
    run_dir = rundir.create(tmp_path / "run", on_disk=False)
    _write(run_dir.path / "events", "vcpu-3", 100)
    run_dir.log("vcpu-3").write_text("a line\nRuntimeError: the story\n")
    (story,) = stories(run_dir, "events", [VCPU])
    assert story.log == ["a line", "RuntimeError: the story"]
    assert len(story.events) == EVENTS_SHOWN
    assert "SWAP_IN" in story.events[-1]
    assert story.events[-1].endswith(
        "us  SWAP_IN                  vm 1 vcpu 3 token=0x2003 hvp=0x63 slot=0x12c frame=0"
    )
    lines = story.lines()
    assert lines[0] == "vcpu-3 (process 103): exit code 70"
    assert lines[-1].strip() == "RuntimeError: the story"
    assert json.loads(json.dumps(story.plain()))["how"] == "exit code 70"


@pytest.mark.parametrize(
    ("one", "note"),
    [(ZYGOTE, "it records no events"), (HOST, "it had not recorded any event"), (_daemon(2), "damaged")],
)
def test_what_there_is_not_is_said(one: Blamed, note: str, tmp_path: Path) -> None:
    run_dir = rundir.create(tmp_path / "run", on_disk=False)
    _write(run_dir.path / "events", "swapd-1-1", 5)
    _write(run_dir.path / "events", "swapd-1-2", 5)
    path = run_dir.path / "events" / "swapd-1-2.bin"
    path.write_bytes(path.read_bytes()[:-64])
    (story,) = stories(run_dir, "events", [one])
    assert note in story.note
    assert story.note in "\n".join(story.lines())
    assert len(story.events) == (4 if one.child.role == "swapd" else 0)
