"""The loop that watches a run: one poller over zygote, host, signals and timers; decisions come from launcher/lifecycle.py.

Purpose: turn what happens into events of the `Lifecycle`, perform its effects, and take everything down at the end.

Invariants: `tear_down` may be called at any time and leaves no process of the run; every wait is bounded.

Not handled here: creating what the run needs (launcher/execute.py), samples for the summary (launcher/outcome.py), the link to the host
(launcher/host_link.py), processes without their zygote (launcher/orphans.py), files, results.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterable
from typing import Final

import zmq

from launcher import kernel_cache
from launcher.blame import Blamed, Deaths
from launcher.chaos import Chaos
from launcher.host_link import HostLink
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
from launcher.orphans import Orphans
from launcher.outcome import Outcome, Samples
from launcher.progress import Progress
from launcher.resources import Resources
from launcher.rundir import RunDir
from launcher.runfile import usable_cores
from launcher.signals import Signals
from launcher.watch import Watch
from launcher.zygote_link import Child, Exited, Forked, Gone, Ready, Zygote, describe_exit, describe_status
from proto import wire
from proto.faults import FOREVER_NS
from proto.layout import CTL_ABORT
from proto.pcpu import Pcpu
from proto.stats import HostCounter
from proto.topology import Topology
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
        self._resources = resources
        self._signals = signals
        self._signals_seen = signals.count if signals_seen is None else signals_seen
        self._progress = progress
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
        self._watch = Watch(resources.segments, [vm.vcpus for vm in topology.vm], len(topology.swapd))
        self._live = Live(self._watch)
        self._samples = Samples(self.outcome, self._watch, lambda: self._life.pids, zygote.pid, began_ns)
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
        self._poller = zmq.Poller()
        self._poller.register(zygote.fileno(), zmq.POLLIN)
        self._poller.register(signals.fileno(), zmq.POLLIN)
        self._link = HostLink(run_dir, key, self._poller)
        self._orphans = Orphans(zygote.pid)

    @property
    def _is_saving(self) -> bool:
        return self._life.phase is Phase.SAVING

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
        self._hear_host()
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
        if self._link.expected:
            return CONNECT_TICK_MS
        now_ns = time.monotonic_ns()
        stop_near = (
            self.outcome.at_start is not None
            and self.outcome.at_stop is None
            and now_ns + TICK_MS * MS > self._life.start_ns + int(self._topology.run.seconds * S)
        )
        if self._life.phase is Phase.RUNNING and 0 < self._life.save_due_ns < now_ns + TICK_MS * MS:
            return max(0, -(-(self._life.save_due_ns - now_ns) // MS))
        booting = self.outcome.started_in_s is None and self._link.is_there
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

    def _hear_host(self) -> None:
        for message in self._link.hear():
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
                        self._link.expected = True
                case Exited(child, pid, status):
                    self._look_at_faults()
                    how = self._life.how(child.name, describe_status(status))
                    self._deaths.note(Blamed(child, how, now_ns, pid))
                    if self._chaos is not None:
                        self._chaos.ended(child.role, child.number)
                    if child.role == "swapd" and self._life.phase is not Phase.OVER:
                        self._samples.daemon_down(child.number, child.epoch, now_ns, saving=self._is_saving)
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
                    if not self._link.tell(message):
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
        self._link.look()
        if self.outcome.started_in_s is None and self._link.is_there and self._watch.all_booted():
            self._samples.started(now_ns)
        if now_ns - self._stall_checked_ns > STALL_CHECK_NS:
            self._stall_checked_ns = now_ns
            self._perform(self._life.on_stalled(self._pcpu.stalled(now_ns, STALL_NS)))
            self._perform(self._life.on_connected(self._watch.epochs(), now_ns))
        self._samples.turn(now_ns, saving=self._is_saving)
        if self.outcome.at_start is not None and self._chaos is not None:
            self._on_faults(self._chaos, now_ns)
        if self._progress.due():
            self._show(now_ns)

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

    def _barrier_opened(self, now_ns: int) -> None:
        self._samples.begin(now_ns, self._life.start_ns, self._topology.run.seconds)
        if self._resumed:
            self._run_dir.image.unlink(missing_ok=True)
        self._live.begin(now_ns)
        self._progress.phase("running")

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
            self._orphans.reap()
            self._link.close()
            self.outcome.bad_messages += self._link.bad_messages

    def _hear_who_else_died(self) -> None:
        """Name those, too, that died together with the first one, before anybody is told to leave."""
        blamed, died = self.outcome.blamed, self._deaths.died
        if not blamed or blamed[0] not in died:
            return  # something else ended it
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
        self._link.tell(wire.Bye(0))
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
        self._link.tell(wire.Bye(0))
        self._hear_reports(LEAVE_ABORT_S, lambda: host in self._life.pids)

    def _hear_reports(self, timeout_s: float, wanted: Callable[[], bool]) -> None:
        """Only the zygote's reports, as long as they are wanted: the dealer and the signals do not matter any more."""
        deadline_s = time.monotonic() + timeout_s
        while wanted() and not self._zygote_gone and (left_s := deadline_s - time.monotonic()) > 0:
            if self._zygote.wait_report(left_s):
                self._hear_zygote()
