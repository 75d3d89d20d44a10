"""The whole emulator in one process and in virtual time: host, guests and swap daemons as the machines of a real run.

A plan (sim/plan.py) goes in; out come an event log and what launcher/sim_verdict.py wants to know. What is a message, a wait or a device
in a real run is a delay here, drawn from the plan's seed; the paths of the host's and of the guests' CPUs may rest at every named step.

Two phases. Safety: anything of the plan may go wrong. From `calm_us` on nothing does: daemons come back, nothing rests; then everything
must drain.

Invariants: the same plan gives the same log, byte for byte, whatever the machine and the hash seed; a run ends by itself, at the latest
after a number of actions that is bounded by the work in the plan.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

from guest.events import GuestPanicError
from host import events as ev
from host.machine_reset import from_command
from host.memory import HostMemory, VmMemory
from host.setup import AREAS_PER_PAGE, least_frames
from host.slots import Memslot
from host.vm import Limits
from proto.events import Kind
from proto.layout import CTL_BARRIER, CTL_STOP, npt_tables
from proto.lives import Where
from proto.machine import MachineError
from proto.profile import PROFILES
from proto.run import PROC_HOST
from proto.units import WORDS_PER_PAGE
from proto.wire import Exit
from sim.agenda import Agenda, PriorityAgenda
from sim.chance import Chance
from sim.daemons import Daemons
from sim.faults import EXIT, Faults
from sim.guests import Guests
from sim.hostside import HostSide, SimulationError
from sim.log import EventLog, HostSink
from sim.plan import US, SimPlan
from sim.restart import MOVED, Restart
from swapd.machine import Request

HOST: Final = 0
"""Actor: what the host does by its own clock. Then come the vCPUs, the host's paths of the vCPUs, the daemons, their links."""
GRACE_NS: Final = 3_000
"""The host looks for flush acknowledgements this often."""
LOOK_NS: Final = 250_000_000
"""The host looks for requests that were lost this often."""
ACTIONS_BASE: Final = 50_000
ACTIONS_PER_OP: Final = 1_000
"""Ten times what the slowest of a thousand drawn plans needs, where hardly any frames are left; most need a few in all."""

ACTIONS_PER_US: Final = 200


def _story(error: Exception) -> str:
    """What a machine died of; for anything but the machines' own words, also where."""
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, MachineError | SimulationError | GuestPanicError):
        return text
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{text} ({Path(place.filename).name}:{place.lineno} {place.name})"


class Emulator:
    """One run of a plan. `run` once, then look at it."""

    def __init__(self, plan: SimPlan) -> None:
        self.plan = plan
        self.chance = Chance(plan)
        count = len(plan.cpus)
        daemons = len(plan.daemons)
        self._cpu_actors = list(range(1, 1 + count))
        self._path_actors = list(range(1 + count, 1 + 2 * count))
        first = 1 + 2 * count
        self._daemon_actors = list(range(first, first + daemons))
        self._link_actors = list(range(first + daemons, first + 2 * daemons))
        self.agenda = self._agenda(first + 2 * daemons)
        self.log = EventLog(self.agenda)
        self.faults = Faults(plan.faults)
        self.control = np.zeros(WORDS_PER_PAGE, np.uint64)
        self.sets = 0
        """Sets of host, daemons and vCPUs so far; what was arranged for an earlier one does not happen any more."""
        self.pages_lost = 0
        """Pages that were only with a daemon that is gone: the run ends in order, and is judged for what was before."""
        self.stuck = False
        """Nothing can happen any more, and the guests are not at their end."""
        self.failures: list[str] = []
        """What stopped the run."""
        self.calm = False
        self._serial = 0
        self._restart: Restart | None = None
        self._at_barrier = [0] * len(plan.vms)
        self._make_set(None)

    def _agenda(self, actors: int) -> Agenda:
        if self.plan.schedule == "delays":
            return Agenda()
        order = list(range(actors))
        self.chance.rng.shuffle(order)
        steps = 20 * max(1_000, self.plan.ops)
        changes = sorted(self.chance.rng.randrange(1, steps) for _ in range(self.plan.changes))
        return PriorityAgenda(order, changes)

    def _make_set(self, before: Guests | None) -> None:
        """Host, daemons and vCPUs, all fresh but for what ``before`` hands on."""
        plan = self.plan
        self.sets += 1
        memory, slots = self._memory()
        self.host = HostSide(
            memory, slots, self._limits(), [d.slots for d in plan.daemons], plan.cpus,
            PROFILES[plan.profile], plan.mode != "sync", HostSink(self.log, PROC_HOST), self._outside(), lambda: self.agenda.now_ns,
            plan.replicas, plan.hedge_us * US,
        )  # fmt: skip
        self.guests = Guests(
            plan,
            memory,
            self.control,
            self.log,
            self.agenda,
            self.chance,
            self._cpu_actors,
            self._exit_taken,
            before,
        )
        self.daemons = Daemons(
            plan, memory, self.agenda, self.chance, self.faults, self._daemon_actors, self._link_actors,
            self._of_this_set(self._from_daemon),
        )  # fmt: skip
        self._io: dict[int, list[ev.SendIo]] = {}
        self._polling = self._looking = False
        self._hedge_ns = 0
        """When the host will look for late reads."""
        self._parked: list[list[int]] = [[] for _ in plan.cpus]
        for cpu, machine in enumerate(self.host.vcpus):
            machine.park_with(partial(self._parks, cpu))

    def _limits(self) -> Limits:
        plan = self.plan
        areas = sum(-(-vm.vcpus // AREAS_PER_PAGE) for vm in plan.vms)
        least = least_frames(len(plan.cpus), plan.frames)
        return Limits(plan.low, plan.high, plan.populate, plan.zero_pages, areas, least)

    def _of_this_set(self, action: Callable[..., None]) -> Callable[..., None]:
        """``action``, unless the set was exchanged by then."""
        number = self.sets
        return lambda *args: action(*args) if number == self.sets else None

    def _memory(self) -> tuple[HostMemory, list[Memslot]]:
        plan = self.plan
        vms, slots, base, first_cpu = [], [], 0, 0
        for v, vm in enumerate(plan.vms):
            # The run loop wants a root and three levels, however small the guest.
            table = np.zeros(max(4, npt_tables(vm.memory_pages)) * WORDS_PER_PAGE, np.uint64)
            vms.append(VmMemory(table, np.zeros(WORDS_PER_PAGE, np.uint64), first_cpu, vm.vcpus))
            slots.append(Memslot(v, 0, vm.memory_pages, base))
            base += vm.memory_pages
            first_cpu += vm.vcpus
        frames = np.zeros(plan.frames * WORDS_PER_PAGE, np.uint64)
        return HostMemory(frames, np.zeros(first_cpu * WORDS_PER_PAGE, np.uint64), vms), slots

    def _outside(self) -> dict[type[Any], Any]:
        return {
            ev.Enter: lambda e: self.guests.enter(e.cpu, e.record), ev.KickVcpu: lambda e: self.guests.kick(e.cpu),
            ev.SetTimer: self._set_timer, ev.SendIpi: self._ipi, ev.AtBarrier: self._at_the_barrier, ev.PoweredDown: lambda _: None,
            ev.SendIo: lambda e: self._io.setdefault(e.daemon, []).append(e), ev.OutOfMemory: self._out_of_memory,
            ev.PagesLost: self._pages_lost,
            **dict.fromkeys(MOVED, self._moved),
        }  # fmt: skip

    # -- save and restore ----------------------------------------------------------------------------------
    def _begin_restart(self) -> None:
        self._restart = Restart(self)
        self._restart.begin()
        self.host.settle()
        self._after()

    def _moved(self, effect: Any) -> None:
        if self._restart is None:
            raise SimulationError(f"{effect!r}: nobody is being moved")
        self._restart.on(effect)

    def soon(self, action: Callable[[], None]) -> None:
        """Do it when the host's machines have nothing to say any more."""

        def act() -> None:
            action()
            self.host.settle()
            self._after()

        self.agenda.after(0, HOST, act)

    def fresh_set(self) -> None:
        """The old set is gone; its daemons' I/O lands nowhere any more."""
        self._make_set(self.guests)
        self.daemons.start()

    def go_on(self) -> None:
        """The fresh host has everything: the vCPUs say their first word."""
        self._restart = None
        self.soon(self.guests.power_on)

    # -- running -------------------------------------------------------------------------------------------
    def run(self) -> None:
        """From power-on to the end, whatever it is."""
        limit = ACTIONS_BASE + ACTIONS_PER_OP * self.plan.ops + ACTIONS_PER_US * self.plan.stop_us
        self.daemons.start()
        try:
            self.guests.power_on()
            self.agenda.at(self.plan.calm_us * US, HOST, self._calm_down)
            step = self.agenda.step
            for _ in range(limit):
                if self.failures or self.pages_lost or not step():
                    break
            else:
                self.failures.append(f"not at an end after {limit} actions")
        except Exception as error:  # noqa: BLE001 - whatever a machine dies of is what this plan has found
            self.failures.append(_story(error))
        if not self.failures and not self.pages_lost and not self.host.off:
            self.stuck = True
            running = [str(cpu) for cpu, one in enumerate(self.host.vcpus) if one.where is not Where.OFF]
            self.failures.append(
                f"nothing can happen any more, and vCPUs {', '.join(running)} have not powered down"
            )

    def _calm_down(self) -> None:
        self.calm = self.chance.calm = True
        self.agenda.calm_down()
        self.faults.disarm()

    # -- the host ------------------------------------------------------------------------------------------
    def _exit_taken(self, cpu: int, record: Exit) -> None:
        self.host.feed(self.host.vcpus[cpu], ev.ExitTaken(record))
        self.faults.see(EXIT)
        # One that is due while another is under way waits for the end of that.
        if self._restart is None and self.faults.take("restart") is not None:
            self._begin_restart()
        self._after()

    def _from_daemon(self, event: Any) -> None:
        self.host.feed(self.host.swap, event)
        self._after()

    def _after(self) -> None:
        """What one round of the host's loop sends, and what it will look at by itself."""
        host = self.host
        if self._io:
            for d, batch in self._io.items():
                requests = [Request(one.request, one.op, one.frame, one.slot) for one in batch]
                self.daemons.request(d, batch[0].epoch, host.swap.settled(d), requests)
            self._io = {}
        if host.vm.grace_pending and not self._polling:
            self._polling = True
            self.agenda.after(GRACE_NS, HOST, self._of_this_set(self._poll_grace))
        if not self._looking and host.swap.outstanding:
            self._looking = True
            self.agenda.after(LOOK_NS, HOST, self._of_this_set(self._look_at_requests))
        if 0 < host.swap.next_hedge_ns != self._hedge_ns:
            self._hedge_ns = host.swap.next_hedge_ns
            self.agenda.at(self._hedge_ns, HOST, self._of_this_set(self._look_for_late))

    def _poll_grace(self) -> None:
        self._polling = False
        self.host.feed(self.host.vm, ev.LookAtGrace())
        self._after()

    def _look_at_requests(self) -> None:
        self._looking = False
        self.host.feed(self.host.swap, ev.LookAtRequests())
        self._after()

    def _look_for_late(self) -> None:
        if 0 < self.host.swap.next_hedge_ns <= self.agenda.now_ns:
            self.host.feed(self.host.swap, ev.LookAtRequests())
            self._after()

    def _set_timer(self, effect: ev.SetTimer) -> None:
        cpu, generation = effect.cpu, effect.generation
        due = self._of_this_set(partial(self._timer_due, cpu, generation))
        self.agenda.at(effect.deadline_ns, self._path_actors[cpu], due)

    def _timer_due(self, cpu: int, generation: int) -> None:
        self.host.feed(self.host.vcpus[cpu], ev.TimerDue(cpu, generation))
        self._after()

    def _ipi(self, effect: ev.SendIpi) -> None:
        cpu = self.plan.cpus.index((effect.vm, effect.target))
        self.host.later(self.host.vcpus[cpu], from_command(cpu, effect.vector))

    def _at_the_barrier(self, effect: ev.AtBarrier) -> None:
        """All tasks of all guests have come: the barrier opens."""
        self._at_barrier[effect.vm] = max(self._at_barrier[effect.vm], effect.tasks)
        expected = [guest.tasks for guest in self.guests.vms]
        if self.control[CTL_BARRIER] or any(n < m for n, m in zip(self._at_barrier, expected, strict=True)):
            return
        self.control[CTL_BARRIER] = 1
        self.log.append(PROC_HOST, Kind.BARRIER, 0, 0, 0, 0, 0, 0, 0)
        if self.plan.stop_us:
            self.agenda.after(self.plan.stop_us * US, HOST, self._stop)
        self._poke_all()

    def _stop(self) -> None:
        """The time is up: tasks without a number of operations end."""
        self.control[CTL_STOP] = 1
        self.log.append(PROC_HOST, Kind.STOP, 0, 0, 0, 0, 0, 0, 0)
        self._poke_all()
        self.host.settle()
        self._after()

    def _poke_all(self) -> None:
        for machine in self.host.vcpus:
            if machine.where is not Where.OFF:
                self.host.later(machine, ev.Poke(machine.cpu))

    def _out_of_memory(self, effect: ev.OutOfMemory) -> None:
        self.failures.append(f"out of memory: {effect.waiting} faults wait for a frame, the swap is full")

    def _pages_lost(self, effect: ev.PagesLost) -> None:
        if not effect.pages:
            self.failures.append(f"the run cannot do without daemon {effect.daemon}, where nothing was")
        self.pages_lost = effect.pages

    # -- parked paths --------------------------------------------------------------------------------------
    def _parks(self, cpu: int, step: str) -> bool:
        ns = self.chance.park_ns(step)
        if ns:
            self._serial += 1
            serial = self._serial
            self._parked[cpu].append(serial)
            self.agenda.after(
                ns, self._path_actors[cpu], self._of_this_set(partial(self._resume, cpu, serial))
            )
        return ns > 0

    def _resume(self, cpu: int, serial: int) -> None:
        index = self._parked[cpu].index(serial)
        del self._parked[cpu][index]
        self.host.resume(self.host.vcpus[cpu], index)
        self._after()
