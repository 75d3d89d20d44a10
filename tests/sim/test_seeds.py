"""Random runs: clean on the unmodified code, the same for the same seed, and able to find what only an interleaving shows."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from host.async_pf import AsyncPf
from host.x86 import X86
from proto.machine import MachineError
from proto.machine import Path as Steps
from proto.profile import PROFILES
from sim import seeds

CLEAN = range(300)
HUNT = range(600)


def test_the_unmodified_rules_hold() -> None:
    parks: Counter[str] = Counter()
    seen: Counter[str] = Counter()
    for seed in CLEAN:
        got = seeds.run_seed(seed)
        assert got.failures == (), seed
        parks += got.parks
        seen[got.draw.scenario.profile] += 1
        for key in ("not_present", "sync", "repeated", "halts", "elided"):
            seen[key] += got.outcome.observed[key]
    assert set(PROFILES) <= set(seen)
    for key in ("not_present", "sync", "repeated", "halts", "elided"):
        assert seen[key], f"no seed ever came to {key}"
    steps = {
        "setup.queued",
        "setup.announced",
        "worker.appended",
        "worker.queued",
        "dequeue.popped",
        "ack.cleared",
        "v3.inject",
    }
    assert steps <= set(parks), "every interleaving point was used"


def test_a_seed_is_a_run() -> None:
    for seed in (3, 4, 5):
        first, second = seeds.run_seed(seed), seeds.run_seed(seed)
        assert first.outcome.events == second.outcome.events
        assert first.draw.parameters() == second.draw.parameters()
    assert seeds.run_seed(6).outcome.events != seeds.run_seed(7).outcome.events


def test_a_profile_can_be_fixed() -> None:
    assert {seeds.draw(seed, "v7").scenario.profile for seed in range(20)} == {"v7"}


def hunt(profile: str | None = None) -> int | None:
    """The first seed that fails."""
    for seed in HUNT:
        try:
            failed = bool(seeds.run_seed(seed, profile).failures)
        except MachineError:
            failed = True
        if failed:
            return seed
    return None


def test_a_waker_that_looks_before_it_appends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Said first, appended later: between the two the vCPU looks, finds nothing, and nobody says it again."""

    def completed(self: AsyncPf, work_id: int) -> Steps:
        work = self.queue.get(work_id)
        if work is None:
            return
        work.arrived = True
        if not self.done:
            self._arch.present_queued()
        yield "worker.queued"
        self.done.append(work)

    monkeypatch.setattr(AsyncPf, "completed", completed)
    assert hunt("mainline") is not None


def test_a_ready_that_nobody_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ready although not-present was never injected (BZ-05)."""
    monkeypatch.setitem(PROFILES, "v7", replace(PROFILES["v7"], ready_needs_announced=False))
    assert hunt("v7") is not None


def test_a_token_word_that_is_overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    def can_dequeue(_: X86) -> Steps:
        yield "can_dequeue.read"
        return True

    monkeypatch.setattr(X86, "can_dequeue", can_dequeue)
    assert hunt("mainline") is not None
