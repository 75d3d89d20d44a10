"""The x86 hooks of async PF for one vCPU (KVM: arch/x86/kvm/x86.c; spec §0.3, §3.1 to §3.4, §1.8 to §1.12).

MSRs, who may fault asynchronously, how not-present and ready are delivered. All differences between profiles come from
proto/profile.py; there is no other switch here.

Shared state with the run loop (host/vcpu.py): ``requests``, ``halted``, ``exception`` live there, because entry consumes them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NamedTuple

from host.async_pf import AsyncPf, Work
from host.events import STALE, Answer, Found, GuestRead32, GuestWrite32, Gup, Translate
from host.gfn_hash import GfnHash
from proto import kvm
from proto.layout import XF_WRITE
from proto.machine import Path
from proto.profile import Profile
from proto.stats import HostCounter, HostHist
from proto.trace import Kind
from proto.units import TOKEN_WAKE_ALL
from proto.wire import Exit, Inject

if TYPE_CHECKING:
    from host.vcpu import VcpuMachine

REQ_APF_HALT: Final = 1
REQ_APF_READY: Final = 2
REQ_RESET: Final = 4

DIRECT_MAP: Final = 1
"""Nested paging: one MMU context per guest, whatever CR3 holds."""
CANCEL_DISABLE: Final = 1
CANCEL_RESET: Final = 2
CANCEL_DESTROY: Final = 3
"""Why a work item was forgotten (trace field of CANCEL)."""


class AreaCache(NamedTuple):
    """The remembered translation of the shared area (KVM's gfn_to_hva cache): the page ``hvp`` (-1: not backed) is behind ``gpa`` in the
    slots of ``generation``. -1 = not translated yet.
    """

    gpa: int = 0
    hvp: int = -1
    generation: int = -1


class X86:
    """Async-PF state of one vCPU that belongs to the architecture (vcpu->arch.apf)."""

    __slots__ = (
        "apf", "area", "cpuid", "deferred", "hash", "host_async", "id", "m", "msr_en", "msr_int", "pageready_pending", "profile",
        "send_always", "vector",
    )  # fmt: skip

    def __init__(self, machine: VcpuMachine, profile: Profile, host_async: bool) -> None:
        self.m = machine
        self.profile = profile
        self.host_async = host_async
        """False in mode sync: the host never goes async."""
        self.apf = AsyncPf(machine.cpu, machine.vm, machine.vcpu_id, profile, self, machine.emit, machine.obs)
        self.hash = GfnHash(lambda kind, a, b, c: self.trace(kind, a=a, b=b, c=c))
        self.cpuid = profile.cpuid
        """Feature bits the guest sees; a restored guest keeps those it was saved with."""
        self.id = 0
        self.msr_en = 0
        self.msr_int = 0
        self.vector = 0
        self.area = AreaCache()
        self.send_always = False
        self.pageready_pending = False
        self.deferred: Work | None = None
        """v3: the one not-present event that was decided and not yet injected."""

    # -- predicates (spec §3.1) ----------------------------------------------------------------------------
    @property
    def enabled(self) -> bool:
        """PV async PF is enabled: all of the profile's bits are set."""
        return self.msr_en & self.profile.enabled_bits == self.profile.enabled_bits

    def interrupts_allowed(self) -> bool:
        """IF=1 and no STI/MOV-SS shadow, as of the last exit."""
        record = self.m.last_exit
        return bool(record.if_) and not record.shadow

    def can_do(self) -> bool:
        """Whether a fault of this vCPU may be handled asynchronously at all."""
        if not self.host_async:
            return False
        record = self.m.last_exit
        if self.profile.test_pending_exception and (record.pending or self.m.exception is not None):
            return False
        if not self.profile.host_halt:
            # v3 (spec §1.12): enabled, and either not at CPL 0 (IF is not looked at) or interrupts allowed.
            return self.enabled and (self.interrupts_allowed() if self.send_always else record.cpl != 0)
        return self.interrupts_allowed()

    def can_deliver(self) -> bool:
        """Whether the guest can be told of a missing page right now."""
        record = self.m.last_exit
        if not self.enabled or not (self.send_always or record.cpl != 0):
            return False
        return bool(record.cr0_pg) or not self.profile.test_paging

    # -- fault path ----------------------------------------------------------------------------------------
    def setup(self, record: Exit, hvp: int) -> Path:
        """kvm_arch_setup_async_pf: allocate the token, then queue (spec §0.5: the id is used up by every attempt)."""
        if self.profile.skip_token_zero and (self.id << 12) & 0xFFFF_FFFF == 0:
            self.id = 1
        token = kvm.make_token(self.id, self.m.vcpu_id)
        self.id = (self.id + 1) & 0xFFFF_FFFF
        work = Work(
            0,
            token,
            gpa=record.gpa,
            gva=record.gva,
            hvp=hvp,
            cr3=record.cr3,
            write=bool(record.flags & XF_WRITE),
        )
        work.started_ns = self.m.exit_ns
        return (yield from self.apf.setup(work))

    def not_present(self, work: Work) -> Path:
        """Announce the fault: shared word and #PF where it can be delivered, otherwise the synthetic halt."""
        self.apf.move(work, "announce")
        self.trace(Kind.ASYNC_PF_NOT_PRESENT, token=work.token, a=work.gpa, b=work.cr3, c=DIRECT_MAP)
        if self.profile.gfn_hash:
            self.hash.add(work.gfn)
        if self.profile.elide:
            self.deferred = work
            return
        if self.can_deliver():
            yield "not_present.deliverable"
            written = yield from self.write_area(kvm.AREA_FLAGS, kvm.REASON_NOT_PRESENT)
            if written:
                self.inject_pf(Inject.PF_NOT_PRESENT, work.token)
                work.announced = True
                self.m.obs.count(HostCounter.FAULTS_ASYNC)
                return
            if not self.profile.failed_write_halts:
                return
        self.m.request(REQ_APF_HALT)
        self.m.obs.count(HostCounter.FAULTS_HALT)

    def deliver_deferred(self) -> Path:
        """v3: just before entry, inject the decided event, or drop it when its page has come (spec §1.8)."""
        work, self.deferred = self.deferred, None
        if work is None:
            return False
        if work.arrived:
            yield from self.page_ready(work)
            self.apf.drop_done(work)
            return False
        yield "v3.inject"
        if (yield from self.write_area(kvm.AREA_FLAGS, kvm.REASON_NOT_PRESENT)):
            self.inject_pf(Inject.PF_NOT_PRESENT, work.token)
            work.announced = True
            self.m.obs.count(HostCounter.FAULTS_ASYNC)
            return True
        return False

    def inject_pf(self, kind: Inject, token: int) -> None:
        """Queue the #PF; entry injects it."""
        self.m.exception = (kind, token)
        self.trace(Kind.INJ, token=token, a=kind, b=token, c=self._state_bits())

    def _state_bits(self) -> int:
        record = self.m.last_exit
        return record.cpl | record.if_ << 2 | record.shadow << 3 | record.cr0_pg << 4 | record.pending << 5

    # -- ArchHooks of the core -----------------------------------------------------------------------------
    def present_queued(self) -> None:
        """The done list became non-empty: request READY, then kick unless a ready event is un-acknowledged (the order matters, I48)."""
        self.m.request(REQ_APF_READY)
        if not self.pageready_pending:
            self.m.kick(REQ_APF_READY)

    def can_dequeue(self) -> Path:
        """Mode I: LAPIC on and the token word is 0. Mode E: interrupts allowed, no exception queued or pending. Disabled: always."""
        if not self.enabled:
            return True
        if not self.profile.ready_by_interrupt:
            event = self.profile.test_pending_exception and self.m.last_exit.pending
            return self.interrupts_allowed() and self.m.exception is None and not event
        if not self.m.lapic.enabled:
            return False
        yield "can_dequeue.read"
        word = yield from self.read_area(kvm.AREA_TOKEN)
        if word == 0:
            self.trace(Kind.SLOT_READ0, a=kvm.AREA_TOKEN)
        return word == 0

    def page_ready(self, work: Work) -> Path:
        """Prefault: repeat the fault so that the woken task does not exit again (spec §1.9). Never starts anything (I18)."""
        if work.wakeup_all:
            return
        answer = yield from self.m.get_page(work.gfn, work.write, Gup.PREFAULT)
        self.m.obs.count(HostCounter.PREFAULTS)
        if answer.value < Found.NEEDS_IO:
            self.m.obs.record(HostHist.FAULT, self.m.now_ns - work.started_ns)
        self.trace(Kind.MMU, token=work.token, a=self.m.last_exit.cr3, b=DIRECT_MAP)
        self.trace(Kind.PREFAULT, token=work.token, a=work.gpa, b=work.gfn, c=answer.value)

    def page_present(self, work: Work) -> Path:
        """Hand the completion to the guest (spec §3.3)."""
        token = TOKEN_WAKE_ALL if work.wakeup_all else work.token
        if self.profile.gfn_hash and not work.wakeup_all:
            self.hash.remove(work.gfn)
        self.apf.move(work, "ready")
        self.trace(Kind.ASYNC_PF_READY, token=token, a=work.gpa, b=self.apf.queued)
        wanted = work.wakeup_all or work.announced or not self.profile.ready_needs_announced
        if wanted and self.enabled:
            yield "page_present.deliver"
            yield from self._deliver_ready(work, token)
        self.m.unhalt()

    def _deliver_ready(self, work: Work, token: int) -> Path:
        if self.profile.ready_by_interrupt:
            if (yield from self.write_area(kvm.AREA_TOKEN, token)):
                self.pageready_pending = True
                if self.m.lapic.raise_fixed(self.vector):
                    self.trace(Kind.APIC_ACCEPT_IRQ, token=token, a=self.vector)
        elif (yield from self.write_area(kvm.AREA_FLAGS, kvm.REASON_READY)):
            self.inject_pf(Inject.PF_READY, token)
        self.m.obs.count(HostCounter.BROADCASTS if work.wakeup_all else HostCounter.READY_SENT)

    # -- shared area ---------------------------------------------------------------------------------------
    def write_area(self, offset: int, value: int) -> Path:
        """Store a u32 of the guest's shared area; False when no memslot backs it. Held while the page is fetched, like any host access."""
        m = self.m
        answer = yield from self._access_area(
            lambda ask, area: GuestWrite32(
                m.cpu, ask, m.vm, area.gpa + offset, value, area.hvp, area.generation
            )
        )
        self.trace(Kind.AREA_CACHE, a=self.area.generation, b=answer.generation, c=answer.dirty)
        # The old word, all ones when nothing was written: what I15 and I24 are checked by.
        self.trace(
            Kind.SLOT_WRITE, token=value, a=offset, b=value, c=(answer.value - 1) & 0xFFFF_FFFF_FFFF_FFFF
        )
        return bool(answer.value)

    def read_area(self, offset: int) -> Path:
        """Load a u32 of the shared area; -1 when no memslot backs it."""
        m = self.m
        answer = yield from self._access_area(
            lambda ask, area: GuestRead32(m.cpu, ask, m.vm, area.gpa + offset, area.hvp, area.generation)
        )
        return answer.value

    def _access_area(self, request: Callable[[int, AreaCache], object]) -> Path:
        """Access the area through the remembered translation, made anew as often as the memslots have changed (spec §1.7, I32)."""
        while True:
            answer: Answer = yield from self.m.query(lambda ask: request(ask, self.area))
            if answer.value != STALE:
                return answer
            yield "area.stale"
            yield from self.translate_area(self.area.gpa)

    def translate_area(self, gpa: int) -> Path:
        """Remember what is behind ``gpa``. Page and generation come in one answer: the slots cannot change between the two (BZ-21)."""
        answer = yield from self.m.query(lambda ask: Translate(self.m.cpu, ask, self.m.vm, gpa >> 12))
        self.area = AreaCache(gpa, answer.hvp, answer.generation)

    # -- MSRs (table G of spec §0.3) -----------------------------------------------------------------------
    def write_msr(self, index: int, value: int) -> Path:
        """WRMSR by the guest or by who restores it; returns True when it is refused (a guest's faults, #GP)."""
        failed = True
        if index == self.profile.msr_en:
            failed = yield from self._write_en(value)
        elif index == kvm.MSR_X2APIC_SPIV:
            failed = False
            was = self.m.lapic.enabled
            self.m.lapic.spiv = value
            if self.m.lapic.enabled and not was:
                self.m.request(REQ_APF_READY)
        elif self.profile.ready_by_interrupt and index == kvm.MSR_ASYNC_PF_INT:
            failed = value >> 8 != 0
            if not failed:
                self.msr_int = value
                self.vector = value & 0xFF
        elif self.profile.ready_by_interrupt and index == kvm.MSR_ASYNC_PF_ACK:
            failed = False
            yield from self._ack(value)
        self.trace(Kind.MSR_WR, a=index, b=value, c=failed)
        return failed

    def read_msr(self, index: int) -> int:
        """RDMSR; -1 = #GP. ACK reads 0."""
        if index == self.profile.msr_en:
            return self.msr_en
        if index == kvm.MSR_X2APIC_SPIV:
            return self.m.lapic.spiv
        if self.profile.ready_by_interrupt:
            return {kvm.MSR_ASYNC_PF_INT: self.msr_int, kvm.MSR_ASYNC_PF_ACK: 0}.get(index, -1)
        return -1

    def _write_en(self, value: int) -> Path:
        """ASYNC_PF_EN. Reserved bits and missing CPUID bits are checked before the value is stored, the address after (the quirk)."""
        reserved = 0x30 if self.profile.ready_by_interrupt else 0x3C
        if value & reserved:
            return True
        if value & kvm.EN_AS_VMEXIT and not self.cpuid & kvm.CPUID_FEATURE_ASYNC_PF_VMEXIT:
            return True
        if value & kvm.EN_AS_INT and not self.cpuid & kvm.CPUID_FEATURE_ASYNC_PF_INT:
            return True
        self.msr_en = value
        if not self.enabled:
            self.disable()
            return False
        yield from self.translate_area(value & kvm.EN_ADDRESS)
        if self.area.hvp < 0:
            return True
        self.send_always = bool(value & kvm.EN_SEND_ALWAYS)
        yield "enable.area"
        self.apf.wakeup_all()
        return False

    def _ack(self, value: int) -> Path:
        """ASYNC_PF_ACK: only bit 0 counts. Pending is cleared before the done list is looked at (I48)."""
        if not value & 1:
            return
        self.pageready_pending = False
        self.trace(Kind.ACK, a=value)
        yield "ack.cleared"
        yield from self.apf.check_completion()

    def disable(self) -> None:
        """Disabling forgets everything; v3 only forgets where to write."""
        if self.profile.cancel_on_disable:
            self.forget(CANCEL_DISABLE)

    def reset(self) -> None:
        """Reset of the vCPU (spec §1.16): registers zero, nothing outstanding. The counter behind the tokens goes on (I2)."""
        self.forget(CANCEL_RESET)
        self.msr_en = 0
        self.msr_int = 0
        self.vector = 0
        self.send_always = False
        self.area = AreaCache()

    def paging_changed(self, was: int, now: int) -> None:
        """CR0.PG was written. Nothing is forgotten; where telling was held back by PG = 0 the done list is looked at again."""
        if now and not was and self.enabled and self.profile.paging_on_requests_ready:
            self.m.request(REQ_APF_READY)

    def forget(self, why: int) -> None:
        """Flush queue, done list and hash (I34)."""
        self.apf.clear(why)
        self.hash.clear()
        self.pageready_pending = False
        self.deferred = None

    def trace(self, kind: Kind, *, token: int = 0, a: int = 0, b: int = 0, c: int = 0) -> None:
        """A trace event of this vCPU."""
        self.m.obs.trace(kind, vcpu=self.m.vcpu_id, vm=self.m.vm, token=token, a=a, b=b, c=c)


def could_not_map(value: int) -> bool:
    """Whether an answer says that the guest can never have this page."""
    return value in (Found.NO_SLOT, Found.BAD)
