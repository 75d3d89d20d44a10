"""Save and restore of vCPUs with faults outstanding, into fresh machines, by hand (spec §1.16; I37, I43, I47)."""

from __future__ import annotations

from typing import Any

import pytest

from host import events as ev
from host.state import RESTORE_ORDER, MpState, VcpuState, save_list
from proto import kvm
from proto.image import Content
from proto.layout import XF_RESTART
from proto.lives import Where
from proto.machine import MachineError
from proto.profile import PROFILES
from proto.stats import HostCounter
from proto.trace import Kind
from proto.units import TOKEN_WAKE_ALL
from proto.wire import ExitReason, Inject
from tests.host.harness import Bench
from tests.host.moving import let_stop, pause, paused, refusals, restore, resume, save

GFN = 40
WORD = 0xABCD
PROFILE_NAMES = ("v3", "v7", "mainline")


def swapped(**options: Any) -> Bench:
    """A booted bench whose page GFN lies on swap."""
    enable = bool(options.pop("enable", True))
    bench = Bench(**options)
    for cpu in range(len(bench.vcpus)):
        bench.boot(cpu, enable=enable)
    bench.fill(GFN, WORD)
    bench.swap_out(GFN)
    bench.obs.events.clear()
    bench.obs.counts.clear()
    return bench


def saved_fields(bench: Bench) -> dict[str, int]:
    return next(fields for kind, fields in bench.obs.events if kind == Kind.STATE_SAVE)


def broadcast(bench: Bench, cpu: int = 0) -> bool:
    """Whether the entry of ``cpu`` brings the wake-all token."""
    entry = bench.entries[cpu]
    if bench.profile.ready_by_interrupt:
        return entry.irr == kvm.VECTOR_PAGE_READY and bench.area(cpu, kvm.AREA_TOKEN) == TOKEN_WAKE_ALL
    return (entry.inject, entry.cr2) == (Inject.PF_READY, TOKEN_WAKE_ALL)


# -- pausing -----------------------------------------------------------------------------------------------
def test_a_running_vcpu_is_kicked_and_stops_at_its_exit() -> None:
    bench = swapped()
    pause(bench)
    assert bench.kicks == [0]
    assert paused(bench) == []
    let_stop(bench)
    assert paused(bench) == [0]
    assert bench.entries == {}
    assert bench.vcpus[0].where is Where.PAUSED


def test_kernel_code_runs_on_to_the_next_save_point() -> None:
    bench = swapped()
    pause(bench)
    bench.exit(0, ExitReason.IPI, cpl=0, if_=0, arg0=0, arg1=kvm.VECTOR_RESCHEDULE)
    assert 0 in bench.entries
    assert paused(bench) == []
    assert bench.kicks == [0, 0], "kicked again behind its entry"
    let_stop(bench)
    assert paused(bench) == [0]


def test_a_synchronous_fault_finishes_first() -> None:
    bench = swapped(host_async=False)
    assert bench.touch(GFN, flags=XF_RESTART) is None
    pause(bench)
    assert paused(bench) == []
    bench.serve()
    assert paused(bench) == [0]
    assert bench.entries == {}


def test_an_idle_vcpu_stops_where_it_is() -> None:
    bench = swapped()
    bench.exit(0, ExitReason.HLT, cpl=0, flags=XF_RESTART)
    pause(bench)
    assert paused(bench) == [0]
    assert bench.vcpus[0].mp_state is MpState.HALTED


def test_a_halt_that_cannot_be_left_is_waited_for() -> None:
    bench = swapped()
    bench.exit(0, ExitReason.HLT, cpl=0)
    pause(bench)
    assert paused(bench) == []
    bench.feed(bench.vcpus[0], ev.Interrupt(0, kvm.VECTOR_RESCHEDULE))
    assert 0 in bench.entries
    let_stop(bench, accepted=kvm.VECTOR_RESCHEDULE, eois=1)
    assert paused(bench) == [0]


def test_a_vcpu_that_is_off_stands_already_and_stays_off() -> None:
    bench = swapped()
    bench.exit(0, ExitReason.DONE)
    pause(bench)
    assert paused(bench) == [0]
    assert bench.vcpus[0].state().mp_state == MpState.UNINITIALIZED
    assert Kind.STATE_SAVE not in bench.obs.kinds()


def test_one_that_goes_off_instead_of_stopping() -> None:
    bench = swapped()
    pause(bench)
    bench.exit(0, ExitReason.DONE)
    assert paused(bench) == [0]


def test_state_of_a_running_vcpu_cannot_be_read() -> None:
    with pytest.raises(MachineError):
        swapped().vcpus[0].state()


def test_what_completes_after_the_stop_is_discarded() -> None:
    bench = swapped()
    bench.touch(GFN)
    bench.clear(0, kvm.AREA_FLAGS)
    pause(bench)
    let_stop(bench)
    bench.serve()
    assert bench.entries == {}
    assert not bench.vcpus[0].x86.apf.done
    assert Kind.ASYNC_PF_COMPLETED not in bench.obs.kinds()


def test_an_interrupt_from_a_vcpu_that_still_runs_is_saved() -> None:
    bench = swapped(vcpus=2)
    pause(bench)
    let_stop(bench, 0)
    bench.exit(1, ExitReason.IPI, cpl=0, if_=0, arg0=0, arg1=kvm.VECTOR_RESCHEDULE)
    let_stop(bench, 1)
    assert bench.vcpus[0].state().irr == (kvm.VECTOR_RESCHEDULE,)


# -- what is saved -----------------------------------------------------------------------------------------
def test_synthetic_halt_is_invisible() -> None:
    bench = swapped()
    assert bench.touch(GFN, cpl=0, flags=XF_RESTART) is None
    assert bench.vcpus[0].halted
    pause(bench)
    fields = saved_fields(bench)
    assert (fields["a"], fields["b"]) == (MpState.RUNNABLE, 1)
    assert fields["c"] == bench.vcpus[0].x86.msr_en != 0
    fresh = restore(save(bench))
    resume(fresh, cpl=0)
    assert 0 in fresh.entries, "the instruction is executed again"
    assert not fresh.vcpus[0].halted


@pytest.mark.parametrize("profile", PROFILE_NAMES)
def test_round_trip_of_the_record(profile: str) -> None:
    bench = swapped(profile=profile)
    bench.touch(GFN)
    pause(bench)
    let_stop(bench)
    state = bench.vcpus[0].state()
    assert VcpuState.from_plain(state.to_plain()) == state
    assert [index for index, _ in state.msrs] == list(save_list(PROFILES[profile]))
    fresh = restore(save(bench), profile=profile)
    assert refusals(fresh) == []
    pause(fresh)
    resume(fresh)
    again = fresh.vcpus[0].state()
    assert again == state


def test_halted_is_saved_only_while_nothing_can_wake_it() -> None:
    bench = swapped()
    bench.touch(GFN)
    bench.clear(0, kvm.AREA_FLAGS)
    bench.exit(0, ExitReason.HLT, cpl=0, flags=XF_RESTART)
    pause(bench)
    before = bench.vcpus[0].state().mp_state
    bench.feed(bench.vcpus[0], ev.Poke(0))
    assert (before, bench.vcpus[0].state().mp_state) == (MpState.HALTED, MpState.RUNNABLE)


# -- restored ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("profile", PROFILE_NAMES)
def test_sleepers_are_broadcast_to_and_the_page_can_be_asked_for_again(profile: str) -> None:
    bench = swapped(profile=profile)
    entry = bench.touch(GFN)
    assert entry is not None
    assert entry.inject == Inject.PF_NOT_PRESENT
    bench.clear(0, kvm.AREA_FLAGS)
    pause(bench)
    let_stop(bench)
    fresh = restore(save(bench), profile=profile)
    resume(fresh)
    assert broadcast(fresh)
    token = fresh.take_ready() if fresh.profile.ready_by_interrupt else fresh.entries[0].cr2
    assert token == TOKEN_WAKE_ALL
    fresh.touch(GFN)
    fresh.serve()
    assert int(fresh.memory.frames[int(fresh.vm.frame_of[GFN]) * 512]) == WORD


@pytest.mark.parametrize("profile", PROFILE_NAMES)
def test_a_pending_exception_is_injected_by_the_new_host(profile: str) -> None:
    bench = swapped(profile=profile)
    pause(bench)
    bench.touch(GFN, flags=XF_RESTART)
    saved = bench.vcpus[0].state()
    if profile == "v3":
        # Decided but not yet injected: the guest knows nothing and takes the fault again.
        assert saved.exception is None
    else:
        assert saved.exception is not None
        assert saved.exception[0] == Inject.PF_NOT_PRESENT
    fresh = restore(save(bench), profile=profile)
    resume(fresh)
    entry = fresh.entries[0]
    if saved.exception is not None:
        assert (entry.inject, entry.cr2) == saved.exception
        assert fresh.area(0, kvm.AREA_FLAGS) == kvm.REASON_NOT_PRESENT
        fresh.clear(0, kvm.AREA_FLAGS)
    if profile == "v7":
        assert entry.irr == 0
        fresh.exit()
    assert broadcast(fresh)


def test_new_tokens_do_not_meet_those_of_sleepers() -> None:
    bench = swapped(profile="v7")
    other = GFN + 1
    bench.fill(other, 7)
    bench.swap_out(other)
    first = bench.touch(GFN)
    bench.clear(0, kvm.AREA_FLAGS)
    pause(bench)
    let_stop(bench, if_=0)
    fresh = restore(save(bench), profile="v7")
    # With IF=0 the broadcast has to wait; a fault may come before it.
    resume(fresh, if_=0)
    assert fresh.entries[0].inject == Inject.NONE
    fresh.swap_out(other)
    second = fresh.touch(other)
    assert first is not None
    assert second is not None
    assert first.cr2 != second.cr2


def test_ready_that_the_guest_has_not_acknowledged() -> None:
    bench = swapped()
    entry = bench.touch(GFN)
    bench.clear(0, kvm.AREA_FLAGS)
    bench.serve()
    pause(bench)
    bench.exit()
    assert paused(bench) == [], "no save point: it is entered with its interrupt"
    let_stop(bench)
    state = bench.vcpus[0].state()
    assert state.irr == (kvm.VECTOR_PAGE_READY,)
    fresh = restore(save(bench))
    resume(fresh)
    assert entry is not None
    assert fresh.entries[0].irr == kvm.VECTOR_PAGE_READY
    assert fresh.take_ready() == entry.cr2, "the old token first"
    assert broadcast(fresh), "its ACK lets the broadcast through"


def test_done_list_is_not_carried() -> None:
    bench = swapped()
    bench.touch(GFN)
    bench.clear(0, kvm.AREA_FLAGS)
    bench.serve()
    assert len(bench.vcpus[0].x86.apf.done) == 1
    pause(bench)
    let_stop(bench)
    fresh = restore(save(bench))
    assert [work.token for work in fresh.vcpus[0].x86.apf.done] == [TOKEN_WAKE_ALL]
    assert not fresh.vcpus[0].x86.apf.queue
    assert not fresh.vcpus[0].x86.hash.slots.count(GFN)


def test_halted_guest_stays_halted_without_async_pf() -> None:
    bench = swapped(enable=False)
    bench.exit(0, ExitReason.HLT, cpl=0, flags=XF_RESTART)
    pause(bench)
    fresh = restore(save(bench))
    resume(fresh, cpl=0)
    assert fresh.entries == {}
    fresh.feed(fresh.vcpus[0], ev.Interrupt(0, kvm.VECTOR_RESCHEDULE))
    assert 0 in fresh.entries


def test_halted_guest_with_async_pf_is_woken_by_its_broadcast() -> None:
    bench = swapped()
    bench.exit(0, ExitReason.HLT, cpl=0, flags=XF_RESTART)
    pause(bench)
    fresh = restore(save(bench))
    resume(fresh, cpl=0)
    assert broadcast(fresh)


def test_every_vcpu_gets_its_own_broadcast() -> None:
    bench = swapped(vcpus=3)
    pause(bench)
    for cpu in range(3):
        let_stop(bench, cpu)
    fresh = restore(save(bench))
    for cpu in range(3):
        resume(fresh, cpu)
    assert all(broadcast(fresh, cpu) for cpu in range(3))


def test_restored_again_before_it_ran() -> None:
    bench = swapped()
    pause(bench)
    let_stop(bench)
    first = save(bench)
    second = restore(first)
    pause(second)
    resume(second)
    assert save(second) == first


def test_the_log_of_a_restore_begins_with_it() -> None:
    bench = swapped()
    pause(bench)
    let_stop(bench)
    fresh = restore(save(bench))
    kind, fields = next((kind, fields) for kind, fields in fresh.obs.events if kind < Kind.SWAP_IN)
    assert kind == Kind.STATE_RESTORE
    assert fields["c"] == bench.vcpus[0].x86.msr_en
    writes = [fields["a"] for kind, fields in fresh.obs.events if kind == Kind.MSR_WR]
    assert writes == [kvm.MSR_X2APIC_SPIV, kvm.MSR_ASYNC_PF_INT, kvm.MSR_ASYNC_PF_ACK, kvm.MSR_ASYNC_PF_EN]
    assert RESTORE_ORDER.index("cpuid") < RESTORE_ORDER.index("lapic") < RESTORE_ORDER.index("int")


# -- refused -----------------------------------------------------------------------------------------------
def state_of(profile: str = "mainline") -> dict[str, Any]:
    bench = swapped(profile=profile)
    pause(bench)
    let_stop(bench)
    return bench.vcpus[0].state().to_plain()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"version": 2}, "version 2, allowed: 1"),
        ({"mp_state": 2}, "mp_state: 2"),
        ({"cpuid": -1}, "cpuid: -1"),
        ({"cpuid": "4"}, "cpuid: '4' is no int"),
        ({"lapic": []}, "lapic: [] is no dict"),
        ({"lapic": {"irr": [256], "isr": [], "spiv": 0}}, "lapic.irr: 256"),
        ({"msrs": [[1]]}, "msrs: 1 values, allowed: 2"),
        ({"exception": [0, 0]}, "exception: kind 0"),
        ({"exception": [1]}, "exception: 1 values, allowed: 2"),
        ({"next_id": 1 << 32}, "next_id: 4294967296"),
        ({"msrs": [[kvm.MSR_ASYNC_PF_EN, 0x10]]}, "MSR 0x4b564d02 := 0x10"),
        ({"msrs": [[0x123, 0]]}, "MSR 0x123 := 0x0"),
        ({"msrs": [[kvm.MSR_ASYNC_PF_EN, 0x7FFF_F009]]}, "MSR 0x4b564d02 := 0x7ffff009"),
        ({"cpuid": 1 << 10}, "CPUID feature bits 0x400"),
    ],
)
def test_a_bad_state_is_refused_with_its_key(change: dict[str, Any], says: str) -> None:
    bench = Bench()
    bench.feed(bench.vcpus[0], ev.Restore(0, {**state_of(), **change}))
    assert len(refusals(bench)) == 1
    assert says in refusals(bench)[0]


def test_a_bit_without_its_cpuid_feature_is_refused() -> None:
    """Backward migration (BZ-27): the saved register holds what the saved CPUID did not allow."""
    bench = Bench()
    bench.feed(bench.vcpus[0], ev.Restore(0, {**state_of(), "cpuid": kvm.CPUID_FEATURE_ASYNC_PF}))
    assert refusals(bench) == ["MSR 0x4b564d02 := 0x1009"]


def test_only_a_fresh_vcpu_is_restored() -> None:
    bench = swapped()
    with pytest.raises(MachineError):
        bench.feed(bench.vcpus[0], ev.Restore(0, state_of()))


# -- memory ------------------------------------------------------------------------------------------------
def test_memory_is_saved_while_most_of_it_is_on_swap() -> None:
    bench = Bench(pages=256, frames=48, low=8, high=16)
    bench.boot()
    for gfn in range(60, 200):
        bench.fill(gfn, gfn)
        bench.settle()
    assert bench.vm.page_out.swap_full is False
    pause(bench)
    let_stop(bench)
    image = save(bench)
    kinds = [content for content, _ in image.pages]
    assert kinds.count(Content.DATA) >= 140
    assert kinds[255] is Content.NONE
    assert bench.vm.frames.free_count <= 48
    fresh = restore(image, frames=48, low=8, high=16)
    fresh.settle()
    assert fresh.obs.counts[HostCounter.SWAP_OUT_PAGES] > 0, "what does not fit goes to swap"
    again = walk_contents(fresh)
    assert again == image.pages


def walk_contents(bench: Bench) -> list[Any]:
    """Contents of every page, by another save."""
    pause(bench)
    for machine in bench.vcpus:
        resume(bench, machine.cpu)
    return save(bench).pages


def test_pages_without_contents_stay_so() -> None:
    bench = Bench()
    bench.boot()
    bench.touch(GFN)
    bench.settle()
    bench.vm.state[GFN + 1] = 7
    pause(bench)
    let_stop(bench)
    image = save(bench)
    assert image.pages[GFN] == (Content.ZERO, b"")
    assert image.pages[GFN + 1] == (Content.BAD, b"")
    fresh = restore(image)
    free = fresh.vm.frames.free_count
    assert fresh.vm.state[GFN] == 1
    assert free == fresh.memory.frame_count - sum(content is Content.DATA for content, _ in image.pages)
    assert fresh.touch(GFN + 1) is not None
    assert fresh.entries[0].inject == Inject.MACHINE_CHECK


def test_a_page_is_loaded_once() -> None:
    bench = Bench()
    bench.feed(bench.vm, ev.LoadPage(GFN, Content.DATA, bytes(4096)))
    with pytest.raises(MachineError):
        bench.feed(bench.vm, ev.LoadPage(GFN, Content.DATA, bytes(4096)))
