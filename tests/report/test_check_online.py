"""Checking files that grow: the verdict is that of the whole run, whatever was taken when, and what cannot be judged is said."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proto.trace import HEADER_BYTES, Kind, TraceWriter
from proto.trace_live import LiveFile
from report.check.checker import Checker
from report.check.online import OnlineCheck
from report.check.verdict import Verdict
from tests.report.check_story import Story, numbers, on_two_vcpus

NAMES = {0: "host", 1: "vcpu-0", 2: "vcpu-1", 2000: "swapd-0-0"}


class Run:
    """Processes that record a story, a piece at a time, and the check that reads along."""

    def __init__(self, folder: Path, story: Story, ring: int = 1 << 12) -> None:
        self.folder = folder
        self.ring = ring
        self.story = story
        self.writers: dict[int, TraceWriter] = {}
        self.told = 0
        self.lamport = 0
        self.check = OnlineCheck(folder, story.profile, [NAMES[p] for p in (0, 1, 2)])
        for proc in NAMES:
            self.open(proc)

    def open(self, proc: int) -> None:
        self.writers[proc] = TraceWriter(self.folder / f"{NAMES[proc]}.bin", proc, self.ring * 64)

    def tell(self, rows: int) -> None:
        """Record the next rows; each process has seen what came before."""
        for row in self.story.rows[self.told : self.told + rows]:
            writer = self.writers[row["proc"]]
            writer.observe(self.lamport)
            self.lamport = writer.event(
                row["kind"], row["vcpu"], 0, row["token"], row["a"], row["b"], row["c"]
            )
        self.told += rows

    def tick(self, *procs: int) -> None:
        for proc in procs or self.writers:
            self.writers[proc].tick()

    def end(self, ended: str = "finished") -> Verdict:
        self.tell(len(self.story.rows))
        for writer in self.writers.values():
            writer.close()
        return self.check.finish("story", ended)


@contextmanager
def running(folder: Path, story: Story, ring: int = 1 << 12) -> Iterator[Run]:
    run = Run(folder, story, ring)
    try:
        yield run
    finally:
        for writer in run.writers.values():
            writer.close()
        run.check.close()


def _whole(story: Story) -> dict[str, Any]:
    checker = Checker(story.profile)
    checker.feed(story.events())
    return checker.finish("story").summary()


def _without_examples(summary: dict[str, Any]) -> dict[str, Any]:
    """Numbers of records are those of the files."""
    return {name: value for name, value in summary.items() if name != "examples"}


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**32), lost=st.booleans())
def test_the_verdict_is_that_of_the_whole_run(
    tmp_path_factory: pytest.TempPathFactory, seed: int, lost: bool
) -> None:
    rng = random.Random(seed)
    story = on_two_vcpus(30, lost=lost)
    with running(tmp_path_factory.mktemp("run"), story, ring=1 << 11) as run:
        while run.told < len(story.rows):
            match rng.randrange(4):
                case 0:
                    run.tick(rng.choice(list(run.writers)))
                case 1:
                    run.check.turn()
                case _:
                    run.tell(rng.randrange(1, 60))
        verdict = run.end()
        assert _without_examples(verdict.summary()) == _without_examples(_whole(story))
        assert verdict.liveness


def test_small_rings_are_recycled_while_the_reader_keeps_up(tmp_path: Path) -> None:
    story = on_two_vcpus(400, lost=True)
    with running(tmp_path, story, ring=128) as run:
        while run.told < len(story.rows):
            run.tell(20)
            run.check.turn()
            run.tick()
            run.check.turn()
        online = run.check.online
        verdict = run.end()
        assert all(writer.dropped == 0 for writer in run.writers.values())
        assert online > len(story.rows) - 100
        assert (numbers(verdict), verdict.events, verdict.liveness) == ({47}, len(story.rows), True)


def test_an_idle_process_holds_up_nothing_once_it_has_looked(tmp_path: Path) -> None:
    story = Story()
    story.boot()
    story.boot(1)
    for number in range(1, 20):
        story.life(number, 10 + number, 0)
    with running(tmp_path, story) as run:
        run.tell(len(story.rows))
        run.check.turn()
        assert run.check.checked_upto < run.lamport - 100, "vcpu-1 may yet record something old"
        run.tick(0, 1)
        run.check.turn()
        assert run.check.checked_upto < run.lamport - 100
        run.tick(2)
        run.check.turn()
        assert run.check.checked_upto >= run.lamport
        assert run.writers[2].event(Kind.G_RESUME, 1) > run.check.checked_upto
        assert run.end().ok


def test_a_process_that_has_not_begun_holds_everything_up(tmp_path: Path) -> None:
    story = on_two_vcpus(3)
    run = Run(tmp_path, story)
    run.writers.pop(2).close()
    (tmp_path / "vcpu-1.bin").unlink()
    run.writers[0].event(Kind.BARRIER)
    run.tick()
    assert run.check.turn() == 0
    run.open(2)
    run.tick()
    run.check.turn()
    run.tick()
    assert run.check.turn() == 1
    assert run.end().ok
    run.check.close()


def test_a_reader_that_was_behind_ends_the_check_where_events_are_missing(tmp_path: Path) -> None:
    story = on_two_vcpus(200, lost=True)
    with running(tmp_path, story, ring=512) as run:
        run.tell(300)
        run.tick()
        run.check.turn()
        verdict = run.end()
        assert run.writers[0].dropped > 0
        assert verdict.ok
        assert not verdict.liveness
        assert verdict.events < len(story.rows)
        assert any("later events were not recorded" in note for note in verdict.notes)
        assert any("checked up to Lamport counter" in note for note in verdict.notes)


def test_a_process_that_breaks_its_promise_ends_the_check(tmp_path: Path) -> None:
    story = on_two_vcpus(20)
    with running(tmp_path, story) as run:
        run.tell(len(story.rows) // 2)
        for _ in range(2):
            run.check.turn()
            run.tick()
        checked = run.check.checker.events
        assert checked
        run.writers[2].lamport = run.check._files["vcpu-1"].live.last
        run.writers[2].event(Kind.G_RESUME, 1)
        run.check.turn()
        verdict = run.end()
        assert not verdict.liveness
        assert verdict.events == checked
        assert any("vcpu-1" in note for note in verdict.notes)


@pytest.mark.parametrize("damage", [False, True])
def test_a_killed_or_damaged_process_cuts_the_check(tmp_path: Path, damage: bool) -> None:
    story = on_two_vcpus(20)
    run = Run(tmp_path, story)
    run.tell(len(story.rows))
    if damage:
        with (tmp_path / "vcpu-1.bin").open("r+b") as file:
            file.seek(HEADER_BYTES + 64 * 3)
            file.write(bytes(64))
    for proc in (0, 1, 2000):
        run.writers[proc].close()
    verdict = run.check.finish("story", "failed:vcpu-1")
    assert verdict.ok
    assert not verdict.liveness
    said = "damaged at byte" if damage else "vcpu-1.bin was not closed"
    assert any(said in note for note in verdict.notes)
    assert (verdict.events < len(story.rows)) is damage
    run.writers[2].close()
    run.check.close()


def test_a_damaged_file_of_a_daemon_is_noted_and_all_others_are_checked_to_their_end(tmp_path: Path) -> None:
    story = on_two_vcpus(20)
    run = Run(tmp_path, story)
    for _ in range(40):
        run.writers[2000].event(Kind.SWAP_IN)
    with (tmp_path / "swapd-0-0.bin").open("r+b") as file:
        file.seek(HEADER_BYTES + 64 * 3)
        file.write(bytes(64))
    verdict = run.end()
    assert verdict.ok
    assert verdict.liveness
    assert verdict.events == len(story.rows) + 3
    assert any("swapd-0-0.bin: damaged" in note for note in verdict.notes)
    run.check.close()


def test_a_run_that_did_not_finish_is_held_to_safety(tmp_path: Path) -> None:
    story = Story()
    story.boot()
    story.asleep(1, 10)
    with running(tmp_path, story) as run:
        verdict = run.end("failed:timeout while running")
        assert verdict.ok
        assert any("failed:timeout" in note for note in verdict.notes)


def test_a_run_without_events_proves_nothing(tmp_path: Path) -> None:
    check = OnlineCheck(tmp_path, "mainline", ["host"])
    assert check.turn() == 0
    verdict = check.finish("x", "interrupted")
    assert (verdict.events, verdict.liveness) == (0, False)
    assert any("no process recorded anything" in note for note in verdict.notes)


def test_files_of_daemons_that_were_replaced_are_let_go(tmp_path: Path) -> None:
    with running(tmp_path, on_two_vcpus(3)) as run:
        for epoch in range(1, 40):
            with TraceWriter(tmp_path / f"swapd-0-{epoch}.bin", 2000, 6400) as writer:
                writer.event(Kind.SWAP_IN)
            run.check.turn()
        assert [name for name in run.check._files if name.startswith("swapd")] == ["swapd-0-39"]
        assert run.end().ok


def test_epochs_of_a_daemon_that_are_seen_at_once_are_taken_as_numbers(tmp_path: Path) -> None:
    with running(tmp_path, on_two_vcpus(3)) as run:
        for epoch in (9, 10):
            TraceWriter(tmp_path / f"swapd-0-{epoch}.bin", 2000, 6400).close()
        run.check.turn()
        assert [name for name in run.check._files if name.startswith("swapd")] == ["swapd-0-10"]


def test_a_turn_does_a_bounded_amount_of_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("report.check.online.EVENTS_PER_TURN", 200)
    monkeypatch.setattr("report.check.online.LEAST_PER_FILE", 1)
    taken = []
    real = LiveFile.take

    def counted(self: LiveFile, most: int) -> Any:
        events = real(self, most)
        taken.append(len(events))
        return events

    monkeypatch.setattr(LiveFile, "take", counted)
    story = on_two_vcpus(100)
    with running(tmp_path, story) as run:
        run.tell(len(story.rows))
        run.check.turn()
        run.tick()
        for _ in range(200):
            taken.clear()
            run.check.turn()
            assert sum(taken) <= 200 + len(NAMES)
        assert run.check.online > len(story.rows) - 10
        assert run.end().ok


def test_a_turn_is_used_by_who_has_recorded_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many idle processes beside one that works: their shares are not kept free for them."""
    monkeypatch.setattr("report.check.online.EVENTS_PER_TURN", 400)
    story = on_two_vcpus(40)
    with running(tmp_path, story) as run:
        idle = [TraceWriter(tmp_path / f"vcpu-{cpu}.bin", 1 + cpu, 1 << 16) for cpu in range(2, 80)]
        for writer in idle:
            writer.event(Kind.PROCESS_START)
        run.lamport = 1
        run.tell(len(story.rows))
        run.check.turn()
        run.tick()
        for writer in idle:
            writer.tick()
        turns = 0
        while run.check.turn() or run.check.more:
            turns += 1
        assert run.check.online >= len(story.rows) - 1
        assert turns <= 2 + len(story.rows) // 200
        for writer in idle:
            writer.close()


def test_what_comes_during_a_turn_does_not_hold_it_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that was idle for long records an event while others' files are read: that is above the floor of the turn."""
    story = on_two_vcpus(20)
    with running(tmp_path, story) as run:
        run.tell(len(story.rows))
        run.check.turn()
        run.tick()
        real = LiveFile.take

        def meanwhile(self: LiveFile, most: int) -> Any:
            for proc in (0, 1, 2):
                run.writers[proc].event(Kind.REQ, a=1)
            return real(self, most)

        with monkeypatch.context() as patched:
            patched.setattr(LiveFile, "take", meanwhile)
            newest = min(one.live.floor() for one in run.check._files.values() if one.orders)
            run.check.turn()
        assert run.check.checked_upto == newest
        assert not run.check.more


def test_how_far_it_is_behind_is_known(tmp_path: Path) -> None:
    story = on_two_vcpus(20)
    with running(tmp_path, story, ring=1 << 10) as run:
        assert (run.check.behind(), run.check.behind_max, run.check.fullest) == (0, 0, 0.0)
        run.tell(len(story.rows))
        run.check.turn()
        run.tick()
        recorded = sum(writer.count for proc, writer in run.writers.items() if proc < 2000)
        assert run.check.behind_max == recorded
        assert run.check.fullest == pytest.approx(max(w.count for w in run.writers.values()) / (1 << 10))
        run.check.turn()
        assert run.check.behind() <= 1
        assert run.end().ok
