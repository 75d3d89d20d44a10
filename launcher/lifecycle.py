"""The life of a run as a pure machine: what has happened in, what to do out.

Purpose: decide the order in which processes start, what the end of each of them means, when daemons are started again, and why and
how the run ends. launcher/supervisor.py performs the effects.

Order of a run: host; when its sockets are bound, daemons and vCPUs; the start barrier; the measured time, which the host ends; the
end of every vCPU. A daemon that ends is told to the host, then fenced (no I/O of it can land any more), then the fence is told,
then its successor starts with the next epoch. One that may not be started again is told to be gone: the host decides whether the run
can go on without it.

Invariants: effects are performed in the order given, each before the next; after `End` no further effect is given; a successor
never starts before the fence; every wait has a bound, so that a run ends at most `warm + setup + seconds + drain` after its start.

Deliberately not here: clocks (every call is told the time), processes, sockets, how a fence is made.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Final, NamedTuple

from launcher.zygote_link import Child, describe_status
from proto import wire

MS: Final = 1_000_000
S: Final = 1_000_000_000
STABLE_NS: Final = 200 * MS
"""A daemon that lived this long had a start that worked."""
HELLO_NS: Final = 15 * S
"""A daemon that the host has not connected so long after its start hangs: many times what a start takes with 256 vCPUs on two cores."""
SAVED: Final = "saved"
"""How a set of processes ended that left an image."""
UNORDERED_MAX: Final = 1000
"""Restarts of a daemon whose topology does not say how many."""
QUICK_DEATHS_MAX: Final = 5
"""Starts in a row that did not work: a sixth would not either."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """How long a run may stay in each phase, and how long a daemon that ended stays away, ns."""

    warm_ns: int = 900 * S
    """To a zygote that can fork: every kernel may have to be compiled, on a busy machine."""
    setup_ns: int = 120 * S
    """From there to the start barrier: forks, boot, filling guest memory."""
    drain_ns: int = 60 * S
    """From the end of the measured time to the end of the last vCPU, the final sweeps of `stamp` tasks included."""
    save_ns: int = 120 * S
    """From the order to save to the complete image: sleepers that cannot be moved are waited for, all memory is written."""
    stop_ns: int = 1 * S
    """From the user's Ctrl-C to the teardown."""
    away_ns: int = 0
    """From the end of a daemon to the start of its successor, at least: to see what its absence does."""


class Fork(NamedTuple):
    """Effect: start these processes."""

    children: Sequence[Child]


class Tell(NamedTuple):
    """Effect: send this to the host."""

    message: wire.Message


class Fence(NamedTuple):
    """Effect: wait until no I/O of the dead daemon can land any more."""

    daemon: int


class Kill(NamedTuple):
    """Effect: SIGKILL this process."""

    child: Child
    pid: int


class Signal(NamedTuple):
    """Effect: send this process a signal that it survives."""

    child: Child
    pid: int
    number: int


class KillZygote(NamedTuple):
    """Effect: SIGKILL the zygote, and with it everybody."""


class End(NamedTuple):
    """Effect, the last one: the run is over. ``orderly``: the processes will leave by themselves when told."""

    ended: str
    orderly: bool
    culprit: str = ""
    """Name of the process whose log tells more (vcpu-3), if there is one."""


Effect = Fork | Tell | Fence | Kill | Signal | KillZygote | End


class Phase(Enum):
    """Where a run is."""

    STARTING = "starting"
    """The host is being started."""
    FILLING = "filling memory"
    RUNNING = "running"
    SAVING = "saving"
    """The vCPUs are being stopped, memory is written into an image."""
    STOPPING = "stopping"
    """The user has asked for the end."""
    OVER = "over"


@dataclass(slots=True)
class RestartBudget:
    """How often one daemon may be started again.

    limit: restarts in all; -1: UNORDERED_MAX of them, not counting those after deaths that were ordered (a scheduled fault). A death
    within STABLE_NS of its start counts as a start that did not work, unless it was ordered: QUICK_DEATHS_MAX of them in a row use the
    budget up.
    """

    limit: int
    restarts: int = 0
    charged: int = 0
    """Restarts that count for the limit."""
    quick_deaths: int = 0

    def spent(self, alive_ns: int, *, ordered: bool) -> str:
        """Count a death; why there may be no further start, or "" if there may (which is then counted)."""
        if not ordered:
            self.quick_deaths = self.quick_deaths + 1 if alive_ns < STABLE_NS else 0
        if self.quick_deaths >= QUICK_DEATHS_MAX:
            return f"died {self.quick_deaths} times in a row within {STABLE_NS // MS} ms of its start"
        if not ordered or self.limit >= 0:
            limit = self.limit if self.limit >= 0 else UNORDERED_MAX
            if self.charged >= limit:
                return f"used up its {limit} restarts (restart_limit)"
            self.charged += 1
        self.restarts += 1
        return ""


@dataclass(slots=True)
class _Daemon:
    budget: RestartBudget
    epoch: int = 0
    pid: int = 0
    """0 while no process of the current epoch is known."""
    started_ns: int = 0
    ordered: bool = False
    """Its death was ordered by the schedule of faults."""
    unwanted: bool = False
    """The host wants it replaced; its process id is not known yet."""
    gone: str = ""
    """Why it is not started again."""
    held_back: bool = False
    """Its predecessor is fenced; it is started at `started_ns`, which is to come."""


@dataclass(slots=True)
class Lifecycle:
    """See the module. Methods return the effects in order; `now_ns` is monotonic."""

    vcpus: int
    restart_limits: Sequence[int]
    seconds: float
    bounds: Bounds = field(default_factory=Bounds)
    save_at_ns: int = 0
    """Measured time at which everything is saved, which ends this set of processes; 0: never."""
    elsewhere: frozenset[int] = frozenset()
    """Daemons that somebody else starts and watches: no process of the run is theirs."""
    phase: Phase = Phase.STARTING
    start_ns: int = 0
    """When the barrier opened; 0 before."""
    _deadline_ns: int = 0
    _daemons: list[_Daemon] = field(default_factory=list)
    _pids: dict[Child, int] = field(default_factory=dict)
    _signals: int = 0
    _ordered: dict[str, str] = field(default_factory=dict)
    """Why processes were killed on purpose, by name."""

    @property
    def restarts(self) -> int:
        """Daemons started again so far."""
        return sum(daemon.budget.restarts for daemon in self._daemons)

    @property
    def gone(self) -> list[str]:
        """Daemons that are not started again, each with the reason."""
        return [daemon.gone for daemon in self._daemons if daemon.gone]

    @property
    def pids(self) -> dict[Child, int]:
        """Processes that are alive as far as is known."""
        return dict(self._pids)

    def begin(self, now_ns: int) -> None:
        """The bounds count from here."""
        self._daemons = [_Daemon(RestartBudget(limit)) for limit in self.restart_limits]
        self._deadline_ns = now_ns + self.bounds.warm_ns

    def on_ready(self, now_ns: int) -> list[Effect]:
        """The zygote can fork."""
        self._deadline_ns = now_ns + self.bounds.setup_ns
        return [] if self.phase is Phase.OVER else [Fork([Child("host", 0, 0)])]

    def on_host(self, message: wire.Message, now_ns: int) -> list[Effect]:
        """A message of the host."""
        match message:
            case wire.HostReady() if self.phase is Phase.STARTING:
                self.phase = Phase.FILLING
                daemons = [Child("swapd", d, 0) for d in range(len(self._daemons)) if d not in self.elsewhere]
                for daemon in self._daemons:
                    daemon.started_ns = now_ns
                return [Fork([*daemons, *(Child("vcpu", cpu, 0) for cpu in range(self.vcpus))])]
            case wire.Started(start_ns) if self.phase is Phase.FILLING:
                self.phase = Phase.RUNNING
                self.start_ns = start_ns
                self._deadline_ns = now_ns + int(self.seconds * S) + self.bounds.drain_ns
            case wire.Saved() if self.phase is Phase.SAVING:
                return self._end(SAVED, orderly=True)
            case wire.Finished() if self.phase is not Phase.OVER:
                return self._end("interrupted" if self._signals else "finished", orderly=True)
            case wire.Failed(reason) if self.phase is not Phase.OVER:
                lost = [
                    d
                    for d, daemon in enumerate(self._daemons)
                    if daemon.gone and reason.startswith(f"swapd-{d} ")
                ]
                return self._end(f"failed:{reason}", culprit=f"swapd-{lost[0]}" if lost else "host-0")
            case wire.RestartWanted(daemon, epoch, _):
                return self._restart_wanted(daemon, epoch)
        return []

    def on_forked(self, child: Child, pid: int) -> list[Effect]:
        """A process runs."""
        self._pids[child] = pid
        if child.role == "swapd":
            state = self._daemons[child.number]
            state.pid = pid
            if state.unwanted and child.epoch == state.epoch:
                state.unwanted = False
                return [Kill(child, pid)]
        return []

    def on_exited(self, child: Child, status: int, now_ns: int) -> list[Effect]:
        """A process was reaped; `status` as of waitpid."""
        self._pids.pop(child, None)
        if self.phase is Phase.OVER:
            return []
        if child.role != "swapd":
            # Nobody leaves before being told to, not even with exit code 0.
            return self._end(
                f"failed:{child.name} {self.how(child.name, describe_status(status))}", culprit=child.name
            )
        return self._daemon_died(child, status, now_ns)

    def on_zygote_gone(self, how: str) -> list[Effect]:
        """The zygote ended; all others end with it."""
        if self.phase is Phase.OVER:
            return []
        self._pids.clear()
        return self._end(f"failed:zygote-0 {self.how('zygote-0', how)}", culprit="zygote-0")

    def on_signal(self, now_ns: int) -> list[Effect]:
        """Ctrl-C or SIGTERM: the first ends the run in order, the second at once."""
        self._signals += 1
        if self.phase is Phase.OVER:
            return []
        if self._signals > 1 or self.phase in (Phase.STARTING, Phase.SAVING):
            # Before there is a guest, and when it stands, nothing can end in order.
            return self._end("interrupted")
        self.phase = Phase.STOPPING
        self._deadline_ns = now_ns + self.bounds.stop_ns
        return [Tell(wire.Stop("interrupted"))]

    def on_connected(self, epochs: Sequence[int], now_ns: int) -> list[Effect]:
        """``epochs``: of each daemon, the one that the host connected last. One that hangs before that has nobody else who would notice."""
        if self.phase is Phase.OVER:
            return []
        return [
            Kill(Child("swapd", d, state.epoch), state.pid)
            for d, (state, epoch) in enumerate(zip(self._daemons, epochs, strict=True))
            if state.pid and epoch < state.epoch and now_ns - state.started_ns > HELLO_NS
        ]

    def on_stalled(self, cpus: Sequence[int]) -> list[Effect]:
        """These vCPUs hold a run token and make no progress."""
        if self.phase is Phase.OVER or not cpus:
            return []
        names = ", ".join(f"vcpu-{cpu}" for cpu in cpus)
        return self._end(f"failed:stalled: {names}", culprit=f"vcpu-{cpus[0]}")

    def on_time(self, now_ns: int) -> list[Effect]:
        """To be called when time has passed."""
        if self.phase is Phase.RUNNING and self.save_due_ns and now_ns >= self.save_due_ns:
            self.phase = Phase.SAVING
            self._deadline_ns = now_ns + self.bounds.save_ns
            return [Tell(wire.SaveVm("asked for"))]
        if self.phase is not Phase.OVER and now_ns < self._deadline_ns:
            return self._let_come(now_ns)
        if self.phase is Phase.OVER:
            return []
        if self.phase is Phase.STOPPING:
            return self._end("interrupted")
        return self._end(f"failed:timeout while {self.phase.value}")

    @property
    def save_due_ns(self) -> int:
        """When everything is to be saved, monotonic; 0: never, or not known yet."""
        return self.start_ns + self.save_at_ns if self.save_at_ns and self.start_ns else 0

    def on_fault(self, role: str, number: int, what: int, why: str = "") -> list[Effect]:
        """The schedule has this process signalled (``what``: SIGKILL, SIGSTOP, SIGCONT); nothing, if it is not there.

        why: of a kill, to be told if it ends the run.
        """
        if self.phase is Phase.OVER or (self.phase is not Phase.RUNNING and what != signal.SIGCONT):
            return []
        if role == "zygote":
            self.ordered(role, number, why)
            return [KillZygote()]
        daemon = self._daemons[number] if role == "swapd" else None
        child = Child(role, number, daemon.epoch if daemon is not None else 0)
        # One that was killed and is not reaped yet is as good as gone.
        if (pid := self._pids.get(child)) is None or (daemon is not None and daemon.ordered):
            return []
        if what != signal.SIGKILL:
            return [Signal(child, pid, what)]
        self.ordered(role, number, why)
        return [Kill(child, pid)]

    def ordered(self, role: str, number: int, why: str) -> None:
        """The next end of this process is what the schedule wanted."""
        if role == "swapd":
            self._daemons[number].ordered = True
        self._ordered[f"{role}-{number}"] = why

    def how(self, name: str, how: str) -> str:
        """How a process ended, and that somebody had ordered it."""
        why = self._ordered.get(name)
        return f"{how} ({why})" if why else how

    def fail(self, reason: str, culprit: str = "") -> list[Effect]:
        """An effect could not be performed."""
        return [] if self.phase is Phase.OVER else self._end(f"failed:{reason}", culprit=culprit)

    def _restart_wanted(self, daemon: int, epoch: int) -> list[Effect]:
        if self.phase is Phase.OVER or not 0 <= daemon < len(self._daemons):
            return []
        state = self._daemons[daemon]
        # A process that has ended has a successor, whose epoch is another, and needs no kill.
        if epoch != state.epoch:
            return []
        if not state.pid:
            # The daemon and the host were faster than the zygote's report of the fork.
            state.unwanted = True
            return []
        return [Kill(Child("swapd", daemon, epoch), state.pid)]

    def _daemon_died(self, child: Child, status: int, now_ns: int) -> list[Effect]:
        d, epoch = child.number, child.epoch
        state = self._daemons[d]
        assert epoch == state.epoch, f"{child} died, the epoch is {state.epoch}"
        why = state.budget.spent(now_ns - state.started_ns, ordered=state.ordered)
        state.pid, state.ordered, state.unwanted = 0, False, False
        # The order was for this one: its successors' ends are their own.
        self._ordered.pop(child.name, None)
        effects: list[Effect] = [Tell(wire.DaemonDown(d, epoch)), Fence(d), Tell(wire.DaemonFenced(d, epoch))]
        if why:
            state.gone = f"{child.name} {why}, at last {describe_status(status)}"
            return [*effects, Tell(wire.DaemonGone(d, state.gone))]
        state.epoch += 1
        state.started_ns = now_ns + self.bounds.away_ns
        state.held_back = True
        return [*effects, *self._let_come(now_ns)]

    def _let_come(self, now_ns: int) -> list[Effect]:
        """Start the successors whose time has come."""
        due = []
        for d, state in enumerate(self._daemons):
            if state.held_back and now_ns >= state.started_ns:
                state.held_back = False
                due.append(Child("swapd", d, state.epoch))
        return [Fork(due)] if due else []

    def _end(self, ended: str, *, orderly: bool = False, culprit: str = "") -> list[Effect]:
        self.phase = Phase.OVER
        return [End(ended, orderly, culprit)]
