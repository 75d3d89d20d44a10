"""Bugs of the host's memory, swap and lifetime rules, shown on the hand-driven bench (tests/host/harness.py), step by step."""

from __future__ import annotations

from typing import Any, Final

from host import events as ev
from host.async_pf import AsyncPf, Work
from host.gfn_hash import EMPTY, GfnHash
from host.kernels import F_DIRTY, HPT_EVICT, HPT_READING, HPT_SLOT
from host.page_in import PageIn
from host.reclaim import Reclaim
from host.slots import Memslot
from host.state import MpState
from host.swap import SwapMachine
from host.vcpu import VcpuMachine
from host.waiters import Waiters
from proto import kvm
from proto.events import Kind
from proto.layout import APF_AREA_GPA, MODE_IN_GUEST, NPT_D, VP_STATE, XF_RESTART
from proto.lives import DaemonState, Halt
from proto.machine import MachineError
from proto.units import TOKEN_WAKE_ALL
from proto.wire import ExitReason, Inject
from tests.host.harness import WORDS, Bench
from tests.host.moving import pause, restore, resume, save
from tests.zoo.core import Bug, Patch, Trial
from tests.zoo.judge import as_array, broken
from tests.zoo.plan_bugs import plans, with_long_stays

GFN: Final = 40
OTHER: Final = 60
FIRST_WORD: Final = 7
STORE: Final = 1234
ANNOUNCED_MAX: Final = 256
"""As often as the checker lets one page be announced in a row."""


def evict(bench: Bench, gfn: int) -> None:
    """What reclaim does to a victim, up to the start of its grace period."""
    if bench.memory.unmap(0, gfn) & NPT_D:
        bench.vm.flags[gfn] |= F_DIRTY
    bench.vm.state[gfn] = HPT_EVICT
    bench.vm.reclaim.begin_grace(0, [gfn])


def outside(bench: Bench) -> None:
    """The vCPU is not executing and has flushed; the end of the grace is noticed."""
    bench.vcpu_pages[VP_STATE] = int(bench.vmc[0]) << 2
    bench.feed(bench.vm, ev.LookAtGrace())


def on_swap(gfn: int = GFN, **options: Any) -> Bench:
    """A booted vCPU and a page whose first word is FIRST_WORD on swap."""
    bench = Bench(**options)
    bench.boot()
    bench.fill(gfn, FIRST_WORD)
    evict(bench, gfn)
    outside(bench)
    bench.serve()
    if bench.vm.state[gfn] != HPT_SLOT:
        raise MachineError("the page did not go to swap")
    bench.obs.events.clear()
    return bench


def word(bench: Bench, gfn: int = GFN) -> int:
    """First word of the page as the guest sees it."""
    return int(bench.memory.frames[int(bench.vm.frame_of[gfn]) * WORDS])


def ready_tokens(bench: Bench) -> list[int]:
    """Tokens that the host wrote into the token word."""
    return [f["b"] for kind, f in bench.obs.events if kind == Kind.SLOT_WRITE and f["a"] == kvm.AREA_TOKEN]


# -- trials ----------------------------------------------------------------------------------------------------
def device_fails_for_ever() -> list[str]:
    """Every read of the page ends with an error: the guest must be told, not announced to again and again."""
    bench = on_swap()
    for _ in range(ANNOUNCED_MAX):
        entry = bench.touch(GFN)
        if entry is None or entry.inject == Inject.MACHINE_CHECK:
            return [] if entry is not None else ["stopped: the vCPU waits for a page that never comes"]
        bench.clear(0, kvm.AREA_FLAGS)
        bench.serve(ok=False)
        bench.exit()
        bench.take_ready()
    return ["I50", f"the page was announced {ANNOUNCED_MAX} times"]


def saved_in_a_synthetic_halt() -> list[str]:
    """Saved while a fault holds a vCPU whose guest knows nothing of async PF; restored into a fresh host."""
    bench = Bench()
    bench.boot(enable=False)
    bench.fill(GFN, FIRST_WORD)
    evict(bench, GFN)
    outside(bench)
    bench.serve()
    if bench.touch(GFN, flags=XF_RESTART) is not None:
        return ["the vCPU was not held"]
    pause(bench)
    image = save(bench)
    found = ["I37"] if bench.vcpus[0].state().mp_state != MpState.RUNNABLE else []
    fresh = restore(image)
    resume(fresh)
    return found if 0 in fresh.entries else [*found, "I47"]


def removes_a_stranger() -> list[str]:
    """Two pages with one home slot; the first one is removed twice."""
    first = GFN
    home = GfnHash.home(first)
    second = next(gfn for gfn in range(first + 1, first + 10_000) if GfnHash.home(gfn) == home)
    table = GfnHash()
    table.add(first)
    table.remove(first)
    table.add(second)
    table.remove(first)
    return [] if second in table else ["I6", "the page that is being fetched is not in the hash"]


def completion_after_power_down() -> list[str]:
    """The vCPU goes while a fetch is under way; the page comes afterwards."""
    bench = on_swap()
    bench.touch(GFN)
    bench.exit(reason=ExitReason.DONE)
    bench.serve()
    if not bench.vcpus[0].x86.apf.done:
        # A worker that was already under way when it was cancelled.
        bench.feed(bench.vcpus[0], ev.Fetched(0, 1))
    rows = [(n, f["vcpu"], kind, {"token": f["token"], "a": f["a"], "b": f["b"], "c": f["c"]})
            for n, (kind, f) in enumerate(bench.obs.events) if 0 < kind < 64]  # fmt: skip
    found = broken("mainline", as_array(rows), cut="these events begin after the guest enabled async PF")
    return [one for one in found if one == "I46"]


def daemon_dies_and_comes_back() -> list[str]:
    """The daemon that reads the page is killed, fenced and started again."""
    bench = on_swap()
    entry = bench.touch(GFN)
    token = entry.cr2 if entry is not None else 0
    bench.io.clear()
    bench.feed(bench.swap, ev.DaemonLost(0, 0))
    bench.feed(bench.swap, ev.DaemonFenced(0, 0))
    bench.feed(bench.swap, ev.DaemonUp(0, 1))
    bench.serve()
    bench.exit()
    return [] if token in ready_tokens(bench) else ["I47", "the task that was told sleeps for ever"]


def old_daemon_writes_late() -> list[str]:
    """A killed daemon's read may land until the fence. Whoever starts its successor before that must be refused."""
    bench = on_swap()
    bench.touch(GFN)
    late = bench.io.pop()
    bytes_of_old = bench.disk[late.slot]
    bench.feed(bench.swap, ev.DaemonLost(0, 0))
    try:
        bench.feed(bench.swap, ev.DaemonUp(0, 1))
        fenced = False
    except MachineError:
        fenced = True
        bench.memory.write_page(late.frame, bytes_of_old)
        bench.feed(bench.swap, ev.DaemonFenced(0, 0))
        bench.feed(bench.swap, ev.DaemonUp(0, 1))
    bench.serve()
    if bench.vm.state[GFN] == HPT_READING:
        return ["the page did not come"]
    bench.memory.frames[int(bench.vm.frame_of[GFN]) * WORDS] = STORE
    if not fenced:
        bench.memory.write_page(late.frame, bytes_of_old)
    return [] if word(bench) == STORE else ["bytes: the guest's store is overwritten by the dead daemon"]


def store_in_the_grace_period() -> list[str]:
    """A vCPU in guest mode stores through its old translation until it has flushed."""
    bench = Bench()
    bench.boot()
    bench.fill(GFN, FIRST_WORD)
    frame = int(bench.vm.frame_of[GFN])
    bench.vcpu_pages[VP_STATE] = int(bench.vmc[0]) << 2 | MODE_IN_GUEST
    evict(bench, GFN)
    bench.feed(bench.vm, ev.LookAtGrace())
    bench.serve()
    bench.memory.frames[frame * WORDS] = STORE
    bench.exit()
    outside(bench)
    bench.serve()
    bench.touch(GFN)
    bench.serve()
    return [] if word(bench) == STORE else ["bytes: a store before the flush is lost"]


def fetch_cancelled_while_the_device_writes() -> list[str]:
    """Async PF is disabled while a read is under way; another page wants a frame at once."""
    bench = on_swap()
    bench.touch(GFN)
    read = bench.io.pop()
    bench.wrmsr(0, kvm.MSR_ASYNC_PF_EN, 0)
    bench.touch(OTHER)
    bench.memory.frames[int(bench.vm.frame_of[OTHER]) * WORDS] = STORE
    bench.complete(read)
    return [] if word(bench, OTHER) == STORE else ["bytes: the read landed in a page of somebody else"]


def broadcast_behind_a_halt() -> list[str]:
    """Sleepers came with a saved guest. A halt-mode fault completes while the restore's EN write is under way."""
    bench = on_swap()
    vcpu = bench.vcpus[0]
    bench.wrmsr(0, kvm.MSR_ASYNC_PF_EN, 0)
    bench.touch(GFN, cpl=0)
    bench.feed(vcpu, ev.Interrupt(0, kvm.VECTOR_TIMER))
    bench.obs.events.clear()
    vcpu.park_with(lambda step: step == "enable.area")
    bench.exit(reason=ExitReason.WRMSR, cpl=0, if_=0, arg0=kvm.MSR_ASYNC_PF_EN, arg1=APF_AREA_GPA | bench.profile.enabled_bits,
               accepted=kvm.VECTOR_TIMER, eois=1)  # fmt: skip
    if not vcpu.parked:
        return ["the write did not rest"]
    bench.serve()
    vcpu.park_with(None)
    for effect in vcpu.resume(0, bench.now):
        bench._perform(effect)
    bench.route()
    bench.exit()
    return (
        []
        if TOKEN_WAKE_ALL in ready_tokens(bench)
        else ["I47", "no broadcast: the restored sleepers sleep for ever"]
    )


def area_without_memory() -> list[str]:
    """The memslot under the shared area goes while a completion is on its way, and comes back."""
    bench = on_swap()
    vcpu = bench.vcpus[0]
    entry = bench.touch(GFN)
    token = entry.cr2 if entry is not None else 0
    bench.clear(0, kvm.AREA_FLAGS)
    bench.serve()
    vcpu.park_with(lambda step: step == "page_present.deliver")
    bench.exit()
    whole = bench.vm.slots.of_vm(0)
    first = (APF_AREA_GPA >> 12) + 1
    bench.set_slots(Memslot(0, first, len(bench.vm.state) - first, first))
    vcpu.park_with(None)
    for effect in vcpu.resume(0, bench.now):
        bench._perform(effect)
    bench.route()
    bench.set_slots(*whole)
    for _ in range(4):
        bench.exit()
    return [] if bench.area(0, kvm.AREA_TOKEN) == token else ["I47", "the ready event is gone with its item"]


# -- bugs ------------------------------------------------------------------------------------------------------
def bad_read_is_forgotten(self: PageIn, hvp: int) -> None:
    """The worker ignores the error and says that it has fetched; the page is still on swap."""
    vm = self._m
    vm.state[hvp] = HPT_SLOT
    vm.frames.give(int(vm.frame_of[hvp]))
    vm.frame_of[hvp] = -1
    for waiter in vm.waiters._pages.pop(hvp, ()):
        vm.emit(ev.Fetched(waiter.cpu, waiter.work))


def halt_in_mp_state(original: Any) -> Any:
    def block(self: VcpuMachine) -> None:
        self.halt = Halt.HLT if self.halted else self.halt
        original(self)

    return block


def removes_the_home_slot(self: GfnHash, gfn: int) -> bool:
    slot = self._find(gfn)
    self.slots[slot if slot >= 0 else self.home(gfn)] = EMPTY
    return True


def destroys_without_cancelling(self: AsyncPf, why: int) -> None:
    for work in self.queue.values():
        self._trace(Kind.CANCEL, work, a=why, b=work.gfn)


def loses_requests(self: SwapMachine, event: ev.DaemonFenced) -> None:
    daemon = self.daemons[event.daemon]
    daemon.state = DaemonState.FENCED
    daemon.out.clear()


def takes_death_for_a_fence(original: Any) -> Any:
    def lost(self: SwapMachine, event: ev.DaemonLost) -> None:
        original(self, event)
        self._daemon_fenced(ev.DaemonFenced(event.daemon, event.epoch))

    return lost


def no_grace(self: Reclaim) -> None:
    for queue in self._unmapped:
        while queue:
            victim = queue.popleft()
            self.in_grace -= 1
            if self._m.state[victim.hvp] == HPT_EVICT:
                self._m.page_out.evicted(victim.hvp)


def frees_the_landing_frame(original: Any) -> Any:
    def cancel(self: Waiters, event: ev.CancelFetch) -> None:
        original(self, event)
        vm = self._m
        if vm.state[event.hvp] == HPT_READING:
            vm.state[event.hvp] = HPT_SLOT
            vm.frames.give(int(vm.frame_of[event.hvp]))
            vm.frame_of[event.hvp] = -1

    return cancel


def always_broadcasts(self: AsyncPf) -> None:
    self.done.append(Work(0, TOKEN_WAKE_ALL))
    self.queued += 1
    self._arch.present_queued()


BUGS: Final = (
    Bug("BZ-12", "destroying a vCPU does not end its workers", "2.6.38 to 6.9", "mainline", ("I46",),
        (Patch(AsyncPf, "clear", destroys_without_cancelling),),
        (Trial("steps a page comes after power-down", completion_after_power_down),)),
    Bug("BZ-18", "an error of the fetch is ignored", "Linux, unresolved", "mainline", ("I50",),
        (Patch(PageIn, "_poison", bad_read_is_forgotten),),
        (Trial("steps the device fails for ever", device_fails_for_ever),)),
    Bug("BZ-25", "the synthetic halt is kept in the saved run state", "v6 (review)", "mainline", ("I37", "I47"),
        (Patch(VcpuMachine, "_block", halt_in_mp_state(VcpuMachine._block)),),
        (Trial("steps saved in a halt, restored in a fresh host", saved_in_a_synthetic_halt),)),
    Bug("BZ-32", "deleting an absent gfn empties its home slot", "2.6.38", "v7", ("I6",),
        (Patch(GfnHash, "remove", removes_the_home_slot),), (Trial("steps two pages with one home slot", removes_a_stranger),)),
    Bug("D-03", "what a lost daemon was asked is not asked again", "distributed", "mainline", ("I47",),
        (Patch(SwapMachine, "_daemon_fenced", loses_requests),),
        (Trial("steps the daemon dies during a read", daemon_dies_and_comes_back),)),
    Bug("D-04", "no fence after a kill", "of our own making", "mainline", (),
        (Patch(SwapMachine, "_daemon_lost", takes_death_for_a_fence(SwapMachine._daemon_lost)),),
        (Trial("steps the dead daemon's read lands late", old_daemon_writes_late),)),
    Bug("D-05", "write-back without grace (stale translation)", "of our own making", "mainline", (),
        (Patch(Reclaim, "advance_grace", no_grace),), (Trial("steps a store before the flush", store_in_the_grace_period),
         plans("with long stays", with_long_stays))),
    Bug("D-06", "a landing frame is used again too early", "of our own making", "mainline", (),
        (Patch(Waiters, "cancel_fetch", frees_the_landing_frame(Waiters.cancel_fetch)),),
        (Trial("steps a cancelled fetch lands", fetch_cancelled_while_the_device_writes),)),
)  # fmt: skip

AS_IN_KVM: Final = (
    Bug("BZ-34", "the broadcast is left out when something is done already", "Linux to this day, found by reading", "mainline",
        ("I47",), (Patch(AsyncPf, "wakeup_all", always_broadcasts),),
        (Trial("steps a halt-mode fault completes during the restore's EN write", broadcast_behind_a_halt),)),
    Bug("BZ-45", "ready is lost when the shared area cannot be written", "Linux to this day, found by reading", "mainline",
        ("I47",), (), (Trial("steps the memslot under the area goes", area_without_memory),)),
)  # fmt: skip
"""KVM does this and so does the emulator: the code as it is must be complained of. ``changes`` repair it, where that is small."""
