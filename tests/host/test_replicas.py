"""Two copies of each page: writes, reads from whoever is up, hedges, bad copies, daemons that never come back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from host import events as ev
from host.copies import SLOTS_PER_DAEMON
from host.kernels import F_DIRTY, HPT_BAD, HPT_RESIDENT, HPT_SLOT
from host.reads import STRIKES_MAX
from host.swap import ATTEMPTS_MAX, RESEND_NS, WINDOW, SwapMachine
from proto.lives import DaemonState
from proto.machine import MachineError
from proto.stats import HostCounter
from proto.trace import Kind
from tests.host import test_swap
from tests.host.harness import Bench, Recorder
from tests.host.test_swap import sent

HEDGE_NS = 1_000
GFN = 40
WORD = 7
SECOND = SLOTS_PER_DAEMON


def machine(daemons: int = 2, blocks: int = 100, hedge_ns: int = 0) -> tuple[SwapMachine, Recorder]:
    obs = Recorder()
    swap = SwapMachine([blocks] * daemons, obs, 2, hedge_ns)
    for d in range(daemons):
        swap.on([ev.DaemonUp(d, 0)], 0)
    return swap, obs


def stored(swap: SwapMachine, hvp: int = 0) -> int:
    """A page that all copies hold; its slot."""
    effects: list[Any] = []
    for io in sent(swap.on([ev.SwapOut(1, hvp, 5, -1, 99)], 0)):
        effects += reply(swap, io)
    (done,) = effects
    assert isinstance(done, ev.SwapOutDone)
    assert done.ok
    return done.slot


def reply(swap: SwapMachine, io: ev.SendIo, result: int = 4096) -> list[Any]:
    return test_swap.reply(swap, io, result)


def of(effects: list[Any], kind: type[Any]) -> list[Any]:
    return [effect for effect in effects if isinstance(effect, kind)]


def lose(swap: SwapMachine, daemon: int, epoch: int = 0) -> list[Any]:
    """Dead and fenced."""
    lost = swap.on([ev.DaemonLost(daemon, epoch)], 0)
    return lost + swap.on([ev.DaemonFenced(daemon, epoch)], 0)


# -- writes --------------------------------------------------------------------------------------------------
def test_a_page_is_written_when_both_copies_are() -> None:
    swap, obs = machine()
    first, second = sent(swap.on([ev.SwapOut(1, 0, 5, -1, 99)], 0))
    assert (first.daemon, second.daemon) == (0, 1)
    assert reply(swap, first) == []
    (done,) = reply(swap, second)
    assert done == ev.SwapOutDone(1, 0, 0, 5, ok=True, full=False)
    assert swap.slots_used == 2
    assert obs.gauges.get(HostCounter.SINGLE_COPIES, 0) == 0


@pytest.mark.parametrize("broken", [0, 1])
def test_a_copy_that_cannot_be_written_leaves_the_slot(broken: int) -> None:
    swap, obs = machine()
    requests = sent(swap.on([ev.SwapOut(1, 0, 5, -1, 99)], 0))
    reply(swap, requests.pop(1 - broken))
    effects: list[Any] = []
    for _ in range(ATTEMPTS_MAX):
        effects = reply(swap, requests[0], -28)
        requests = sent(effects)
    (done,) = effects
    assert (done.ok, done.slot) == (True, (1 - broken) * SLOTS_PER_DAEMON)
    assert obs.gauges[HostCounter.SINGLE_COPIES] == 1
    assert swap.slots_used == 1
    swap.on([ev.SlotFree(done.slot)], 0)
    assert (swap.slots_used, obs.gauges[HostCounter.SINGLE_COPIES]) == (0, 0)


def test_a_page_that_no_daemon_can_write_stays() -> None:
    swap, _ = machine()
    requests = sent(swap.on([ev.SwapOut(1, 0, 5, -1, 99)], 0))
    effects: list[Any] = []
    while requests:
        effects = reply(swap, requests.pop(), -5)
        requests += sent(effects)
    assert of(effects, ev.SwapOutDone) == [ev.SwapOutDone(1, 0, -1, 5, ok=False, full=False)]
    assert swap.slots_used == 0


def test_with_one_daemon_up_there_is_one_copy_and_the_next_read_says_so() -> None:
    swap, obs = machine()
    lose(swap, 1)
    slot = stored(swap)
    assert obs.gauges[HostCounter.SINGLE_COPIES] == 1
    (read,) = sent(swap.on([ev.SwapIn(0, slot, 9)], 0))
    assert reply(swap, read)[0].rewrite is False, "nobody else could take it"
    swap.on([ev.DaemonUp(1, 1)], 0)
    (read,) = sent(swap.on([ev.SwapIn(0, slot, 9)], 0))
    assert reply(swap, read)[0].rewrite is True


# -- reads ---------------------------------------------------------------------------------------------------
def test_reads_go_to_the_daemon_with_less_to_do() -> None:
    swap, _ = machine()
    slots = [stored(swap, hvp) for hvp in range(6)]
    daemons = [sent(swap.on([ev.SwapIn(hvp, slot, 10 + hvp)], 0))[0].daemon for hvp, slot in enumerate(slots)]
    assert sorted(daemons) == [0, 0, 0, 1, 1, 1]


def test_a_daemon_that_is_down_is_not_asked() -> None:
    swap, obs = machine()
    slot = stored(swap)
    lose(swap, 0)
    (read,) = sent(swap.on([ev.SwapIn(0, slot, 9)], 0))
    assert read.daemon == 1
    assert obs.counts[HostCounter.REPLICA_READS] == 1
    assert reply(swap, read)[0].xxh3 == 99


def test_a_read_of_a_daemon_that_dies_goes_to_the_other_with_another_frame() -> None:
    swap, _ = machine()
    slot = stored(swap)
    (first,) = sent(swap.on([ev.SwapIn(0, slot, 9)], 0))
    assert swap.on([ev.DaemonLost(first.daemon, 0)], 0) == [ev.LendFrame(0)]
    (second,) = sent(swap.on([ev.FrameLent(0, 33)], 0))
    assert (second.daemon, second.frame) == (1 - first.daemon, 33)
    done, *rest = reply(swap, second)
    assert (done.ok, done.frame, rest) == (True, 33, []), "frame 9 may still be written to"
    assert swap.on([ev.DaemonFenced(first.daemon, 0)], 0) == [ev.FrameBack(9)]
    assert sent(swap.on([ev.DaemonUp(first.daemon, 1)], 0)) == [], "nobody waits for it any more"


def test_without_a_free_frame_the_read_goes_over_after_the_fence() -> None:
    swap, obs = machine()
    slot = stored(swap)
    (first,) = sent(swap.on([ev.SwapIn(0, slot, 9)], 0))
    swap.on([ev.DaemonLost(first.daemon, 0)], 0)
    assert swap.on([ev.FrameLent(0, -1)], 0) == []
    (second,) = sent(swap.on([ev.DaemonFenced(first.daemon, 0)], 0))
    assert (second.daemon, second.frame) == (1 - first.daemon, 9)
    assert second.request > first.request
    assert obs.counts[HostCounter.FRAMES_REFUSED] == 1
    assert reply(swap, second)[0].ok


def test_what_waits_for_a_daemon_moves_when_another_comes_up() -> None:
    swap, _ = machine()
    slot = stored(swap)
    lose(swap, 0)
    lose(swap, 1)
    assert swap.on([ev.SwapIn(0, slot, 9)], 0) == []
    (read,) = sent(swap.on([ev.DaemonUp(1, 1)], 0))
    assert (read.daemon, read.frame) == (1, 9)


def test_a_daemon_that_is_silent_gets_nothing_new() -> None:
    swap, obs = machine(3)
    slots = [stored(swap, hvp) for hvp in range(3)]
    (silent,) = sent(swap.on([ev.SwapIn(0, slots[0], 9)], 0))
    assert silent.daemon == 0
    later = swap.on([ev.SwapOut(2, 50, 5, -1, 1), ev.SwapOut(3, 51, 5, -1, 1)], RESEND_NS)
    assert {io.daemon for io in sent(later)} == {1, 2}
    rewritten = sent(swap.on([ev.SwapOut(4, 0, 5, slots[0], 1)], RESEND_NS))
    assert {io.daemon for io in rewritten} == {1, 2}, "its copy is given up, another takes the place"
    (read,) = sent(swap.on([ev.SwapIn(2, slots[2], 10)], RESEND_NS))
    assert read.daemon == 2
    swap.on([ev.IoReply(0, 0, silent.request, 4096, 1)], RESEND_NS)
    assert 0 in {
        io.daemon
        for io in sent(swap.on([ev.SwapOut(5, 52, 5, -1, 1), ev.SwapOut(6, 53, 5, -1, 1)], RESEND_NS))
    }
    assert obs.counts[HostCounter.STALE_REPLIES] == 0


def test_when_nobody_answers_any_daemon_is_asked() -> None:
    swap, _ = machine()
    slot = stored(swap)
    swap.on([ev.SwapIn(0, slot, 9), ev.SwapOut(2, 50, 5, -1, 1)], 0)
    assert len(sent(swap.on([ev.SwapOut(3, 51, 5, -1, 1)], 2 * RESEND_NS))) == 2
    assert len(sent(swap.on([ev.SwapOut(4, 0, 5, slot, 1)], 2 * RESEND_NS))) == 2


# -- hedges --------------------------------------------------------------------------------------------------
def late(swap: SwapMachine) -> tuple[ev.SendIo, ev.SendIo]:
    """A read and, after the hedge's time, its second attempt, in frames 9 and 33."""
    slot = stored(swap)
    (first,) = sent(swap.on([ev.SwapIn(0, slot, 9)], 0))
    assert swap.next_hedge_ns == HEDGE_NS
    assert swap.on([ev.LookAtRequests()], HEDGE_NS - 1) == []
    assert swap.on([ev.LookAtRequests()], HEDGE_NS) == [ev.LendFrame(0)]
    assert swap.next_hedge_ns == 0, "once for a read"
    (second,) = sent(swap.on([ev.FrameLent(0, 33)], HEDGE_NS))
    assert second.daemon != first.daemon
    return first, second


def test_a_late_read_is_asked_twice_and_the_first_answer_counts() -> None:
    swap, obs = machine(hedge_ns=HEDGE_NS)
    first, second = late(swap)
    (done,) = reply(swap, second)
    assert (done.frame, done.copy) == (33, second.daemon * SLOTS_PER_DAEMON)
    assert reply(swap, first) == [ev.FrameBack(9)]
    assert (obs.counts[HostCounter.HEDGED], obs.counts[HostCounter.HEDGE_WINS]) == (1, 1)


def test_the_late_one_may_still_win() -> None:
    swap, obs = machine(hedge_ns=HEDGE_NS)
    first, second = late(swap)
    assert reply(swap, first)[0].frame == 9
    assert reply(swap, second, -5) == [ev.FrameBack(33)], "what the loser says does not matter"
    assert obs.counts[HostCounter.HEDGE_WINS] == obs.counts[HostCounter.IO_RETRIES] == 0


def test_a_loser_that_was_never_sent_gives_its_frame_back_at_once() -> None:
    swap, _ = machine(blocks=4 * WINDOW, hedge_ns=HEDGE_NS)
    slot = stored(swap)
    writes = sent(swap.on([ev.SwapOut(9, 100 + k, 5, -1, 1) for k in range(WINDOW)], 0))
    assert len(writes) == 2 * WINDOW
    assert sent(swap.on([ev.SwapIn(0, slot, 9), ev.LookAtRequests()], 0)) == [], "both windows are full"
    swap.on([ev.LookAtRequests()], HEDGE_NS)
    assert sent(swap.on([ev.FrameLent(0, 33)], HEDGE_NS)) == []
    (hedge,) = sent(reply(swap, next(io for io in writes if io.daemon == 1)))
    assert (hedge.daemon, hedge.frame) == (1, 33)
    done, back = reply(swap, hedge)
    assert (done.frame, back) == (33, ev.FrameBack(9)), "its daemon has never heard of it"


@pytest.mark.parametrize("answers", [False, True])
def test_a_dead_loser_keeps_its_frame_until_its_answer_or_the_fence(answers: bool) -> None:
    swap, _ = machine(hedge_ns=HEDGE_NS)
    first, second = late(swap)
    assert len(reply(swap, second)) == 1
    assert swap.on([ev.DaemonLost(first.daemon, 0)], 0) == []
    told = reply(swap, first) if answers else []
    assert told == ([ev.FrameBack(9)] if answers else [])
    told += swap.on([ev.DaemonFenced(first.daemon, 0)], 0)
    assert told == [ev.FrameBack(9)], "once"


def test_a_frame_that_comes_too_late_goes_back() -> None:
    swap, _ = machine(hedge_ns=HEDGE_NS)
    slot = stored(swap)
    (first,) = sent(swap.on([ev.SwapIn(0, slot, 9)], 0))
    swap.on([ev.LookAtRequests()], HEDGE_NS)
    reply(swap, first)
    assert swap.on([ev.FrameLent(0, 33)], HEDGE_NS) == [ev.FrameBack(33)]


def test_one_daemon_that_is_up_is_not_hedged() -> None:
    swap, _ = machine(hedge_ns=HEDGE_NS)
    slot = stored(swap)
    lose(swap, 1)
    swap.on([ev.SwapIn(0, slot, 9)], 0)
    assert swap.on([ev.LookAtRequests()], HEDGE_NS) == []


# -- bad copies ----------------------------------------------------------------------------------------------
def test_a_copy_that_fails_is_given_up_after_its_tries_and_the_other_is_read() -> None:
    swap, obs = machine()
    slot = stored(swap)
    (read,) = sent(swap.on([ev.SwapIn(0, slot, 9)], 0))
    bad = read.daemon
    tries = 0
    while read.daemon == bad:
        tries += 1
        (read,) = sent(reply(swap, read, -5))
    assert tries == ATTEMPTS_MAX * STRIKES_MAX
    assert read.frame == 9
    (done,) = reply(swap, read)
    assert (done.ok, done.rewrite, done.xxh3) == (True, True, 99)
    assert obs.counts[HostCounter.QUARANTINED] == 1
    assert obs.kinds(Kind.COPY_BAD) == [Kind.COPY_BAD]
    swap.on([ev.SlotFree(slot)], 0)
    assert swap.slots_used == 0
    left = [
        len([io for io in sent(swap.on([ev.SwapOut(k, k, 5, -1, 1)], 0)) if io.daemon == bad])
        for k in range(100)
    ]
    assert sum(left) == 99, "that block is never given out again"


def test_wrong_sums_count_the_same_and_hedged_frames_stay_apart() -> None:
    swap, _ = machine(hedge_ns=HEDGE_NS)
    first, second = late(swap)
    (done,) = reply(swap, second)
    (again,) = sent(swap.on([ev.SwapInBad(0, done.slot, done.frame, done.copy)], 0))
    assert (again.daemon, again.frame) == (second.daemon, 33), "the same copy once more"
    assert reply(swap, first) == [ev.FrameBack(9)], "an attempt of the read that is over"
    for _ in range(STRIKES_MAX - 1):
        (done,) = reply(swap, again)
        (again,) = sent(swap.on([ev.SwapInBad(0, done.slot, done.frame, done.copy)], 0))
    assert again.daemon == first.daemon
    assert reply(swap, again)[0].rewrite


def test_a_page_is_read_once_at_a_time() -> None:
    swap, _ = machine()
    slot = stored(swap)
    swap.on([ev.SwapIn(0, slot, 9)], 0)
    with pytest.raises(MachineError, match="twice"):
        swap.on([ev.SwapIn(0, slot, 10)], 0)


# -- a daemon that never comes back ----------------------------------------------------------------------------
def test_pages_go_on_from_the_other_copy() -> None:
    swap, obs = machine()
    slots = [stored(swap, hvp) for hvp in range(4)]
    lose(swap, 0)
    assert swap.on([ev.DaemonGone(0)], 0) == [ev.SlotsLost(0, (), fatal=False)]
    assert swap.daemons[0].state is DaemonState.GONE
    assert obs.gauges[HostCounter.SINGLE_COPIES] == 4
    reads = [sent(swap.on([ev.SwapIn(hvp, slot, 10 + hvp)], 0))[0] for hvp, slot in enumerate(slots)]
    assert {read.daemon for read in reads} == {1}
    assert all(reply(swap, read)[0].xxh3 == 99 for read in reads)
    assert {io.daemon for io in sent(swap.on([ev.SwapOut(9, 50, 5, -1, 1)], 0))} == {1}


def test_a_third_daemon_takes_the_place() -> None:
    swap, _ = machine(3)
    lose(swap, 0)
    swap.on([ev.DaemonGone(0)], 0)
    assert [io.daemon for io in sent(swap.on([ev.SwapOut(9, 50, 5, -1, 1)], 0))] == [1, 2]


def test_what_was_only_there_is_said() -> None:
    swap, _ = machine()
    lose(swap, 1)
    alone = stored(swap)
    swap.on([ev.DaemonUp(1, 1)], 0)
    stored(swap, 1)
    lose(swap, 0)
    assert swap.on([ev.DaemonGone(0)], 0) == [ev.SlotsLost(0, (alone,), fatal=False)]
    (done,) = swap.on([ev.SwapIn(0, alone, 9)], 0)
    assert (done.ok, done.frame) == (False, 9)


def test_a_write_to_it_has_failed_and_the_page_has_one_copy() -> None:
    swap, obs = machine()
    gone, other = sent(swap.on([ev.SwapOut(1, 0, 5, -1, 99)], 0))
    lose(swap, gone.daemon)
    assert reply(swap, other) == []
    _, done = swap.on([ev.DaemonGone(gone.daemon)], 0)
    assert (done.ok, done.slot) == (True, SECOND)
    assert obs.gauges[HostCounter.SINGLE_COPIES] == 1


def test_a_write_that_it_had_answered_is_not_there_any_more() -> None:
    swap, obs = machine()
    gone, other = sent(swap.on([ev.SwapOut(1, 0, 5, -1, 99)], 0))
    reply(swap, gone)
    lose(swap, gone.daemon)
    swap.on([ev.DaemonGone(gone.daemon)], 0)
    (done,) = reply(swap, other)
    assert (done.ok, done.slot) == (True, SECOND)
    assert obs.gauges[HostCounter.SINGLE_COPIES] == 1


def test_a_read_that_waits_for_it_goes_elsewhere() -> None:
    swap, _ = machine()
    slot = stored(swap)
    lose(swap, 0)
    lose(swap, 1)
    swap.on([ev.SwapIn(0, slot, 9)], 0)
    assert sent(swap.on([ev.DaemonGone(0)], 0)) == []
    (read,) = sent(swap.on([ev.DaemonUp(1, 1)], 0))
    assert (read.daemon, read.frame) == (1, 9)


def test_without_replicas_or_another_daemon_it_is_the_end() -> None:
    swap = SwapMachine([4, 4], Recorder(), 1)
    swap.on([ev.DaemonLost(0, 0)], 0)
    swap.on([ev.DaemonFenced(0, 0)], 0)
    assert swap.on([ev.DaemonGone(0)], 0) == [ev.SlotsLost(0, (), fatal=True)]
    both, _ = machine()
    for daemon, fatal in ((0, False), (1, True)):
        lose(both, daemon)
        assert both.on([ev.DaemonGone(daemon)], 0) == [ev.SlotsLost(daemon, (), fatal=fatal)]


@pytest.mark.parametrize("before", [[], [ev.DaemonLost(0, 0)]])
def test_only_a_fenced_daemon_can_be_gone(before: list[Any]) -> None:
    swap, _ = machine()
    swap.on(before, 0)
    with pytest.raises(MachineError, match="give_up"):
        swap.on([ev.DaemonGone(0)], 0)


# -- with the vm machine: frames and pages -----------------------------------------------------------------------
def accounted(bench: Bench) -> None:
    """Every frame is in exactly one place."""
    vm = bench.vm
    owned = vm.frame_of[vm.frame_of >= 0].tolist()
    free = vm.frames.free[: vm.frames.free_count].tolist()
    assert sorted([*owned, *free, *vm.frames.lent]) == list(range(len(vm.frames.owner)))


def on_two(**options: Any) -> Bench:
    """A page whose first word is WORD, on two daemons."""
    bench = Bench(daemons=2, replicas=2, **options)
    bench.boot()
    bench.fill(GFN, WORD)
    bench.exit()
    bench.swap_out(GFN)
    assert len(bench.swap.copies.copies(int(bench.vm.slot_of[GFN]))) == 2
    return bench


def word(bench: Bench) -> int:
    assert bench.vm.state[GFN] == HPT_RESIDENT
    return int(bench.memory.frames[int(bench.vm.frame_of[GFN]) * 512])


def test_a_hedge_wins_in_its_own_frame() -> None:
    bench = on_two(hedge_ns=HEDGE_NS)
    bench.touch(GFN)
    (first,) = bench.io
    bench.now += HEDGE_NS
    bench.feed(bench.swap, ev.LookAtRequests())
    _, second = bench.io
    assert second.frame != first.frame
    accounted(bench)
    bench.complete(bench.io.pop())
    assert word(bench) == WORD
    assert bench.vm.frames.lent == {first.frame}
    accounted(bench)
    bench.memory.write_page(first.frame, b"\xee" * 4096)
    assert word(bench) == WORD, "what the loser writes harms nobody"
    bench.complete(bench.io.pop())
    assert bench.vm.frames.lent == set()
    accounted(bench)


def test_a_hedge_takes_no_frame_that_somebody_waits_for() -> None:
    bench = on_two(hedge_ns=HEDGE_NS)
    bench.touch(GFN)
    bench.vm.waiters.guests.append(3)
    bench.feed(bench.swap, ev.LookAtRequests())
    free = bench.vm.frames.free_count
    bench.vm.page_in.lend(ev.LendFrame(GFN))
    assert bench.vm.frames.free_count == free
    assert bench.vm.frames.lent == set()


def test_a_damaged_copy_is_made_good_from_the_other() -> None:
    bench = on_two()
    slot = int(bench.vm.slot_of[GFN])
    bench.disk[slot] = b"\xff" * 4096
    bench.touch(GFN)
    assert bench.serve() == STRIKES_MAX + 1
    assert word(bench) == WORD
    assert bench.vm.flags[GFN] & F_DIRTY
    assert bench.vm.slot_of[GFN] == -1
    assert bench.obs.counts[HostCounter.REWRITTEN] == bench.obs.counts[HostCounter.QUARANTINED] == 1
    assert bench.obs.counts[HostCounter.MACHINE_CHECKS] == bench.swap.slots_used == 0
    bench.exit()
    bench.swap_out(GFN)
    now = bench.swap.copies.copies(int(bench.vm.slot_of[GFN]))
    assert len(now) == 2
    assert slot not in now
    accounted(bench)


def test_only_when_both_copies_are_damaged_the_page_is_lost() -> None:
    bench = on_two()
    for copy in bench.swap.copies.copies(int(bench.vm.slot_of[GFN])):
        bench.disk[copy] = b"\xff" * 4096
    bench.touch(GFN)
    assert bench.serve() == 2 * STRIKES_MAX
    assert (bench.vm.state[GFN], bench.vm.slot_of[GFN]) == (HPT_BAD, -1)
    assert bench.obs.counts[HostCounter.QUARANTINED] == 2
    accounted(bench)


def gone(bench: Bench, daemon: int) -> None:
    for event in (ev.DaemonLost(daemon, 0), ev.DaemonFenced(daemon, 0), ev.DaemonGone(daemon)):
        bench.feed(bench.swap, event)


def test_a_clean_page_in_memory_is_dirty_when_its_slot_is_lost() -> None:
    bench = Bench(daemons=2, replicas=2)
    gone(bench, 1)
    bench.boot()
    bench.fill(GFN, WORD)
    bench.exit()
    bench.swap_out(GFN)
    bench.touch(GFN, write=False)
    bench.serve()
    bench.exit()
    assert not bench.vm.flags[GFN] & F_DIRTY
    gone(bench, 0)
    assert bench.told == [ev.PagesLost(0, 0)], "nobody else is left"
    assert bench.vm.flags[GFN] & F_DIRTY
    assert bench.vm.slot_of[GFN] == -1


def test_pages_that_are_only_there_are_counted() -> None:
    bench = Bench(daemons=3, replicas=2)
    for daemon in (1, 2):
        bench.feed(bench.swap, ev.DaemonLost(daemon, 0))
    bench.boot()
    for gfn in (GFN, GFN + 1):
        bench.fill(gfn, WORD)
        bench.exit()
        bench.swap_out(gfn)
    bench.feed(bench.swap, ev.DaemonFenced(1, 0))
    bench.feed(bench.swap, ev.DaemonUp(1, 1))
    gone(bench, 0)
    assert bench.told == [ev.PagesLost(0, 2)]
    assert np.all(bench.vm.state[GFN : GFN + 2] == HPT_SLOT)


def test_a_frame_comes_back_once() -> None:
    bench = on_two()
    with pytest.raises(MachineError, match="not lent"):
        bench.feed(bench.vm, ev.FrameBack(3))
