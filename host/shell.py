"""The host process: one loop that turns messages and timers into events, and effects into messages.

It owns the machines (one per vCPU, the vm machine, the swap machine) and routes events between them. What it does not do itself belongs
to its parts: sockets, links to daemons, the run's clock, deadlines of vCPUs, images. Each has its own messages and effects, and the tables
of the shell are made of theirs. It decides nothing about pages or faults.

Invariants: bad input never ends it: a message that cannot be decoded, comes from a stranger, or does not fit the sender's state is counted
and answered with NACK. Our own bugs (MachineError) do end it, loudly.

Not handled here: daemons (host/daemon_links.py, host/remote.py), barrier, stop and end (host/run_clock.py), images (host/image.py),
sockets (host/sockets.py), who may speak at all (host/peers.py).
"""

from __future__ import annotations

import gc
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any, Final

import numpy as np

from host import events as ev
from host.daemon_links import DaemonLinks
from host.image import Images
from host.logged import Recording, start_recording
from host.machine_reset import MachineReset, from_command
from host.notices import notices
from host.outbox import RETRY_MS, Outbox
from host.peers import Handler, Peer, Peers, observe, only_launcher
from host.remote import RemoteDaemons
from host.run_clock import RunClock
from host.setup import ShellObserver, build_machines, host_memory, vcpus_of_vms
from host.sockets import HostSockets
from host.timers import Timers
from proto import atomics, link, wire
from proto.layout import CTL_ABORT, VP_DOORBELL
from proto.machine import Machine
from proto.run import PROC_HOST, RunContext
from proto.stats import HostCounter, host_block
from proto.units import WORDS_PER_PAGE
from proto.wire import Message, Nack, WireError

DRAIN_MAX: Final = 64
"""Messages taken before the effects go out: bounds how long an answer may wait for its batch."""
GRACE_POLL_MS: Final = 1
IDLE_POLL_NS: Final = 200_000_000
GAUGES_EVERY_NS: Final = 50_000_000
PING_EVERY_NS: Final = 500_000_000
_EXIT_REASONS: Final = frozenset(int(r) for r in wire.ExitReason)


class HostShell:
    """See the module docstring. `loop` returns when the launcher says BYE or the run is aborted."""

    def __init__(self, ctx: RunContext) -> None:
        self._opened = ExitStack()
        """What `close` gives back, the last one first, whatever fails meanwhile."""
        try:
            self._build(ctx)
        except BaseException:
            self._opened.close()
            raise

    # -- its parts -----------------------------------------------------------------------------------------
    def _build(self, ctx: RunContext) -> None:
        self.ctx = ctx
        self.topology = ctx.topology
        self.control = ctx.segments["control"].u64
        self.vcpu_pages = ctx.segments["vcpus"].u64
        self.writer = ctx.trace("host", PROC_HOST)
        self._opened.callback(self.writer.close)
        self.obs = ShellObserver(host_block(ctx.segments["stats"].u64), self.writer)
        self.routed: deque[tuple[Any, Any]] = deque()
        self.leaving = False
        self.launcher = link.launcher_identity(ctx.key)
        self.cpu_identity = [link.vcpu_identity(cpu, ctx.key) for cpu in range(self.topology.total_vcpus)]
        self.peers = Peers(ctx.key)
        self.outbox = Outbox(self.send)
        self._on: Callable[[Machine, tuple[Any, ...], int], list[Any]] = Machine.on
        """Calls a machine: plainly, or written down."""
        self._machines()
        self.resets = MachineReset(vcpus_of_vms(ctx))
        self.clock = RunClock(self)
        self.timers = Timers(len(self.vcpus))
        self.links = self._links()
        self.clock.on_start.append(self.links.start_models)
        # A run that needs no page from a daemon that nobody has ever reached would end as if all were well.
        self.clock.may_begin = self.links.all_met
        self.links.on_up.append(self.clock.open_when_due)
        self.images = Images(self)
        self.links.on_up.append(self.images.daemon_up)
        self._opened.callback(self.images.close)
        self._sockets()
        self.next_ping_ns = 0
        self.next_gauge_ns = 0
        self._tables()

    def _machines(self) -> None:
        ctx = self.ctx
        self.memory = host_memory(ctx)
        slots = [file.slots for file in ctx.swap_files]
        self.recording: Recording | None = None
        if ctx.log_inputs:
            folder = ctx.run_dir / ctx.log_inputs
            self.recording = start_recording(folder, ctx.run_id, self.topology, slots, self.memory, self.obs)
            self._opened.callback(self.recording.log.close)
            self.vm, self.swap, self.vcpus = self.recording.machines
            self._on = self.recording.recorder.on
        else:
            self.vm, self.swap, self.vcpus = build_machines(self.topology, slots, self.memory, self.obs)

    def _links(self) -> DaemonLinks:
        return DaemonLinks(self)

    def _sockets(self) -> None:
        self.sockets = HostSockets(self.ctx, self._opened)
        slots = [file.slots for file in self.ctx.swap_files]
        self.remote = RemoteDaemons(self, self.sockets.context, self.sockets.poller, slots)
        self._opened.callback(self.remote.close)

    def _tables(self) -> None:
        self._effects: dict[type[Any], Callable[[Any], None]] = {
            ev.Enter: self._enter,
            ev.KickVcpu: self._kick,
            ev.SetTimer: self.timers.set,
            ev.SendIpi: self._ipi,
            ev.ResetMachine: lambda e: self._to_vcpus(self.resets.begin(e.vm, e.cpu)),
            ev.WasReset: lambda e: self._to_vcpus(self.resets.was_reset(e.cpu)),
            ev.MemslotsSet: lambda _: None,
            ev.MemoryShort: self._memory_short,
            **dict.fromkeys((ev.Answer, ev.Fetched), lambda e: self.routed.append((self.vcpus[e.cpu], e))),
            **dict.fromkeys(
                (
                    *(ev.GetPage, ev.Translate, ev.Fetch, ev.CancelFetch, ev.GuestRead32, ev.GuestWrite32),
                    *(ev.CancelPage, ev.ReleasePages, ev.MemoryGiven, ev.NoticeLost),
                    *(ev.SwapInDone, ev.SwapOutDone, ev.LendFrame, ev.FrameBack, ev.SlotsLost),
                    *(ev.ReadCancelled, ev.WritesStand),
                ),
                self._to_vm,
            ),
            **dict.fromkeys(
                (ev.SwapIn, ev.SwapInBad, ev.SwapOut, ev.SlotFree, ev.FrameLent, ev.CancelRead), self._to_swap
            ),
            **self.links.effects,
            **self.clock.effects,
            **self.images.effects,
        }
        self._messages: dict[type[Any], Handler] = {
            wire.Hello: self._hello,
            wire.Exit: self._exit,
            wire.NackMsg: self._nacked,
            wire.Bye: self._bye,
            **self.links.messages,
            **self.clock.messages,
            **self.images.messages,
        }

    # -- the loop ------------------------------------------------------------------------------------------
    def loop(self) -> None:
        """Until BYE or abort."""
        while not self.leaving and not self.control[CTL_ABORT]:
            self.once()

    def once(self) -> None:
        """Wait for something, and do what it wants."""
        if self.sockets.wait(self._timeout_ms(time.monotonic_ns())):
            self._drain()
            self.remote.drain()
            for _ in range(self.sockets.turn_away()):
                self.obs.bad_message(None, Nack.STRANGER, 0)
        now = time.monotonic_ns()
        if self.outbox:
            self.outbox.retry()
        self._due(now)
        if self.vm.grace_pending:
            self.feed(self.vm, ev.LookAtGrace())
        self.images.turn()
        self._route()
        self.links.flush()

    def _timeout_ms(self, now: int) -> int:
        if self.images.busy:
            return 0
        if self.vm.grace_pending:
            return GRACE_POLL_MS
        if self.outbox:
            return RETRY_MS
        due = now + IDLE_POLL_NS
        if (timer_ns := self.timers.next_ns()) is not None:
            due = min(due, timer_ns)
        if (hedge_ns := self.swap.next_hedge_ns) > 0:
            due = min(due, hedge_ns)
        if self.clock.measures:
            due = min(due, self.clock.next_ns(now))
        return max(0, -(-(due - now) // 1_000_000))

    def _drain(self) -> None:
        for _ in range(DRAIN_MAX):
            parts = self.sockets.take()
            if parts is None:
                return
            self._receive(parts)
            self._route()

    def _due(self, now: int) -> None:
        for event in self.timers.due(now):
            self.feed(self.vcpus[event.cpu], event)
        if self.clock.measures:
            self.clock.turn(now)
        if now >= self.next_gauge_ns:
            self.next_gauge_ns = now + GAUGES_EVERY_NS
            self.obs.gauge(HostCounter.FRAMES_FREE, self.vm.frames.free_count)
            self.obs.gauge(HostCounter.SLOTS_USED, self.swap.slots_used)
            self.obs.gauge(HostCounter.OUTSTANDING, self.swap.outstanding)
            self.writer.tick()
            if self.recording is not None:
                self.recording.log.flush()
        if now >= self.next_ping_ns:
            self.next_ping_ns = now + PING_EVERY_NS
            self._heartbeat(now)
            if self.swap.outstanding:
                self.feed(self.swap, ev.LookAtRequests())
        elif 0 < self.swap.next_hedge_ns <= now:
            self.feed(self.swap, ev.LookAtRequests())

    def _heartbeat(self, now: int) -> None:
        for number in range(len(self.links.daemons)):
            if number in self.remote.daemons:
                self.remote.heartbeat(number, now)
            else:
                self.links.heartbeat(number)

    # -- routing -------------------------------------------------------------------------------------------
    def feed(self, machine: Any, event: Any) -> None:
        """Give a machine an event, at the next `_route`."""
        self.routed.append((machine, event))

    def _route(self) -> None:
        """Hand events to machines and perform what they answer, until nobody has anything to say."""
        now = time.monotonic_ns()
        routed, effects, on = self.routed, self._effects, self._on
        while routed:
            machine, event = routed.popleft()
            for effect in on(machine, (event,), now):
                effects[type(effect)](effect)

    def _to_vm(self, event: Any) -> None:
        self.routed.append((self.vm, event))

    def _to_swap(self, event: Any) -> None:
        self.routed.append((self.swap, event))

    def _to_vcpus(self, events: Iterable[Any]) -> None:
        for event in events:
            self.feed(self.vcpus[event.cpu], event)

    def _ipi(self, effect: ev.SendIpi) -> None:
        if effect.target < self.topology.vm[effect.vm].vcpus:
            cpu = self.ctx.first_cpu(effect.vm) + effect.target
            self.feed(self.vcpus[cpu], from_command(cpu, effect.vector))

    def _memory_short(self, effect: ev.MemoryShort) -> None:
        for event in notices(effect, self.vcpus):
            self.feed(self.vm if type(event) is ev.NoticeLost else self.vcpus[event.cpu], event)

    # -- receiving -----------------------------------------------------------------------------------------
    def _receive(self, parts: list[bytes]) -> None:
        identity = parts[0]
        peer = self.peers.of(identity)
        if peer is None or len(parts) < 2:
            self.refuse(peer, identity, WireError(Nack.STRANGER, "not a peer of this run"))
            return
        try:
            message = wire.decode(parts[1])
        except WireError as error:
            self.refuse(peer, identity, error)
            return
        try:
            self.dispatch(peer, identity, message, parts[2:])
        except WireError as error:
            error.kind = error.kind or wire.kind_of(message)
            self.refuse(peer, identity, error)

    def dispatch(self, peer: Peer, identity: bytes, message: Message, extra: Sequence[bytes]) -> None:
        """Handle a message of a peer. WireError for what the peer may not say."""
        self._messages.get(type(message), self._not_expected)(peer, identity, message, extra)

    def refuse(self, peer: Peer | None, identity: bytes, error: WireError) -> None:
        """Count what a peer must not say, and tell it."""
        self.obs.bad_message(peer, error.code, error.kind)
        self.send(identity, wire.NackMsg(error.code, error.kind, error.text))

    def _not_expected(self, peer: Peer, identity: bytes, message: Message, extra: Sequence[bytes]) -> None:
        raise WireError(Nack.NOT_EXPECTED, f"{type(message).__name__} is not for the host")

    def _hello(self, peer: Peer, identity: bytes, message: wire.Hello, _: Sequence[bytes]) -> None:
        kind, number, epoch = peer
        if kind == "L":
            self.outbox.put(identity, wire.HostReady(os.getpid()))
            self.images.begin()
        elif kind == "V" and message.role == wire.Role.VCPU and number < len(self.vcpus):
            if not self.images.holds(number):
                self.outbox.put(identity, wire.Welcome(0, 0))
        elif kind == "S" and message.role == wire.Role.SWAPD and self.links.is_ours(number):
            self.links.hello(number, epoch, identity)
        else:
            raise WireError(Nack.STRANGER, f"no {kind}{number} in this run")

    def _exit(self, peer: Peer, identity: bytes, message: wire.Exit, _: Sequence[bytes]) -> None:
        kind, cpu, _epoch = peer
        if kind != "V" or cpu >= len(self.vcpus):
            raise WireError(Nack.STRANGER, "EXIT from a peer that is no vCPU")
        machine = self.vcpus[cpu]
        if not machine.expects_exit():
            raise WireError(Nack.NOT_EXPECTED, f"vCPU {cpu} was not entered", wire.Kind.EXIT)
        if message.reason not in _EXIT_REASONS:
            raise WireError(Nack.FIELD, f"exit reason {message.reason} is unknown", wire.Kind.EXIT)
        observe(self.writer, message)
        self.feed(machine, ev.ExitTaken(message))

    def _nacked(self, peer: Peer, identity: bytes, message: wire.NackMsg, _: Sequence[bytes]) -> None:
        """A peer dropped something of ours: counted; what it was about is re-sent or timed out by its own rules."""
        self.obs.bad_message(peer, message.code, message.kind, ours=True)

    def _bye(self, peer: Peer, identity: bytes, message: wire.Bye, _: Sequence[bytes]) -> None:
        only_launcher(peer)
        for identity_of in self.cpu_identity:
            self.send(identity_of, wire.Bye(0))
        self.links.say_bye()
        self.leaving = True

    # -- sending -------------------------------------------------------------------------------------------
    def send(self, identity: bytes, message: Message, pages: Sequence[memoryview] = ()) -> bool:
        """False when the peer is gone or reads nothing: the protocol's own bounds and re-sends deal with that."""
        if (elsewhere := self.remote.by_name.get(identity)) is not None:
            return elsewhere.send(message, pages)
        return self.sockets.send(identity, message, pages)

    def to_launcher(self, message: Message) -> None:
        """As soon as it can take it. A run may fail before the launcher has connected: it is told then."""
        self.outbox.put(self.launcher, message)

    def to_vcpu(self, cpu: int, message: wire.Entry | wire.Save | wire.Registers) -> None:
        """As the next event of this process."""
        self.writer.lamport += 1
        self.outbox.put(self.cpu_identity[cpu], message._replace(lamport=self.writer.lamport))

    def _enter(self, effect: ev.Enter) -> None:
        self.to_vcpu(effect.cpu, effect.record)

    def _kick(self, effect: ev.KickVcpu) -> None:
        """Send first, then ring: a vCPU that sees the bell will find the message."""
        self.writer.lamport += 1
        bell = effect.cpu * WORDS_PER_PAGE + VP_DOORBELL
        self.outbox.put(
            self.cpu_identity[effect.cpu],
            wire.Kick(self.writer.lamport, effect.request),
            lambda: self._ring(bell),
        )

    def _ring(self, bell: int) -> None:
        atomics.py_add(self.vcpu_pages, bell, np.uint64(1))

    def close(self) -> None:
        """Sockets, trace file, input log, images."""
        self._opened.close()


def warm() -> None:
    """Call every kernel of the host once per signature (in the zygote, before the fork)."""
    from host.warm import warm_host  # noqa: PLC0415 - builds arrays that only the zygote needs

    warm_host()


def _shell_of(ctx: RunContext) -> HostShell:
    if "faults" not in ctx.segments:
        return HostShell(ctx)
    from host.faulty_shell import FaultyShell  # noqa: PLC0415 - which is made of the class above

    return FaultyShell(ctx)


def main(ctx: RunContext) -> None:
    """Entry point of the host process."""
    shell = _shell_of(ctx)
    gc.freeze()
    try:
        shell.loop()
    finally:
        shell.close()
