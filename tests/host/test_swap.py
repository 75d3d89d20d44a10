"""The swap machine: epochs, fences, windows, slots."""

from __future__ import annotations

from typing import Any

import pytest

from host import events as ev
from host.copies import SLOTS_PER_DAEMON
from host.reads import STRIKES_MAX
from host.swap import ATTEMPTS_MAX, RESEND_NS, WINDOW, SwapMachine, op_of
from proto.machine import MachineError
from proto.stats import HostCounter
from proto.wire import OP_READ, OP_WRITE
from tests.host.harness import Recorder


def machine(slots: tuple[int, ...] = (1000,), up: bool = True) -> tuple[SwapMachine, Recorder]:
    obs = Recorder()
    swap = SwapMachine(slots, obs)
    if up:
        for d in range(len(slots)):
            swap.on([ev.DaemonUp(d, 0)], 0)
    return swap, obs


def holding(
    slots: tuple[int, ...] = (1000,), up: bool = True, pages: int = 1
) -> tuple[SwapMachine, Recorder]:
    """With slots 0 to ``pages`` - 1 of the first daemon in use."""
    swap, obs = machine(slots, up)
    for slot in range(pages):
        assert swap.copies.take(lambda d: d == 0) == slot
        swap.copies.written(slot, [slot], 0)
    return swap, obs


def write(swap: SwapMachine, serial: int, hvp: int = 0, slot: int = -1) -> list[object]:
    return swap.on([ev.SwapOut(serial, hvp, 5, slot, 99)], 0)


def sent(effects: list[object]) -> list[ev.SendIo]:
    return [e for e in effects if isinstance(e, ev.SendIo)]


def reply(swap: SwapMachine, io: ev.SendIo, result: int = 4096, epoch: int | None = None) -> list[object]:
    return swap.on([ev.IoReply(io.daemon, io.epoch if epoch is None else epoch, io.request, result, 1)], 10)


def test_write_then_read_returns_the_sum_of_the_acknowledged_write() -> None:
    swap, _ = machine()
    (io,) = sent(write(swap, 1))
    (done,) = reply(swap, io)
    assert isinstance(done, ev.SwapOutDone)
    assert done.ok
    (read,) = sent(swap.on([ev.SwapIn(0, done.slot, 9)], 0))
    (came,) = reply(swap, read)
    assert came == ev.SwapInDone(0, done.slot, 9, True, 99, done.slot, False)


def test_duplicate_and_foreign_replies_are_dropped_and_counted() -> None:
    swap, obs = machine()
    (io,) = sent(write(swap, 1))
    assert reply(swap, io, epoch=7) == []
    assert len(reply(swap, io)) == 1
    assert reply(swap, io) == []
    assert obs.counts[HostCounter.STALE_REPLIES] == 2


def test_unanswered_requests_are_sent_again_only_after_fence_and_new_epoch() -> None:
    swap, obs = holding()
    (first,) = sent(write(swap, 1))
    assert swap.on([ev.DaemonLost(0, 0)], 0) == [ev.WritesStand(stand=True)]
    assert sent(swap.on([ev.SwapIn(3, 0, 4)], 0)) == [], "nothing is sent to a dead daemon"
    with pytest.raises(MachineError):
        swap.on([ev.DaemonUp(0, 1)], 0)
    assert sent(swap.on([ev.DaemonFenced(0, 0)], 0)) == []
    again, _read = sent(swap.on([ev.DaemonUp(0, 1)], 0))
    assert (again.request, again.slot, again.frame, again.epoch) == (
        first.request,
        first.slot,
        first.frame,
        1,
    )
    assert reply(swap, first) == [], "a late reply of the old epoch means nothing"
    assert len(reply(swap, again)) == 1
    assert obs.counts[HostCounter.RESENT] == 1


def test_writes_stand_while_no_daemon_is_up() -> None:
    swap = SwapMachine([64, 64], Recorder())

    def told(event: Any) -> list[bool]:
        return [effect.stand for effect in swap.on([event], 0) if isinstance(effect, ev.WritesStand)]

    assert told(ev.DaemonUp(0, 0)) == told(ev.DaemonUp(1, 0)) == []
    assert told(ev.DaemonLost(0, 0)) == []
    assert told(ev.DaemonLost(1, 0)) == [True]
    assert told(ev.DaemonLost(1, 1)) == [], "its successor died before it was up"
    assert told(ev.DaemonFenced(0, 0)) == []
    assert told(ev.DaemonUp(0, 1)) == [False]


def test_a_reply_that_was_sent_before_the_death_still_counts() -> None:
    swap, _ = machine()
    (first,) = sent(write(swap, 1))
    swap.on([ev.DaemonLost(0, 0)], 0)
    assert len(reply(swap, first)) == 1
    swap.on([ev.DaemonFenced(0, 0)], 0)
    assert sent(swap.on([ev.DaemonUp(0, 1)], 0)) == []


def test_death_before_hello() -> None:
    swap, _ = holding(up=False)
    swap.on([ev.SwapIn(0, 0, 0)], 0)
    swap.on([ev.DaemonLost(0, 0)], 0)
    swap.on([ev.DaemonFenced(0, 0)], 0)
    assert len(sent(swap.on([ev.DaemonUp(0, 1)], 0))) == 1


def test_window_bounds_what_is_out() -> None:
    swap, _ = machine((4 * WINDOW,))
    out = sent(swap.on([ev.SwapOut(i, i, i, -1, 0) for i in range(2 * WINDOW)], 0))
    assert len(out) == WINDOW
    assert len(sent(reply(swap, out[0]))) == 1


def test_errors_are_retried_a_bounded_number_of_times_then_reported() -> None:
    swap, obs = holding()
    (io,) = sent(swap.on([ev.SwapIn(0, 0, 0)], 0))
    attempts = 1
    effects = reply(swap, io, -5)
    while sent(effects):
        attempts += 1
        effects = reply(swap, sent(effects)[0], -5)
    assert attempts == ATTEMPTS_MAX * STRIKES_MAX
    assert effects == [ev.SwapInDone(0, 0, 0, False, 0, -1, False)]
    assert obs.counts[HostCounter.IO_ERRORS] == STRIKES_MAX
    assert obs.counts[HostCounter.QUARANTINED] == 1
    assert swap.slots_used == 0, "the block is used no more"


def test_short_read_is_an_error_too() -> None:
    swap, _ = holding()
    (io,) = sent(swap.on([ev.SwapIn(0, 0, 0)], 0))
    assert sent(reply(swap, io, 100)) != []


def test_full_swap_is_said_and_freed_slots_are_reused() -> None:
    swap, _ = machine((1,))
    (io,) = sent(write(swap, 1))
    (full,) = write(swap, 2)
    assert isinstance(full, ev.SwapOutDone)
    assert full.full
    (done,) = reply(swap, io)
    assert isinstance(done, ev.SwapOutDone)
    swap.on([ev.SlotFree(done.slot)], 0)
    assert len(sent(write(swap, 3))) == 1


def test_failed_write_gives_its_slot_back() -> None:
    swap, _ = machine((1,))
    effects = write(swap, 1)
    while sent(effects):
        effects = reply(swap, sent(effects)[0], -28)
    assert isinstance(effects[-1], ev.SwapOutDone)
    assert not effects[-1].ok
    assert swap.slots_used == 0


def test_slots_are_spread_over_daemons() -> None:
    swap, _ = machine((10, 10))
    daemons = [sent(write(swap, i, i))[0].daemon for i in range(4)]
    assert daemons == [0, 1, 0, 1]
    assert SLOTS_PER_DAEMON > 10


def test_what_is_not_answered_for_long_is_sent_again_under_the_same_id() -> None:
    swap, obs = holding()
    (first,) = sent(swap.on([ev.SwapIn(0, 0, 0)], 0))
    assert swap.on([ev.LookAtRequests()], RESEND_NS - 1) == []
    (again,) = sent(swap.on([ev.LookAtRequests()], RESEND_NS))
    assert again == first
    assert swap.on([ev.LookAtRequests()], RESEND_NS + 1) == [], "it has just been sent"
    assert obs.counts[HostCounter.RESENT] == 1
    assert len(reply(swap, first)) == 1
    assert reply(swap, again) == []


def test_a_daemon_that_is_down_is_not_asked_again() -> None:
    swap, _ = holding()
    swap.on([ev.SwapIn(0, 0, 0)], 0)
    swap.on([ev.DaemonLost(0, 0)], 0)
    assert swap.on([ev.LookAtRequests()], RESEND_NS) == []


def test_a_failed_attempt_is_repeated_under_a_new_id() -> None:
    """The daemon remembers its answers and would give the same one again."""
    swap, _ = holding()
    (io,) = sent(swap.on([ev.SwapIn(0, 0, 0)], 0))
    (again,) = sent(reply(swap, io, -5))
    assert again.request > io.request
    assert (again.slot, again.frame, again.op) == (io.slot, io.frame, io.op)


def test_settled_are_the_ids_below_all_that_is_unanswered() -> None:
    swap, _ = machine((4 * WINDOW, 10))
    out = sent(swap.on([ev.SwapOut(i, i, i, -1, 0) for i in range(8)], 0))
    mine = [io for io in out if io.daemon == 0]
    assert swap.settled(0) == mine[0].request
    reply(swap, mine[1])
    assert swap.settled(0) == mine[0].request
    reply(swap, mine[0])
    assert swap.settled(0) == mine[2].request
    for io in out:
        reply(swap, io)
    assert swap.settled(0) == swap.settled(1) > max(io.request for io in out)
    swap.on([ev.DaemonLost(0, 0)], 0)
    swap.on([ev.SwapIn(0, 0, 0)], 0)
    assert swap.settled(0) == swap.settled(1) - 2, "what waits to be sent is not settled"


def test_an_id_says_what_was_asked() -> None:
    swap, _ = holding()
    (read,) = sent(swap.on([ev.SwapIn(0, 0, 0)], 0))
    (written,) = sent(write(swap, 1))
    assert (op_of(read.request), op_of(written.request)) == (OP_READ, OP_WRITE)
