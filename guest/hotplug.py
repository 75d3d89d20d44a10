"""CPUs that go offline and come back, and reboots, as the guest kernel does them (spec §1.3, §1.16, §2.8).

What the run wants is in the VM's control page (``VMC_*``); a CPU looks at it in its main loop, where no task of its own is in the way.

    offline   disable async PF on this CPU, wake all its sleepers, give its tasks to other CPUs, halt with interrupts off
    online    the first CPU sends INIT and start-up; the CPU boots and enables again; tasks that were placed on it go back
    reboot    the first CPU has async PF disabled on every CPU and waits for all (the reboot notifier), then resets the machine; it finds
              the kernel's memory as it was at power-on, and starts the other CPUs after it has enabled async PF itself
    power off all tasks are finished: no notifier, no disabling

What a reboot does to tasks: every one begins again, its shadow zeroed, and the allocator hands out guest memory from the start.

Invariants
* Disable before waking: nothing can be announced to a CPU after its broadcast (BZ-39).
* One CPU goes offline at a time; a task belongs to a CPU that is online or on its way offline.
* The first CPU never goes offline. A CPU that is offline executes nothing until it is started.

Not handled here: suspend, kexec, a reboot while tasks are at the start barrier (requests wait until it is open).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from guest.events import GuestPanicError, LoadKernel
from proto.kvm import ICR_INIT, ICR_STARTUP, VECTOR_CALL, VECTOR_RESCHEDULE
from proto.layout import (
    K_BOOTS,
    K_DEAD,
    K_HOTPLUG,
    K_ONLINE,
    K_POWER,
    K_QUIET,
    POWER_OFF,
    POWER_ON,
    POWER_REBOOT,
    T_CPU,
    T_CR3,
    T_HOME,
    T_LAMPORT,
    T_STATE,
    T_VRUNTIME_NS,
    TS_DONE,
    TS_RUNNABLE,
    TS_UNUSED,
    VMC_OFFLINE,
    VMC_REBOOTS,
)
from proto.machine import MachineError, Path
from proto.port import MemoryPort
from proto.trace import Kind
from proto.units import PAGE_SIZE
from proto.wire import HC_RESET, ExitReason

if TYPE_CHECKING:
    from guest.machine import GuestCpu

BOOT_CPU: Final = 0
WAITS_MAX: Final = 600_000
"""Relaxations while another CPU is waited for (at 0.1 ms each: a minute): it may be held for a page whose daemon is being restarted."""


class Hotplug:
    """One CPU's part. ``wanted``: the VM's control page."""

    __slots__ = ("_boots", "_cpu", "_guests", "_me", "_online", "_wanted")

    def __init__(self, cpu: GuestCpu, wanted: MemoryPort) -> None:
        self._cpu = cpu
        self._wanted = wanted
        self._me = cpu.config.vcpu_id
        self._boots = 0
        """Reboots that this CPU has begun or been part of."""
        self._online: tuple[int, ...] = ()
        """The bitmap of online CPUs as this CPU last saw it."""
        self._guests = False
        """Tasks may be here that belong to another CPU."""

    # ---- what the run wants -------------------------------------------------------------------------------------------------
    def look(self) -> Path:
        """Do what is wanted of this CPU, if it is in a state for it; True when something was done."""
        cpu = self._cpu
        if not cpu.phases.barrier_open or cpu.kernel.load(K_POWER) == POWER_OFF:
            return False
        yield from self._send_home()
        if self._me != BOOT_CPU:
            if not self._bit(self._wanted, VMC_OFFLINE) or not cpu.switching.put_back():
                return False
            yield from self._go_offline()
            return True
        if self._wanted.load(VMC_REBOOTS) > self._boots:
            if not cpu.switching.put_back():
                return False
            return (yield from self._reboot())
        return (yield from self._start_the_wanted())

    def may_power_down(self) -> bool:
        """Whether a CPU without tasks may leave for good."""
        return not self._cpu.config.hotplug or self._cpu.kernel.load(K_POWER) == POWER_OFF

    def is_dead(self) -> bool:
        """Whether this CPU is offline and waits to be started again."""
        return self._bit(self._cpu.kernel, K_DEAD)

    # ---- offline, online ----------------------------------------------------------------------------------------------------
    def _go_offline(self) -> Path:
        cpu = self._cpu
        cpu.acc.interrupts = 0
        yield from self._lock()
        yield from cpu.apf.disable()
        yield "offline-disabled"
        yield from cpu.apf.wake_all()
        yield "offline-woken"
        self._set(K_ONLINE, on=False)
        moved = self._move_tasks()
        cpu.acc.event(Kind.CPU_OFFLINE, 0, sum(moved.values()))
        cpu.kernel.store(K_HOTPLUG, 0)
        for other in moved:
            yield from cpu.interrupts.send(other, VECTOR_RESCHEDULE)
        # A full barrier, then a look: whoever switches the machine off looks at the dead afterwards.
        self._set(K_DEAD, on=True)
        yield "offline-dead"
        while cpu.kernel.load(K_POWER) != POWER_OFF:
            yield from cpu.exits.take(ExitReason.HLT)
        cpu.acc.interrupts = 1

    def _move_tasks(self) -> dict[int, int]:
        """Give the tasks of this CPU to the online ones in turn; returns how many each got.

        The state is not touched: whoever wakes a task changes it first and asks for its CPU second, so it finds the new one or was
        seen here.
        """
        cpu = self._cpu
        online = [other for other in range(cpu.config.vcpus) if self._bit(cpu.kernel, K_ONLINE, other)]
        if not online:
            raise MachineError("the last CPU goes offline")
        moved: dict[int, int] = {}
        for task in self._mine():
            to = online[sum(moved.values()) % len(online)]
            moved[to] = moved.get(to, 0) + 1
            self._move(task, to)
        return moved

    def _mine(self) -> list[int]:
        """Tasks of this CPU that are not finished."""
        load = self._cpu.tasks.load
        tasks = [t for t in range(self._cpu.config.tasks) if load(t, T_CPU) == self._me]
        return [t for t in tasks if TS_UNUSED < load(t, T_STATE) < TS_DONE]

    def _move(self, task: int, to: int) -> None:
        cpu = self._cpu
        cpu.acc.event(Kind.TASK_MOVED, 0, task + 1, to)
        # The new queue lifts it to its own floor.
        cpu.tasks.store(task, T_VRUNTIME_NS, 0)
        # The new CPU may find the task before any message of this one reaches it.
        cpu.tasks.store(task, T_LAMPORT, cpu.acc.trace.lamport)
        cpu.tasks.store(task, T_CPU, to)

    def _send_home(self) -> Path:
        """After a CPU came or went: tasks of others that can run go to where they were placed, if that CPU is online. Only the CPU that a
        task is on picks it, so only that CPU may give it away.
        """
        cpu = self._cpu
        words = range(K_ONLINE, K_ONLINE + -(-cpu.config.vcpus // 64))
        online = tuple(cpu.kernel.load(word) for word in words)
        if online == self._online and not self._guests:
            return
        self._online = online
        mine = self._mine()
        away = [t for t in mine if cpu.tasks.load(t, T_HOME) != self._me]
        self._guests = bool(away)
        if not any(self._bit(cpu.kernel, K_ONLINE, cpu.tasks.load(t, T_HOME)) for t in away):
            return
        if cpu.queue.current in away and not cpu.switching.put_back():
            return
        moved = set()
        yield from self._lock()
        for task in away:
            home = cpu.tasks.load(task, T_HOME)
            # One that sleeps here is woken here, and goes then.
            if cpu.tasks.load(task, T_STATE) == TS_RUNNABLE and self._bit(cpu.kernel, K_ONLINE, home):
                self._move(task, home)
                moved.add(home)
        cpu.kernel.store(K_HOTPLUG, 0)
        for home in sorted(moved):
            yield from cpu.interrupts.send(home, VECTOR_RESCHEDULE)

    def _start_the_wanted(self) -> Path:
        cpu, started = self._cpu, False
        for other in range(1, cpu.config.vcpus):
            if self._bit(cpu.kernel, K_DEAD, other) and not self._bit(self._wanted, VMC_OFFLINE, other):
                yield from self._start(other)
                started = True
        return started

    def _start(self, other: int) -> Path:
        self._set(K_DEAD, other, on=False)
        yield from self._cpu.interrupts.send(other, ICR_INIT)
        yield from self._cpu.interrupts.send(other, ICR_STARTUP)

    # ---- a CPU starts again -------------------------------------------------------------------------------------------------
    def started_again(self) -> Path:
        """First thing after a reset. False: there is nothing to boot for, all tasks are finished."""
        cpu = self._cpu
        if self._me == BOOT_CPU:
            ask = cpu.new_ask()
            cpu.emit(LoadKernel(ask.ask_id))
            yield ask
            self._boots = self._wanted.load(VMC_REBOOTS)
            cpu.kernel.store(K_BOOTS, self._boots)
            roots = {cpu.tasks.load(task, T_CR3) for task in range(cpu.config.tasks)}
            for root in sorted(roots):
                yield from cpu.access.clear_page(root & -PAGE_SIZE)
        return cpu.kernel.load(K_POWER) != POWER_OFF

    def booted_again(self) -> Path:
        """Last thing of a boot after a reset; the first CPU starts the others (T1: after it has enabled)."""
        cpu = self._cpu
        cpu.acc.event(Kind.CPU_ONLINE)
        if self._me == BOOT_CPU:
            for other in range(1, cpu.config.vcpus):
                yield from cpu.interrupts.send(other, ICR_STARTUP)
            return
        for other in range(cpu.config.vcpus):
            if other != self._me and self._bit(cpu.kernel, K_ONLINE, other):
                yield from cpu.interrupts.send(other, VECTOR_RESCHEDULE)

    # ---- reboot, power off --------------------------------------------------------------------------------------------------
    def _reboot(self) -> Path:
        """The notifier's work on every CPU, then the reset, from which this CPU does not come back here."""
        cpu = self._cpu
        self._boots = self._wanted.load(VMC_REBOOTS)
        if cpu.kernel.cmpxchg(K_POWER, POWER_ON, POWER_REBOOT) != POWER_ON:
            return False
        yield from cpu.apf.disable()
        yield "reboot-disabled"
        asked: set[int] = set()
        for _ in range(WAITS_MAX):
            loud = self._loud()
            if not loud:
                break
            # Also one that has come online since.
            for other in sorted(set(loud) - asked):
                yield from cpu.interrupts.send(other, VECTOR_CALL)
                asked.add(other)
            yield cpu.relax()
        else:
            raise GuestPanicError(f"reboot: CPUs {self._loud()} do not answer")
        cpu.acc.event(Kind.G_REBOOT, 0, self._boots)
        yield from cpu.exits.take(ExitReason.HYPERCALL, arg0=HC_RESET)
        raise MachineError("the machine was not reset")

    def _loud(self) -> list[int]:
        """CPUs that may still be written to; one that goes offline meanwhile disables by itself."""
        kernel = self._cpu.kernel
        others = range(1, self._cpu.config.vcpus)
        return [c for c in others if self._bit(kernel, K_ONLINE, c) and not self._bit(kernel, K_QUIET, c)]

    def called(self) -> Path:
        """The interrupt with which the first CPU asks every other to disable async PF. Nobody is woken."""
        cpu = self._cpu
        if cpu.kernel.load(K_POWER) == POWER_REBOOT and not self._bit(cpu.kernel, K_QUIET):
            yield from cpu.apf.disable()
            yield "reboot-quiet"
            self._set(K_QUIET, on=True)

    def power_off(self) -> Path:
        """The last task is finished: every CPU shall leave, also those that are offline. Not when a reboot came first."""
        cpu = self._cpu
        if cpu.kernel.cmpxchg(K_POWER, POWER_ON, POWER_OFF) != POWER_ON:
            return
        for other in range(cpu.config.vcpus):
            if other == self._me:
                continue
            if self._bit(cpu.kernel, K_DEAD, other):
                yield from self._start(other)
            elif self._bit(cpu.kernel, K_ONLINE, other):
                yield from cpu.interrupts.send(other, VECTOR_RESCHEDULE)

    # ---- bitmaps and the lock -----------------------------------------------------------------------------------------------
    def _bit(self, port: MemoryPort, bitmap: int, cpu: int = -1) -> bool:
        number = self._me if cpu < 0 else cpu
        return bool(port.load(bitmap + number // 64) >> number % 64 & 1)

    def _set(self, bitmap: int, cpu: int = -1, *, on: bool) -> None:
        """Change a bit that only this CPU may change now, and that is the other way round: adding is setting."""
        number = self._me if cpu < 0 else cpu
        self._cpu.kernel.add(bitmap + number // 64, 1 << number % 64 if on else -(1 << number % 64))

    def _lock(self) -> Path:
        for _ in range(WAITS_MAX):
            if self._cpu.kernel.cmpxchg(K_HOTPLUG, 0, self._me + 1) == 0:
                return
            yield self._cpu.relax()
        raise GuestPanicError("another CPU never gets offline")
