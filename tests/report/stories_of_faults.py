"""Stories that break one invariant each: faults, how they are announced, prefaults, what is saved."""

from __future__ import annotations

from proto.trace import Kind
from tests.report.check_story import IF, PENDING, PG, USER, Story
from tests.report.story_register import Stories, Teller, registering

STORIES: Stories = {}
tells = registering(STORIES)


@tells(1, recorded=True)
def _token_twice(s: Story, bad: bool) -> None:
    # Numbers may jump in a recorded kernel: three jumps go once round the 20 bits.
    for gfn, number in enumerate((1, 400_001, 800_001, 1 if bad else 2)):
        s.fault(number, 10 + gfn)


@tells(2)
def _token_of_another_vcpu(s: Story, bad: bool) -> None:
    s.boot()
    token = 1 << 12 | (5 if bad else 0)
    s.add(Kind.TRY_ASYNC_GET_PAGE, b=10)
    s.add(Kind.ASYNC_PF_NOT_PRESENT, 0, token)
    s.cancel(token)


@tells(3)
def _token_zero(s: Story, bad: bool) -> None:
    s.boot()
    s.life(0 if bad else 1, 10)


@tells(4)
def _sixty_five_outstanding(s: Story, bad: bool) -> None:
    s.boot()
    tokens = [s.fault(1 + i, 10 + i) for i in range(65 if bad else 64)]
    for token in tokens:
        s.cancel(token)


@tells(5)
def _full_while_empty(s: Story, bad: bool) -> None:
    s.boot()
    tokens = [s.fault(1 + i, 10 + i) for i in range(1 if bad else 64)]
    s.add(Kind.TRY_ASYNC_GET_PAGE, b=500)
    s.add(Kind.SETUP_FAIL, 0, (len(tokens) + 1) << 12, a=1, b=500)
    for token in tokens:
        s.cancel(token)


@tells(6)
def _repeated_but_never_announced(s: Story, bad: bool) -> None:
    s.boot()
    token = s.asleep(1, 10)
    s.add(Kind.TRY_ASYNC_GET_PAGE, b=77 if bad else 10)
    s.add(Kind.ASYNC_PF_REPEATED_FAULT, b=77 if bad else 10)
    s.halt()
    s.done(token)
    s.add(Kind.HALT_OFF)
    s.told(token)


@tells(7)
def _page_announced_twice(s: Story, bad: bool) -> None:
    s.boot()
    first = s.asleep(1, 10)
    second = s.asleep(2, 10 if bad else 11, task=2)
    s.done(first)
    s.done(second)
    s.told(first)
    s.told(second, task=2)


@tells(8)
def _entry_behind_a_hole(s: Story, bad: bool) -> None:
    """34 and 89 have slot 63 for a home; the second one must move up when the first one goes."""
    s.boot()
    first = s.asleep(1, 34)
    s.add(Kind.HASH_SET, a=34, b=63, c=63)
    second = s.asleep(2, 89, task=2)
    s.add(Kind.HASH_SET, a=89, b=63, c=0)
    s.done(first)
    s.done(second)
    s.add(Kind.HASH_DROP, a=34, b=63)
    if not bad:
        s.add(Kind.HASH_SET, a=89, b=63, c=63)
    s.told(first)
    s.add(Kind.HASH_DROP, a=89, b=0 if bad else 63)
    s.told(second, task=2)


@tells(29)
def _prefault_of_another_context(s: Story, bad: bool) -> None:
    s.boot()
    token = 1 << 12
    s.add(Kind.TRY_ASYNC_GET_PAGE, b=10)
    s.add(Kind.ASYNC_PF_NOT_PRESENT, 0, token, a=10 << 12, b=0x5000, c=0)
    s.inject(token)
    s.handle(token)
    s.sleep(token)
    s.done(token)
    s.add(Kind.MMU, 0, token, a=0x7000 if bad else 0x5000, b=0)
    s.told(token)


@tells(32)
def _written_by_a_stale_translation(s: Story, bad: bool) -> None:
    s.boot()
    s.add(Kind.AREA_CACHE, a=1 if bad else 2, b=2, c=1)
    s.inject(s.fault(1, 10))
    s.handle(1 << 12)
    s.cancel(1 << 12)


@tells(37)
def _saved_as_halted(s: Story, bad: bool) -> None:
    s.boot()
    token = s.fault(1, 10)
    s.halt()
    s.add(Kind.STATE_SAVE, a=3 if bad else 0, b=1, c=0x9009)
    s.cancel(token)


@tells(42)
def _table_with_interrupts_on(s: Story, bad: bool) -> None:
    s.boot()
    token = s.asleep(1, 10)
    s.done(token)
    s.hears(token)
    s.add(Kind.G_TABLE, 0, token, a=1, b=1 if bad else 0)
    s.wake(token)
    s.consumed(0, token)


def _injected_with(state: int, good: int = USER) -> Teller:
    def teller(s: Story, bad: bool) -> None:
        s.boot()
        token = s.fault(1, 10)
        s.inject(token, state=state if bad else good)
        s.handle(token)
        s.sleep(token)
        s.done(token)
        s.told(token)

    return teller


tells(9)(_injected_with(USER & ~IF))
tells(10)(_injected_with(USER | PENDING))
tells(11)(_injected_with(USER & ~3))
tells(12)(_injected_with(USER & ~PG))


@tells(13)
def _injected_without_the_word(s: Story, bad: bool) -> None:
    s.boot()
    token = s.fault(1, 10)
    if not bad:
        s.add(Kind.SLOT_WRITE, 0, 1, a=0, b=1)
    s.add(Kind.INJ, 0, token, a=1, b=token, c=USER)
    s.handle(token)
    s.sleep(token)
    s.done(token)
    s.told(token)


@tells(14, recorded=True)
def _double_fault(s: Story, bad: bool) -> None:
    s.boot(enable=False)
    s.add(Kind.INJ_EXCEPTION, a=8 if bad else 3)


@tells(15)
def _word_not_consumed(s: Story, bad: bool) -> None:
    s.boot()
    first = s.fault(1, 10)
    s.inject(first)
    if not bad:
        s.add(Kind.G_CLEAR, 0, first, a=0, b=1)
    s.add(Kind.G_NP, 0, first, a=1, b=first)
    s.sleep(first)
    second = s.asleep(2, 11, task=2)
    s.done(first)
    s.done(second)
    s.told(first)
    s.told(second, task=2)


@tells(16)
def _taken_twice(s: Story, bad: bool) -> None:
    s.boot()
    token = s.fault(1, 10)
    s.inject(token)
    s.handle(token)
    if bad:
        s.add(Kind.G_NP, 0, token, a=1, b=token)
    s.sleep(token)
    s.done(token)
    s.told(token)


@tells(17)
def _another_cr2(s: Story, bad: bool) -> None:
    s.boot()
    token = s.fault(1, 10)
    s.inject(token)
    s.add(Kind.G_CLEAR, 0, token, a=0, b=1)
    s.add(Kind.G_NP, 0, token, a=1, b=token + 0x1000 * bad)
    s.sleep(token)
    s.done(token)
    s.told(token)


@tells(18)
def _prefault_starts_a_fault(s: Story, bad: bool) -> None:
    s.boot()
    token = s.asleep(1, 10)
    s.done(token)
    s.add(Kind.PREFAULT, 0, token)
    if bad:
        s.add(Kind.TRY_ASYNC_GET_PAGE, b=99)
    s.add(Kind.ASYNC_PF_READY, 0, token)
    s.deliver(0, token)
    s.take_ready(0, token)
    s.wake(token)
    s.consumed(0, token)


@tells(19)
def _repeated_without_halt(s: Story, bad: bool) -> None:
    s.boot()
    token = s.asleep(1, 10)
    s.add(Kind.TRY_ASYNC_GET_PAGE, b=10)
    s.add(Kind.ASYNC_PF_REPEATED_FAULT, b=10)
    if not bad:
        s.halt()
        s.add(Kind.HALT_OFF)
    s.add(Kind.SWITCH, a=1, b=2, c=1)
    s.done(token)
    s.told(token)
