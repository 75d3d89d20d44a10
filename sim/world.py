"""The world of a simulated run: the host's machines, guest CPUs and a paging device in one process, in virtual time.

Events go between the host's machines exactly as host/shell.py routes them; what is a message there is a delay here. The device serves any
number of requests at the same time, each page in its own service time.

Invariants
* Nothing depends on the wall clock, on hash seeds or on object identities: the same configuration gives the same events.
* A vCPU is in guest mode from its entry to its exit, and executes only there: what the host decides reaches it with the next entry.
* A kick that finds the vCPU on its way out is swallowed, as the real one is.
* Every run ends: at the guest's end, when nothing can happen any more, when nothing happened for QUIET_NS, or after ACTIONS_MAX;
  `over` tells whether it was the guest's end.

Deliberately not here: loss, crashes and random schedules; daemons as machines; reclaim under pressure (frames suffice for all pages).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, NamedTuple

import numpy as np

from host import events as ev
from host.kernels import HPT_EVICT, HPT_RESIDENT, HPT_SLOT
from host.machine_reset import MachineReset, from_command
from host.memory import HostMemory, VmMemory
from host.slots import Memslot, Region
from host.swap import SwapMachine
from host.vcpu import VcpuMachine
from host.vm import Limits, VmMachine
from proto.events import Kind
from proto.layout import MODE_IN_GUEST, MODE_OUTSIDE, NPT_D, VP_STATE, npt_tables
from proto.lives import Where
from proto.machine import Machine
from proto.profile import Profile
from proto.units import PAGE_SIZE, WORDS_PER_PAGE
from proto.wire import OP_READ, Entry, Exit
from sim.agenda import ARRIVAL, GUEST, Agenda
from sim.events import Back, ChangeSlots, EndRun, Leave, Off, PageOut, PowerOn, Said, SaveRestore, Spin, Spun
from sim.hostside import SimulationError
from sim.memory import GuestMemory
from sim.moving import Move
from sim.record import Record
from sim.slots import Layouts

EXIT_NS: Final = 1_000
"""From leaving guest mode to the host's decision."""
ENTRY_NS: Final = 1_000
"""From the host's entry record to the first instruction."""
KICK_NS: Final = 2_000
"""From a kick to the vCPU's exit."""
HOST_TICK_NS: Final = 4_000_000
"""The host's own timer forces an exit of a running vCPU. Recorded hosts: every 1 to 4 ms; here the slowest of them."""
QUIET_NS: Final = 11_000_000_000
"""A world in which nothing happens but host ticks for this long stays like that: longer than any service time or wait of a scenario."""
ACTIONS_MAX: Final = 200_000
"""A scenario that needs more goes round in circles: the largest shipped one takes a few thousand."""
SPARE_FRAMES: Final = 64
WITNESS: Final = 0x5EED_0000_0000_0000
"""Last word of a page that was put on swap: WITNESS + gfn."""
NOBODY: Final = -1
_STEPS_MAX: Final = 100_000


class WorldConfig(NamedTuple):
    """One VM. ``vcpu_ids``: of its vCPUs; ``pages``: guest frames; ``service_ns``: of one page read, by gfn.

    ``park_ns``: how long a path of a vCPU's machine rests at a named step while others run, 0 = not at all.
    """

    profile: Profile
    vcpu_ids: tuple[int, ...]
    pages: int
    service_ns: Callable[[int], int]
    host_async: bool = True
    park_ns: Callable[[str], int] | None = None
    moves: int = 0
    """How often a page gets other host memory: so many host pages are spare."""
    no_memory_for_items: int = 0
    """So many work items of each vCPU, the first ones, find no memory."""


def fail_first(vcpu: VcpuMachine, count: int) -> None:
    """Have the first ``count`` work items of a vCPU find no memory."""
    left = [count]

    def can_allocate() -> bool:
        left[0] -= 1
        return left[0] < 0

    vcpu.x86.apf.can_allocate = can_allocate


class World:
    """See the module docstring. Guests are attached with `attach`, then `run`."""

    def __init__(self, config: WorldConfig) -> None:
        self.config = config
        self.record = Record()
        self.agenda = Agenda()
        count = len(config.vcpu_ids)
        self.host = 0
        """How often the host was exchanged; what was arranged for an earlier one does not happen any more."""
        self.move: Move | None = None
        self._make_host()
        self.layouts = Layouts(config.pages)
        self.guest_memory = GuestMemory(self.memory, 0, config.pages)
        self.max_outstanding = 0
        self._guests: list[Machine] = []
        self._open: list[Spin | None] = [None] * count
        """The Spin a CPU is in, while it is in guest mode and executing."""
        self._spin_since = [0] * count
        self._spin_serial = [0] * count
        self._changing_slots: list[tuple[int, int]] = []
        """(vCPU, request) of script steps that wait for their layout."""
        self._leaving: list[int] = [0] * count
        """The request that the last exit of this CPU has to answer."""
        self._routed: deque[tuple[Machine, Any]] = deque()
        self._instant_io = False
        self._park_serial = 0
        self.ended = False
        self._effects = self._effect_table()
        self._requests: dict[type[Any], Callable[[int, Any], None]] = {
            Leave: self._leave, Spin: self._spin, Off: self._off, EndRun: self._end_run, PageOut: self._page_out,
            SaveRestore: self._save_restore,
            ChangeSlots: self._change_slots,
            Said: lambda cpu, s: self.record.add(
                "guest", s.name, config.vcpu_ids[cpu], s.fields, s.after_ns
            ),
        }  # fmt: skip
        self._start_host()

    def _make_host(self) -> None:
        """A host's machines, its memory and its device, all fresh."""
        config = self.config
        count = len(config.vcpu_ids)
        self._vcpu_pages = np.zeros(count * WORDS_PER_PAGE, np.uint64)
        self._vmc = np.zeros(WORDS_PER_PAGE, np.uint64)
        table = np.zeros(npt_tables(config.pages) * WORDS_PER_PAGE, np.uint64)
        frames = np.zeros((config.pages + SPARE_FRAMES) * WORDS_PER_PAGE, np.uint64)
        self.memory = HostMemory(frames, self._vcpu_pages, [VmMemory(table, self._vmc, 0, count)])
        self.vm = VmMachine(
            self.memory, [Memslot(0, 0, config.pages, 0)], Limits(2, 4, 1, True), self.record,
            [Region(0, 0, config.pages + config.moves)],
        )  # fmt: skip
        self.swap = SwapMachine([config.pages + SPARE_FRAMES], self.record)
        self.vcpus = [
            VcpuMachine(cpu, 0, vcpu_id, config.profile, config.host_async, self.record)
            for cpu, vcpu_id in enumerate(config.vcpu_ids)
        ]
        for vcpu in self.vcpus:
            fail_first(vcpu, config.no_memory_for_items)
        self.resets = MachineReset([range(count)])
        self._disk: dict[int, bytes] = {}
        self._parked: list[list[int]] = [[] for _ in range(count)]
        """Serial numbers of each machine's parked paths, in the machine's order."""

    def _start_host(self) -> None:
        if self.config.park_ns is not None:
            for cpu, machine in enumerate(self.vcpus):
                machine.park_with(self._picker(cpu, self.config.park_ns))
        self._quietly(lambda: self._feed(self.swap, ev.DaemonUp(0, self.host)))

    def fresh_host(self) -> None:
        """Exchange the host under the guest."""
        self.host += 1
        layout = self.vm.slots.all()
        self._make_host()
        self.vm.slots.replace(layout)
        self.guest_memory.bind(self.memory)
        self._start_host()

    def _of_this_host(self, action: Callable[[], None]) -> Callable[[], None]:
        """``action``, if the host is still the same then."""
        host = self.host
        return lambda: action() if host == self.host else None

    def _effect_table(self) -> dict[type[Any], Callable[[Any], None]]:
        to_vm = lambda e: self._routed.append((self.vm, e))  # noqa: E731
        to_swap = lambda e: self._routed.append((self.swap, e))  # noqa: E731
        return {
            ev.Enter: self._enter, ev.KickVcpu: self._kick, ev.SetTimer: self._set_timer, ev.SendIo: self._send_io,
            ev.SendIpi: self._ipi, ev.PoweredDown: lambda _: None, ev.MemslotsSet: self._slots_changed,
            ev.ResetMachine: lambda e: self._to_vcpus(self.resets.begin(e.vm, e.cpu)),
            ev.WasReset: lambda e: self._to_vcpus(self.resets.was_reset(e.cpu)),
            ev.GetPage: to_vm, ev.Translate: to_vm, ev.Fetch: to_vm, ev.CancelFetch: to_vm, ev.GuestRead32: to_vm,
            ev.GuestWrite32: to_vm, ev.SwapInDone: to_vm, ev.SwapOutDone: to_vm,
            ev.SwapIn: to_swap, ev.SwapInBad: to_swap, ev.SwapOut: to_swap, ev.SlotFree: to_swap,
            ev.Answer: self._to_vcpu, ev.Fetched: self._to_vcpu,
            **dict.fromkeys((ev.Paused, ev.PageSaved, ev.PageLoaded, ev.Restored), self._moves),
        }  # fmt: skip

    # -- set-up --------------------------------------------------------------------------------------------
    def attach(self, guest: Machine) -> None:
        """The next vCPU's guest."""
        self._guests.append(guest)

    def put_on_swap(self, gfn: int) -> None:
        """Before the run: give the page recognisable contents and write it to the device, through the machines."""
        # The last word, so that what the guest keeps in the page (the shared area) starts as zeros.
        self.fill(gfn, {WORDS_PER_PAGE - 1: WITNESS + gfn})
        self._quietly(lambda: self._evict(gfn))

    def fill(self, gfn: int, words: Mapping[int, int]) -> None:
        """Before the run: words of a page by index."""

        def write() -> None:
            self._feed(self.vm, ev.GetPage(NOBODY, 0, 0, gfn, True, ev.Gup.WAIT))
            frame = int(self.vm.frame_of[gfn])
            for index, word in words.items():
                self.memory.frames[frame * WORDS_PER_PAGE + index] = np.uint64(word)
            self.vm.mark_dirty(gfn)

        self._quietly(write)

    def _quietly(self, action: Callable[[], None]) -> None:
        self.record.quiet = self._instant_io = True
        action()
        self.record.quiet = self._instant_io = False

    def _evict(self, gfn: int) -> None:
        """What reclaim does to a victim. No guest CPU is between two instructions with a stale translation: there is no TLB."""
        hvp = self.vm.find_hvp(0, gfn)
        if self.vm.state[hvp] != HPT_RESIDENT:
            return
        if self.memory.unmap(0, gfn) & NPT_D:
            self.vm.mark_dirty(hvp)
        self.vm.state[hvp] = HPT_EVICT
        self.vm.reclaim.begin_grace(0, [hvp])
        self._flush_all()

    def _flush_all(self) -> None:
        for cpu in range(len(self.vcpus)):
            at = cpu * WORDS_PER_PAGE + VP_STATE
            self._vcpu_pages[at] = int(self._vmc[0]) << 2 | int(self._vcpu_pages[at]) & 3
        self._feed(self.vm, ev.LookAtGrace())

    # -- parked paths --------------------------------------------------------------------------------------
    def _picker(self, cpu: int, park_ns: Callable[[str], int]) -> Callable[[str], bool]:
        def pick(step: str) -> bool:
            ns = park_ns(step)
            if ns:
                self._park_serial += 1
                serial = self._park_serial
                self._parked[cpu].append(serial)
                self.agenda.after(ns, GUEST, self._of_this_host(lambda: self._resume(cpu, serial)))
            return ns > 0

        return pick

    def _resume(self, cpu: int, serial: int) -> None:
        index = self._parked[cpu].index(serial)
        del self._parked[cpu][index]
        self.record.now_ns = self.agenda.now_ns
        self._perform(self.vcpus[cpu].resume(index, self.agenda.now_ns))
        self._route()

    # -- running -------------------------------------------------------------------------------------------
    def run(self) -> None:
        """From power-on to the end."""
        for cpu in range(len(self.vcpus)):
            self._tell(cpu, PowerOn())
        for _ in range(ACTIONS_MAX):
            if self.ended or not self.agenda.step():
                return
            events = self.record.events
            if events and self.agenda.now_ns > events[-1].t_ns + QUIET_NS:
                return

    def _feed(self, machine: Machine, event: Any) -> None:
        """Give an event to one of the host's machines, and let them talk until nobody has anything to say."""
        self._routed.append((machine, event))
        self._route()

    def _route(self) -> None:
        self.record.now_ns = self.agenda.now_ns
        for _ in range(_STEPS_MAX):
            if not self._routed:
                break
            machine, event = self._routed.popleft()
            self._perform(machine.on((event,), self.agenda.now_ns))
        else:
            raise SimulationError("the host's machines talk to each other for ever")
        self.max_outstanding = max(self.max_outstanding, *(len(v.x86.apf.queue) for v in self.vcpus))

    def _perform(self, effects: list[Any]) -> None:
        for effect in effects:
            self._effects[type(effect)](effect)

    def _to_vcpu(self, event: Any) -> None:
        if event.cpu != NOBODY:
            self._routed.append((self.vcpus[event.cpu], event))

    def _tell(self, cpu: int, event: Any) -> None:
        """Give a guest CPU an answer and perform what it wants next."""
        self.record.now_ns = self.agenda.now_ns
        for request in self._guests[cpu].on((event,), self.agenda.now_ns):
            self._requests[type(request)](cpu, request)

    # -- guest CPUs ----------------------------------------------------------------------------------------
    def _leave(self, cpu: int, request: Leave) -> None:
        self._leaving[cpu] = request.ask
        self.agenda.after(request.after_ns + EXIT_NS, GUEST, lambda: self._exit(cpu, request.record))

    def _exit(self, cpu: int, record: Exit) -> None:
        self._vcpu_pages[cpu * WORDS_PER_PAGE + VP_STATE] = int(self._vmc[0]) << 2 | MODE_OUTSIDE
        self._feed(self.vcpus[cpu], ev.ExitTaken(record))

    def _enter(self, effect: ev.Enter) -> None:
        entry: Entry = effect.record
        self._vcpu_pages[effect.cpu * WORDS_PER_PAGE + VP_STATE] = int(self._vmc[0]) << 2 | MODE_IN_GUEST
        ask = self._leaving[effect.cpu]
        self.agenda.after(ENTRY_NS, GUEST, lambda: self._tell(effect.cpu, Back(ask, entry)))

    def _spin(self, cpu: int, request: Spin) -> None:
        """Executing for a while: until its end, the next host tick, or a kick that arrives meanwhile."""
        now = self.agenda.now_ns
        self._open[cpu] = request
        self._spin_since[cpu] = now
        self._spin_serial[cpu] += 1
        serial = self._spin_serial[cpu]
        tick = (now // HOST_TICK_NS + 1) * HOST_TICK_NS
        done = tick + 1 if request.ns is None else now + request.ns
        self.agenda.at(min(done, tick), GUEST, lambda: self._spun(cpu, serial, kicked=tick < done))

    def _spun(self, cpu: int, serial: int, *, kicked: bool) -> None:
        request = self._open[cpu]
        if request is None or serial != self._spin_serial[cpu]:
            return
        self._open[cpu] = None
        passed = self.agenda.now_ns - self._spin_since[cpu]
        left = 0 if request.ns is None else max(0, request.ns - passed)
        self._tell(cpu, Spun(request.ask, kicked, left))

    def _kick(self, effect: ev.KickVcpu) -> None:
        cpu = effect.cpu
        self.record.trace(Kind.KICK, vcpu=self.config.vcpu_ids[cpu], a=effect.request)
        self.agenda.after(KICK_NS, GUEST, lambda: self._spun(cpu, self._spin_serial[cpu], kicked=True))

    def _off(self, cpu: int, request: Off) -> None:
        self.agenda.after(request.after_ns + EXIT_NS, GUEST, lambda: self._exit(cpu, request.record))

    def _end_run(self, _cpu: int, request: EndRun) -> None:
        self.agenda.after(request.after_ns, GUEST, self._end)

    def _end(self) -> None:
        self.ended = True

    def _page_out(self, cpu: int, request: PageOut) -> None:
        self._instant_io = True
        self._evict(request.gfn)
        self._instant_io = False
        if self.vm.state[self.vm.find_hvp(0, request.gfn)] != HPT_SLOT:
            raise SimulationError(f"gfn {request.gfn} did not go to swap")
        self.agenda.after(0, GUEST, lambda: self._tell(cpu, Spun(request.ask, kicked=False)))

    def _change_slots(self, cpu: int, request: ChangeSlots) -> None:
        self._changing_slots.append((cpu, request.ask))
        self._feed(self.vm, self.layouts.change(self.vm.slots, request))
        self._flush_all()

    def _slots_changed(self, _: ev.MemslotsSet) -> None:
        cpu, ask = self._changing_slots.pop(0)
        self.agenda.after(0, GUEST, lambda: self._tell(cpu, Spun(ask, kicked=False)))

    # -- save and restore ----------------------------------------------------------------------------------
    def _save_restore(self, cpu: int, request: SaveRestore) -> None:
        """The asking CPU executes on until it is kicked, like all others."""
        self._spin(cpu, Spin(request.ask, None))
        self.move = Move(self)
        self.move.begin()
        self._route()

    def _moves(self, effect: Any) -> None:
        if self.move is None:
            raise SimulationError(f"{effect!r}: nobody moves")
        self.move.on(effect)

    def feed(self, machine: Machine, event: Any) -> None:
        """Give an event to a machine of the host once those under way have been handled."""
        self._routed.append((machine, event))

    def give(self, machine: Machine, event: Any) -> None:
        """Give an event to a machine of the host now."""
        self._feed(machine, event)

    def quietly(self, action: Callable[[], None]) -> None:
        """Do it without a trace, its I/O at once."""
        self._quietly(action)

    def evict(self, gfn: int) -> None:
        """What reclaim does to a victim."""
        self._evict(gfn)

    def exited(self, cpu: int, record: Exit) -> None:
        """A vCPU leaves guest mode, or says its first word to a fresh host."""
        self._exit(cpu, record)

    # -- the host's surroundings ---------------------------------------------------------------------------
    def _set_timer(self, effect: ev.SetTimer) -> None:
        due = ev.TimerDue(effect.cpu, effect.generation)
        self.agenda.at(
            effect.deadline_ns, ARRIVAL, self._of_this_host(lambda: self._feed(self.vcpus[effect.cpu], due))
        )

    def _ipi(self, effect: ev.SendIpi) -> None:
        if effect.target in self.config.vcpu_ids:
            cpu = self.config.vcpu_ids.index(effect.target)
            self._routed.append((self.vcpus[cpu], from_command(cpu, effect.vector)))

    def _to_vcpus(self, events: Iterable[Any]) -> None:
        self._routed.extend((self.vcpus[event.cpu], event) for event in events)

    def _send_io(self, effect: ev.SendIo) -> None:
        if effect.op != OP_READ:
            self._disk[effect.slot] = bytes(self.memory.page(effect.frame))
            self._reply(effect, 0)
            return
        gfn = self.layouts.gfn_of(int(self.vm.frames.owner[effect.frame]))
        self.record.add("pages", "request", 0, {"gfn": gfn})
        service_ns = self.config.service_ns(gfn)
        self.agenda.after(
            service_ns, ARRIVAL, self._of_this_host(lambda: self._copied(effect, gfn, service_ns))
        )

    def _copied(self, effect: ev.SendIo, gfn: int, service_ns: int) -> None:
        self.memory.write_page(effect.frame, self._disk[effect.slot])
        self.record.now_ns = self.agenda.now_ns
        self.record.add("pages", "copied", 0, {"gfn": gfn})
        self._feed(self.swap, ev.IoReply(0, effect.epoch, effect.request, PAGE_SIZE, service_ns))

    def _reply(self, effect: ev.SendIo, service_ns: int) -> None:
        """A write is acknowledged at once: the scenarios are about reads."""
        reply = ev.IoReply(0, effect.epoch, effect.request, PAGE_SIZE, service_ns)
        if self._instant_io:
            self._routed.append((self.swap, reply))
        else:
            self.agenda.after(service_ns, ARRIVAL, self._of_this_host(lambda: self._feed(self.swap, reply)))

    # -- questions -----------------------------------------------------------------------------------------
    @property
    def over(self) -> bool:
        """The guest ended the run, or all vCPUs have powered down."""
        return self.ended or all(vcpu.where is Where.OFF for vcpu in self.vcpus)
