"""Pages that a guest gives back: in every state a page can be in, with requests under way, and who waits for them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from host import events as ev
from host.kernels import (
    F_DIRTY,
    F_STUCK,
    HPT_BAD,
    HPT_EVICT,
    HPT_NONE,
    HPT_READING,
    HPT_RESIDENT,
    HPT_SLOT,
    HPT_WRITING,
    HPT_ZERO,
)
from host.slots import moved
from proto.layout import MODE_IN_GUEST, VP_STATE
from proto.stats import HostCounter
from proto.wire import HC_RELEASE, ExitReason, Inject
from tests.host.harness import WORDS, Bench
from tests.host.test_vm import begin_eviction, frames_are_accounted_for

GFN = 40
OTHER = 41


def bench_of(vcpus: int = 1, slots: int = 512, spare: int = 0) -> Bench:
    bench = Bench(host_async=False, vcpus=vcpus, slots=slots, spare=spare)
    for cpu in range(vcpus):
        bench.boot(cpu, enable=False)
    bench.fill(OTHER, 9)
    return bench


def release(bench: Bench, gfn: int = GFN, mask: int = 1, cpu: int = 0) -> None:
    bench.exit(cpu, ExitReason.HYPERCALL, cpl=0, if_=0, arg0=HC_RELEASE, gpa=gfn << 12, arg1=mask)


def flush_acknowledged(bench: Bench) -> None:
    bench.vcpu_pages[::WORDS] = int(bench.vmc[0]) << 2
    bench.feed(bench.vm, ev.LookAtGrace())


def zero(bench: Bench) -> None:
    bench.fill(GFN, 0)
    bench.swap_out(GFN)


def slot(bench: Bench) -> None:
    bench.fill(GFN, 7)
    bench.swap_out(GFN)


def reading(bench: Bench) -> None:
    slot(bench)
    assert bench.touch(GFN, cpu=1) is None


def evict(bench: Bench) -> None:
    bench.fill(GFN, 7)
    bench.vcpu_pages[WORDS + VP_STATE] = int(bench.vmc[0]) << 2 | MODE_IN_GUEST
    begin_eviction(bench, GFN)


def writing(bench: Bench) -> None:
    bench.fill(GFN, 7)
    begin_eviction(bench, GFN)
    flush_acknowledged(bench)


def bad(bench: Bench) -> None:
    slot(bench)
    bench.touch(GFN)
    for _ in range(20):
        bench.serve(1, ok=False)
    assert bench.entries[0].inject == Inject.MACHINE_CHECK


WAYS: dict[int, Callable[[Bench], None]] = {
    HPT_ZERO: zero,
    HPT_RESIDENT: lambda bench: bench.fill(GFN, 7),
    HPT_SLOT: slot,
    HPT_READING: reading,
    HPT_EVICT: evict,
    HPT_WRITING: writing,
    HPT_BAD: bad,
}


def slots_are_accounted_for(bench: Bench) -> None:
    assert int((bench.vm.slot_of >= 0).sum()) == bench.swap.slots_used


@pytest.mark.parametrize("state", WAYS)
def test_a_page_given_back_reads_as_zeros(state: int) -> None:
    bench = bench_of(vcpus=2)
    WAYS[state](bench)
    assert bench.vm.state[GFN] == state
    release(bench)
    assert bench.obs.counts[HostCounter.PAGES_RELEASED] == 1
    if state != HPT_READING:
        assert bench.vm.state[GFN] == HPT_NONE
    bench.settle()
    frames_are_accounted_for(bench)
    slots_are_accounted_for(bench)
    bench.touch(GFN)
    frame = int(bench.vm.frame_of[GFN])
    assert not bench.memory.frames[frame * WORDS : (frame + 1) * WORDS].any()
    other = int(bench.vm.frame_of[OTHER])
    assert bench.memory.frames[other * WORDS] == 9, "nothing else went"


@pytest.mark.parametrize("state", WAYS)
def test_a_page_given_back_while_its_memslot_moves_reads_as_zeros_where_it_is_then(state: int) -> None:
    bench = bench_of(vcpus=2, spare=64)
    WAYS[state](bench)
    bench.vcpu_pages[WORDS + VP_STATE] = MODE_IN_GUEST
    layout, moves = moved(bench.vm.slots.of_vm(0), 0, 32, 32, bench.vm.slots.of_vm(0)[-1].pages)
    bench.set_slots(*layout, moves=tuple(moves))
    assert bench.vm.change.pending
    release(bench)
    assert bench.obs.counts[HostCounter.PAGES_RELEASED] == 1
    flush_acknowledged(bench)
    bench.settle()
    assert len(bench.layouts) == 1
    frames_are_accounted_for(bench)
    slots_are_accounted_for(bench)
    bench.touch(GFN)
    hvp = bench.vm.find_hvp(0, GFN)
    assert hvp != GFN
    frame = int(bench.vm.frame_of[hvp])
    assert not bench.memory.frames[frame * WORDS : (frame + 1) * WORDS].any()


def test_a_mask_names_what_it_says_and_no_more() -> None:
    bench = bench_of()
    for gfn in range(64, 72):
        bench.fill(gfn, gfn)
    release(bench, 64, 0b1010_0101)
    assert [int(s) == HPT_NONE for s in bench.vm.state[64:72]] == [
        True,
        False,
        True,
        False,
        False,
        True,
        False,
        True,
    ]
    assert bench.obs.counts[HostCounter.PAGES_RELEASED] == 4


def test_pages_beyond_the_memory_and_pages_never_touched_are_nothing() -> None:
    bench = bench_of()
    before = bench.vm.frames.free_count
    release(bench, 255, (1 << 64) - 1)
    release(bench, 1 << 40, 1)
    release(bench, 100, 1)
    assert bench.obs.counts[HostCounter.PAGES_RELEASED] == 0
    assert bench.vm.frames.free_count == before
    assert 0 in bench.entries


def test_frame_is_kept_and_whoever_asked_is_held_until_every_vcpu_has_flushed() -> None:
    bench = bench_of(vcpus=2)
    bench.fill(GFN, 7)
    frame = int(bench.vm.frame_of[GFN])
    bench.vcpu_pages[WORDS + VP_STATE] = int(bench.vmc[0]) << 2 | MODE_IN_GUEST
    release(bench)
    assert frame not in bench.vm.frames.free[: bench.vm.frames.free_count].tolist()
    assert 0 in bench.entries, "the pages are gone for the guest"
    release(bench, mask=0)
    assert 0 not in bench.entries
    assert bench.vm.grace_pending
    flush_acknowledged(bench)
    assert 0 in bench.entries
    assert frame in bench.vm.frames.free[: bench.vm.frames.free_count].tolist()
    assert not bench.vm.grace_pending


def test_read_under_way_keeps_frame_and_slot_until_it_is_answered() -> None:
    bench = bench_of(vcpus=2)
    reading(bench)
    read = bench.io.pop()
    release(bench)
    assert bench.entries[1].inject == Inject.NONE, "who waited got a page of zeros"
    assert int(bench.vm.frame_of[GFN]) != read.frame
    flush_acknowledged(bench)
    assert read.frame not in bench.vm.frames.free[: bench.vm.frames.free_count].tolist()
    assert bench.swap.slots_used == 1
    bench.complete(read)
    assert read.frame in bench.vm.frames.free[: bench.vm.frames.free_count].tolist()
    assert bench.swap.slots_used == 0
    frames_are_accounted_for(bench)


@pytest.mark.parametrize("ok", [True, False])
def test_write_under_way_keeps_frame_and_slot_until_it_is_answered(ok: bool) -> None:
    bench = bench_of()
    writing(bench)
    write = bench.io.pop()
    release(bench)
    flush_acknowledged(bench)
    assert write.frame not in bench.vm.frames.free[: bench.vm.frames.free_count].tolist()
    assert bench.swap.slots_used == 1
    bench.complete(write, ok=ok)
    bench.settle() if ok else bench.serve(ok=False)
    for _ in range(3):
        bench.serve(ok=ok)
    assert write.frame in bench.vm.frames.free[: bench.vm.frames.free_count].tolist()
    assert bench.swap.slots_used == 0
    assert bench.vm.state[GFN] == HPT_NONE


def test_page_read_back_during_its_write_goes_like_one_that_is_written() -> None:
    bench = bench_of()
    writing(bench)
    bench.touch(GFN, write=False)
    release(bench)
    bench.settle()
    assert bench.swap.slots_used == 0
    frames_are_accounted_for(bench)


def test_worker_of_an_asynchronous_fault_is_done_when_its_page_is_given_back() -> None:
    bench = Bench(vcpus=2)
    bench.boot(0)
    bench.boot(1)
    bench.fill(GFN, 7)
    bench.swap_out(GFN)
    entry = bench.touch(GFN)
    assert entry is not None
    assert entry.inject == Inject.PF_NOT_PRESENT
    bench.clear(0, 0)
    release(bench, cpu=1)
    bench.exit(0)
    assert bench.take_ready() == entry.cr2, "done does not mean present"
    bench.settle()
    frames_are_accounted_for(bench)


def test_a_slot_that_comes_back_lets_one_stuck_page_go() -> None:
    bench = bench_of(slots=1)
    slot(bench)
    for gfn in (50, 51):
        bench.fill(gfn, gfn)
        begin_eviction(bench, gfn)
    bench.settle()
    assert (bench.vm.page_out.stuck, bench.vm.page_out.swap_full) == (2, True)
    release(bench)
    assert (bench.vm.page_out.stuck, bench.vm.page_out.swap_full) == (1, True)
    begin_eviction(bench, 50 if not bench.vm.flags[50] & 16 else 51)
    bench.settle()
    assert bench.swap.slots_used == 1
    assert bench.vm.flags[50] & bench.vm.flags[51] & F_DIRTY == 0


def test_a_stuck_page_that_is_given_back_passes_its_chance_on() -> None:
    bench = bench_of(slots=1)
    slot(bench)
    for gfn in (50, 51):
        bench.fill(gfn, gfn)
        begin_eviction(bench, gfn)
    bench.settle()
    release(bench)
    chosen, other = (50, 51) if not bench.vm.flags[50] & F_STUCK else (51, 50)
    assert bench.vm.flags[other] & F_STUCK
    release(bench, chosen)
    assert not bench.vm.flags[other] & F_STUCK
    assert not bench.vm.page_out.swap_full
