"""Stories that break one invariant each: ready events, registers, halts, sleepers, and what is left at the end."""

from __future__ import annotations

from proto.trace import Kind
from tests.report.check_story import IF, MSR_EN, SECOND_NS, USER, VECTOR, WAKE_ALL, Story
from tests.report.story_register import Stories, registering

STORIES: Stories = {}
tells = registering(STORIES)


@tells(20)
def _ready_before_the_fetch(s: Story, bad: bool) -> None:
    s.boot()
    token = s.asleep(1, 10)
    if not bad:
        s.done(token)
    s.told(token)


@tells(21)
def _ready_twice(s: Story, bad: bool) -> None:
    s.boot()
    token = s.life(1, 10)
    if bad:
        s.add(Kind.ASYNC_PF_READY, 0, token)


@tells(22)
def _told_ready_but_never_missing(s: Story, bad: bool) -> None:
    s.boot()
    token = s.fault(1, 10)
    s.halt()
    s.done(token)
    s.add(Kind.HALT_OFF)
    s.ready(token)
    if bad:
        s.deliver(0, token)
        s.take_ready(0, token)
        s.consumed(0, token)
    s.life(2, 11)


@tells(23)
def _overtaken(s: Story, bad: bool) -> None:
    s.boot()
    first, second = s.asleep(1, 10), s.asleep(2, 11, task=2)
    s.done(first)
    s.done(second)
    order = [(second, 2), (first, 1)] if bad else [(first, 1), (second, 2)]
    for token, task in order:
        s.told(token, task=task)


def _old_word(number: int, profile: str, offset: int) -> None:
    @tells(number, profile)
    def teller(s: Story, bad: bool) -> None:
        s.boot()
        token = s.fault(1, 10)
        s.inject(token, old=7 * (bad and offset == 0))
        s.handle(token)
        s.sleep(token)
        s.done(token)
        s.ready(token)
        s.deliver(0, token, old=7 * (bad and offset == 4))
        s.take_ready(0, token)
        s.wake(token)
        s.consumed(0, token)


_old_word(24, "mainline", 4)


@tells(25)
def _word_written_over(s: Story, bad: bool) -> None:
    s.boot()
    first, second = s.asleep(1, 10), s.asleep(2, 11, task=2)
    for token in (first, second):
        s.done(token)
    s.hears(first)
    s.wake(first)
    if not bad:
        s.consumed(0, first)
    s.hears(second)
    s.wake(second, task=2)
    s.consumed(0, second)


@tells(26)
def _token_without_interrupt(s: Story, bad: bool) -> None:
    s.boot()
    token = s.asleep(1, 10)
    s.done(token)
    s.ready(token)
    s.add(Kind.SLOT_WRITE, 0, token, a=4, b=token)
    if not bad:
        s.add(Kind.APIC_ACCEPT_IRQ, 0, token, a=VECTOR)
    s.take_ready(0, token)
    s.wake(token)
    s.consumed(0, token)


@tells(27, "v7")
def _ready_with_interrupts_off(s: Story, bad: bool) -> None:
    s.boot()
    token = s.asleep(1, 10)
    s.done(token)
    s.ready(token)
    s.add(Kind.SLOT_WRITE, 0, 2, a=0, b=2)
    s.add(Kind.INJ, 0, token, a=2, b=token, c=USER & ~IF if bad else USER)
    s.take_ready(0, token)
    s.wake(token)


@tells(28)
def _repeated_after_ready(s: Story, bad: bool) -> None:
    s.boot()
    s.life(1, 10)
    other = s.asleep(2, 11)
    s.add(Kind.TRY_ASYNC_GET_PAGE, b=10 if bad else 11)
    s.add(Kind.ASYNC_PF_REPEATED_FAULT, b=10 if bad else 11)
    s.halt()
    s.done(other)
    s.add(Kind.HALT_OFF)
    s.told(other)


@tells(30)
def _written_while_disabled(s: Story, bad: bool) -> None:
    if bad:
        s.add(Kind.SLOT_WRITE, 0, 1, a=0, b=1)
    s.boot()


@tells(31)
def _written_elsewhere(s: Story, bad: bool) -> None:
    s.boot()
    s.add(Kind.SLOT_WRITE, 0, 1, a=8 if bad else 0, b=1)


@tells(33)
def _reserved_bit_accepted(s: Story, bad: bool) -> None:
    s.boot()
    s.add(Kind.MSR_WR, a=MSR_EN, b=0x9009 | 0x10, c=not bad)


@tells(34)
def _disabled_with_an_item(s: Story, bad: bool) -> None:
    s.boot()
    token = s.fault(1, 10)
    s.halt()
    s.add(Kind.HALT_OFF)
    if not bad:
        s.cancel(token, why=1)
    s.add(Kind.MSR_WR, a=MSR_EN, b=0)
    if bad:
        s.cancel(token, why=1)


@tells(35)
def _runs_while_halted(s: Story, bad: bool) -> None:
    s.boot()
    token = s.fault(1, 10)
    s.halt()
    if bad:
        s.add(Kind.G_IRQ, a=0xEC)
    s.done(token)
    s.add(Kind.HALT_OFF)
    s.ready(token)


@tells(36)
def _halted_for_nothing(s: Story, bad: bool) -> None:
    s.boot()
    token = s.fault(1, 10)
    if bad:
        s.done(token)
        s.ready(token)
    s.halt()
    s.add(Kind.HALT_OFF)
    s.cancel(token)


@tells(38)
def _left_blocked(s: Story, bad: bool) -> None:
    s.boot()
    token = s.fault(1, 10)
    s.halt()
    s.done(token)
    s.now_ns += 11 * SECOND_NS * bad
    s.add(Kind.HALT_OFF)
    s.ready(token)


@tells(39)
def _two_nodes(s: Story, bad: bool) -> None:
    s.boot()
    token = s.asleep(1, 10)
    if bad:
        s.sleep(token, task=2)
    s.done(token)
    s.told(token, task=2 if bad else 1)


@tells(40)
def _resumed_before_the_wake(s: Story, bad: bool) -> None:
    s.boot()
    token = s.asleep(1, 10)
    if bad:
        s.add(Kind.G_RESUME, 0, token, a=1)
    s.done(token)
    s.told(token)


@tells(41)
def _switches_while_it_halts(s: Story, bad: bool) -> None:
    s.boot()
    token = s.fault(1, 10)
    s.inject(token)
    s.handle(token)
    s.sleep(token, variant=1)
    if bad:
        s.add(Kind.SWITCH, a=1, b=2, c=1)
    s.done(token)
    s.told(token)


@tells(43)
def _broadcast_of_another_cpu(s: Story, bad: bool) -> None:
    s.boot()
    s.boot(1)
    token = s.asleep(1, 10)
    s.add(Kind.ASYNC_PF_READY, 0, WAKE_ALL)
    s.deliver(0, WAKE_ALL)
    s.take_ready(0, WAKE_ALL)
    s.wake(token, 1 if bad else 0, variant=2)
    s.consumed(0, WAKE_ALL)
    s.cancel(token)


@tells(44)
def _gone_but_linked(s: Story, bad: bool) -> None:
    s.boot()
    token = s.asleep(1, 10)
    s.add(Kind.TASK_DONE, a=1 if bad else 2)
    s.done(token)
    s.told(token)


@tells(45)
def _dummy_for_ever(s: Story, bad: bool) -> None:
    s.boot()
    token = s.life(1, 10)
    if bad:
        s.wake(token, variant=1)


@tells(46)
def _after_the_end(s: Story, bad: bool) -> None:
    s.boot()
    token = s.fault(1, 10)
    s.cancel(token)
    if bad:
        s.add(Kind.SLOT_READ0, a=4)


@tells(47)
def _cleared_without_a_wake(s: Story, bad: bool) -> None:
    s.boot()
    token = s.asleep(1, 10)
    s.done(token)
    s.hears(token)
    if not bad:
        s.wake(token)
    s.consumed(0, token)


@tells(48)
def _never_delivered(s: Story, bad: bool) -> None:
    s.boot()
    token = s.fault(1, 10)
    s.done(token)
    s.now_ns += 11 * SECOND_NS * bad
    s.cancel(token)


@tells(49)
def _round_and_round(s: Story, bad: bool) -> None:
    s.boot()
    token = s.asleep(1, 10)
    for _ in range(150 if bad else 50):
        s.halt()
        s.add(Kind.HALT_OFF)
    s.done(token)
    s.told(token)


@tells(50)
def _the_same_page_for_ever(s: Story, bad: bool) -> None:
    s.boot()
    for number in range(1, 300 if bad else 200):
        token = s.fault(number, 10)
        s.done(token)
        s.ready(token)
