"""What a guest CPU asks its world for, and what the world answers. One request is open at a time: a CPU is sequential.

Every request carries ``ask``; its answer carries the same number. The real world is guest/shell.py.
"""

from __future__ import annotations

from typing import NamedTuple

from proto.profile import Profile
from proto.wire import Entry, Exit


class GuestPanicError(Exception):
    """The guest kernel cannot go on (a page of its own is lost, the host broke the contract). Ends the run, with the reason."""


class CpuConfig(NamedTuple):
    """What a CPU's kernel is built with. Times in ns of guest time."""

    vm: int
    vcpu_id: int
    vcpus: int
    """CPUs of this guest."""
    tasks: int
    """Task records of this guest."""
    mode: str
    """Delivery mode of the run: sync, halt, exception, interrupt."""
    profile: Profile
    send_always: bool
    preemptible: bool
    tick_ns: int
    granularity_ns: int
    exit_cost_ns: int
    exception_cost_ns: int
    switch_cost_ns: int
    interrupt_cost_ns: int
    hotplug: bool = False
    """CPUs of this guest may go and come, or it may reboot: no CPU powers down before all tasks are finished."""

    @property
    def enables_async_pf(self) -> bool:
        """Whether this guest writes the enable register at all."""
        return self.mode in ("exception", "interrupt")


# ---- requests: machine -> world ---------------------------------------------------------------------------------------------
class RunTask(NamedTuple):
    """Execute the current task in guest mode; answer `Ran`."""

    ask: int
    task: int
    max_ns: int
    """Guest time after which the scheduler wants to look again; 0: no such time."""
    max_ops: int
    """The same in operations."""


class TakeExit(NamedTuple):
    """Leave to the host with this record; answer `Entered`."""

    ask: int
    record: Exit


class Access32(NamedTuple):
    """One aligned 32-bit access to guest memory, interrupts off; answer `Accessed`."""

    ask: int
    gpa: int
    write: bool
    value: int


class ClearPage(NamedTuple):
    """Fill a page of guest memory with zeros, interrupts off; answer `Accessed`."""

    ask: int
    gpa: int


class LoadKernel(NamedTuple):
    """Put the guest kernel's memory and the tasks' shadow back to what they were at power-on; answer `Relaxed`. Only the first CPU asks,
    while no other executes.
    """

    ask: int


class Relax(NamedTuple):
    """Another CPU has to get on first (a lock is held, a pool is empty): let it run; answer `Relaxed`."""

    ask: int


class PowerDown(NamedTuple):
    """Nothing left to run. ``record``: exit record without an entry; None when the run is being torn down."""

    record: Exit | None


# ---- answers: world -> machine ----------------------------------------------------------------------------------------------
class PowerOn(NamedTuple):
    """The CPU starts. Not an answer: the first event."""


class Ran(NamedTuple):
    """``code``: RUN_*; ``ns``: guest time the operations took."""

    ask: int
    code: int
    ns: int


class Entered(NamedTuple):
    """The host's entry record. ``at_ns``: the guest clock that goes with its arrival (paced: the wall clock since boot), 0 = unpaced."""

    ask: int
    entry: Entry
    at_ns: int = 0


class Accessed(NamedTuple):
    """``ok`` False: nested fault, VP_X_* say where; take the exit, then ask again."""

    ask: int
    ok: bool
    value: int


class Relaxed(NamedTuple):
    """Go on trying."""

    ask: int
