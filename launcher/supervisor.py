"""The loop that watches a run: one poller over zygote, host, signals and timers; decisions come from launcher/lifecycle.py.

Purpose: turn what happens into events of the `Lifecycle`, perform its effects, sample what the summary needs, and take everything
down at the end.

Invariants: `tear_down` may be called at any time and leaves no process of the run; every wait is bounded; a message that cannot be
read is counted and dropped.

Not handled here: creating what the run needs (launcher/execute.py), files, results.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import zmq

from launcher import kernel_cache
from launcher.blame import Blamed, Deaths
from launcher.chaos import Chaos
from launcher.lifecycle import (
    Bounds,
    Effect,
    End,
    Fence,
    Fork,
    Kill,
    KillZygote,
    Lifecycle,
    Phase,
    Signal,
    Tell,
)
from launcher.live import Live
from launcher.outage import OutageMeter
from launcher.progress import Progress
from launcher.resources import Resources
from launcher.rundir import RunDir
from launcher.runfile import usable_cores
from launcher.signals import Signals
from launcher.usage import Sampler
from launcher.watch import Watch, private_memory_mib
from launcher.zygote_link import Child, Exited, Forked, Gone, Ready, Zygote, describe_exit, describe_status
from proto import link, wire
from proto.faults import FOREVER_NS
from proto.layout import CTL_ABORT
from proto.pcpu import Pcpu
from proto.stats import HostCounter
from proto.topology import Topology
from report.summary import Snapshot
from swapd import swapfile

MS: Final = 1_000_000
S: Final = 1_000_000_000
TICK_MS: Final = 100
"""Longest sleep of the loop."""
QUICK_TICK_MS: Final = 5
"""While something is expected that sends no message: the host's socket, the boot of vCPUs, the stop flag."""
CONNECT_TICK_MS: Final = 2
STALL_NS: Final = 10 * S
"""A vCPU that holds a run token this long without looking at anything is stuck or stopped."""
STALL_CHECK_NS: Final = 1 * S
LEAVE_ORDERLY_S: Final = 3.0
LEAVE_EACH_S: Final = 0.05
"""More for each process: hundreds of them have to get their turn."""
LEAVE_ABORT_S: Final = 0.2
TOGETHER_S: Final = 0.05
"""Who dies this soon after the death that ends the run was not told to: it is named, too."""
LEFT_NAMED_MAX: Final = 8
ZYGOTE_STOP_S: Final = 5.0
"""Reaping waits for reads that the device has begun."""
ORPHANS_S: Final = 5.0
ORPHAN_POLL_S: Final = 0.01
MESSAGES_PER_TURN: Final = 64
USS_SAMPLES_MAX: Final = 16
PR_SET_CHILD_SUBREAPER: Final = 36
PR_GET_CHILD_SUBREAPER: Final = 37


@dataclass(slots=True)
class Outcome:
    """What became of a run, beside the figures in shared memory."""

    ended: str = ""
    orderly: bool = False
    blamed: list[Blamed] = field(default_factory=list)
    """Who ended the run, first things first: those that died, or one that hangs or gave up."""
    details: list[str] = field(default_factory=list)
    start_ns: int = 0
    end_ns: int = 0
    started_in_s: float | None = None
    restarts: int = 0
    bad_messages: int = 0
    memory: dict[str, float] | None = None
    usage: Sampler = field(default_factory=Sampler)
    at_start: Snapshot | None = None
    at_stop: Snapshot | None = None
    outage: OutageMeter = field(default_factory=OutageMeter)
    saved_pages: int = 0
    """With contents, in the last image."""


class Supervisor:
    """One run, from a zygote that has been handed everything to the end of all processes."""

    def __init__(
        self,
        topology: Topology,
        zygote: Zygote,
        run_dir: RunDir,
        resources: Resources,
        signals: Signals,
        progress: Progress,
        *,
        began_ns: int,
        key: bytes = b"",
        chaos: Chaos | None = None,
        bounds: Bounds | None = None,
        save_at_ns: int = 0,
        before: Outcome | None = None,
        signals_seen: int | None = None,
    ) -> None:
        """began_ns: when the user's wait began, monotonic. chaos: kill and stop processes, too. save_at_ns: see `Lifecycle`.

        key: the secret of the run (proto/link.py).

        before: what became of the run so far, when this set of processes goes on from an image. signals_seen: those that the run
        has dealt with; by default all so far.
        """
        self.outcome = before or Outcome()
        self._resumed = before is not None
        self._restarts_before = self.outcome.restarts
        self._topology = topology
        self._zygote = zygote
        self._zygote_gone = False
        self._run_dir = run_dir
        self._key = key
        self._resources = resources
        self._signals = signals
        self._signals_seen = signals.count if signals_seen is None else signals_seen
        self._progress = progress
        self._began_ns = began_ns
        self._chaos = chaos
        limits = [daemon.restart_limit for daemon in topology.swapd]
        self._life = Lifecycle(
            topology.total_vcpus,
            limits,
            topology.run.seconds,
            bounds or Bounds(),
            save_at_ns,
            elsewhere=frozenset(d for d, daemon in enumerate(topology.swapd) if daemon.connect),
        )
        self._watch = Watch(resources.segments, [vm.vcpus for vm in topology.vm])
        self._live = Live(self._watch)
        self.outcome.outage.expected = bool(topology.fault) or any(
            daemon.connect for daemon in topology.swapd
        )
        # An observer writes to no eventfd; their number says how many vCPUs there are.
        self._pcpu = Pcpu(
            resources.segments["pcpu"].u64,
            -1,
            [-1] * topology.total_vcpus,
            topology.pcpus(usable_cores()),
        )
        self._deaths = Deaths()
        self._starting = ""
        self._stall_checked_ns = 0
        self._memory_due_ns = 0
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._dealer: zmq.Socket[bytes] | None = None
        self._connecting = False
        self._poller = zmq.Poller()
        self._poller.register(zygote.fileno(), zmq.POLLIN)
        self._poller.register(signals.fileno(), zmq.POLLIN)
        self._children_before = _children()
        self._subreaper_before = _subreaper(on=True)

    @property
    def signals_seen(self) -> int:
        """Signals that were dealt with."""
        return self._signals_seen

    # -- the loop ---------------------------------------------------------------------------------------------------------
    def run(self) -> None:
        """Until the run is over; `outcome` says how. The processes are still there: `tear_down`."""
        self._starting = (
            "starting"
            if kernel_cache.is_filled()
            else "compiling the kernels, this once (about half a minute)"
        )
        self._progress.phase(self._starting)
        self._life.begin(time.monotonic_ns())
        while self._life.phase is not Phase.OVER:
            self._turn()

    def _turn(self) -> None:
        # A register's events are only a hint: every source is asked below without waiting, except the zygote.
        ready = dict(self._poller.poll(self._timeout_ms()))
        if self._dealer is not None:
            self._hear_host(self._dealer)
        if self._zygote.fileno() in ready:
            self._hear_zygote()
        if self._signals.fileno() in ready:
            self._signals.drain()
        while self._signals_seen < self._signals.count:
            self._signals_seen += 1
            self._progress.say("stopping" if self._signals_seen == 1 else "stopping at once")
            self._perform(self._life.on_signal(time.monotonic_ns()))
        self._on_time(time.monotonic_ns())

    def _timeout_ms(self) -> int:
        if self._connecting:
            return CONNECT_TICK_MS
        now_ns = time.monotonic_ns()
        stop_near = (
            self.outcome.at_start is not None
            and self.outcome.at_stop is None
            and now_ns + TICK_MS * MS > self._life.start_ns + int(self._topology.run.seconds * S)
        )
        if self._life.phase is Phase.RUNNING and 0 < self._life.save_due_ns < now_ns + TICK_MS * MS:
            return max(0, -(-(self._life.save_due_ns - now_ns) // MS))
        booting = self.outcome.started_in_s is None and self._dealer is not None
        if stop_near or booting:
            return QUICK_TICK_MS
        tick_ms = min(TICK_MS, self.outcome.outage.tick_ms)
        if self._chaos is None:
            return tick_ms
        if self._chaos.watches:
            tick_ms = min(tick_ms, QUICK_TICK_MS)
        if (due_ns := self._chaos.wakes_ns(now_ns)) is not None:
            tick_ms = min(tick_ms, max(0, -(-(due_ns - now_ns) // MS)))
        return tick_ms

    def _hear_host(self, dealer: zmq.Socket[bytes]) -> None:
        for _ in range(MESSAGES_PER_TURN):
            try:
                parts = dealer.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                message = wire.decode(parts[0])
            except wire.WireError:
                self.outcome.bad_messages += 1
                continue
            now_ns = time.monotonic_ns()
            was = self._life.phase
            if isinstance(message, wire.Saved):
                self.outcome.saved_pages = message.pages
            self._perform(self._life.on_host(message, now_ns))
            if self._life.phase is Phase.RUNNING and was is not Phase.RUNNING:
                self._barrier_opened(now_ns)
            elif self._life.phase is Phase.FILLING and was is not Phase.FILLING:
                what = "restoring" if self._resumed else "filling"
                self._progress.phase(f"starting {self._topology.total_vcpus} vCPUs, {what} memory")

    def _hear_zygote(self) -> None:
        for report in self._zygote.receive():
            now_ns = time.monotonic_ns()
            match report:
                case Ready():
                    self._perform(self._life.on_ready(now_ns))
                case Forked(child, pid):
                    self._perform(self._life.on_forked(child, pid))
                    if child.role == "host":
                        self._connecting = True
                case Exited(child, pid, status):
                    self._look_at_faults()
                    how = self._life.how(child.name, describe_status(status))
                    self._deaths.note(Blamed(child, how, now_ns, pid))
                    if child.role == "swapd":
                        self._daemon_ended(child.number, now_ns)
                    self._perform(self._life.on_exited(child, status, now_ns))
                case Gone():
                    self._zygote_gone = True
                    self._poller.unregister(self._zygote.fileno())
                    how = describe_exit(self._zygote.wait(ZYGOTE_STOP_S))
                    self._look_at_faults()
                    told = self._life.how("zygote-0", how)
                    self._deaths.note(Blamed(Child("zygote", 0, 0), told, now_ns, self._zygote.pid))
                    self._perform(self._life.on_zygote_gone(how))

    # -- effects ----------------------------------------------------------------------------------------------------------
    def _perform(self, effects: Iterable[Effect]) -> None:
        for effect in effects:
            match effect:
                case Fork(children):
                    self._zygote.fork(children)
                case Tell(message):
                    if not self._tell(message):
                        self._perform(self._life.fail("the host does not read its messages", "host-0"))
                        return
                case Fence(daemon):
                    try:
                        file = self._resources.files[daemon]
                        assert file is not None, f"swapd-{daemon} is not this machine's to fence"
                        swapfile.fence(file.fd, file.size_bytes)
                    except (OSError, swapfile.SwapFileError) as error:
                        self._perform(self._life.fail(f"the fence of swapd-{daemon} failed: {error}"))
                        return
                case Kill(_, pid):
                    self._zygote.kill(pid)
                case Signal(_, pid, number):
                    self._zygote.kill(pid, number)
                case KillZygote():
                    self._zygote.kill_zygote()
                case End():
                    self._ended(effect)

    def _tell(self, message: wire.Message) -> bool:
        if self._dealer is None:
            return True  # there is no host yet that would have to know
        try:
            self._dealer.send(wire.encode(message), zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def _ended(self, end: End) -> None:
        outcome = self.outcome
        outcome.ended, outcome.orderly = end.ended, end.orderly
        outcome.end_ns = time.monotonic_ns()
        outcome.blamed = self._deaths.blamed(end.culprit, outcome.end_ns)
        if not end.orderly:
            self._progress.say(f"{end.ended.removeprefix('failed:')}: ending the run")
        outcome.start_ns = self._life.start_ns
        outcome.restarts = self._restarts_before + self._life.restarts
        if not end.ended.startswith("failed:"):
            outcome.details += [f"{why}; the run went on without it" for why in self._life.gone]
        if end.ended.startswith(("failed:timeout", "failed:stalled")):
            outcome.details += self._watch.describe_vcpus()

    # -- timers -----------------------------------------------------------------------------------------------------------
    def _on_time(self, now_ns: int) -> None:
        self._perform(self._life.on_time(now_ns))
        if self._connecting and self._run_dir.socket.exists():
            self._connect()
        outcome = self.outcome
        if outcome.started_in_s is None and self._dealer is not None and self._watch.all_booted():
            outcome.started_in_s = (now_ns - self._began_ns) / S
        if now_ns - self._stall_checked_ns > STALL_CHECK_NS:
            self._stall_checked_ns = now_ns
            self._perform(self._life.on_stalled(self._pcpu.stalled(now_ns, STALL_NS)))
        if outcome.at_start is not None:
            self._on_measured_time(now_ns)
        if self._progress.due():
            self._show(now_ns)

    def _on_measured_time(self, now_ns: int) -> None:
        outcome = self.outcome
        outcome.outage.sample(now_ns, self._watch.outage_reading())
        if outcome.at_stop is None and self._watch.stopped():
            # Before the copy of all figures, which is the launcher's own and only made now.
            outcome.usage.end(now_ns, self._pids_by_role())
            outcome.at_stop = self._watch.snapshot(now_ns)
            outcome.outage.stop(now_ns, self._watch.outage_reading())
        if outcome.usage.due(now_ns):
            outcome.usage.take(now_ns, self._pids_by_role())
        if self._memory_due_ns and now_ns >= self._memory_due_ns:
            self._memory_due_ns = 0
            vcpus = [pid for child, pid in self._life.pids.items() if child.role == "vcpu"]
            outcome.memory = private_memory_mib(vcpus[:: -(-len(vcpus) // USS_SAMPLES_MAX)])
        if self._chaos is not None:
            self._on_faults(self._chaos, now_ns)

    def _on_faults(self, chaos: Chaos, now_ns: int) -> None:
        """Kill and stop what the schedule wants now, and let go on what has stood long enough."""
        self._look_at_faults()
        for order in chaos.due(now_ns):
            effects = self._life.on_fault(order.role, order.number, order.signal, chaos.why(order.spec))
            if effects:
                chaos.take(order, now_ns)
                self._perform(effects)
            else:
                chaos.missed(order, now_ns)
        self._look_at_faults()
        for role, number in chaos.over(now_ns):
            self._perform(self._life.on_fault(role, number, signal.SIGCONT))
        chaos.tick()

    def _look_at_faults(self) -> None:
        """Kills by other hands than this one are ordered, too."""
        if self._chaos is not None:
            for spec, number in self._chaos.look():
                self._life.ordered(spec.role, number, self._chaos.why(spec))

    def _pids_by_role(self) -> dict[str, list[int]]:
        """Process ids of this run, the launcher's and the zygote's too."""
        found = {"host": [], "swapd": [], "vcpu": [], "launcher": [os.getpid()], "zygote": [self._zygote.pid]}
        for child, pid in self._life.pids.items():
            found[child.role].append(pid)
        return found

    def _barrier_opened(self, now_ns: int) -> None:
        if self.outcome.at_start is None:
            self.outcome.at_start = self._watch.snapshot(now_ns)
        self.outcome.outage.begin(now_ns, self._watch.outage_reading())
        if self.outcome.memory is None:
            self._memory_due_ns = max(
                now_ns + S // 10, self._life.start_ns + int(self._topology.run.seconds * S / 2)
            )
        if self._resumed:
            self._run_dir.image.unlink(missing_ok=True)
        if self.outcome.started_in_s is None:
            self.outcome.started_in_s = (now_ns - self._began_ns) / S
        self.outcome.usage.begin(now_ns, self._topology.run.seconds)
        self._live.begin(now_ns)
        self._progress.phase("running")

    def _daemon_ended(self, daemon: int, now_ns: int) -> None:
        if self._life.phase is Phase.OVER:
            return
        self.outcome.outage.down(daemon, now_ns, self._watch.outage_reading())

    def _connect(self) -> None:
        self._connecting = False
        self._context = link.new_context()
        self._dealer = link.connect_dealer(
            self._context, self._run_dir.endpoint, link.launcher_identity(self._key)
        )
        self._poller.register(self._dealer, zmq.POLLIN)
        self._tell(wire.Hello(wire.Role.LAUNCHER, 0, 0, os.getpid()))

    def _show(self, now_ns: int) -> None:
        host = self._watch.host
        if self._life.phase is Phase.RUNNING:
            seconds = (now_ns - self._life.start_ns) / S
            elapsed = f"{seconds:.0f} of {self._topology.run.seconds:g} s"
            if self.outcome.at_stop is not None:
                done, tasks = self._watch.tasks_done()
                elapsed = f"stopped, {done} of {tasks} tasks are done"
            restarts = self._restarts_before + self._life.restarts
            kills = self._chaos.kills if self._chaos is not None else None
            self._progress.update(self._live.line(now_ns, elapsed, restarts, kills))
        elif self._life.phase is Phase.STARTING:
            self._progress.update(self._starting)
        else:
            swapped = f"{host(HostCounter.SWAP_IN_PAGES)} pages in, {host(HostCounter.SWAP_OUT_PAGES)} out"
            self._progress.update(f"{self._life.phase.value}, {swapped}")

    # -- the end ----------------------------------------------------------------------------------------------------------
    def tear_down(self) -> None:
        """End every process of the run, whatever state it is in, and release the sockets. Bounded."""
        try:
            self._wake_stopped()
            if not self.outcome.orderly:
                self._hear_who_else_died()
            self._deaths.leaving = True
            if not self._zygote_gone:
                self._let_leave() if self.outcome.orderly else self._abort()
        finally:
            if not self._zygote_gone:
                self._zygote.stop(ZYGOTE_STOP_S)
            self._reap_orphans()
            _subreaper(on=self._subreaper_before)
            if self._dealer is not None:
                self._dealer.close(linger=0)
            if self._context is not None:
                self._context.term()

    def _hear_who_else_died(self) -> None:
        """Name those, too, that died together with the first one, before anybody is told to leave."""
        if not self._deaths.died:
            return
        self._hear_reports(TOGETHER_S, lambda: True)
        self.outcome.blamed = list(self._deaths.died)
        self.outcome.ended = self._deaths.text()

    def _wake_stopped(self) -> None:
        """A process that stands still could not leave by itself."""
        if self._chaos is None or self._zygote_gone:
            return
        self._chaos.look()
        alive = {(child.role, child.number): pid for child, pid in self._life.pids.items()}
        for who in self._chaos.over(FOREVER_NS):
            if (pid := alive.get(who)) is not None:
                self._zygote.kill(pid, signal.SIGCONT)

    def _let_leave(self) -> None:
        """Say goodbye and give the processes time to write down what they know."""
        self._tell(wire.Bye(0))
        bound_s = LEAVE_ORDERLY_S + LEAVE_EACH_S * len(self._life.pids)
        self._hear_reports(bound_s, lambda: bool(self._life.pids))
        if self._life.pids:
            names = sorted(child.name for child in self._life.pids)
            more = f" and {len(names) - LEFT_NAMED_MAX} more" if len(names) > LEFT_NAMED_MAX else ""
            self.outcome.details.append(
                f"killed, since they did not leave by themselves: {', '.join(names[:LEFT_NAMED_MAX])}{more}"
            )

    def _abort(self) -> None:
        """After a failure the host has something to write down. All others are killed at once: hundreds of vCPUs that are woken to leave
        by themselves would take seconds.
        """
        host = Child("host", 0, 0)
        for child, pid in self._life.pids.items():
            if child != host:
                self._zygote.kill(pid)
        self._resources.segments["control"].u64[CTL_ABORT] = 1
        self._tell(wire.Bye(0))
        self._hear_reports(LEAVE_ABORT_S, lambda: host in self._life.pids)

    def _hear_reports(self, timeout_s: float, wanted: Callable[[], bool]) -> None:
        """Only the zygote's reports, as long as they are wanted: the dealer and the signals do not matter any more."""
        deadline_s = time.monotonic() + timeout_s
        while wanted() and not self._zygote_gone and (left_s := deadline_s - time.monotonic()) > 0:
            if self._zygote.wait_report(left_s):
                self._hear_zygote()

    def _reap_orphans(self) -> None:
        """Processes of a zygote that was killed are ours now: they are dead or about to be, and must not stay as zombies."""
        deadline_s = time.monotonic() + ORPHANS_S
        while (left := _children() - self._children_before - {self._zygote.pid}) and (
            time.monotonic() < deadline_s
        ):
            for pid in left:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, os.WNOHANG)
            time.sleep(ORPHAN_POLL_S)


def _children() -> set[int]:
    """Children of this process, zombies too."""
    found: set[int] = set()
    for path in Path("/proc/self/task").glob("*/children"):
        found.update(map(int, path.read_text().split()))
    return found


def _subreaper(*, on: bool) -> bool:
    """Whether orphaned descendants become children of this process, from now on; returns what was so before."""
    libc: Any = ctypes.CDLL(None, use_errno=True)
    before = ctypes.c_int()
    if (
        libc.prctl(PR_GET_CHILD_SUBREAPER, ctypes.byref(before), 0, 0, 0) != 0
        or libc.prctl(PR_SET_CHILD_SUBREAPER, int(on), 0, 0, 0) != 0
    ):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")
    return bool(before.value)
