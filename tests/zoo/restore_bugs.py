"""Bugs of VMMs that restore a guest: what is left out, and what comes too early. Shown on hand-driven machines (tests/host/moving.py).

Every trial saves a VM whose tasks sleep, restores it into a fresh host and looks whether the broadcast reaches every vCPU.
"""

from __future__ import annotations

from typing import Any, Final

from host import state
from host.async_pf import AsyncPf
from host.state import VcpuState
from host.vcpu import VcpuMachine
from host.x86 import X86
from proto import kvm
from proto.events import Kind
from proto.layout import XF_IF, XF_RESTART, XF_WRITE
from proto.machine import Path
from proto.profile import Profile
from proto.units import TOKEN_WAKE_ALL
from proto.wire import Inject
from tests.host.harness import Bench
from tests.host.moving import let_stop, pause, refusals, restore, resume, save
from tests.zoo.bench_bugs import GFN, evict
from tests.zoo.core import Bug, Patch, Trial

VCPUS: Final = 2
LOOKS: Final = 4
"""Exits of a vCPU that nothing else happens to: enough for a broadcast that waits for the next one."""


def asleep(profile: str = "mainline") -> Bench:
    """Two vCPUs that were each told of a missing page, took note, and run on."""
    bench = Bench(vcpus=VCPUS, profile=profile)
    for cpu in range(VCPUS):
        bench.boot(cpu)
    for cpu in range(VCPUS):
        bench.fill(GFN + cpu, cpu + 1)
        evict(bench, GFN + cpu)
        bench.settle()
    for cpu in range(VCPUS):
        bench.touch(GFN + cpu, cpu)
        bench.clear(cpu, kvm.AREA_FLAGS)
    return bench


def moved(bench: Bench) -> tuple[Bench, list[str]]:
    """The VM in a fresh host, its vCPUs entered once; what was refused."""
    pause(bench)
    for cpu in range(VCPUS):
        let_stop(bench, cpu)
    fresh = restore(save(bench), profile=bench.profile.name)
    for cpu in range(VCPUS):
        resume(fresh, cpu)
    return fresh, refusals(fresh)


def every_vcpu_gets_its_broadcast() -> list[str]:
    """Saved with a sleeper on each vCPU; the guest's handler takes what the vector it chose brings."""
    fresh, refused = moved(asleep())
    found = [f"refused: {text}" for text in refused]
    for cpu in range(VCPUS):
        vectors = {
            f["a"] for kind, f in fresh.obs.events if kind == Kind.APIC_ACCEPT_IRQ and f["vcpu"] == cpu
        }
        written = fresh.area(cpu, kvm.AREA_TOKEN)
        if written and vectors != {kvm.VECTOR_PAGE_READY}:
            found.append("I26")
        if not _woken(fresh, cpu):
            found += ["I43", "I47", f"the sleepers of vCPU {cpu} sleep for ever"]
    return found


def _woken(fresh: Bench, cpu: int) -> bool:
    """Whether the broadcast's interrupt reaches the guest within a few exits."""
    for _ in range(LOOKS):
        if fresh.entries[cpu].irr == kvm.VECTOR_PAGE_READY:
            return fresh.area(cpu, kvm.AREA_TOKEN) == TOKEN_WAKE_ALL
        fresh.exit(cpu)
    return False


def tokens_after_a_move() -> list[str]:
    """Mode E, saved with a not-present event pending; the next fault comes before the broadcast can."""
    bench = Bench(profile="v7")
    bench.boot()
    for k, gfn in enumerate((GFN, GFN + 1, GFN + 2)):
        bench.fill(gfn, k + 1)
        evict(bench, gfn)
        bench.settle()
    first = bench.touch(GFN)
    bench.clear(0, kvm.AREA_FLAGS)
    pause(bench)
    bench.touch(GFN + 1, flags=XF_RESTART | XF_IF | XF_WRITE)
    fresh = restore(save(bench), profile="v7")
    for gfn in (GFN, GFN + 1, GFN + 2):
        evict(fresh, gfn)
        fresh.settle()
    resume(fresh)
    pending = fresh.entries[0]
    fresh.clear(0, kvm.AREA_FLAGS)
    late = fresh.touch(GFN + 2)
    if first is None or late is None or late.inject != Inject.PF_NOT_PRESENT:
        return ["the steps did not lead there"]
    return ["I1", "I39"] if late.cr2 in (first.cr2, pending.cr2) else []


# -- bugs ------------------------------------------------------------------------------------------------------
def lists_enable_only(profile: Profile) -> tuple[int, ...]:
    """The VMM's list of MSRs lacks INT and ACK."""
    return (profile.msr_en,)


def enables_the_first_vcpu_only(original: Any) -> Any:
    def part(m: VcpuMachine, saved: VcpuState) -> Path:
        if m.vcpu_id == 0:
            return (yield from original(m, saved))
        return ""

    return part


def runs_before_the_lapic(original: Any) -> Any:
    """After its MSRs the vCPU is let run; the LAPIC's page is copied in afterwards, and a copy asks for nothing."""

    def part(m: VcpuMachine, saved: VcpuState) -> Path:
        refused = yield from original(m, saved)
        yield from m._completions()
        m.lapic.irr, m.lapic.isr, m.lapic.spiv = set(saved.irr), list(saved.isr), saved.spiv
        return refused

    return part


def no_lapic_test(self: X86) -> Path:
    """Hosts of 5.8 to 5.12 (BZ-02)."""
    yield "can_dequeue.read"
    return (yield from self.read_area(kvm.AREA_TOKEN)) == 0


def without_id(original: Any) -> Any:
    def part(m: VcpuMachine, saved: VcpuState) -> Path:
        refused = yield from original(m, saved)
        m.x86.id = 0
        return refused

    return part


def never_broadcasts(self: AsyncPf) -> None:
    """Enabling after a move tells nobody."""


PARTS: Final = dict(state._PARTS)
LATE_LAPIC: Final = {name: PARTS[name] for name in ("cpuid", "int", "en")} | {
    "events": runs_before_the_lapic(PARTS["events"])
}
BROADCAST: Final = Trial(
    "steps a saved VM with sleepers goes on in a fresh host", every_vcpu_gets_its_broadcast
)

BUGS: Final = (
    Bug("BZ-29A", "the snapshot lacks INT", "VMMs (firecracker #5738)", "mainline", ("I26", "I47"),
        (Patch(state, "save_list", lists_enable_only),), (BROADCAST,)),
    Bug("BZ-29B", "EN is restored before the LAPIC, and the vCPU runs in between", "VMMs, on hosts before 5.13", "mainline",
        ("I26", "I47"),
        (Patch(state, "RESTORE_ORDER", tuple(LATE_LAPIC)), Patch(state, "_PARTS", LATE_LAPIC),
         Patch(X86, "can_dequeue", no_lapic_test)), (BROADCAST,)),
    Bug("BZ-29C", "EN is not restored on one vCPU", "VMMs (firecracker #3020)", "mainline", ("I43", "I47"),
        (Patch(state, "_PARTS", {**PARTS, "en": enables_the_first_vcpu_only(PARTS["en"])}),), (BROADCAST,)),
    Bug("D-10", "enabling after a move does not broadcast", "of our own making", "mainline", ("I43", "I47"),
        (Patch(AsyncPf, "wakeup_all", never_broadcasts),), (BROADCAST,)),
    Bug("D-09", "tokens begin again at 0 after a move", "KVM to this day, found by reading", "v7", ("I1", "I39"),
        (Patch(state, "_PARTS", {**PARTS, "events": without_id(PARTS["events"])}),),
        (Trial("steps a fault between a pending exception and the broadcast", tokens_after_a_move),)),
)  # fmt: skip
