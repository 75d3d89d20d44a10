"""The host of a simulated world: the machines of host/ and what runs between them, as host/shell.py routes it.

What leaves the host (entries, kicks, timers, requests to daemons) is the world's business: it gives a handler for each such effect.

Invariants: machines talk until nobody has anything to say, then the world goes on; a path parked at a named step is resumed by the
world's agenda; nothing here depends on time or chance.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

from host import events as ev
from host.machine_reset import MachineReset
from host.memory import HostMemory
from host.notices import notices
from host.observe import Observer
from host.slots import Memslot
from host.swap import SwapMachine
from host.vcpu import VcpuMachine
from host.vm import Limits, VmMachine
from proto.lives import Where
from proto.machine import Machine
from proto.profile import Profile

ROUNDS_MAX: Final = 100_000
"""Events that the host's machines may exchange without time passing."""

Handler = Callable[[Any], None]


class SimulationError(AssertionError):
    """The world cannot go on; our bug, or a rule that was broken on purpose."""


class HostSide:
    """``cpus``: (vm, vcpu_id) of each global vCPU. ``outside``: handlers of the effects that leave the host."""

    __slots__ = ("_effects", "_routed", "clock", "memory", "resets", "swap", "vcpus", "vm")

    def __init__(
        self,
        memory: HostMemory,
        slots: Sequence[Memslot],
        limits: Limits,
        swap_slots: Sequence[int],
        cpus: Sequence[tuple[int, int]],
        profile: Profile,
        host_async: bool,
        observer: Observer,
        outside: Mapping[type[Any], Handler],
        clock: Callable[[], int],
        replicas: int = 1,
        hedge_ns: int = 0,
    ) -> None:
        self.memory = memory
        self.clock = clock
        self.vm = VmMachine(memory, slots, limits, observer)
        self.swap = SwapMachine(swap_slots, observer, replicas, hedge_ns)
        self.vcpus = [
            VcpuMachine(cpu, vm, vcpu_id, profile, host_async, observer)
            for cpu, (vm, vcpu_id) in enumerate(cpus)
        ]
        self._routed: deque[tuple[Machine, Any]] = deque()
        routed = self._routed
        vm_machine, swap_machine, vcpus = self.vm, self.swap, self.vcpus

        def to_vm(event: Any) -> None:
            routed.append((vm_machine, event))

        def to_swap(event: Any) -> None:
            routed.append((swap_machine, event))

        def to_vcpu(event: Any) -> None:
            routed.append((vcpus[event.cpu], event))

        def to_vcpus(events: Iterable[Any]) -> None:
            routed.extend((vcpus[event.cpu], event) for event in events)

        vms = max(vm for vm, _ in cpus) + 1
        self.resets = MachineReset([[cpu for cpu, (vm, _) in enumerate(cpus) if vm == v] for v in range(vms)])
        self._effects: dict[type[Any], Handler] = {
            ev.GetPage: to_vm, ev.Translate: to_vm, ev.Fetch: to_vm, ev.CancelFetch: to_vm, ev.GuestRead32: to_vm,
            ev.GuestWrite32: to_vm, ev.SwapInDone: to_vm, ev.SwapOutDone: to_vm, ev.LendFrame: to_vm, ev.FrameBack: to_vm,
            ev.SlotsLost: to_vm, ev.ReadCancelled: to_vm, ev.WritesStand: to_vm,
            ev.SwapIn: to_swap, ev.SwapInBad: to_swap, ev.SwapOut: to_swap, ev.SlotFree: to_swap, ev.FrameLent: to_swap,
            ev.CancelRead: to_swap, ev.Answer: to_vcpu, ev.Fetched: to_vcpu, ev.MemoryShort: self._memory_short,
            **dict.fromkeys((ev.CancelPage, ev.ReleasePages, ev.MemoryGiven, ev.NoticeLost), to_vm),
            ev.ResetMachine: lambda e: to_vcpus(self.resets.begin(e.vm, e.cpu)),
            ev.WasReset: lambda e: to_vcpus(self.resets.was_reset(e.cpu)), ev.MemslotsSet: lambda _: None,
            **outside,
        }  # fmt: skip

    def _memory_short(self, effect: ev.MemoryShort) -> None:
        for event in notices(effect, self.vcpus):
            self.later(self.vm if type(event) is ev.NoticeLost else self.vcpus[event.cpu], event)

    def feed(self, machine: Machine, event: Any) -> None:
        """Give an event to a machine, then let all talk until nobody has anything to say."""
        self._routed.append((machine, event))
        self.settle()

    def later(self, machine: Machine, event: Any) -> None:
        """Give an event to a machine when those before it are done (for handlers of effects)."""
        self._routed.append((machine, event))

    def resume(self, machine: Machine, index: int) -> None:
        """Run a parked path of ``machine`` on."""
        self._perform(machine.resume(index, self.clock()))
        self.settle()

    def settle(self) -> None:
        """Until nobody has anything to say."""
        now = self.clock()
        routed, effects = self._routed, self._effects
        rounds = 0
        while routed:
            machine, event = routed.popleft()
            for effect in machine.on((event,), now):
                effects[type(effect)](effect)
            rounds += 1
            if rounds > ROUNDS_MAX:
                raise SimulationError("the host's machines talk to each other for ever")

    def _perform(self, effects: list[Any]) -> None:
        for effect in effects:
            self._effects[type(effect)](effect)

    @property
    def off(self) -> bool:
        """All vCPUs have powered down."""
        return all(vcpu.where is Where.OFF for vcpu in self.vcpus)
