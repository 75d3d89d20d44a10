"""Every invariant that is checked: a story that breaks it and nothing else, and the same story told right."""

from __future__ import annotations

import pytest

from proto.trace import Kind
from report.check.rules import RULES
from tests.report.check_story import IF, MSR_EN, MSR_INT, SECOND_NS, USER, VECTOR, WAKE_ALL, Story, numbers
from tests.report.stories import STORIES, tell


@pytest.mark.parametrize("number", sorted(STORIES))
def test_a_story_that_breaks_it_breaks_nothing_else(number: int) -> None:
    story, recorded = tell(number, bad=True)
    verdict = story.check(recorded=recorded)
    assert numbers(verdict) == {number}
    (finding,) = verdict.violated
    assert finding.violations == len(finding.examples) >= 1
    assert finding.checks >= finding.violations


@pytest.mark.parametrize("number", sorted(STORIES))
def test_the_same_story_told_right_breaks_nothing(number: int) -> None:
    story, recorded = tell(number, bad=False)
    verdict = story.check(recorded=recorded)
    assert numbers(verdict) == set()
    assert verdict.findings[number - 1].checks > 0


def test_every_invariant_is_told() -> None:
    assert set(STORIES) == {rule.number for rule in RULES} == set(range(1, 51))


# -- other ways to break some of them ----------------------------------------------------------------------------------


def _hashed(gfn: int, slot: int, *, home: int | None = None) -> Story:
    """A live item on gfn 0 (home 0), then an entry for it or for another page."""
    story = Story()
    story.boot()
    story.asleep(1, 0)
    story.add(Kind.HASH_SET, a=gfn, b=slot if home is None else home, c=slot)
    return story


@pytest.mark.parametrize(
    ("gfn", "slot", "home", "expected"),
    [
        (0, 0, 0, set()),
        (0, 1, 0, {8}),
        (0, 0, 3, {8}),
        (0, 64, 0, {8}),
        (0, 2**63, 0, {8}),
        (55, 0, 0, {6}),
    ],
)
def test_entries_of_the_hash(gfn: int, slot: int, home: int, expected: set[int]) -> None:
    assert numbers(_hashed(gfn, slot, home=home).check(cut="test")) == expected


def test_an_entry_that_another_one_overwrites() -> None:
    story = _hashed(0, 0)
    story.asleep(2, 55, task=2)
    story.add(Kind.HASH_SET, a=55, b=0, c=0)
    assert numbers(story.check(cut="test")) == {8}


@pytest.mark.parametrize(
    ("drops", "expected"),
    [([(0, 0)], set()), ([], {6, 28}), ([(0, 5)], {6, 28}), ([(77, 0)], {6, 28}), ([(2**64 - 1, 0)], set())],
)
def test_the_page_leaves_the_hash_before_its_ready_event(
    drops: list[tuple[int, int]], expected: set[int]
) -> None:
    story = _hashed(0, 0)
    story.done(1 << 12)
    for gfn, slot in drops:
        story.add(Kind.HASH_DROP, a=gfn, b=slot)
    story.told(1 << 12)
    assert numbers(story.check(cut="test")) == expected


@pytest.mark.parametrize(("queued", "good"), [(1, True), (2, False), (64, False)])
def test_the_count_of_queued_items(queued: int, good: bool) -> None:
    story = Story()
    story.boot()
    token = story.asleep(1, 10)
    story.done(token)
    story.add(Kind.PREFAULT, 0, token)
    story.add(Kind.ASYNC_PF_READY, 0, token, b=queued)
    story.deliver(0, token)
    story.take_ready(0, token)
    story.wake(token)
    story.consumed(0, token)
    assert numbers(story.check()) == (set() if good else {5})


@pytest.mark.parametrize(
    ("cached", "current", "dirty", "old", "good"),
    [(2, 2, 1, 0, True), (2, 2, 0, 0, False), (2, 3, 1, 0, False), (2, 2, 0, 2**64 - 1, True)],
)
def test_writes_by_a_translation(cached: int, current: int, dirty: int, old: int, good: bool) -> None:
    story = Story()
    story.boot()
    token = story.fault(1, 10)
    story.add(Kind.AREA_CACHE, a=cached, b=current, c=dirty)
    story.add(Kind.SLOT_WRITE, 0, 1, a=0, b=1, c=old)
    story.cancel(token)
    assert (32 not in numbers(story.check(cut="test"))) is good


def test_once_translations_are_logged_every_write_needs_its_own() -> None:
    story = Story()
    story.boot()
    story.add(Kind.AREA_CACHE, a=1, b=1, c=1)
    story.inject(story.fault(1, 10))
    story.add(Kind.G_CLEAR, 0, 1 << 12, a=0, b=1)
    story.inject(story.fault(2, 11))
    assert 32 in numbers(story.check(cut="test"))


@pytest.mark.parametrize(
    ("hlt", "synthetic", "mp_state", "good"),
    [
        (False, True, 3, False),
        (False, True, 0, True),
        (True, False, 3, True),
        (True, True, 3, True),
        (False, False, 0, True),
    ],
)
def test_what_is_saved_of_a_halt(hlt: bool, synthetic: bool, mp_state: int, good: bool) -> None:
    story = Story()
    story.boot()
    story.fault(1, 10)
    if hlt:
        story.add(Kind.G_HLT)
    if synthetic:
        story.halt()
    story.add(Kind.STATE_SAVE, a=mp_state, b=int(synthetic), c=0x9009)
    assert (37 not in numbers(story.check(cut="test"))) is good


def test_hlt_counts_as_blocked_and_not_as_getting_on() -> None:
    story = Story()
    story.boot()
    token = story.asleep(1, 10)
    for _ in range(99):
        story.add(Kind.G_HLT)
        story.add(Kind.HALT_OFF, a=1)
    assert numbers(story.check(cut="test")) == set()
    story.add(Kind.G_HLT)
    story.add(Kind.HALT_OFF, a=1)
    assert numbers(story.check(cut="test")) == {49}
    story = Story()
    story.boot()
    token = story.asleep(1, 10)
    story.add(Kind.G_HLT)
    story.done(token)
    story.now_ns += 11 * SECOND_NS
    story.add(Kind.HALT_OFF, a=1)
    assert numbers(story.check(cut="test")) == {38}


def test_tasks_are_switched_with_interrupts_on() -> None:
    story = Story()
    story.boot()
    story.life(1, 10)
    assert numbers(story.check()) == set()
    story.add(Kind.SWITCH, a=1, b=2, c=0)
    assert numbers(story.check()) == {42}


def test_two_exceptions_queued_at_once() -> None:
    story = Story()
    story.boot()
    first, second = story.fault(1, 10), story.fault(2, 11)
    story.inject(first)
    story.inject(second)
    assert 14 in numbers(story.check(cut="test"))


def test_an_exception_that_the_guest_never_saw() -> None:
    story = Story()
    story.boot()
    first = story.fault(1, 10)
    story.inject(first)
    story.add(Kind.G_CLEAR, 0, first, a=0, b=1)
    story.inject(story.fault(2, 11))
    assert numbers(story.check(cut="test")) == {16}


def test_announcing_word_by_its_old_value() -> None:
    story = Story()
    story.boot()
    story.inject(story.fault(1, 10), old=2)
    assert numbers(story.check(cut="test")) == {15}


def test_a_write_that_no_memslot_backed_is_none() -> None:
    story = Story()
    story.boot()
    token = story.fault(1, 10)
    story.add(Kind.SLOT_WRITE, 0, 1, a=0, b=1, c=2**64 - 1)
    story.halt()
    story.add(Kind.HALT_OFF)
    story.cancel(token)
    assert numbers(story.check()) == set()


def test_vector_zero() -> None:
    story = Story()
    story.add(Kind.MSR_WR, a=0x80F, b=0x1FF)
    story.add(Kind.MSR_WR, a=MSR_EN, b=0x9009)
    story.add(Kind.ASYNC_PF_READY, 0, WAKE_ALL)
    story.add(Kind.SLOT_WRITE, 0, WAKE_ALL, a=4, b=WAKE_ALL)
    story.add(Kind.APIC_ACCEPT_IRQ, 0, WAKE_ALL, a=0)
    assert numbers(story.check()) == {26}


def test_enabled_with_the_lapic_off() -> None:
    story = Story()
    story.add(Kind.MSR_WR, a=MSR_INT, b=VECTOR)
    story.add(Kind.MSR_WR, a=MSR_EN, b=0x9009)
    story.add(Kind.ASYNC_PF_READY, 0, WAKE_ALL)
    assert 26 in numbers(story.check(cut="test"))


@pytest.mark.parametrize("profile", ["mainline", "v7", "v3"])
def test_a_broadcast_wakes_all_of_its_cpu(profile: str) -> None:
    story = Story(profile)
    story.boot()
    first, second = story.asleep(1, 10), story.asleep(2, 11, task=2)
    story.add(Kind.ASYNC_PF_READY, 0, WAKE_ALL)
    story.deliver(0, WAKE_ALL)
    story.take_ready(0, WAKE_ALL)
    story.wake(first, variant=2)
    story.consumed(0, WAKE_ALL)
    story.resume(first)
    for token in (first, second):
        story.cancel(token)
    found = story.check(cut="test")
    assert numbers(found) == {43}
    assert found.violated[0].examples[0]["token"] == second


def test_a_wake_by_another_cpu_may_stand_behind_the_resume() -> None:
    story = Story()
    story.boot()
    story.boot(1)
    token = story.asleep(1, 10)
    story.done(token)
    story.hears(token)
    story.resume(token)
    story.wake(token, 1)
    story.consumed(0, token)
    assert numbers(story.check()) == set()


def test_a_task_that_resumed_and_was_never_woken() -> None:
    story = Story()
    story.boot()
    token = story.asleep(1, 10)
    story.resume(token)
    story.done(token)
    assert 40 in numbers(story.check())


@pytest.mark.parametrize("profile", ["v7", "mainline"])
def test_the_dummy_of_a_sleeper_whom_a_broadcast_woke_is_kvms_own(profile: str) -> None:
    """Enabled, told of a missing page, and only then of the broadcast: the page's own wake-up comes when nobody sleeps any more."""
    for late in (True, False):
        story = Story(profile)
        story.boot()
        first = story.asleep(1, 10)
        story.wake(first, variant=2)
        story.resume(first)
        story.finds_nobody(first)
        token = story.life(2, 11)
        if not late:
            story.wake(token, variant=1)
        assert numbers(story.check()) == (set() if late else {45})


@pytest.mark.parametrize("profile", ["v3", "v7", "mainline"])
@pytest.mark.parametrize("when", ["before", "behind"])
def test_a_broadcast_is_for_those_who_sleep_when_it_is_taken(profile: str, when: str) -> None:
    if profile != "mainline" and when == "behind":
        pytest.skip("the word is cleared before anybody can sleep")
    story = Story(profile)
    story.boot()
    story.add(Kind.ASYNC_PF_READY, 0, WAKE_ALL)
    tokens = [story.asleep(1, 10)] if when == "before" else []
    story.deliver(0, WAKE_ALL)
    story.take_ready(0, WAKE_ALL)
    tokens += [story.asleep(1, 10)] if when == "behind" else []
    story.consumed(0, WAKE_ALL)
    for token in tokens:
        story.done(token)
        story.told(token)
    assert numbers(story.check()) == ({43} if when == "before" else set())


def test_dummy_rules() -> None:
    story = Story()
    story.boot()
    token = story.fault(1, 10)
    story.inject(token)
    story.handle(token)
    story.finds_nobody(token)
    story.sleep(token, variant=2)
    assert numbers(story.check()) == set()
    story.sleep(token, variant=2)
    assert numbers(story.check()) == {39}


def test_a_lost_fault_is_found_when_the_run_ends_by_itself() -> None:
    story = Story()
    story.boot()
    token = story.asleep(1, 10)
    assert numbers(story.check()) == {47}
    story.add(Kind.STOP)
    story.cancel(token)
    assert numbers(story.check()) == set(), "stopped while it was under way"


def test_a_sleeper_whom_the_disabling_guest_forgot() -> None:
    story = Story()
    story.boot()
    token = story.asleep(1, 10)
    story.cancel(token, why=1)
    story.add(Kind.MSR_WR, a=MSR_EN, b=0)
    assert numbers(story.check()) == {47}
    story.wake(token, variant=2)
    assert numbers(story.check()) == set()


def test_a_dequeued_completion_that_was_not_told() -> None:
    story = Story()
    story.boot()
    token = story.asleep(1, 10)
    story.done(token)
    story.ready(token)
    story.add(Kind.STOP)
    assert numbers(story.check()) == {47}


def test_completions_behind_ready_events_where_the_trace_does_not_order_them() -> None:
    story = Story()
    for number in (1, 2):
        story.fault(number, 10 + number)
    for number in (1, 2):
        story.ready(number << 12)
    for number in (2, 1):
        story.add(Kind.ASYNC_PF_COMPLETED, b=(10 + number) << 12)
    assert numbers(story.check(recorded=True)) == set()
    del story.rows[-1]
    assert numbers(story.check(recorded=True)) == {20}


def test_a_fetch_may_end_before_its_announcement_in_v3_only() -> None:
    for profile, expected in (("v3", set()), ("mainline", {20})):
        story = Story(profile)
        story.boot()
        story.done(1 << 12)
        token = story.asleep(1, 10)
        if profile == "mainline":
            story.done(token)
        story.told(token)
        assert numbers(story.check()) == expected


def test_an_elided_fault_of_v3() -> None:
    story = Story("v3")
    story.boot()
    token = story.fault(0, 10)
    story.done(token)
    story.add(Kind.PREFAULT, 0, token)
    story.cancel(token, why=4)
    story.life(1, 10)
    assert numbers(story.check()) == set()


def test_v3_may_send_to_user_mode_with_interrupts_off() -> None:
    story = Story("v3")
    story.boot()
    story.inject(story.fault(1, 10), state=USER & ~IF)
    assert numbers(story.check(cut="test")) == set()
    story = Story("v3")
    story.boot(send_always=True)
    story.inject(story.fault(1, 10), state=USER & ~IF)
    assert numbers(story.check(cut="test")) == {9}


@pytest.mark.parametrize(
    ("index", "value", "failed", "good"),
    [
        (MSR_INT, 0x1F3, 0, False),
        (MSR_INT, 0x1F3, 1, True),
        (MSR_EN, 0x9009 | 4, 0, False),
        (MSR_EN, 0x9009 | 4, 1, True),
        (MSR_EN, 0x9009, 1, True),
        (MSR_EN, 0, 1, False),
        (0x4B564D00, 0x9001, 0, False),
        (0x4B564D07, 2**64 - 1, 0, True),
    ],
)
def test_table_g(index: int, value: int, failed: int, good: bool) -> None:
    story = Story()
    story.boot()
    story.add(Kind.MSR_WR, a=index, b=value, c=failed)
    assert (33 not in numbers(story.check(cut="test"))) is good
