"""The machine of faults: what is due when, who it happens to, and what survives a death."""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from host.reads import STRIKES_MAX
from proto.faults import (
    BAD_WORDS,
    FIRED,
    FOREVER_NS,
    KINDS,
    LAST_NS,
    NATURAL,
    READ_TRIES,
    SEEN,
    STEPS,
    BadBlocks,
    FaultMachine,
    Spec,
    may_lose_pages,
    outcome,
    target_code,
    words_needed,
)

MS = 1_000_000
START = 5_000 * MS


def machine(*specs: Spec, started: bool = True) -> FaultMachine:
    made = FaultMachine(specs, memoryview(array("Q", [0] * words_needed(len(specs), 2))))
    if started:
        made.start(START)
    return made


def at_step(number: int = 0, kind: str = "kill", **more: Any) -> Spec:
    return Spec(number, kind, more.pop("role", "swapd"), more.pop("targets", (0,)), **more)


def timed(*times_ms: int, **more: Any) -> Spec:
    times = tuple(ms * MS for ms in times_ms)
    return at_step(times_ns=times, scheduled=len(times), **more)


def hit(made: FaultMachine, now_ns: int, number: int = 0, role: str = "swapd") -> list[tuple[str, int, int]]:
    """One fault of each kind at most."""
    found = [made.take(kind, role, number, now_ns) for kind in KINDS]
    return [(f.spec.kind, f.number, f.nth) for f in found if f is not None]


def test_the_nth_occasion_of_a_step_and_no_other() -> None:
    made = machine(at_step(step="read.done", nth=3))
    found = [(made.step("read.done", "swapd", 0, START + 1), hit(made, START + 1)) for _ in range(7)]
    assert found == [(n == 2, [("kill", 0, 1)] if n == 2 else []) for n in range(7)]
    assert not made.step("write.done", "swapd", 0, START + 1), "another step"


def test_every_nth_occasion_as_often_as_asked() -> None:
    made = machine(at_step(step="read.done", nth=2, scheduled=3))
    due = [n for n in range(20) if made.step("read.done", "swapd", 0, START + 1) and hit(made, START + 1)]
    assert due == [1, 3, 5]
    assert outcome(made.specs[0], made) == ""


def test_occasions_of_somebody_else_do_not_count() -> None:
    made = machine(
        at_step(step="read.done", targets=(1,)), at_step(1, step="fault.announced", role="vcpu", targets=(3,))
    )
    assert not made.step("read.done", "swapd", 0, START + 1)
    assert not made.step("fault.announced", "vcpu", 2, START + 1)
    assert made.step("fault.announced", "vcpu", 3, START + 1)
    assert hit(made, START + 1) == []
    assert hit(made, START + 1, 3, "vcpu") == [("kill", 3, 1)]


def test_a_step_of_another_role_counts_whoever_has_it() -> None:
    made = machine(at_step(step="fault.announced", nth=2, targets=(1,)))
    assert not made.step("fault.announced", "vcpu", 0, START + 1)
    assert made.step("fault.announced", "vcpu", 7, START + 1)
    assert hit(made, START + 1, 0) == []
    assert hit(made, START + 1, 1) == [("kill", 1, 1)]


def test_daemons_take_turns() -> None:
    made = machine(at_step(step="read.done", scheduled=3, targets=(0, 1)))
    found = []
    for number in (1, 0, 0, 1, 0, 0):
        if made.step("read.done", "swapd", number, START + 1):
            found += hit(made, START + 1, number)
    assert found == [("kill", 0, 1), ("kill", 1, 2), ("kill", 0, 3)]
    assert [made.fired_at(made.specs[0], number) for number in (0, 1)] == [2, 1]


def test_nothing_happens_before_the_barrier_or_after_the_stop() -> None:
    made = machine(at_step(step="read.done"), timed(0, 10, number=1), started=False)
    assert not made.step("read.done", "swapd", 0, START)
    assert hit(made, START) == []
    made.start(START)
    made.stop(START + 5 * MS)
    assert not made.step("read.done", "swapd", 0, START + 6 * MS)
    assert hit(made, START + 20 * MS) == []
    assert made.next_ns(made.specs, START + 1) is None
    assert made.word(made.specs[0], SEEN) == 0


def test_what_is_due_at_the_stop_has_not_happened_and_what_lasts_goes_on() -> None:
    made = machine(
        at_step(kind="bit_flip", step="read.done"),
        timed(10, number=1, kind="drop"),
        timed(10, 11, 12, number=2, merges=True),
        timed(10, number=3, kind="slow", for_ns=50 * MS),
        timed(30, number=4),
    )
    made.step("read.done", "swapd", 0, START + 10 * MS)
    assert made.take("slow", "swapd", 0, START + 10 * MS) is not None
    assert made.take("kill", "swapd", 0, START + 10 * MS) is not None
    made.stop(START + 20 * MS)
    assert hit(made, START + 10_000 * MS) == []
    assert made.open("slow", 0, START + 59 * MS) == made.specs[3]
    assert [made.left_over(spec) for spec in made.specs] == [True, True, True, False, False]
    found = [outcome(spec, made) for spec in made.specs]
    late = "; it was due, and the measured time was over before there was anything it could happen to"
    assert found == [
        f"happened 0 times of 1 (the step was seen 1 times){late}",
        f"happened 0 times of 1{late}",
        "",
        "",
        "happened 0 times of 1",
    ], "one that comes again and again may be passed over at the end as anywhere else"
    never = machine(timed(10, 11, merges=True))
    never.stop(START + 20 * MS)
    assert outcome(never.specs[0], never) == f"never happened, 2 times were scheduled{late}"


def test_occasions_outside_the_window_do_not_count() -> None:
    made = machine(at_step(step="read.done", from_ns=10 * MS, until_ns=20 * MS, scheduled=9))
    times = [
        n
        for n in range(30)
        if made.step("read.done", "swapd", 0, START + n * MS) and hit(made, START + n * MS)
    ]
    assert times == list(range(10, 19)), "nine times, and 20 ms is too late"


def test_one_that_comes_again_and_again_is_not_made_up_for() -> None:
    made = machine(timed(10, 20, 30, 40, merges=True, targets=(0, 1)))
    assert hit(made, START + 9 * MS) == []
    assert made.next_ns(made.specs, START + 9 * MS) == START + 10 * MS
    assert hit(made, START + 35 * MS) == [("kill", 0, 1)]
    assert hit(made, START + 36 * MS, 0) == hit(made, START + 36 * MS, 1) == []
    made.skip(made.specs[0], START + 40 * MS)
    assert hit(made, START + 50 * MS, 0) == hit(made, START + 50 * MS, 1) == []
    assert made.next_ns(made.specs, START + 50 * MS) is None
    assert outcome(made.specs[0], made) == ""


def test_one_that_was_to_happen_once_waits() -> None:
    made = machine(timed(10))
    assert hit(made, START + 10_000 * MS) == [("kill", 0, 1)]
    assert made.word(made.specs[0], LAST_NS) == START + 10_000 * MS
    assert hit(made, START + 10_001 * MS) == []


def test_what_lasts_is_open_at_its_target_until_its_end() -> None:
    made = machine(timed(10, kind="slow", for_ns=5 * MS), timed(10, kind="device_gone", number=1))
    assert made.open("slow", 0, START + 12 * MS) is None, "nothing has begun"
    assert hit(made, START + 12 * MS) == [("slow", 0, 1), ("device_gone", 0, 1)]
    assert made.open("slow", 0, START + 16 * MS) == made.specs[0]
    assert made.open("slow", 1, START + 16 * MS) is None
    assert made.open("slow", 0, START + 17 * MS) is None
    assert made.open("device_gone", 0, START + 12 * MS) is None, "it lasts for one operation"


@pytest.mark.parametrize("kind", ["slow", "read_error", "device_gone"])
def test_what_lasts_at_one_daemon_goes_on_while_it_begins_at_the_next(kind: str) -> None:
    for for_ns, ends in ((FOREVER_NS, False), (15 * MS, True)):
        made = machine(timed(10, 20, kind=kind, merges=True, targets=(0, 1), for_ns=for_ns))
        assert hit(made, START + 10 * MS, 0) == [(kind, 0, 1)]
        assert hit(made, START + 20 * MS, 1) == [(kind, 1, 2)]
        assert [made.open(kind, daemon, START + 21 * MS) for daemon in (0, 1)] == list(made.specs) * 2
        later = [made.open(kind, daemon, START + 26 * MS) for daemon in (0, 1)]
        assert later == ([None, made.specs[0]] if ends else list(made.specs) * 2)


class Watched(list[int]):
    """Words of which each that is written is told, as another process may look after each."""

    told: Callable[[], object] | None = None

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(index, value)
        if self.told is not None:
            self.told()


@pytest.mark.parametrize(
    "spec",
    [
        timed(10, kind="bit_flip", targets=(0, 1)),
        timed(10, kind="bit_flip", targets=(0, 1), merges=True),
        at_step(kind="bit_flip", step="read.done", targets=(0, 1)),
    ],
)
def test_a_target_in_turn_acts_only_after_all_of_the_one_before_is_written(spec: Spec) -> None:
    words = Watched([0] * words_needed(1, 2))
    mine, other = FaultMachine([spec], words), FaultMachine([spec], words)
    mine.start(START)
    mine.step("read.done", "swapd", 0, START + 10 * MS)
    found = []
    words.told = lambda: found.append((other.target(spec), hit(other, START + 10 * MS, 1)))
    assert hit(mine, START + 10 * MS, 0) == [("bit_flip", 0, 1)]
    words.told = None
    assert {taken for _, hits in found for taken in hits} == set(), "what was to happen once happened once"
    assert [number for number, _ in found] == [0] * (len(found) - 1) + [1], "the turn comes last"
    assert mine.word(spec, FIRED) == 1


def test_who_asks_whose_turn_it_is_asks_that_first() -> None:
    """The turn is handed on between two looks of the next target: it sees all of it, or nothing."""
    spec = timed(10, kind="bit_flip", targets=(0, 1))

    class Late(list[int]):
        reads = 0
        act: Callable[[], object] | None = None

        def __getitem__(self, index: Any) -> Any:
            value = super().__getitem__(index)
            self.reads -= 1
            if not self.reads and self.act is not None:
                act, self.act = self.act, None
                act()
            return value

    for reads in range(1, 30):
        words = Late([0] * words_needed(1, 2))
        other = FaultMachine([spec], words)
        other.start(START)
        words.reads = reads
        words.act = partial(hit, FaultMachine([spec], words), START + 10 * MS, 0)
        assert hit(other, START + 10 * MS, 1) == [], reads


def test_of_two_at_one_operation_one_waits_for_the_next() -> None:
    made = machine(*(at_step(n, "bit_flip", step="read.done", nth=5) for n in (0, 1)))
    for _ in range(5):
        made.step("read.done", "swapd", 0, START + 1)
    for fired in ([1, 0], [1, 1], [1, 1]):
        made.take("bit_flip", "swapd", 0, START + 1)
        assert [made.word(spec, FIRED) for spec in made.specs] == fired


@pytest.mark.parametrize(
    ("kinds", "arrivals"),
    [
        ((), [(1, 0)]),
        (("drop", "delay"), [(0, 0), (1, 7), (1, 0)]),
        (("delay", "drop"), [(0, 0), (1, 7), (1, 0)]),
        (("drop", "duplicate"), [(0, 0), (2, 0), (1, 0)]),
        (("drop", "drop"), [(0, 0), (0, 0), (1, 0)]),
        (("duplicate", "delay"), [(2, 7), (1, 0)]),
        (("delay", "delay"), [(1, 7), (1, 7), (1, 0)]),
    ],
)
def test_what_becomes_of_messages(kinds: tuple[str, ...], arrivals: list[tuple[int, int]]) -> None:
    """Each that is due at the first message makes a difference, at that or at a later one."""
    made = machine(
        *(at_step(n, kind, step="link.message", for_ns=7 * (kind == "delay")) for n, kind in enumerate(kinds))
    )
    made.step("link.message", "swapd", 0, START + 1)
    found = [made.deliver(0, START + 1) for _ in arrivals]
    assert [(one.copies, one.later_ns) for one in found] == arrivals
    assert sorted(f.spec.number for one in found for f in one.firings) == list(range(len(kinds)))


def test_a_daemon_that_is_gone_for_good_has_no_turn() -> None:
    made = machine(
        timed(10, 20, 30, kind="bit_flip", merges=True, targets=(0, 1)),
        at_step(1, "kill", step="read.done", targets=(0, 1), scheduled=2),
        timed(10, kind="drop", number=2, targets=(0, 1)),
        timed(10, kind="slow", number=3, targets=(0,), for_ns=MS),
    )
    assert not made.step("read.done", "swapd", 1, START + MS), "it is the other's turn"
    made.gone(0)
    found = []
    for ms in (10, 20, 30):
        made.step("read.done", "swapd", 1, START + ms * MS)
        found.append(hit(made, START + ms * MS, 1))
    assert found == [
        [("kill", 1, 1), ("bit_flip", 1, 1), ("drop", 1, 1)],
        [("kill", 1, 2), ("bit_flip", 1, 2)],
        [("bit_flip", 1, 3)],
    ]
    assert not made.pending(made.specs[3], START + 40 * MS), "nobody is left that it could happen to"
    assert [bool(outcome(spec, made)) for spec in made.specs] == [False, False, False, True]
    made.gone(1)
    assert not made.pending(made.specs[0], START + 40 * MS)
    assert made.target(made.specs[0]) in (0, 1)


def test_the_others_go_on_taking_turns() -> None:
    spec = at_step(kind="bit_flip", step="read.done", targets=(0, 1, 2), scheduled=9)
    made = FaultMachine([spec], [0] * words_needed(1, 3))
    made.start(START)
    made.gone(0)
    found = []
    for _ in range(4):
        found.append(made.target(spec))
        made.step("read.done", "swapd", made.target(spec), START + 1)
        made.take("bit_flip", "swapd", made.target(spec), START + 1)
    assert found == [1, 2, 1, 2]


def test_the_words_outlive_the_machine() -> None:
    made = machine(at_step(step="read.done", nth=2))
    made.step("read.done", "swapd", 0, START + 1)
    successor = FaultMachine(made.specs, made.words)
    assert successor.step("read.done", "swapd", 0, START + 2)
    assert hit(successor, START + 2) == [("kill", 0, 1)]
    assert not FaultMachine(made.specs, made.words).step("read.done", "swapd", 0, START + 3)


def test_what_waits_for_its_target_is_pending_at_the_next_occasion() -> None:
    made = machine(at_step(step="read.done", nth=2))
    due = [made.step("read.done", "swapd", 0, START + 1) for _ in range(4)]
    assert due == [False, True, True, True]


@pytest.mark.parametrize(
    ("spec", "fired", "words"),
    [
        (at_step(step="read.done", scheduled=2), 1, "happened 1 times of 2"),
        (timed(10), 0, "happened 0 times of 1"),
        (timed(10, 20, merges=True), 0, "never happened, 2 times"),
        (timed(10, 20, merges=True), 1, ""),
        (timed(10), 1, ""),
    ],
)
def test_what_did_not_happen_fails(spec: Spec, fired: int, words: str) -> None:
    made = machine(spec)
    for n in range(fired):
        made.fire(spec, START + n)
    assert made.word(spec, FIRED) == fired
    assert outcome(spec, made).startswith(words)
    assert bool(outcome(spec, made)) == bool(words)


def test_which_faults_may_cost_a_page() -> None:
    specs = [at_step(i, kind, step="read.done") for i, kind in enumerate(("bad_block", "bit_flip", "kill"))]
    made = machine(*specs)
    for spec in specs[1:]:
        made.fire(spec, START)
    assert may_lose_pages(made) == [], "one wrong bit is read again, a dead daemon has lost nothing"
    for _ in range(READ_TRIES - 1):
        made.fire(specs[1], START)
    assert [spec.kind for spec in may_lose_pages(made)] == ["bit_flip"]
    made.fire(specs[0], START)
    assert [spec.kind for spec in may_lose_pages(made)] == ["bad_block", "bit_flip"]
    lasting = machine(dataclasses.replace(specs[1], number=0, for_ns=MS))
    lasting.fire(lasting.specs[0], START)
    assert [spec.kind for spec in may_lose_pages(lasting)] == ["bit_flip"]


def test_the_tries_that_a_page_has_are_those_of_the_host() -> None:
    assert READ_TRIES == STRIKES_MAX


def test_bad_blocks_stay_bad_in_the_next_incarnation() -> None:
    words = [0] * words_needed(1, 2)
    bad = BadBlocks(words, 1, 1)
    for block in (7, 9, 7):
        bad.add(block)
    again = BadBlocks(words, 1, 1)
    assert (7 in again, 9 in again, 8 in again) == (True, True, False)
    assert 7 not in BadBlocks(words, 1, 0), "another daemon's file"
    again.add(11)
    assert words[-BAD_WORDS : -BAD_WORDS + 4] == [3, 7, 9, 11]


def test_every_kind_has_its_place() -> None:
    assert set(NATURAL) == set(KINDS) - {"kill", "stop"}
    assert set(NATURAL.values()) <= set(STEPS)
    assert target_code("vcpu", 3) == 1 << 16 | 3
