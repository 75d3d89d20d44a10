"""The vm machine: the ladder, reclaim, write-back order, and a model-checked storm of faults, flushes and replies."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from host import events as ev
from host.kernels import (
    F_DIRTY,
    F_STUCK,
    F_WRITEBACK,
    HPT_EVICT,
    HPT_NONE,
    HPT_READING,
    HPT_RESIDENT,
    HPT_SLOT,
    HPT_WRITING,
    HPT_ZERO,
)
from proto.layout import MODE_IN_GUEST, VP_STATE
from proto.stats import HostCounter
from tests.host.harness import WORDS, Bench


def begin_eviction(bench: Bench, gfn: int) -> None:
    """Unmap one page the way reclaim does it, up to the start of its grace period."""
    if bench.memory.unmap(0, gfn) & 0x200:
        bench.vm.flags[gfn] |= F_DIRTY
    bench.vm.state[gfn] = HPT_EVICT
    bench.vm.reclaim.begin_grace(0, [gfn])


def frames_are_accounted_for(bench: Bench) -> None:
    """Every frame is free, owned by exactly one page, or held for a request."""
    vm = bench.vm
    free = vm.frames.free[: vm.frames.free_count].tolist()
    owned = [f for f in vm.frame_of.tolist() if f >= 0]
    places = Counter(free + owned + list(vm.frames._limbo))
    assert set(places) == set(range(bench.memory.frame_count))
    assert max(places.values()) == 1, [f for f, n in places.items() if n > 1]


def test_zero_fill_is_synchronous_and_populates_a_block() -> None:
    bench = Bench(populate=16)
    bench.boot()
    bench.touch(37)
    assert [int(s) for s in bench.vm.state[32:48]] == [HPT_RESIDENT] * 16
    assert bench.vm.state[31] == bench.vm.state[48] == HPT_NONE
    assert all(bench.memory.mapped(0, g) == (True, True) for g in range(32, 48))
    assert bench.io == []
    frames_are_accounted_for(bench)


def test_untouched_zero_page_is_dropped_and_zero_page_is_not_written() -> None:
    bench = Bench()
    bench.boot()
    bench.touch(40)
    begin_eviction(bench, 40)
    bench.exit()
    bench.settle()
    assert bench.vm.state[40] == HPT_NONE, "never written: nothing to keep"
    bench.touch(41)
    bench.vm.flags[41] |= F_DIRTY
    begin_eviction(bench, 41)
    bench.settle()
    assert bench.vm.state[41] == HPT_ZERO
    assert bench.io == []


def test_no_shortcut_for_zero_pages_when_it_is_off() -> None:
    bench = Bench(zero_pages=False)
    bench.boot()
    bench.touch(41)
    bench.vm.flags[41] |= F_DIRTY
    begin_eviction(bench, 41)
    bench.settle()
    assert bench.vm.state[41] == HPT_SLOT
    assert bench.obs.counts[HostCounter.SWAP_OUT_PAGES] == 1


def test_frame_is_kept_until_every_vcpu_has_flushed() -> None:
    bench = Bench(vcpus=2)
    bench.boot(0)
    bench.boot(1)
    bench.fill(40, 7)
    bench.vcpu_pages[WORDS + VP_STATE] = (int(bench.vmc[0]) << 2) | MODE_IN_GUEST
    begin_eviction(bench, 40)
    bench.vcpu_pages[VP_STATE] = int(bench.vmc[0]) << 2
    bench.feed(bench.vm, ev.LookAtGrace())
    assert bench.vm.state[40] == HPT_EVICT, "vCPU 1 is in the guest and has not acknowledged"
    assert bench.io == [], "nothing is written before the grace period has ended"
    bench.vcpu_pages[WORDS + VP_STATE] = (int(bench.vmc[0]) << 2) | MODE_IN_GUEST
    bench.feed(bench.vm, ev.LookAtGrace())
    assert bench.vm.state[40] == HPT_WRITING


def test_fault_during_grace_takes_the_page_back_without_io() -> None:
    bench = Bench()
    bench.boot()
    bench.fill(40, 7)
    begin_eviction(bench, 40)
    frame = int(bench.vm.frame_of[40])
    bench.touch(40)
    assert (bench.vm.state[40], int(bench.vm.frame_of[40])) == (HPT_RESIDENT, frame)
    bench.settle()
    assert bench.vm.state[40] == HPT_RESIDENT, "the old grace entry must not evict it again"


def test_read_during_write_back_maps_read_only_and_the_reply_makes_it_clean() -> None:
    bench = Bench()
    bench.boot()
    bench.fill(40, 7)
    begin_eviction(bench, 40)
    bench.exit()
    bench.vcpu_pages[VP_STATE] = int(bench.vmc[0]) << 2
    bench.feed(bench.vm, ev.LookAtGrace())
    assert bench.vm.state[40] == HPT_WRITING
    bench.touch(40, write=False)
    assert bench.memory.mapped(0, 40) == (True, False)
    bench.serve()
    assert bench.vm.flags[40] & (F_DIRTY | F_WRITEBACK) == 0
    assert bench.vm.slot_of[40] >= 0


def test_store_during_write_back_cancels_the_slot_until_the_reply() -> None:
    bench = Bench(slots=1)
    bench.boot()
    bench.fill(40, 7)
    begin_eviction(bench, 40)
    bench.exit()
    bench.vcpu_pages[VP_STATE] = int(bench.vmc[0]) << 2
    bench.feed(bench.vm, ev.LookAtGrace())
    bench.touch(40, write=True)
    assert bench.memory.mapped(0, 40) == (True, True)
    assert bench.vm.slot_of[40] == -1
    assert bench.vm.flags[40] & F_DIRTY
    assert bench.swap.slots_used == 1, "named by an unanswered request"
    bench.serve()
    assert bench.swap.slots_used == 0
    assert bench.obs.counts[HostCounter.WRITEBACK_CANCELLED] == 1
    frames_are_accounted_for(bench)


def test_clean_page_with_a_slot_is_dropped_without_io() -> None:
    bench = Bench()
    bench.boot()
    bench.fill(40, 7)
    bench.swap_out(40)
    bench.touch(40, write=False)
    bench.serve()
    bench.exit()
    bench.io.clear()
    bench.swap_out(40)
    assert bench.obs.counts[HostCounter.CLEAN_DROPS] == 1
    assert bench.obs.counts[HostCounter.SWAP_OUT_PAGES] == 1


@pytest.mark.parametrize("flips", [1, 2])
def test_checksum_mismatch_is_read_again(flips: int) -> None:
    bench = Bench(host_async=False)
    bench.boot(enable=False)
    bench.fill(40, 7)
    bench.swap_out(40)
    good = dict(bench.disk)
    slot = bench.vm.slot_of[40]
    assert bench.touch(40) is None
    for _ in range(flips):
        bench.disk[int(slot)] = b"\xff" * 4096
        bench.serve(1)
        assert 0 not in bench.entries
    bench.disk = good
    bench.serve()
    assert bench.vm.state[40] == HPT_RESIDENT
    assert bench.obs.counts[HostCounter.CHECKSUM_ERRORS] == flips


def test_unreadable_page_becomes_a_machine_check_and_frees_its_frame() -> None:
    from proto.wire import Inject

    bench = Bench(host_async=False)
    bench.boot(enable=False)
    bench.fill(40, 7)
    bench.swap_out(40)
    bench.touch(40)
    for _ in range(20):
        bench.serve(1, ok=False)
    assert bench.entries[0].inject == Inject.MACHINE_CHECK
    frames_are_accounted_for(bench)


def test_faults_queue_for_frames_and_are_served_in_order() -> None:
    bench = Bench(vcpus=3, frames=16, low=2, high=4, host_async=False)
    for cpu in range(3):
        bench.boot(cpu, enable=False)
    bench.settle()
    gfn = 100
    while bench.vm.frames.free_count:
        bench.vm.frames.take(200)
        bench.vm._frame[200] = -1
    held = [bench.touch(gfn + cpu, cpu) for cpu in range(3)]
    assert held == [None, None, None]
    bench.vm.frames.push(0)
    bench.feed(bench.vm, ev.LookAtGrace())
    assert set(bench.entries) == {0}, "first come, first served"


class Storm:
    """Random faults, acknowledgements, replies and daemon deaths on one bench, with the truth kept beside it."""

    def __init__(self, seed: int, profile: str, zero_pages: bool) -> None:
        self.rng = random.Random(seed)
        self.bench = Bench(
            profile=profile, pages=96, frames=40, low=4, high=10, vcpus=2, zero_pages=zero_pages, slots=120
        )
        self.bench.boot(0)
        self.bench.boot(1)
        self.truth: dict[int, int] = {}
        self.stamp = 1

    def step(self) -> None:
        action = self.rng.random()
        ready = [cpu for cpu in (0, 1) if cpu in self.bench.entries]
        if action < 0.5 and ready:
            self.access(self.rng.choice(ready))
        elif action < 0.75:
            self.bench.serve(self.rng.randrange(1, 4))
        elif action < 0.9 and ready:
            self.bench.exit(self.rng.choice(ready))
        elif action < 0.93:
            self.daemon_dies()
        for cpu in (0, 1):
            if self.rng.random() < 0.5:
                mode = MODE_IN_GUEST if cpu in self.bench.entries else 0
                self.bench.vcpu_pages[cpu * WORDS + VP_STATE] = (int(self.bench.vmc[0]) << 2) | mode
        self.bench.feed(self.bench.vm, ev.LookAtGrace())

    def access(self, cpu: int) -> None:
        bench, gfn, write = self.bench, self.rng.randrange(8, 96), self.rng.random() < 0.6
        entry = bench.touch(gfn, cpu, write=write)
        if cpu in bench.entries and bench.vm.frame_of[1] >= 0:
            bench.clear(cpu, 0)
            bench.clear(cpu, 4)
        present, writable = bench.memory.mapped(0, gfn)
        if entry is None or not present or (write and not writable):
            return
        frame = int(bench.vm.frame_of[gfn])
        assert int(bench.memory.frames[frame * WORDS]) == self.truth.get(gfn, 0)
        if write:
            self.stamp += 1
            self.truth[gfn] = self.stamp
            bench.memory.frames[frame * WORDS] = self.stamp
            bench.vm.flags[gfn] |= F_DIRTY

    def daemon_dies(self) -> None:
        bench, epoch = self.bench, self.bench.swap.daemons[0].epoch
        bench.feed(bench.swap, ev.DaemonLost(0, epoch))
        bench.io.clear()
        bench.feed(bench.swap, ev.DaemonFenced(0, epoch))
        bench.feed(bench.swap, ev.DaemonUp(0, epoch + 1))

    def check_contents(self) -> None:
        vm = self.bench.vm
        for gfn, word in self.truth.items():
            state = int(vm.state[gfn])
            if state == HPT_RESIDENT:
                assert int(self.bench.memory.frames[int(vm.frame_of[gfn]) * WORDS]) == word
            elif state == HPT_SLOT:
                assert int(np.frombuffer(self.bench.disk[int(vm.slot_of[gfn])], np.uint64)[0]) == word
            else:
                assert word == 0


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 1 << 32), st.sampled_from(["mainline", "v7"]), st.booleans())
def test_storm(seed: int, profile: str, zero_pages: bool) -> None:
    """Contents, frames and waiters always add up, and everything drains."""
    storm = Storm(seed, profile, zero_pages)
    for _ in range(250):
        storm.step()
        frames_are_accounted_for(storm.bench)
    storm.bench.settle()
    assert not any(int(s) in (HPT_READING, HPT_EVICT, HPT_WRITING) for s in storm.bench.vm.state)
    assert storm.bench.swap.outstanding == 0
    storm.check_contents()


def test_a_page_unmapped_twice_waits_for_the_later_generation() -> None:
    bench = Bench(vcpus=2)
    bench.boot(0)
    bench.boot(1)
    bench.fill(40, 7)
    in_guest = int(bench.vmc[0])
    bench.vcpu_pages[WORDS + VP_STATE] = (in_guest << 2) | MODE_IN_GUEST
    begin_eviction(bench, 40)
    bench.touch(40)
    begin_eviction(bench, 40)
    bench.vcpu_pages[VP_STATE] = 0
    bench.vcpu_pages[WORDS + VP_STATE] = ((in_guest + 1) << 2) | MODE_IN_GUEST
    bench.feed(bench.vm, ev.LookAtGrace())
    assert bench.vm.state[40] == HPT_EVICT, "the first grace period is not the second one's"


def test_frame_named_by_a_cancelled_write_is_not_reused_before_its_reply() -> None:
    bench = Bench()
    bench.boot()
    bench.fill(40, 7)
    for _ in range(2):
        begin_eviction(bench, 40)
        bench.exit()
        bench.vcpu_pages[VP_STATE] = 0
        bench.feed(bench.vm, ev.LookAtGrace())
        assert bench.vm.state[40] == HPT_WRITING
        if len(bench.io) == 1:
            bench.touch(40, write=True)
    first, second = bench.io
    assert first.frame == second.frame
    assert first.slot != second.slot
    bench.io.clear()
    bench.complete(second)
    assert bench.vm.state[40] == HPT_SLOT
    free = bench.vm.frames.free[: bench.vm.frames.free_count].tolist()
    assert first.frame not in free
    frames_are_accounted_for(bench)
    bench.complete(first)
    assert first.frame in bench.vm.frames.free[: bench.vm.frames.free_count].tolist()


# -- while no daemon takes writes ------------------------------------------------------------------------------
CLEAN = range(100, 120)
DIRTY = range(130, 138)


def with_clean_and_dirty_pages() -> Bench:
    """Clean pages with a slot, and dirty ones; the daemon has died."""
    bench = Bench(host_async=False, vcpus=2, frames=48, low=2, high=6, zero_pages=False)
    for cpu in (0, 1):
        bench.boot(cpu, enable=False)
    for gfn in CLEAN:
        bench.fill(gfn, gfn)
        bench.swap_out(gfn)
    for gfn in CLEAN:
        bench.touch(gfn, write=0)
        bench.settle()
    for gfn in DIRTY:
        bench.fill(gfn, gfn)
    return bench


def touch_more_than_is_free(bench: Bench) -> None:
    for gfn in range(150, 150 + bench.vm.frames.free_count + 10):
        bench.touch(gfn, cpu=1)
        for _ in range(8):
            bench.vcpu_pages[::WORDS] = int(bench.vmc[0]) << 2
            bench.feed(bench.vm, ev.LookAtGrace())
        assert 1 in bench.entries, "it needs a frame, and nothing from swap"


def test_pages_that_need_no_write_are_dropped_while_no_daemon_is_up() -> None:
    bench = with_clean_and_dirty_pages()
    bench.feed(bench.swap, ev.DaemonLost(0, 0))
    for gfn in DIRTY[:3]:
        begin_eviction(bench, gfn)
    touch_more_than_is_free(bench)
    assert bench.io == [], "nobody is asked to write"
    assert all(bench.vm.state[gfn] == HPT_RESIDENT for gfn in DIRTY)
    assert all(bench.vm.flags[gfn] & F_STUCK for gfn in DIRTY[:3]), "they were tried, and are not tried again"
    bench.feed(bench.swap, ev.DaemonFenced(0, 0))
    bench.feed(bench.swap, ev.DaemonUp(0, 1))
    assert not (bench.vm.flags & F_STUCK).any()
    for gfn in DIRTY:
        bench.touch(gfn, write=0)
        bench.swap_out(gfn)
        assert bench.vm.state[gfn] == HPT_SLOT
    frames_are_accounted_for(bench)


def test_pages_that_were_taken_back_from_their_write_bring_no_frame() -> None:
    bench = with_clean_and_dirty_pages()
    for gfn in DIRTY:
        begin_eviction(bench, gfn)
    bench.vcpu_pages[::WORDS] = int(bench.vmc[0]) << 2
    bench.feed(bench.vm, ev.LookAtGrace())
    assert bench.vm.page_out.coming == len(DIRTY)
    for gfn in DIRTY:
        bench.touch(gfn, write=0)
    assert bench.vm.page_out.coming == 0
    # The daemon is up and has not answered: what it was asked to write is in use again.
    touch_more_than_is_free(bench)
    bench.settle()
    assert bench.vm.page_out.coming == 0
    frames_are_accounted_for(bench)
