"""What happens to the vCPUs of a scenario's guest: offline and online, reset, reboot, tasks that change their vCPU.

The rules are those of the guest kernel (guest/hotplug.py), on this small guest: disable, then wake, then give the tasks away; the reboot
notifier disables on every vCPU and wakes nobody; the first vCPU starts the others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from proto import kvm
from proto.machine import MachineError, Path
from proto.wire import HC_RESET, ExitReason
from sim.scenario_steps import Step
from sim.scenario_tasks import TaskState

if TYPE_CHECKING:
    from sim.scenario_guest import ScenarioCpu

LOOK_NS: Final = 20_000
"""How often it is looked whether every vCPU has disabled."""
LOOKS_MAX: Final = 100_000


class Life:
    """The part of one vCPU."""

    def __init__(self, cpu: ScenarioCpu) -> None:
        self._cpu = cpu

    def step(self, step: Step) -> Path:
        """A step of the script."""
        if step.do == "offline":
            yield from self._offline()
        elif step.do == "online":
            yield from self._start(step.target)
        elif step.do == "wake":
            yield from self._wake(step.task)
        elif step.do == "reboot":
            yield from self._reboot()
        elif step.target >= 0:
            yield from self._start(step.target)
        else:
            # The reset button: no notifier.
            yield from self._cpu.leave(ExitReason.HYPERCALL, arg0=HC_RESET, if_=0)

    def _offline(self) -> Path:
        cpu = self._cpu
        yield from cpu.wrmsr(cpu.profile.msr_en, 0, if_=1)
        for state in cpu.sleepers.values():
            state.wake()
        cpu.sleepers.clear()
        cpu.online.set(cpu.cpu, on=False)
        others = [other for other in range(len(cpu.scenario.vcpu_ids)) if cpu.online.has(other)]
        if not others:
            raise MachineError("the last vCPU goes offline")
        cpu.say("OFFLINE")
        for number, state in enumerate(cpu.tasks):
            yield from self._give(state, others[number % len(others)])
        while True:
            # Only a reset ends this.
            yield from cpu.leave(ExitReason.HLT, if_=0)

    def _start(self, target: int) -> Path:
        yield from self._interrupt(target, kvm.ICR_INIT)
        yield from self._interrupt(target, kvm.ICR_STARTUP)

    def _reboot(self) -> Path:
        cpu = self._cpu
        cpus = len(cpu.scenario.vcpu_ids)
        yield from cpu.wrmsr(cpu.profile.msr_en, 0, if_=1)
        cpu.online.quiet(cpu.cpu)
        for other in cpu.online.loud(cpus):
            yield from self._interrupt(other, kvm.VECTOR_CALL)
        for _ in range(LOOKS_MAX):
            if not cpu.online.loud(cpus):
                break
            yield from cpu.spin(LOOK_NS)
        cpu.say("REBOOT")
        yield from cpu.leave(ExitReason.HYPERCALL, arg0=HC_RESET, if_=0)

    def called(self) -> Path:
        """The interrupt of the reboot notifier."""
        cpu = self._cpu
        yield from cpu.wrmsr(cpu.profile.msr_en, 0)
        cpu.online.quiet(cpu.cpu)

    def booted_again(self) -> Path:
        """The first vCPU starts the others, after it has enabled (T1). Who is running already ignores it."""
        cpu = self._cpu
        if cpu.cpu == 0:
            cpu.online.forget_quiet()
            for other in range(1, len(cpu.scenario.vcpu_ids)):
                yield from self._interrupt(other, kvm.ICR_STARTUP)

    def _wake(self, number: int) -> Path:
        """Wake a task of any vCPU before its page has come: it tries again there."""
        state = self._cpu.everybody[number - 1]
        if state.asleep:
            state.wake()
            if state.cpu != self._cpu.cpu:
                yield from self._interrupt(state.cpu, kvm.VECTOR_RESCHEDULE)

    def place(self, state: TaskState) -> Path:
        """Where a task that was woken here goes on."""
        if state.task.wakes_on not in (-1, self._cpu.cpu):
            yield from self._give(state, state.task.wakes_on)

    def _give(self, state: TaskState, to: int) -> Path:
        if not state.finished:
            self._cpu.say("MOVED", moved=state.task.number, to=to)
            state.move(to)
            yield from self._interrupt(to, kvm.VECTOR_RESCHEDULE)

    def _interrupt(self, other: int, command: int) -> Path:
        target = self._cpu.scenario.vcpu_ids[other]
        yield from self._cpu.leave(ExitReason.IPI, arg0=target, arg1=command, if_=0)
