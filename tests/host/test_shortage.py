"""Swap is full: when a guest is told, who is told, how the notice gets there, and that it never ends in a wait for ever."""

from __future__ import annotations

import numpy as np
import pytest

from host import events as ev
from host.kernels import F_DIRTY, F_STUCK
from host.memory import HostMemory, VmMemory
from host.slots import Memslot
from host.vm import Limits, VmMachine
from proto.image import Content
from proto.kvm import AREA_TOKEN
from proto.layout import npt_tables
from proto.lives import Where
from proto.stats import HostCounter
from proto.trace import Kind
from proto.wire import HC_OOM, HC_RELEASE, HC_RESET, OOM_KILLED, OOM_PENDING, ExitReason, Inject
from tests.host.harness import WORDS, Bench, Recorder
from tests.host.test_vm import frames_are_accounted_for

FIRST = 30
GFNS = 120


def answer(bench: Bench, number: int, pages: int = 0, flags: int = 0, cpu: int = 0) -> None:
    bench.exit(cpu, ExitReason.HYPERCALL, cpl=0, if_=0, arg0=HC_OOM, arg1=number, gpa=pages, gva=flags)


def release(bench: Bench, first: int, pages: int, cpu: int = 0) -> None:
    for gfn in range(first, first + pages, 64):
        mask = (1 << min(64, first + pages - gfn)) - 1
        bench.exit(cpu, ExitReason.HYPERCALL, cpl=0, if_=0, arg0=HC_RELEASE, gpa=gfn << 12, arg1=mask)
    bench.settle()


def fill_up(bench: Bench, cpu: int = 0) -> int:
    """Dirty page after page until the guest is told that memory is short; returns the page that could not be had."""
    for gfn in range(FIRST, FIRST + GFNS):
        if bench.touch(gfn, cpu) is None:
            bench.settle()
        if bench.notices:
            return gfn
        bench.memory.frames[int(bench.vm.frame_of[gfn]) * WORDS] = gfn
        bench.vm.flags[gfn] |= F_DIRTY
        bench.settle()
    raise AssertionError("memory was never short")


def full(vcpus: int = 1) -> Bench:
    """Memory is short, and vCPU 0 was held for a frame."""
    bench = Bench(vcpus=vcpus, frames=24, slots=4, low=4, high=10, least=4, reserve=1, host_async=False)
    for cpu in range(vcpus):
        bench.boot(cpu, enable=False)
    fill_up(bench)
    return bench


def test_a_held_vcpu_goes_back_to_its_guest_with_the_notice() -> None:
    bench = full()
    entry = bench.entries[0]
    assert (entry.inject, entry.cr2) == (Inject.OUT_OF_MEMORY, 1)
    assert bench.notices == [ev.MemoryShort(0, 1)]
    assert bench.vm.page_out.swap_full
    assert bench.vm.page_out.stuck >= 24 - 4, "as many frames as could be used were used"
    assert bench.obs.counts[HostCounter.OOM_NOTICES] == 1
    frames_are_accounted_for(bench)


def test_memory_given_back_serves_whoever_waits() -> None:
    bench = full()
    gfn = FIRST + 40
    release(bench, FIRST, 12)
    answer(bench, 1, 12, OOM_KILLED)
    assert bench.touch(gfn) is not None
    assert bench.entries[0].inject == Inject.NONE
    assert bench.obs.counts[HostCounter.OOM_KILLS] == 1
    assert not bench.out_of_memory
    frames_are_accounted_for(bench)


def test_a_guest_with_nothing_to_give_ends_the_run() -> None:
    bench = full()
    answer(bench, 1)
    assert bench.touch(FIRST + 50) is None
    bench.settle()
    assert bench.out_of_memory == 1
    bench.settle()
    assert bench.out_of_memory == 1, "said once"


def test_one_notice_is_open_at_a_time_and_a_wrong_answer_is_none() -> None:
    bench = full(vcpus=2)
    answer(bench, 7, 100, cpu=0)
    assert bench.touch(FIRST + 50, 1) is None
    bench.settle()
    assert len(bench.notices) == 1
    answer(bench, 1, 0)
    bench.settle()
    assert bench.out_of_memory == 1


def test_every_vcpu_has_to_look_while_the_victim_executes() -> None:
    bench = full(vcpus=3)
    assert bench.touch(FIRST + 50, 2) is None
    answer(bench, 1, 0, OOM_KILLED | OOM_PENDING)
    assert bench.notices == [ev.MemoryShort(0, 1), ev.MemoryShort(0, 0)]
    assert (bench.entries[2].inject, bench.entries[2].cr2) == (Inject.OUT_OF_MEMORY, 0), "held, and let go"
    assert 1 in bench.kicks, "in guest mode, and kicked"
    bench.exit(1)
    assert (bench.entries[1].inject, bench.entries[1].cr2) == (Inject.OUT_OF_MEMORY, 0)
    release(bench, FIRST, 12, cpu=2)
    answer(bench, 1, 12, cpu=2)
    assert bench.touch(FIRST + 50, 2) is not None
    assert not bench.out_of_memory


def test_a_halted_vcpu_is_woken_for_it() -> None:
    bench = Bench(vcpus=2, frames=24, slots=4, low=4, high=10, least=4, host_async=False)
    bench.boot(0, enable=False)
    bench.boot(1, enable=False)
    bench.exit(0, ExitReason.HLT)
    assert bench.vcpus[0].where is Where.BLOCKED
    fill_up(bench, 1)
    assert bench.entries[0].inject == Inject.OUT_OF_MEMORY
    assert 1 not in bench.entries, "the other one still waits for its page"


def test_an_exception_goes_first_and_the_notice_comes_with_the_next_entry() -> None:
    bench = full(vcpus=2)
    vcpu = bench.vcpus[1]
    bench.exit(1)
    bench.kicks.clear()
    vcpu.exception = None
    bench.feed(vcpu, ev.MemoryNotice(1, 0))
    assert bench.kicks == [1]
    bench.exit(1, ExitReason.WRMSR, cpl=0, if_=0, arg0=0x123, arg1=1)
    assert bench.entries[1].inject == Inject.GP
    assert bench.kicks == [1, 1], "and out again"
    bench.exit(1)
    assert bench.entries[1].inject == Inject.OUT_OF_MEMORY


@pytest.mark.parametrize("how", ["reset", "power_down"])
def test_a_notice_whose_vcpu_is_gone_goes_to_another(how: str) -> None:
    bench = full(vcpus=2)
    if how == "reset":
        bench.feed(bench.vcpus[0], ev.Reset(0))
        bench.exit(0)
    else:
        bench.exit(0, ExitReason.DONE)
    assert bench.touch(FIRST + 50, 1) is None or bench.entries[1].inject == Inject.OUT_OF_MEMORY
    bench.settle()
    assert (bench.entries[1].inject, bench.entries[1].cr2) == (Inject.OUT_OF_MEMORY, 2)


def test_a_reboot_while_the_victim_is_still_being_stopped() -> None:
    bench = full(vcpus=2)
    answer(bench, 1, 0, OOM_KILLED | OOM_PENDING)
    bench.exit(0, ExitReason.HYPERCALL, cpl=0, if_=0, arg0=HC_RESET)
    bench.exit(1)
    assert bench.entries[0].inject == Inject.RESET
    assert bench.touch(FIRST + 50, 0) is not None
    assert (bench.entries[0].inject, bench.entries[0].cr2) == (Inject.OUT_OF_MEMORY, 2), (
        "the next one is told"
    )


def test_a_write_that_will_free_enough_is_waited_for() -> None:
    bench = full()
    release(bench, FIRST, 8)
    answer(bench, 1, 8)
    told = len(bench.notices)
    # Every slot is named by a write whose page was written to again.
    vm = bench.vm
    vm.flags[vm.flags & F_STUCK != 0] &= 255 - F_STUCK
    stuck = [hvp for hvp in range(FIRST, FIRST + GFNS) if vm.state[hvp] == 2]
    vm.flags[stuck] |= F_STUCK
    vm.page_out.swap_full = True
    vm.frames.pinned = dict.fromkeys(range(1000, 1000 + len(stuck)), -1)
    bench.touch(FIRST + 60)
    bench.settle()
    assert len(bench.notices) == told


def test_the_hosts_own_accesses_have_a_reserve() -> None:
    bench = Bench(frames=24, slots=8, low=4, high=10, least=2, reserve=1)
    bench.boot()
    bench.fill(1, 0)
    bench.swap_out(1)
    gfn = fill_up(bench)
    assert bench.vm.frames.free_count >= 1
    assert gfn
    bench.exit(
        0, ExitReason.WRMSR, cpl=0, if_=0, arg0=bench.profile.msr_en, arg1=0x1000 | bench.profile.enabled_bits
    )
    bench.settle()
    assert 0 in bench.entries, "the area was written although guests have no frame left"
    assert bench.area(0, AREA_TOKEN)


def test_a_save_goes_on_while_memory_is_short() -> None:
    bench = full()
    answer(bench, 1, 1)
    bench.feed(bench.vcpus[0], ev.Pause(0))
    bench.exit(0, flags=16)
    assert bench.vcpus[0].where is Where.PAUSED
    on_swap = [hvp for hvp in range(FIRST, FIRST + GFNS) if bench.vm.state[hvp] == 3]
    assert on_swap
    for hvp in range(FIRST, FIRST + GFNS):
        bench.feed(bench.vm, ev.SavePage(hvp))
        bench.settle()
    saved = {one.hvp for one in bench.told if type(one) is ev.PageSaved}
    assert saved == set(range(FIRST, FIRST + GFNS))
    assert not bench.out_of_memory


def test_an_image_that_does_not_fit_is_said() -> None:
    bench = Bench(frames=8, slots=4, low=2, high=4, zero_pages=False)
    for hvp in range(40):
        bench.feed(bench.vm, ev.LoadPage(hvp, Content.DATA, bytes([hvp + 1]) * 4096))
        bench.settle()
    assert bench.out_of_memory == 1


# -- several VMs -----------------------------------------------------------------------------------------------
def two_vms(pages: tuple[int, int]) -> tuple[VmMachine, Recorder]:
    """Two guests of which each has filled so many frames, none of them can be paged; somebody of VM 0 waits."""
    frames = sum(pages)
    vms = [
        VmMemory(np.zeros(npt_tables(64) * 512, np.uint64), np.zeros(WORDS, np.uint64), v, 1)
        for v in range(2)
    ]
    observer = Recorder()
    memory = HostMemory(np.zeros(frames * WORDS, np.uint64), np.zeros(2 * WORDS, np.uint64), vms)
    machine = VmMachine(
        memory, [Memslot(0, 0, 64, 0), Memslot(1, 0, 64, 64)], Limits(0, 1, 1, False), observer
    )
    for vm, count in enumerate(pages):
        for gfn in range(count):
            machine.on([ev.GetPage(vm, gfn, vm, gfn, True, ev.Gup.WAIT)], 1)
            machine.flags[64 * vm + gfn] = F_DIRTY | F_STUCK
    machine.page_out.swap_full = True
    return machine, observer


@pytest.mark.parametrize(("pages", "first"), [((10, 20), 1), ((20, 10), 0), ((15, 15), 0)])
def test_the_largest_guest_is_told_and_the_other_when_that_has_nothing(
    pages: tuple[int, int], first: int
) -> None:
    machine, _ = two_vms(pages)
    (short,) = machine.on([ev.GetPage(0, 99, 0, 60, True, ev.Gup.WAIT)], 2)
    assert short == ev.MemoryShort(first, 1)
    (short,) = machine.on([ev.MemoryGiven(first, 1, 0, 0)], 3)
    assert short == ev.MemoryShort(1 - first, 2)
    (short,) = machine.on([ev.NoticeLost(1 - first, 2, nobody=False)], 4)
    assert short == ev.MemoryShort(1 - first, 3)
    (end,) = machine.on([ev.MemoryGiven(1 - first, 3, 0, 0)], 5)
    assert end == ev.OutOfMemory(1)


def test_a_request_taken_back_is_answered_and_leaves_nothing() -> None:
    machine, observer = two_vms((10, 10))
    machine.on([ev.GetPage(0, 99, 0, 60, True, ev.Gup.WAIT)], 2)
    (back,) = machine.on([ev.CancelPage(0, 99)], 3)
    assert back == ev.Answer(0, 99, ev.Found.NO_MEMORY, True, 60)
    assert machine.waiters.starving == 0
    assert machine.on([ev.CancelPage(0, 99)], 4) == []
    assert Kind.SWAP_IN not in observer.kinds()
