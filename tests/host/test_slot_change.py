"""Memslots that move or vanish while a guest runs: flush protocol, pages that stay, fetches under way, the remembered area."""

from __future__ import annotations

import pytest

from host import events as ev
from host.kernels import F_DIRTY, HPT_NONE, HPT_READING, HPT_RESIDENT, HPT_SLOT
from host.slots import Memslot, moved
from proto import kvm
from proto.layout import APF_AREA_GPA, MODE_IN_GUEST, NPT_A, NPT_D, VP_STATE
from proto.pagetable import npt_get
from proto.trace import Kind
from proto.wire import Inject
from tests.host.harness import WORDS, Bench

GFN = 40
AREA_GFN = APF_AREA_GPA >> 12
WHOLE = Memslot(0, 0, 256, 0)
WITHOUT = (Memslot(0, 0, 32, 0), Memslot(0, 64, 192, 64))
"""Guest frames 32 to 63 have no slot."""


def outside(bench: Bench) -> None:
    """Every vCPU is outside guest mode and has flushed; the vm machine notices."""
    for cpu in range(len(bench.vcpus)):
        bench.vcpu_pages[cpu * WORDS + VP_STATE] = int(bench.vmc[0]) << 2
    bench.feed(bench.vm, ev.LookAtGrace())


def running(**options: object) -> Bench:
    bench = Bench(**options)  # type: ignore[arg-type]
    bench.boot()
    bench.fill(GFN, 0xABCD)
    bench.obs.events.clear()
    return bench


def test_a_change_takes_effect_when_every_vcpu_has_flushed() -> None:
    bench = running()
    bench.vcpu_pages[VP_STATE] = int(bench.vmc[0]) << 2 | MODE_IN_GUEST
    bench.set_slots(*WITHOUT)
    assert bench.memory.mapped(0, GFN) == (False, False), "the entry is cleared before the flush is asked for"
    assert bench.vm.slots.generation[0] == 1, "taking the old slots away is a publication of its own"
    assert bench.layouts == []
    assert bench.vm.grace_pending
    outside(bench)
    assert [(done.vm, done.generation) for done in bench.layouts] == [(0, 2)]
    assert not bench.vm.grace_pending


def test_a_fault_on_what_is_being_changed_is_held() -> None:
    bench = running(vcpus=2, spare=32)
    bench.boot(1)
    bench.vcpu_pages[VP_STATE] = int(bench.vmc[0]) << 2 | MODE_IN_GUEST
    bench.set_slots(
        Memslot(0, 0, 32, 0), Memslot(0, 32, 32, 256), Memslot(0, 64, 192, 64), moves=((32, 256, 32),)
    )
    assert bench.touch(GFN, cpu=1) is None
    assert bench.touch(100) is not None, "other frames are served"
    outside(bench)
    assert 1 in bench.entries, "served with the new layout"
    assert bench.vm.find_hvp(0, GFN) == 256 + GFN - 32
    assert bench.memory.mapped(0, GFN) == (True, True)


def test_a_deleted_slot_leaves_its_pages_with_the_host() -> None:
    bench = running()
    bench.set_slots(*WITHOUT)
    outside(bench)
    assert bench.vm.state[GFN] == HPT_RESIDENT
    entry = bench.touch(GFN)
    assert entry is not None
    assert entry.inject == Inject.MACHINE_CHECK, "no slot: the guest cannot have it"
    bench.set_slots(WHOLE)
    outside(bench)
    assert bench.touch(GFN) is not None
    assert int(bench.memory.frames[int(bench.vm.frame_of[GFN]) * WORDS]) == 0xABCD


def test_dirty_bits_of_cleared_entries_are_kept() -> None:
    bench = running()
    bench.touch(GFN)
    bench.vm.flags[GFN] = 0
    table = bench.memory.vms[0].npt
    table[(table == npt_get(table, GFN)).nonzero()[0][-1]] |= NPT_A | NPT_D
    bench.set_slots(*WITHOUT)
    assert bench.vm.flags[GFN] & F_DIRTY


def test_pages_without_a_slot_can_be_reclaimed() -> None:
    bench = running(frames=24, low=4, high=8)
    bench.set_slots(*WITHOUT)
    outside(bench)
    for gfn in range(100, 140):
        bench.touch(gfn)
        bench.settle()
    assert bench.vm.state[GFN] == HPT_SLOT
    bench.set_slots(WHOLE)
    bench.settle()
    bench.touch(GFN, if_=0)
    bench.settle()
    assert int(bench.memory.frames[int(bench.vm.frame_of[GFN]) * WORDS]) == 0xABCD


def test_aliases_are_unmapped_together() -> None:
    bench = running(frames=24, low=4, high=8)
    bench.set_slots(Memslot(0, 0, 200, 0), Memslot(0, 200, 20, 30))
    outside(bench)
    alias = 200 + GFN - 30
    bench.touch(alias)
    bench.touch(GFN)
    assert bench.memory.mapped(0, alias)[0]
    for gfn in range(100, 140):
        bench.touch(gfn)
        bench.settle()
    assert bench.vm.state[GFN] == HPT_SLOT
    assert bench.memory.mapped(0, alias) == bench.memory.mapped(0, GFN) == (False, False)


def test_a_fetch_goes_on_for_the_old_page_and_ready_is_sent() -> None:
    bench = running()
    bench.swap_out(GFN)
    entry = bench.touch(GFN)
    assert entry is not None
    assert entry.inject == Inject.PF_NOT_PRESENT
    bench.clear(0, kvm.AREA_FLAGS)
    bench.set_slots(*WITHOUT)
    outside(bench)
    bench.serve()
    assert bench.vm.state[GFN] == HPT_RESIDENT, "a useless but harmless fetch (spec §1.16)"
    bench.exit()
    assert bench.take_ready() == entry.cr2


def test_a_waiting_fault_is_served_from_the_new_layout() -> None:
    """A synchronous fault waits for a page; the slot is replaced by other host memory meanwhile."""
    bench = running(spare=32)
    bench.swap_out(GFN)
    assert bench.touch(GFN, if_=0) is None
    bench.set_slots(Memslot(0, 0, 32, 0), Memslot(0, 32, 32, 256), Memslot(0, 64, 192, 64))
    outside(bench)
    assert 0 not in bench.entries
    bench.serve()
    assert 0 in bench.entries
    hvp = 256 + GFN - 32
    assert int(bench.memory.frames[int(bench.vm.frame_of[hvp]) * WORDS]) == 0, "fresh memory"


def test_moved_pages_keep_their_contents_and_wait_for_reads() -> None:
    bench = running(spare=32)
    bench.swap_out(GFN)
    bench.fill(GFN + 1, 0x77)
    assert bench.touch(GFN, if_=0) is None
    bench.set_slots(
        Memslot(0, 0, 32, 0), Memslot(0, 32, 32, 256), Memslot(0, 64, 192, 64), moves=((32, 256, 32),)
    )
    outside(bench)
    assert bench.vm.state[GFN] == HPT_READING
    assert bench.layouts == [], "a request names the old page"
    bench.serve()
    outside(bench)
    bench.serve()
    assert len(bench.layouts) == 1
    assert 0 in bench.entries
    assert bench.vm.state[GFN] == HPT_NONE
    for gfn, word in ((GFN, 0xABCD), (GFN + 1, 0x77)):
        frame = int(bench.vm.frame_of[256 + gfn - 32])
        assert int(bench.memory.frames[frame * WORDS]) == word
        assert int(bench.vm.frames.owner[frame]) == 256 + gfn - 32


def test_pages_of_a_move_that_wait_for_frames_get_those_of_others_of_the_move() -> None:
    bench = Bench(frames=48, low=2, high=4, spare=256, zero_pages=False)
    bench.boot(0)
    for gfn in range(100, 180):
        while bench.vm.state[gfn] != HPT_RESIDENT:
            bench.touch(gfn)
            bench.settle()
        bench.vm.mark_dirty(gfn)
    on_swap = [gfn for gfn in range(100, 180) if bench.vm.state[gfn] == HPT_SLOT]
    for gfn in on_swap[:20]:
        bench.touch(gfn)
    waiting = (bench.vm.state == HPT_READING) & (bench.vm.frame_of < 0)
    assert waiting.any(), "no frame is free"
    layout, moves = moved(bench.vm.slots.of_vm(0), 0, 0, 256, 256)
    bench.set_slots(*layout, moves=tuple(moves))
    for _ in range(200):
        outside(bench)
        bench.serve()
    assert not bench.vm.change.pending
    assert len(bench.layouts) == 1


def test_changes_queue() -> None:
    bench = running()
    bench.vcpu_pages[VP_STATE] = int(bench.vmc[0]) << 2 | MODE_IN_GUEST
    bench.set_slots(*WITHOUT)
    bench.set_slots(WHOLE)
    assert bench.layouts == []
    for _ in range(2):
        outside(bench)
    assert [done.generation for done in bench.layouts] == [2, 4]
    assert bench.vm.find_hvp(0, GFN) == GFN


def test_a_bad_layout_is_refused() -> None:
    bench = running()
    with pytest.raises(ValueError, match="does not fit"):
        bench.set_slots(Memslot(0, 0, 300, 0))


# -- the remembered translation of the shared area (spec §1.7, I32) ---------------------------------------------
def moved_area(bench: Bench) -> None:
    """Other host memory behind the page of the area."""
    bench.set_slots(Memslot(0, 0, 1, 0), Memslot(0, AREA_GFN, 1, 256), Memslot(0, 2, 254, 2))
    outside(bench)


def test_the_word_appears_in_the_new_memory() -> None:
    """T7, first half."""
    bench = running(spare=1)
    bench.swap_out(GFN)
    old = int(bench.vm.frame_of[AREA_GFN])
    moved_area(bench)
    bench.obs.events.clear()
    entry = bench.touch(GFN)
    assert entry is not None
    assert entry.inject == Inject.PF_NOT_PRESENT
    assert bench.area(0, kvm.AREA_FLAGS) == 1
    assert int(bench.vm.frame_of[256]) != old
    assert bench.memory.read32(old, APF_AREA_GPA & 0xFFF) == 0, "nothing goes to the old memory"
    log = [(k, f) for k, f in bench.obs.events if k in (Kind.AREA_CACHE, Kind.SLOT_WRITE)]
    assert [k for k, _ in log] == [Kind.AREA_CACHE, Kind.SLOT_WRITE]
    assert (log[0][1]["a"], log[0][1]["b"], log[0][1]["c"]) == (2, 2, 1)
    assert bench.vm.flags[256] & F_DIRTY, "the write marks its page"


def test_an_unchanged_layout_is_not_asked_for_again() -> None:
    bench = running()
    bench.swap_out(GFN)
    bench.obs.events.clear()
    bench.touch(GFN)
    cache = next(f for k, f in bench.obs.events if k == Kind.AREA_CACHE)
    assert (cache["a"], cache["b"]) == (0, 0)
    assert bench.vcpus[0].x86.area.hvp == AREA_GFN


def test_a_read_of_the_token_word_uses_the_new_memory() -> None:
    """The word in the old memory is occupied; in the new it is free: the completion is handed over."""
    bench = running(spare=1)
    bench.swap_out(GFN)
    bench.touch(GFN)
    bench.memory.write32(int(bench.vm.frame_of[AREA_GFN]), (APF_AREA_GPA & 0xFFF) + kvm.AREA_TOKEN, 99)
    moved_area(bench)
    bench.serve()
    bench.exit()
    assert bench.area(0, kvm.AREA_TOKEN) == 0x1000


def test_an_area_on_swap_when_its_slots_change_is_written_where_it_is_now() -> None:
    """The vCPU is held for the old page of the area; the translation is stale when it comes."""
    bench = running(spare=1)
    bench.swap_out(GFN)
    bench.memory.frames[int(bench.vm.frame_of[AREA_GFN]) * WORDS + 100] = 77
    bench.vm.mark_dirty(AREA_GFN)
    bench.swap_out(AREA_GFN)
    assert bench.touch(GFN) is None
    moved_area(bench)
    bench.serve()
    assert bench.entries[0].inject == Inject.PF_NOT_PRESENT
    assert bench.area(0, kvm.AREA_FLAGS) == 1


@pytest.mark.parametrize("profile", ["v3", "v7", "mainline"])
def test_an_area_whose_slot_is_gone(profile: str) -> None:
    """T7, second half; spec §8.2, row 'area write fails'."""
    bench = Bench(profile=profile)
    bench.boot()
    bench.fill(GFN, 0xABCD)
    bench.swap_out(GFN)
    bench.set_slots(Memslot(0, 2, 254, 2))
    outside(bench)
    bench.obs.events.clear()
    entry = bench.touch(GFN)
    assert (entry is None) is (profile == "mainline"), (
        "mainline halts; v3 and v7 execute the instruction again"
    )
    assert entry is None or entry.inject == Inject.NONE
    written = [f for k, f in bench.obs.events if k == Kind.SLOT_WRITE]
    assert [f["c"] for f in written] == [0xFFFF_FFFF_FFFF_FFFF]
    bench.serve()
    bench.exit()
    assert 0 in bench.entries
    waits = bool(bench.vcpus[0].x86.apf.done)
    assert waits is (profile == "mainline"), "mainline: a word that cannot be read is not free (spec §3.3)"
