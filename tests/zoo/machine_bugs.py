"""Bugs of what happens to a machine during its life (spec §5.2, §5.4), on the real guest kernel and the real host machines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from guest.apf import AsyncPf
from guest.exits import CpuReset
from guest.hotplug import Hotplug
from host.events import Translate
from host.slots import Memslot
from host.x86 import X86, AreaCache
from proto import kvm
from proto import layout as L  # noqa: N812 - a table of constants
from proto.machine import Path
from proto.units import TOKEN_WAKE_ALL
from proto.wire import ExitReason
from tests.guest.whole_machine import WholeMachine, stamps
from tests.zoo.bench_bugs import GFN, on_swap, outside
from tests.zoo.core import Bug, Patch, Trial

AREA_GFN: Final = L.APF_AREA_GPA >> 12
SEEDS: Final = 6
STEPS_MAX: Final = 40_000
"""Several times what a correct machine needs from its stop to its end."""
RESTS: Final = 40
"""Rounds of the main loop between the two halves of a CPU's way offline."""


# -- trials ----------------------------------------------------------------------------------------------------
def slots_change_during_a_translation() -> list[str]:
    """The memslot under the shared area is replaced twice, the second time while a write looks where it is."""
    bench = on_swap(spare=2)
    vcpu = bench.vcpus[0]

    def move(to: int, was: int) -> None:
        around = (Memslot(0, 0, 1, 0), Memslot(0, AREA_GFN, 1, to), Memslot(0, 2, 254, 2))
        bench.set_slots(*around, moves=((was, to, 1),))
        outside(bench)

    move(256, AREA_GFN)
    vcpu.park_with(lambda step: step == "zoo.translated")
    bench.touch(GFN)
    vcpu.park_with(None)
    move(257, 256)
    if vcpu.parked:
        for effect in vcpu.resume(0, bench.now):
            bench._perform(effect)
        bench.route()
    if bench.area(0, kvm.AREA_FLAGS) == kvm.REASON_NOT_PRESENT:
        return []
    return ["I32", "I47", "the word is in memory that the guest does not see any more"]


def started(seed: int, **options: Any) -> WholeMachine:
    """A guest whose tasks fault."""
    machine = WholeMachine(stamps(4, options.get("vcpus", 2)), seed=seed, **options)
    machine.run(machine.barrier_open)
    before = machine.announced()
    machine.run(lambda: machine.announced() > before + 3)
    return machine


def a_cpu_goes_while_its_tasks_fault() -> list[str]:
    """A CPU goes offline; then everything must come to its end."""
    for seed in range(SEEDS):
        machine = started(seed)
        machine.want(offline=[1])
        if not _within(machine, lambda machine=machine: machine.online() == {0}):  # type: ignore[misc]
            return ["I47", f"the CPU never gets offline: @seed {seed}"]
        machine.stop()
        if not _within(machine, None):
            return ["I47", f"@seed {seed}"]
    return []


def _within(machine: WholeMachine, until: Callable[[], bool] | None) -> bool:
    try:
        machine.run(until, STEPS_MAX)
    except AssertionError as error:
        if "no end" not in str(error):
            raise
        return False
    return True


def next_kernel_owns_its_memory() -> list[str]:
    """A reboot with faults outstanding: until the next kernel has enabled, its area is memory like any other."""
    for seed in range(SEEDS):
        machine = started(seed, vcpus=1)
        machine.want(reboots=1)
        first: dict[int, int] = {}
        written: set[int] = set()

        def enabled(
            machine: WholeMachine = machine, first: dict[int, int] = first, written: set[int] = written
        ) -> bool:
            if machine.kern[L.K_BOOTS] and not machine.host.vcpu_pages[L.VP_APF_ENABLED]:
                for index, word in enumerate(_area(machine)):
                    if first.setdefault(index, word) != word:
                        written.add(word)
                return False
            return bool(first) or len(machine.off) == machine.vcpus

        machine.run(enabled)
        # The kernel itself clears its area, and the host answers the write that enables.
        if written - {0, TOKEN_WAKE_ALL}:
            return ["I30", f"the host wrote into the memory of the next kernel: @seed {seed}"]
        machine.stop()
        if not _within(machine, None) or machine.cpu[0].sleepers.count() != (0, 0):
            return ["I45", f"@seed {seed}"]
    return []


def _area(machine: WholeMachine) -> list[int]:
    """The 32-bit words of the first CPU's area; none while its page is on swap."""
    frame = int(machine.host.vm.frame_of[AREA_GFN])
    if frame < 0:
        return []
    return [machine.host.memory.read32(frame, (L.APF_AREA_GPA & 0xFFF) + 4 * i) for i in range(16)]


def nodes_and_their_tasks() -> list[str]:
    """While tasks sleep and are woken: whoever has a node in the table is inside its wait."""
    machine = started(0)

    def escaped() -> bool:
        linked = machine.cpu[0].sleepers.linked
        return any(
            linked(task) and machine.word(task, L.T_STATE) in (L.TS_RUNNABLE, L.TS_DONE)
            for task in range(len(machine.tasks))
        )

    end = machine.steps + STEPS_MAX // 10
    machine.run(lambda: escaped() or machine.steps > end)
    return ["I44", "a task runs while its node is in the table"] if escaped() else []


# -- bugs ------------------------------------------------------------------------------------------------------
def reads_slots_and_generation_apart(self: X86, gpa: int) -> Path:
    m = self.m
    mapping = yield from m.query(lambda ask: Translate(m.cpu, ask, m.vm, gpa >> 12))
    yield "zoo.translated"
    number = yield from m.query(lambda ask: Translate(m.cpu, ask, m.vm, gpa >> 12))
    self.area = AreaCache(gpa, mapping.hvp, number.generation)


_WAY: Final[dict[int, int]] = {}
"""Rounds of the main loop left for CPUs (by identity) that have woken their sleepers and not disabled yet."""


def rests_between(original: Any) -> Any:
    def look(self: Hotplug) -> Path:
        if _WAY.get(id(self), 0) > 0:
            # The thread that takes the CPU offline is preempted.
            _WAY[id(self)] -= 1
            return False
        return (yield from original(self))

    return look


def wakes_before_disabling(self: Hotplug) -> Path:
    cpu = self._cpu
    if id(self) not in _WAY:
        _WAY[id(self)] = RESTS
        yield from cpu.apf.wake_all()
        return
    del _WAY[id(self)]
    yield from self._lock()
    yield from cpu.apf.disable()
    self._set(L.K_ONLINE, on=False)
    moved = self._move_tasks()
    cpu.kernel.store(L.K_HOTPLUG, 0)
    for other in moved:
        yield from cpu.interrupts.send(other, kvm.VECTOR_RESCHEDULE)
    self._set(L.K_DEAD, on=True)
    while cpu.kernel.load(L.K_POWER) != L.POWER_OFF:
        yield from cpu.exits.take(ExitReason.HLT)


def starts_the_next_kernel_without_the_hook(self: Hotplug) -> Path:
    self._boots = self._wanted.load(L.VMC_REBOOTS)
    yield "zoo.kexec"
    self._cpu.page.store(L.VP_APF_ENABLED, 0)
    raise CpuReset


def returns_on_a_signal(self: AsyncPf, task: int, token: int) -> Path:
    cpu = self._cpu
    if (yield from cpu.sleepers.wait(token, task, halted=False)):
        cpu.tasks.store(task, L.T_STATE, L.TS_RUNNABLE)
        cpu.switching.leave()


BUGS: Final = (
    Bug("BZ-21", "slot array and version are read one after the other", "v5 (review)", "mainline", ("I32", "I47"),
        (Patch(X86, "translate_area", reads_slots_and_generation_apart),),
        (Trial("steps the slots change during a translation", slots_change_during_a_translation),)),
    Bug("BZ-30", "a wait returns on a signal and leaves its node", "guest, a model of firecracker #5322", "mainline", ("I44",),
        (Patch(AsyncPf, "_sleep", returns_on_a_signal),), (Trial("a running guest, nodes against tasks", nodes_and_their_tasks),)),
    Bug("BZ-39", "offline: broadcast first, disable second", "order of Linux, reversed", "mainline", ("I47",),
        (Patch(Hotplug, "look", rests_between(Hotplug.look)),
         Patch(Hotplug, "_go_offline", wakes_before_disabling)),
        (Trial(f"{SEEDS} runs of a CPU that goes while its tasks fault", a_cpu_goes_while_its_tasks_fault),)),
    Bug("BZ-40", "the next kernel starts without the reboot hook", "kexec (review of v6)", "mainline", ("I30", "I45"),
        (Patch(Hotplug, "_reboot", starts_the_next_kernel_without_the_hook),),
        (Trial(f"{SEEDS} reboots with faults outstanding", next_kernel_owns_its_memory),)),
)  # fmt: skip
