"""The host's machines wired together without a process: a hand-driven vCPU, a pretend device, virtual time.

`Bench` routes events exactly as the shell does. Reads and writes stay in `reads`/`writes` until a test completes them, so a test
decides every interleaving.
"""

from __future__ import annotations

from collections import Counter, deque
from typing import Any

import numpy as np

from host import events as ev
from host.copies import SLOTS_PER_DAEMON
from host.machine_reset import MachineReset, from_command
from host.memory import HostMemory, VmMemory
from host.notices import notices
from host.slots import Memslot, Region
from host.swap import SwapMachine
from host.vcpu import VcpuMachine
from host.vm import Limits, VmMachine
from proto import kvm
from proto.image import Content
from proto.layout import APF_AREA_GPA, MODE_IN_GUEST, VP_STATE, XF_IF, XF_WRITE, npt_tables
from proto.profile import PROFILES
from proto.stats import HostCounter, HostHist
from proto.trace import Kind
from proto.units import PAGE_SIZE
from proto.wire import OP_READ, Entry, Exit, ExitReason

WORDS = 512


class Recorder:
    """Observer that keeps everything."""

    def __init__(self) -> None:
        self.counts: Counter[HostCounter] = Counter()
        self.gauges: dict[HostCounter, int] = {}
        self.events: list[tuple[Kind, dict[str, int]]] = []
        self.latencies: list[tuple[HostHist, int]] = []

    def count(self, counter: HostCounter, n: int = 1) -> None:
        self.counts[counter] += n

    def gauge(self, counter: HostCounter, value: int) -> None:
        self.gauges[counter] = value

    def record(self, hist: HostHist, value_ns: int) -> None:
        self.latencies.append((hist, value_ns))

    def trace(
        self, kind: Kind, *, vcpu: int = 0, vm: int = 0, token: int = 0, a: int = 0, b: int = 0, c: int = 0
    ) -> None:
        self.events.append((kind, {"vcpu": vcpu, "vm": vm, "token": token, "a": a, "b": b, "c": c}))

    def kinds(self, *wanted: Kind) -> list[Kind]:
        return [k for k, _ in self.events if not wanted or k in wanted]

    def tokens(self, kind: Kind) -> list[int]:
        return [fields["token"] for k, fields in self.events if k == kind]


class Bench:
    """One VM. See the module docstring."""

    def __init__(
        self,
        *,
        profile: str = "mainline",
        host_async: bool = True,
        pages: int = 256,
        frames: int = 128,
        vcpus: int = 1,
        slots: int = 512,
        spare: int = 0,
        low: int = 8,
        high: int = 24,
        populate: int = 1,
        zero_pages: bool = True,
        reserve: int = 0,
        least: int = 1,
        vcpu_ids: tuple[int, ...] = (),
        daemons: int = 1,
        replicas: int = 1,
        hedge_ns: int = 0,
    ) -> None:
        self.obs = Recorder()
        self.vcpu_pages = np.zeros(vcpus * WORDS, np.uint64)
        self.vmc = np.zeros(WORDS, np.uint64)
        npt = np.zeros(npt_tables(pages) * 512, np.uint64)
        self.memory = HostMemory(
            np.zeros(frames * WORDS, np.uint64), self.vcpu_pages, [VmMemory(npt, self.vmc, 0, vcpus)]
        )
        limits = Limits(low, high, populate, zero_pages, reserve, least)
        self.vm = VmMachine(
            self.memory, [Memslot(0, 0, pages, 0)], limits, self.obs, [Region(0, 0, pages + spare)]
        )
        self.swap = SwapMachine([slots] * daemons, self.obs, replicas, hedge_ns)
        ids = vcpu_ids or tuple(range(vcpus))
        self.vcpus = [
            VcpuMachine(cpu, 0, ids[cpu], PROFILES[profile], host_async, self.obs) for cpu in range(vcpus)
        ]
        self.profile = PROFILES[profile]
        self.resets = MachineReset([range(vcpus)])
        self.layouts: list[ev.MemslotsSet] = []
        self.now = 1_000_000
        self.routed: deque[tuple[Any, Any]] = deque()
        self.entries: dict[int, Entry] = {}
        self.kicks: list[int] = []
        self.timers: list[ev.SetTimer] = []
        self.io: list[ev.SendIo] = []
        self.disk: dict[int, bytes] = {}
        """By daemon * SLOTS_PER_DAEMON + block."""
        self.seq = 0
        self.out_of_memory = 0
        self.notices: list[ev.MemoryShort] = []
        self.image: dict[int, tuple[Content, bytes]] = {}
        """Pages saved so far (tests/host/moving.py)."""
        self.told: list[Any] = []
        """Answers about pausing, restoring and pages of an image; pages that are lost."""
        for daemon in range(daemons):
            self.feed(self.swap, ev.DaemonUp(daemon, 0))

    # -- routing -------------------------------------------------------------------------------------------
    def feed(self, machine: Any, event: Any) -> None:
        self.routed.append((machine, event))
        self.route()

    def route(self) -> None:
        steps = 0
        while self.routed:
            steps += 1
            assert steps < 100_000, "machines talk to each other for ever"
            machine, event = self.routed.popleft()
            for effect in machine.on((event,), self.now):
                self._perform(effect)

    def _perform(self, effect: Any) -> None:
        kind = type(effect)
        if kind is ev.Enter:
            assert effect.cpu not in self.entries, "entered twice"
            self.entries[effect.cpu] = effect.record
            self.vcpu_pages[effect.cpu * WORDS + VP_STATE] = (int(self.vmc[0]) << 2) | MODE_IN_GUEST
        elif kind is ev.KickVcpu:
            self.kicks.append(effect.cpu)
        elif kind is ev.SetTimer:
            self.timers.append(effect)
        elif kind is ev.SendIo:
            self.io.append(effect)
        elif kind in (ev.ResetMachine, ev.WasReset, ev.MemslotsSet):
            self._change(effect)
        elif kind in (ev.Answer, ev.Fetched):
            self.routed.append((self.vcpus[effect.cpu], effect))
        elif kind in (ev.SwapIn, ev.SwapInBad, ev.SwapOut, ev.SlotFree, ev.FrameLent, ev.CancelRead):
            self.routed.append((self.swap, effect))
        elif kind is ev.SendIpi:
            self.routed.append((self.vcpus[effect.target], from_command(effect.target, effect.vector)))
        elif kind in (ev.OutOfMemory, ev.MemoryShort):
            self._short(effect)
        elif kind in (ev.Paused, ev.Restored, ev.PageSaved, ev.PageLoaded, ev.PagesLost):
            self.told.append(effect)
        elif kind not in (ev.PoweredDown, ev.AtBarrier):
            self.routed.append((self.vm, effect))

    def _short(self, effect: Any) -> None:
        """Memory is short, or there is none."""
        if type(effect) is ev.OutOfMemory:
            self.out_of_memory += 1
            return
        self.notices.append(effect)
        for event in notices(effect, self.vcpus):
            lost = type(event) is ev.NoticeLost
            self.routed.append((self.vm if lost else self.vcpus[event.cpu], event))

    def _change(self, effect: Any) -> None:
        """Resets, and memslots that are in force."""
        if type(effect) is ev.MemslotsSet:
            self.layouts.append(effect)
            return
        told: Any = (
            self.resets.begin(effect.vm, effect.cpu)
            if type(effect) is ev.ResetMachine
            else self.resets.was_reset(effect.cpu)
        )
        self.routed.extend((self.vcpus[event.cpu], event) for event in told)

    def set_slots(self, *slots: Memslot, moves: tuple[tuple[int, int, int], ...] = ()) -> None:
        """Set a layout; it is in force when every vCPU has flushed."""
        self.feed(self.vm, ev.SetMemslots(0, slots, moves))

    # -- the vCPU ------------------------------------------------------------------------------------------
    def exit(self, cpu: int = 0, reason: ExitReason = ExitReason.KICK, **fields: int) -> None:
        """Leave guest mode; the entry, if there is one, is in `entries`."""
        self.entries.pop(cpu, None)
        self.vcpu_pages[cpu * WORDS + VP_STATE] = int(self.vmc[0]) << 2
        self.seq += 1
        base = Exit(self.seq, 0, reason, 0, 3, 1, 0, 0, 1, 0, 0, 0x5000, 0, 0, 0, 0, 0, 0)
        self.feed(self.vcpus[cpu], ev.ExitTaken(base._replace(**fields)))

    def boot(self, cpu: int = 0, *, enable: bool = True, send_always: bool = False) -> None:
        """Boot, LAPIC on, async PF enabled as the profile's guest does it; the wake-all is acknowledged."""
        self.exit(cpu, ExitReason.BOOT, cpl=0, if_=0)
        self.wrmsr(cpu, kvm.MSR_X2APIC_SPIV, 0x1FF)
        if not enable:
            return
        area = APF_AREA_GPA + 64 * cpu
        extra = kvm.EN_SEND_ALWAYS if send_always else 0
        if self.profile.ready_by_interrupt:
            self.wrmsr(cpu, kvm.MSR_ASYNC_PF_INT, kvm.VECTOR_PAGE_READY)
        self.wrmsr(cpu, self.profile.msr_en, area | self.profile.enabled_bits | extra)
        self.exit(cpu)
        if self.profile.ready_by_interrupt:
            self.take_ready(cpu)

    def wrmsr(self, cpu: int, index: int, value: int, **fields: int) -> Entry:
        self.exit(cpu, ExitReason.WRMSR, **{"cpl": 0, "if_": 0, **fields, "arg0": index, "arg1": value})
        return self.entries[cpu]

    def touch(self, gfn: int, cpu: int = 0, *, write: int = 1, **fields: int) -> Entry | None:
        """A nested fault on ``gfn``; None while the vCPU is held."""
        flags = XF_WRITE * bool(write) | XF_IF
        self.exit(cpu, ExitReason.NESTED, **{"gpa": gfn << 12, "gva": gfn << 12, "flags": flags, **fields})
        return self.entries.get(cpu)

    def area(self, cpu: int, offset: int) -> int:
        gpa = APF_AREA_GPA + 64 * cpu + offset
        hvp = self.vm.find_hvp(0, gpa >> 12)
        return self.memory.read32(int(self.vm.frame_of[hvp]), gpa & 0xFFF)

    def clear(self, cpu: int, offset: int) -> None:
        gpa = APF_AREA_GPA + 64 * cpu + offset
        hvp = self.vm.find_hvp(0, gpa >> 12)
        self.memory.write32(int(self.vm.frame_of[hvp]), gpa & 0xFFF, 0)

    def take_ready(self, cpu: int = 0) -> int:
        """The guest's page-ready handler: accept, EOI, read, clear, ACK. Returns the token."""
        token = self.area(cpu, kvm.AREA_TOKEN)
        self.clear(cpu, kvm.AREA_TOKEN)
        self.wrmsr(cpu, kvm.MSR_ASYNC_PF_ACK, 1, accepted=kvm.VECTOR_PAGE_READY, eois=1)
        return token

    # -- the device ----------------------------------------------------------------------------------------
    def serve(self, count: int = 1 << 30, *, ok: bool = True) -> int:
        """Complete up to ``count`` requests, oldest first; returns how many."""
        served = 0
        while self.io and served < count:
            self.complete(self.io.pop(0), ok=ok)
            served += 1
        return served

    def complete(self, request: ev.SendIo, *, ok: bool = True) -> None:
        if ok and request.op == OP_READ:
            self.memory.write_page(request.frame, self.disk[request.daemon * SLOTS_PER_DAEMON + request.slot])
        elif ok:
            self.disk[request.daemon * SLOTS_PER_DAEMON + request.slot] = bytes(
                self.memory.page(request.frame)
            )
        result = PAGE_SIZE if ok else -5
        self.feed(self.swap, ev.IoReply(request.daemon, request.epoch, request.request, result, 1000))

    # -- helpers -------------------------------------------------------------------------------------------
    def fill(self, gfn: int, word: int) -> None:
        """Make a page resident with a recognisable first word, written by the guest (dirty)."""
        self.touch(gfn)
        self.settle()
        hvp = self.vm.find_hvp(0, gfn)
        frame = int(self.vm.frame_of[hvp])
        self.memory.frames[frame * WORDS] = word
        self.vm.flags[hvp] |= 1

    def settle(self) -> None:
        """Let every grace period end and every request be served."""
        for _ in range(200):
            self.vcpu_pages[::WORDS] = int(self.vmc[0]) << 2
            self.feed(self.vm, ev.LookAtGrace())
            if not self.serve() and not self.vm.grace_pending:
                return
        raise AssertionError("never settles")

    def swap_out(self, gfn: int) -> None:
        """Evict one page by hand, through the machine's own path."""
        hvp = self.vm.find_hvp(0, gfn)
        entry = self.memory.unmap(0, gfn)
        if entry & 0x200:
            self.vm.flags[hvp] |= 1
        self.vm.state[hvp] = 5
        self.vm.reclaim.begin_grace(0, [hvp])
        self.settle()
        assert self.vm.state[hvp] in (1, 3), f"page is in state {self.vm.state[hvp]}"
