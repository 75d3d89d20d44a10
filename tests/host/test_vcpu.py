"""The vcpu machine with the vm and swap machines: every delivery mode from fault to wake-up, by hand."""

from __future__ import annotations

import pytest

from host.slots import Memslot
from proto import kvm
from proto.stats import HostCounter
from proto.trace import Kind
from proto.units import TOKEN_WAKE_ALL
from proto.wire import Entry, ExitReason, Held, Inject
from tests.host.harness import Bench

GFN = 40


def swapped(**options: object) -> Bench:
    """A booted bench whose page GFN lies on swap."""
    enable = bool(options.pop("enable", True))
    send_always = bool(options.pop("send_always", False))
    bench = Bench(**options)  # type: ignore[arg-type]
    bench.boot(enable=enable, send_always=send_always)
    bench.fill(GFN, 0xABCD)
    bench.swap_out(GFN)
    bench.obs.events.clear()
    bench.obs.counts.clear()
    return bench


def entry_of(entry: Entry | None) -> Entry:
    assert entry is not None
    return entry


def test_enabling_broadcasts_wake_all() -> None:
    bench = Bench()
    bench.exit(0, ExitReason.BOOT, cpl=0, if_=0)
    bench.wrmsr(0, kvm.MSR_X2APIC_SPIV, 0x1FF)
    bench.wrmsr(0, kvm.MSR_ASYNC_PF_INT, 0xF3)
    entry = bench.wrmsr(0, kvm.MSR_ASYNC_PF_EN, 0x1009)
    assert bench.area(0, kvm.AREA_TOKEN) == TOKEN_WAKE_ALL
    assert entry.irr == 0xF3
    assert bench.take_ready() == TOKEN_WAKE_ALL
    assert bench.vcpus[0].x86.apf.queued == 0


def test_interrupt_mode_not_present_then_ready_then_no_second_exit() -> None:
    bench = swapped()
    entry = entry_of(bench.touch(GFN))
    assert (entry.inject, entry.cr2) == (Inject.PF_NOT_PRESENT, 0x1000)
    assert bench.area(0, kvm.AREA_FLAGS) == 1
    bench.clear(0, kvm.AREA_FLAGS)
    assert bench.kicks == []
    bench.serve()
    assert bench.kicks == [0], "a completion kicks the running vCPU"
    bench.exit()
    assert bench.entries[0].irr == 0xF3
    assert bench.take_ready() == 0x1000
    assert bench.memory.mapped(0, GFN) == (True, True), "prefault: the woken task does not exit again"
    kinds = bench.obs.kinds(Kind.ASYNC_PF_NOT_PRESENT, Kind.ASYNC_PF_COMPLETED, Kind.ASYNC_PF_READY, Kind.ACK)
    assert kinds == [Kind.ASYNC_PF_NOT_PRESENT, Kind.ASYNC_PF_COMPLETED, Kind.ASYNC_PF_READY, Kind.ACK]


def test_contents_survive_the_round_trip() -> None:
    bench = swapped()
    bench.touch(GFN)
    bench.serve()
    frame = int(bench.vm.frame_of[GFN])
    assert bench.memory.frames[frame * 512] == 0xABCD


def test_exception_mode_delivers_both_by_page_fault() -> None:
    bench = swapped(profile="v7")
    entry = entry_of(bench.touch(GFN))
    assert (entry.inject, entry.cr2) == (Inject.PF_NOT_PRESENT, 0)
    bench.clear(0, kvm.AREA_FLAGS)
    bench.serve()
    bench.exit()
    entry = bench.entries[0]
    assert (entry.inject, entry.cr2) == (Inject.PF_READY, 0)
    assert bench.area(0, kvm.AREA_FLAGS) == 2


def test_exception_mode_holds_ready_back_while_interrupts_are_off() -> None:
    bench = swapped(profile="v7")
    bench.touch(GFN)
    bench.clear(0, kvm.AREA_FLAGS)
    bench.serve()
    bench.exit(if_=0)
    assert bench.entries[0].inject == Inject.NONE
    bench.exit(if_=1)
    assert bench.entries[0].inject == Inject.PF_READY


def test_halt_mode_halts_until_the_page_is_in() -> None:
    bench = swapped(enable=False)
    assert bench.touch(GFN) is None
    assert bench.vcpus[0].halted
    bench.now += 5_000_000
    bench.serve()
    entry = bench.entries[0]
    assert (entry.inject, entry.irr) == (Inject.NONE, 0)
    assert (entry.held_kind, entry.held_ns) == (Held.HALTED, 5_000_000)
    assert bench.obs.counts[HostCounter.FAULTS_HALT] == 1
    assert bench.obs.counts[HostCounter.FAULTS_ASYNC] == 0


def test_a_timer_ends_the_synthetic_halt_and_the_refault_is_repeated() -> None:
    bench = swapped(enable=False)
    assert bench.touch(GFN, timer_ns=1_000_000) is None
    timer = bench.timers[-1]
    bench.now = timer.deadline_ns
    from host.events import TimerDue

    bench.feed(bench.vcpus[0], TimerDue(0, timer.generation))
    assert bench.entries[0].irr == kvm.VECTOR_TIMER
    assert bench.touch(GFN, accepted=kvm.VECTOR_TIMER, eois=1) is None
    assert bench.obs.counts[HostCounter.FAULTS_REPEATED] == 1
    assert len([r for r in bench.io if r.op == 0]) == 1, "one read, however often the guest asks"


def test_a_halt_that_a_pending_interrupt_ends_at_once_is_told() -> None:
    bench = swapped(enable=False)
    assert bench.touch(GFN) is None
    from host.events import Interrupt

    bench.feed(bench.vcpus[0], Interrupt(0, kvm.VECTOR_RESCHEDULE))
    assert bench.entries[0].irr == kvm.VECTOR_RESCHEDULE
    entry = bench.touch(GFN)
    assert entry is not None, "not accepted yet: still pending"
    assert (entry.held_kind, entry.held_ns) == (Held.HALTED, 0)


def test_sync_mode_blocks_and_reports_how_long() -> None:
    bench = swapped(host_async=False)
    assert bench.touch(GFN, timer_ns=1000) is None
    bench.now += 7_000
    bench.serve()
    entry = bench.entries[0]
    assert (entry.held_kind, entry.held_ns) == (Held.BLOCKED, 7_000)
    assert bench.obs.counts[HostCounter.FAULTS_SYNC] == 1
    assert Kind.TRY_ASYNC_GET_PAGE not in bench.obs.kinds()


@pytest.mark.parametrize(
    ("fields", "outcome"),
    [
        ({"cpl": 3, "if_": 1}, "np"),
        ({"cpl": 3, "if_": 0}, "block"),
        ({"cpl": 3, "if_": 1, "shadow": 1}, "block"),
        ({"cpl": 3, "if_": 1, "pending": 1}, "block"),
        ({"cpl": 0, "if_": 1}, "halt"),
        ({"cpl": 0, "if_": 0}, "block"),
        ({"cpl": 3, "if_": 1, "cr0_pg": 0}, "halt"),
    ],
)
def test_outcome_matrix_mainline(fields: dict[str, int], outcome: str) -> None:
    bench = swapped()
    entry = bench.touch(GFN, **fields)
    counts = bench.obs.counts
    got = (
        "np"
        if entry is not None and entry.inject == Inject.PF_NOT_PRESENT
        else "halt"
        if counts[HostCounter.FAULTS_HALT]
        else "block"
    )
    assert got == outcome
    bench.serve()
    assert 0 in bench.entries, "whatever happened, the page brings it back"


def test_send_always_allows_kernel_mode() -> None:
    bench = swapped(send_always=True)
    assert entry_of(bench.touch(GFN, cpl=0)).inject == Inject.PF_NOT_PRESENT


def test_second_fault_on_the_same_page_halts() -> None:
    bench = swapped()
    bench.touch(GFN)
    bench.clear(0, kvm.AREA_FLAGS)
    assert bench.touch(GFN) is None
    assert bench.obs.counts[HostCounter.FAULTS_REPEATED] == 1
    assert bench.vcpus[0].x86.apf.queued == 1


def test_v3_has_no_hash_and_queues_again() -> None:
    bench = swapped(profile="v3")
    assert entry_of(bench.touch(GFN)).inject == Inject.PF_NOT_PRESENT
    bench.clear(0, kvm.AREA_FLAGS)
    assert entry_of(bench.touch(GFN)).inject == Inject.PF_NOT_PRESENT
    assert bench.vcpus[0].x86.apf.queued == 2
    assert bench.obs.tokens(Kind.ASYNC_PF_NOT_PRESENT) == [0, 0x1000]


def test_sixty_four_outstanding_then_block() -> None:
    bench = Bench(pages=512, frames=400, low=2, high=4)
    bench.boot()
    for gfn in range(100, 165):
        bench.fill(gfn, gfn)
        bench.swap_out(gfn)
    for gfn in range(100, 164):
        assert entry_of(bench.touch(gfn)).inject == Inject.PF_NOT_PRESENT
        bench.clear(0, kvm.AREA_FLAGS)
    ids_before = bench.vcpus[0].x86.id
    assert bench.touch(164) is None
    assert bench.obs.counts[HostCounter.SETUP_FAILED] == 1
    assert bench.vcpus[0].x86.id == ids_before + 1, "the failed attempt uses up a token id"
    bench.serve(1)
    assert bench.vcpus[0].x86.apf.queued == 64, "completions wait while the vCPU blocks for its own page"


def test_one_ready_slot_and_fifo() -> None:
    bench = Bench()
    bench.boot()
    for gfn in (50, 51, 52):
        bench.fill(gfn, gfn)
        bench.swap_out(gfn)
    tokens = []
    for gfn in (50, 51, 52):
        tokens.append(entry_of(bench.touch(gfn)).cr2)
        bench.clear(0, kvm.AREA_FLAGS)
    bench.serve()
    bench.exit()
    got = [bench.take_ready(), bench.take_ready(), bench.take_ready()]
    assert got == tokens
    assert bench.vcpus[0].x86.apf.queued == 0


def test_no_clear_no_next_ready() -> None:
    bench = Bench()
    bench.boot()
    for gfn in (50, 51):
        bench.fill(gfn, gfn)
        bench.swap_out(gfn)
        bench.touch(gfn)
        bench.clear(0, kvm.AREA_FLAGS)
        bench.serve()
    bench.exit()
    first = bench.area(0, kvm.AREA_TOKEN)
    bench.wrmsr(0, kvm.MSR_ASYNC_PF_ACK, 1, accepted=0xF3, eois=1)
    assert bench.area(0, kvm.AREA_TOKEN) == first, (
        "the word is overwritten only when the guest cleared it (I24)"
    )
    assert len(bench.vcpus[0].x86.apf.done) == 1


def test_disable_cancels_everything() -> None:
    bench = swapped()
    bench.touch(GFN)
    bench.wrmsr(0, kvm.MSR_ASYNC_PF_EN, 0)
    x86 = bench.vcpus[0].x86
    assert (x86.apf.queued, len(x86.apf.done), x86.apf.queue) == (0, 0, {})
    assert GFN not in x86.hash
    bench.serve()
    assert x86.apf.done.__len__() == 0
    assert bench.obs.kinds(Kind.CANCEL) == [Kind.CANCEL]


def test_hlt_is_ended_by_a_completion() -> None:
    bench = swapped()
    bench.touch(GFN)
    bench.clear(0, kvm.AREA_FLAGS)
    bench.exit(0, ExitReason.HLT, cpl=0)
    assert 0 not in bench.entries
    bench.now += 100
    bench.serve()
    entry = bench.entries[0]
    assert entry.irr == 0xF3
    assert entry.held_kind == Held.IDLE


def test_ready_waits_while_the_lapic_is_off() -> None:
    bench = Bench()
    bench.exit(0, ExitReason.BOOT, cpl=0, if_=0)
    bench.wrmsr(0, kvm.MSR_ASYNC_PF_INT, 0xF3)
    entry = bench.wrmsr(0, kvm.MSR_ASYNC_PF_EN, 0x1009)
    assert entry.irr == 0
    assert bench.area(0, kvm.AREA_TOKEN) == 0 if bench.vm.frame_of[1] >= 0 else True
    entry = bench.wrmsr(0, kvm.MSR_X2APIC_SPIV, 0x1FF)
    assert entry.irr == 0xF3
    assert bench.area(0, kvm.AREA_TOKEN) == TOKEN_WAKE_ALL


@pytest.mark.parametrize(
    ("value", "faults"),
    [
        (0, False),
        (0x1009, False),
        (0x100B, False),
        (0x1001, False),
        (0x1019, True),
        (0x1029, True),
        (0x100D, True),
        ((1 << 40) | 9, True),
    ],
)
def test_table_g(value: int, faults: bool) -> None:
    bench = Bench()
    bench.exit(0, ExitReason.BOOT, cpl=0, if_=0)
    entry = bench.wrmsr(0, kvm.MSR_ASYNC_PF_EN, value)
    assert (entry.inject == Inject.GP) is faults


def test_value_quirk_after_bad_address() -> None:
    bench = Bench()
    bench.exit(0, ExitReason.BOOT, cpl=0, if_=0)
    bench.wrmsr(0, kvm.MSR_ASYNC_PF_EN, (1 << 40) | 9)
    bench.exit(0, ExitReason.RDMSR, arg0=kvm.MSR_ASYNC_PF_EN)
    assert bench.entries[0].value == (1 << 40) | 9


def test_area_swapped_out_holds_the_vcpu_and_then_delivers() -> None:
    bench = swapped()
    bench.memory.frames[int(bench.vm.frame_of[1]) * 512 + 100] = 77
    bench.vm.flags[1] |= 1
    bench.swap_out(1)
    assert bench.touch(GFN) is None, "the word cannot be written before its page is in"
    bench.serve(1)
    assert entry_of(bench.entries.get(0)).inject == Inject.PF_NOT_PRESENT
    assert bench.area(0, kvm.AREA_FLAGS) == 1


def test_token_zero_is_never_used_in_mainline() -> None:
    bench = swapped()
    bench.vcpus[0].x86.id = 1 << 20
    assert entry_of(bench.touch(GFN)).cr2 == 0x1000


@pytest.mark.parametrize(("profile", "halts"), [("mainline", True), ("v7", False)])
def test_a_not_present_whose_word_cannot_be_written(profile: str, halts: bool) -> None:
    bench = swapped(profile=profile)
    bench.set_slots(Memslot(0, 2, 254, 2))
    entry = bench.touch(GFN)
    assert (entry is None) is halts
    assert bench.obs.counts[HostCounter.FAULTS_ASYNC] == 0
    if entry is not None:
        assert entry.inject == Inject.NONE
        assert bench.touch(GFN) is None, "the refault meets the hash"
    bench.serve()
    assert 0 in bench.entries


def test_v3_blocks_while_an_exception_is_pending() -> None:
    bench = swapped(profile="v3")
    assert bench.touch(GFN, pending=1) is None
    assert bench.obs.counts[HostCounter.FAULTS_ASYNC] == 0
