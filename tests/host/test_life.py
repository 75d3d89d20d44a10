"""Reset of a vCPU and of a machine, start-up, and CR0.PG (spec §1.16)."""

from __future__ import annotations

import pytest

from host import events as ev
from host.x86 import CANCEL_RESET
from proto import kvm
from proto.layout import APF_AREA_GPA
from proto.lives import Where
from proto.trace import Kind
from proto.wire import HC_RESET, ExitReason, Inject
from tests.host.harness import Bench

GFN = 40


def swapped(**options: object) -> Bench:
    """A booted bench whose page GFN lies on swap."""
    bench = Bench(**options)  # type: ignore[arg-type]
    for cpu in range(len(bench.vcpus)):
        bench.boot(cpu)
    bench.fill(GFN, 0xABCD)
    bench.swap_out(GFN)
    bench.obs.events.clear()
    return bench


def reset(bench: Bench, cpu: int = 0) -> None:
    bench.feed(bench.vcpus[cpu], ev.Reset(cpu))


def start(bench: Bench, cpu: int = 0) -> None:
    bench.feed(bench.vcpus[cpu], ev.Startup(cpu))


@pytest.mark.parametrize("profile", ["v3", "v7", "mainline"])
def test_reset_forgets_and_clears(profile: str) -> None:
    """T2c, I34."""
    bench = swapped(profile=profile)
    bench.touch(GFN)
    bench.exit()
    vcpu = bench.vcpus[0]
    assert vcpu.x86.apf.queued == 1
    reset(bench)
    assert bench.kicks, "a running vCPU is kicked out first"
    assert vcpu.x86.msr_en, "and is not reset while it executes"
    bench.exit()
    assert 0 not in bench.entries, "it waits for its start-up"
    assert (vcpu.x86.msr_en, vcpu.x86.msr_int, vcpu.x86.vector, vcpu.x86.apf.queued) == (0, 0, 0, 0)
    assert not vcpu.x86.apf.queue
    assert not vcpu.lapic.enabled
    assert [f["a"] for k, f in bench.obs.events if k == Kind.CANCEL] == [CANCEL_RESET]
    assert not vcpu.x86.pageready_pending
    start(bench)
    assert bench.entries[0].inject == Inject.RESET
    bench.serve()
    bench.exit(cpl=0, if_=0)
    assert bench.entries[0].inject == Inject.NONE, "no completion survives"
    assert bench.area(0, kvm.AREA_TOKEN) == 0


def test_after_a_reset_nothing_is_announced_until_it_is_enabled_again() -> None:
    bench = swapped()
    used = bench.vcpus[0].x86.id
    reset(bench)
    bench.exit()
    start(bench)
    assert bench.touch(GFN) is None, "off: a synthetic halt"
    assert bench.area(0, kvm.AREA_FLAGS) == 0
    assert bench.vcpus[0].x86.id > used, "the counter behind the tokens goes on (I2)"


def test_reset_of_a_vcpu_in_a_synthetic_halt() -> None:
    bench = swapped()
    assert bench.touch(GFN, cpl=0) is None
    reset(bench)
    vcpu = bench.vcpus[0]
    assert vcpu.mp_init
    assert not vcpu.halted
    assert vcpu.where is Where.BLOCKED
    start(bench)
    assert bench.entries[0].inject == Inject.RESET
    bench.serve()
    assert not vcpu.x86.apf.done


def test_reset_of_a_vcpu_that_is_held_for_a_page_waits_for_it() -> None:
    """The vCPU is in the middle of a blocking fault: KVM_RUN has not returned."""
    bench = swapped()
    assert bench.touch(GFN, if_=0) is None
    reset(bench)
    assert not bench.vcpus[0].mp_init
    bench.serve()
    assert bench.vcpus[0].mp_init


def test_a_queued_exception_does_not_survive_a_reset() -> None:
    bench = swapped()
    vcpu = bench.vcpus[0]
    vcpu.park_with(lambda step: step == "run.enter")
    bench.touch(GFN)
    assert vcpu.exception is not None
    vcpu.park_with(None)
    vcpu.requests |= 4
    for effect in vcpu.resume(0, bench.now):
        bench._perform(effect)
    bench.exit()
    start(bench)
    assert bench.entries[0].inject == Inject.RESET
    assert vcpu.exception is None


def test_interrupts_and_pokes_do_not_start_a_reset_vcpu() -> None:
    bench = swapped()
    reset(bench)
    bench.exit()
    bench.feed(bench.vcpus[0], ev.Interrupt(0, kvm.VECTOR_RESCHEDULE))
    bench.feed(bench.vcpus[0], ev.Poke(0))
    assert 0 not in bench.entries
    start(bench)
    assert bench.entries[0].irr == 0


def test_start_up_of_a_running_vcpu_is_ignored() -> None:
    bench = swapped()
    bench.exit()
    start(bench)
    assert bench.entries[0].inject == Inject.NONE


def test_one_cpu_stops_and_starts_another() -> None:
    bench = swapped(vcpus=2)
    bench.exit(1)
    bench.exit(0, ExitReason.IPI, arg0=1, arg1=kvm.ICR_INIT)
    bench.exit(1)
    assert 1 not in bench.entries
    bench.exit(0, ExitReason.IPI, arg0=1, arg1=kvm.ICR_STARTUP)
    assert bench.entries[1].inject == Inject.RESET
    assert bench.entries[0].inject == Inject.NONE


def test_a_start_up_that_overtakes_the_reset_is_kept() -> None:
    """Both arrive while the vCPU executes."""
    bench = swapped()
    bench.exit()
    reset(bench)
    start(bench)
    assert bench.entries[0].inject == Inject.NONE
    bench.exit()
    assert bench.entries[0].inject == Inject.RESET
    bench.exit()
    assert bench.entries[0].inject == Inject.NONE, "once"


def test_a_machine_is_reset_as_a_whole() -> None:
    """The first CPU starts when all others have stopped, and only it."""
    bench = swapped(vcpus=3)
    for cpu in (1, 2):
        bench.exit(cpu)
    bench.exit(0, ExitReason.HYPERCALL, cpl=0, if_=0, arg0=HC_RESET)
    assert 0 not in bench.entries
    bench.exit(1)
    assert 0 not in bench.entries
    bench.exit(2)
    assert bench.entries[0].inject == Inject.RESET
    assert 1 not in bench.entries
    assert 2 not in bench.entries
    assert bench.resets.done == [1]


def test_a_second_reset_while_one_is_under_way_is_the_same() -> None:
    bench = swapped(vcpus=2)
    bench.exit(1)
    bench.exit(0, ExitReason.HYPERCALL, arg0=HC_RESET)
    bench.feed(bench.vcpus[0], ev.Poke(0))
    bench.exit(1, ExitReason.HYPERCALL, arg0=HC_RESET)
    assert bench.entries[0].inject == Inject.RESET
    assert bench.resets.done == [1]


def test_a_vcpu_that_powers_down_does_not_hold_up_a_reset() -> None:
    bench = swapped(vcpus=2)
    bench.exit(1)
    bench.exit(0, ExitReason.HYPERCALL, arg0=HC_RESET)
    bench.exit(1, ExitReason.DONE)
    assert bench.entries[0].inject == Inject.RESET
    bench.exit(0, ExitReason.HYPERCALL, arg0=HC_RESET)
    assert bench.resets.done == [2], "and one that is off is none either"


# -- CR0.PG ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("profile", ["v7", "mainline"])
def test_paging_toggles_forget_nothing(profile: str) -> None:
    """BZ-03 is a bug, not a rule of any profile."""
    bench = swapped(profile=profile)
    bench.touch(GFN)
    bench.clear(0, kvm.AREA_FLAGS)
    for old in (1, 0):
        bench.exit(0, ExitReason.CR0, cpl=0, if_=0, cr0_pg=old, arg0=1 - old)
    assert bench.vcpus[0].x86.apf.queued == 1
    assert bench.obs.tokens(Kind.CANCEL) == []
    assert [(f["a"], f["b"]) for k, f in bench.obs.events if k == Kind.CR0_PG] == [(0, 1), (1, 0)]


@pytest.mark.parametrize(("profile", "requested"), [("mainline", True), ("v7", False)])
def test_switching_paging_on_looks_at_the_done_list(profile: str, requested: bool) -> None:
    """Recorded of mainline as REQ; mode E looks at every entry anyway."""
    bench = swapped(profile=profile)
    bench.exit(0, ExitReason.CR0, cpl=0, if_=0, cr0_pg=0, arg0=1)
    assert bool([1 for k, f in bench.obs.events if k == Kind.REQ and f["a"] == 2]) is requested


def test_switching_it_on_while_disabled_requests_nothing() -> None:
    bench = Bench()
    bench.boot(enable=False)
    bench.obs.events.clear()
    bench.exit(0, ExitReason.CR0, cpl=0, if_=0, cr0_pg=0, arg0=1)
    assert bench.obs.kinds(Kind.REQ) == []


def test_without_paging_the_guest_is_not_told() -> None:
    bench = swapped()
    bench.exit(0, ExitReason.CR0, cpl=0, if_=0, cr0_pg=1, arg0=0)
    assert bench.touch(GFN, cr0_pg=0) is None
    assert bench.memory.read32(int(bench.vm.frame_of[1]), APF_AREA_GPA & 0xFFF) == 0


def test_a_completion_after_v3_was_switched_off_does_not_keep_the_vcpu_from_halting() -> None:
    """BZ-28 leaves it on the done list, without a request."""
    bench = swapped(profile="v3")
    bench.touch(GFN)
    bench.serve()
    vcpu = bench.vcpus[0]
    assert vcpu.x86.apf.done
    vcpu.requests = 0
    bench.wrmsr(0, kvm.MSR_ASYNC_PF_EN_V3, 0)
    assert not vcpu.x86.apf.done
    bench.exit(0, ExitReason.HLT, cpl=0, if_=0)
    assert 0 not in bench.entries
