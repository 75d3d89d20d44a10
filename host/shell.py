"""The host process: one loop that turns messages and timers into events, and effects into messages.

It owns the machines (one per vCPU, the vm machine, the swap machine), the ROUTER socket, the timers and the run's clock (barrier,
stop, end). It decides nothing about pages or faults.

Bad input never ends it: a message that cannot be decoded, comes from a stranger, or does not fit the sender's state is counted and
answered with NACK. Our own bugs (MachineError) do end it, loudly.
"""

from __future__ import annotations

import gc
import heapq
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import numpy as np
import zmq

from host import events as ev
from host.image import Restoring, Saving
from host.logged import Recording, start_recording
from host.machine_reset import MachineReset, from_command
from host.memory import HostMemory, VmMemory
from host.notices import notices
from host.outbox import RETRY_MS, Outbox
from host.remote import RemoteDaemons
from host.schedule import Guest, Schedule
from host.setup import ShellObserver, build_machines, memslots
from host.swap import op_of
from proto import atomics, link, wire
from proto.door import Door, guard_with_password
from proto.layout import (
    CTL_ABORT,
    CTL_BARRIER,
    CTL_START_NS,
    CTL_STOP,
    K_TASKS,
    VP_DOORBELL,
)
from proto.lives import Where
from proto.machine import Machine
from proto.run import PROC_HOST, RunContext
from proto.stats import HostCounter, host_block
from proto.trace import Kind
from proto.units import PAGE_SIZE
from proto.wire import OP_READ, OP_WRITE, Message, Nack, WireError

DRAIN_MAX: Final = 64
"""Messages taken before the effects go out: bounds how long an answer may wait for its batch."""
GRACE_POLL_MS: Final = 1
EVENT_POLL_MS: Final = 5
"""How often it is looked whether a guest has done what the schedule wants of it."""
IDLE_POLL_MS: Final = 200
GAUGES_EVERY_NS: Final = 50_000_000
PING_EVERY_NS: Final = 500_000_000
PONG_BOUND_NS: Final = 5_000_000_000
"""A daemon that answers no heartbeat for this long is reported for a restart: ten beats, far above any scheduling delay seen."""
LAMPORT_LEAP_MAX: Final = 1 << 36
"""Events that a peer may have recorded since its last message: a million each second for 19 hours."""
GONE_TEXT_MAX: Final = 300
"""Of the reason why a daemon is gone, where more is said in the same message."""
TIMERS_PER_VCPU: Final = 64
"""Timers kept before those that were armed anew are thrown away."""
WORDS: Final = 512


class Daemon:
    """What the shell knows of a daemon's link."""

    __slots__ = (
        "early",
        "epoch",
        "fenced",
        "gone",
        "identity",
        "last_pong_ns",
        "next_epoch",
        "pages_in_messages",
        "ping_nonce",
        "reported",
        "up",
    )

    def __init__(self, pages_in_messages: bool) -> None:
        self.pages_in_messages = pages_in_messages
        self.identity = b""
        self.epoch = -1
        self.up = False
        self.fenced = True
        self.next_epoch = 0
        """The only epoch that may say HELLO next: the launcher counts them, one by one."""
        self.early: tuple[bytes, int] | None = None
        """(identity, epoch) of a successor that said HELLO before the fence of this one was reported."""
        self.last_pong_ns = 0
        self.ping_nonce = 0
        self.reported = False
        self.gone = ""
        """Why it never comes back."""


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

    def _build(self, ctx: RunContext) -> None:
        self.ctx = ctx
        self.topology = ctx.topology
        self.control = ctx.segments["control"].u64
        self.vcpu_pages = ctx.segments["vcpus"].u64
        self.writer = ctx.trace("host", PROC_HOST)
        self._opened.callback(self.writer.close)
        self.obs = ShellObserver(host_block(ctx.segments["stats"].u64), self.writer)
        self._on: Callable[[Machine, tuple[Any, ...], int], list[Any]] = Machine.on
        """Calls a machine: plainly, or written down."""
        self._machines()
        self.saving: Saving | None = None
        self.restoring: Restoring | None = None
        if ctx.image:
            self.restoring = Restoring(self, Path(ctx.image), self._feed, self._to_launcher)
            self._opened.callback(self.restoring.close)
        self._sockets()
        self.outbox = Outbox(self._send)
        self.timers: list[tuple[int, int, int]] = []
        self.routed: deque[tuple[Any, Any]] = deque()
        self.io: dict[int, list[ev.SendIo]] = {}
        self.at_barrier: dict[int, int] = {}
        self.powered_down = 0
        self.start_ns = 0
        self.stop_at_ns = 0
        self.started = False
        self.stopped = False
        self.finished = False
        self.leaving = False
        self.launcher: bytes | None = None
        self.peers: dict[bytes, tuple[str, int, int]] = {}
        self.next_ping_ns = 0
        self.next_gauge_ns = 0
        self.cpu_identity = [link.vcpu_identity(cpu, ctx.key) for cpu in range(self.topology.total_vcpus)]
        self._effects: dict[type[Any], Callable[[Any], None]] = {
            ev.Enter: self._enter,
            ev.KickVcpu: self._kick,
            ev.SetTimer: self._set_timer,
            ev.SendIpi: self._ipi,
            ev.AtBarrier: self._at_barrier,
            ev.PoweredDown: self._powered_down,
            ev.ResetMachine: lambda e: self._to_vcpus(self.resets.begin(e.vm, e.cpu)),
            ev.WasReset: lambda e: self._to_vcpus(self.resets.was_reset(e.cpu)),
            ev.MemslotsSet: lambda _: None,
            ev.SendIo: lambda e: self.io.setdefault(e.daemon, []).append(e),
            ev.GetPage: self._to_vm,
            ev.Translate: self._to_vm,
            ev.Fetch: self._to_vm,
            ev.CancelFetch: self._to_vm,
            ev.GuestRead32: self._to_vm,
            ev.GuestWrite32: self._to_vm,
            ev.Answer: lambda e: self.routed.append((self.vcpus[e.cpu], e)),
            ev.Fetched: lambda e: self.routed.append((self.vcpus[e.cpu], e)),
            ev.MemoryShort: self._memory_short,
            ev.OutOfMemory: self._out_of_memory,
            **dict.fromkeys(
                (ev.SwapIn, ev.SwapInBad, ev.SwapOut, ev.SlotFree, ev.FrameLent, ev.CancelRead), self._to_swap
            ),
            **dict.fromkeys(
                (ev.SwapInDone, ev.SwapOutDone, ev.LendFrame, ev.FrameBack, ev.SlotsLost, ev.ReadCancelled),
                self._to_vm,
            ),
            **dict.fromkeys((ev.CancelPage, ev.ReleasePages, ev.MemoryGiven, ev.NoticeLost), self._to_vm),
            ev.PagesLost: self._pages_lost,
            **self._image_effects(),
        }
        self._messages: dict[
            type[Any], Callable[[tuple[str, int, int], bytes, Any, Sequence[bytes]], None]
        ] = {
            wire.Hello: self._hello,
            wire.Exit: self._exit,
            wire.IoDone: self._io_done,
            wire.Pong: self._pong,
            wire.NackMsg: self._nacked,
            wire.DaemonDown: self._daemon_down,
            wire.DaemonFenced: self._daemon_fenced,
            wire.DaemonGone: self._daemon_gone,
            wire.Stop: self._stop_message,
            wire.Bye: self._bye,
            wire.SaveVm: self._save_vm,
            wire.Registers: self._registers,
        }

    def _machines(self) -> None:
        topology, segments = self.topology, self.ctx.segments
        vms = [
            VmMemory(
                segments[f"npt-{v}"].u64,
                self.control[(1 + v) * WORDS : (2 + v) * WORDS],
                self.ctx.first_cpu(v),
                vm.vcpus,
            )
            for v, vm in enumerate(topology.vm)
        ]
        self.memory = HostMemory(segments["frames"].u64, self.vcpu_pages, vms)
        slots = [file.slots for file in self.ctx.swap_files]
        self.recording: Recording | None = None
        if self.ctx.log_inputs:
            self.recording = start_recording(
                self.ctx.run_dir / self.ctx.log_inputs,
                self.ctx.run_id,
                topology,
                slots,
                self.memory,
                self.obs,
            )
            self._opened.callback(self.recording.log.close)
            self.vm, self.swap, self.vcpus = self.recording.machines
            self._on = self.recording.recorder.on
        else:
            self.vm, self.swap, self.vcpus = build_machines(topology, slots, self.memory, self.obs)
        cpus = range(topology.total_vcpus)
        self.resets = MachineReset(
            [[c for c in cpus if self.ctx.vm_of_cpu(c)[0] == v] for v in range(len(vms))]
        )
        guests = [
            Guest(vm.vmc, segments[f"kernel-{v}"].u64, slot.base_hvp + slot.pages)
            for v, (vm, slot) in enumerate(zip(vms, memslots(topology), strict=True))
        ]
        self.schedule = Schedule(topology.event, guests, self.vm.slots, self.resets)
        self.obs.gauge(HostCounter.EVENTS_SCHEDULED, len(topology.event))
        self.daemons = [Daemon(d.transport == "tcp" or bool(d.connect)) for d in topology.swapd]

    def _sockets(self) -> None:
        link.raise_descriptor_limit(64 + 4 * self.topology.total_vcpus)
        self.context = link.new_context()
        self._opened.callback(self.context.destroy)
        self.router = link.bind_router(self.context, self.ctx.endpoint)
        self.poller = zmq.Poller()
        self.poller.register(self.router, zmq.POLLIN)
        self.door: Door | None = None
        if self.ctx.tcp_endpoint:
            # Every user of the machine can connect to the port; the ipc socket lies in a directory of the user's own.
            self.door = Door(self.context, password=link.tcp_password(self.ctx.key))
            self.poller.register(self.door.socket, zmq.POLLIN)
            guard_with_password(self.router)
            self.router.bind(self.ctx.tcp_endpoint)
        slots = [file.slots for file in self.ctx.swap_files]
        self.remote = RemoteDaemons(
            self,
            self.context,
            self.poller,
            self.topology,
            slots,
            self._feed,
            lambda why: self._to_launcher(wire.Failed(why)),
            self.give_up,
        )
        self._opened.callback(self.remote.close)

    # -- the loop ------------------------------------------------------------------------------------------
    def loop(self) -> None:
        """Until BYE or abort."""
        while not self.leaving and not self.control[CTL_ABORT]:
            self.once()

    def once(self) -> None:
        """Wait for something, and do what it wants."""
        now = time.monotonic_ns()
        if self.poller.poll(self._timeout_ms(now)):
            self._drain()
            self.remote.drain()
            if self.door is not None and (refused := self.door.answer()):
                self.obs.count(HostCounter.BAD_MESSAGES, len(refused))
        now = time.monotonic_ns()
        if self.outbox:
            self.outbox.retry()
        self._due(now)
        if self.vm.grace_pending:
            self._feed(self.vm, ev.LookAtGrace())
        if (image := self.saving or self.restoring) is not None:
            image.turn()
        self._route()
        if self.io:
            self._send_io()

    def _timeout_ms(self, now: int) -> int:
        image = self.saving or self.restoring
        if image is not None and image.busy:
            return 0
        if self.vm.grace_pending:
            return GRACE_POLL_MS
        if self.outbox:
            return RETRY_MS
        due = now + IDLE_POLL_MS * 1_000_000
        if self.timers:
            due = min(due, self.timers[0][0])
        if (hedge_ns := self.swap.next_hedge_ns) > 0:
            due = min(due, hedge_ns)
        if self.started and not self.stopped:
            due = min(due, self.stop_at_ns)
            if self.schedule.open:
                due = min(due, now + EVENT_POLL_MS * 1_000_000)
            elif (next_ns := self.schedule.next_ns()) is not None:
                due = min(due, self.start_ns + next_ns)
        return max(0, -(-(due - now) // 1_000_000))

    def _drain(self) -> None:
        router = self.router
        for _ in range(DRAIN_MAX):
            try:
                parts = [router.recv(zmq.NOBLOCK)]
            except zmq.Again:
                return
            while router.get(zmq.RCVMORE):
                parts.append(router.recv())
            self._receive(parts)
            self._route()

    def _due(self, now: int) -> None:
        while self.timers and self.timers[0][0] <= now:
            _, cpu, generation = heapq.heappop(self.timers)
            self._feed(self.vcpus[cpu], ev.TimerDue(cpu, generation))
        if self.started and not self.stopped:
            self._scheduled(now)
            if now >= self.stop_at_ns:
                self._stop("time")
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
                self._feed(self.swap, ev.LookAtRequests())
        elif 0 < self.swap.next_hedge_ns <= now:
            self._feed(self.swap, ev.LookAtRequests())

    def _scheduled(self, now: int) -> None:
        """Begin what the topology wants now, count what has come to its end."""
        for action in self.schedule.step(now - self.start_ns):
            if action.memslots is not None:
                self._feed(self.vm, action.memslots)
            else:
                self._poke_all(action.vm)
        self.obs.gauge(HostCounter.EVENTS_DONE, self.schedule.done)
        self.obs.gauge(HostCounter.REBOOTS, sum(self.resets.done))

    def _feed(self, machine: Any, event: Any) -> None:
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

    # -- receiving -----------------------------------------------------------------------------------------
    def _receive(self, parts: list[bytes]) -> None:
        identity = parts[0]
        peer = self.peers.get(identity) or self._peer(identity)
        if peer is None or len(parts) < 2:
            self._refuse(identity, WireError(Nack.STRANGER, "not a peer of this run"))
            return
        try:
            self.dispatch(peer, identity, wire.decode(parts[1]), parts[2:])
        except WireError as error:
            self._refuse(identity, error)

    def dispatch(
        self, peer: tuple[str, int, int], identity: bytes, message: Message, extra: Sequence[bytes]
    ) -> None:
        """Handle a message of a peer. WireError for what the peer may not say."""
        self._messages.get(type(message), self._not_expected)(peer, identity, message, extra)

    def _peer(self, identity: bytes) -> tuple[str, int, int] | None:
        """Who has this routing id. Known ones are remembered: a run has some for each process, and strangers have none."""
        peer = link.parse_identity(identity, self.ctx.key)
        if peer is not None:
            self.peers[identity] = peer
        return peer

    def _refuse(self, identity: bytes, error: WireError) -> None:
        self.obs.count(HostCounter.BAD_MESSAGES)
        self._send(identity, wire.NackMsg(error.code, error.kind, error.text))

    def _not_expected(
        self, peer: tuple[str, int, int], identity: bytes, message: Message, extra: Sequence[bytes]
    ) -> None:  # all handlers have these four
        raise WireError(Nack.NOT_EXPECTED, f"{type(message).__name__} is not for the host")

    def _hello(
        self, peer: tuple[str, int, int], identity: bytes, message: wire.Hello, _: Sequence[bytes]
    ) -> None:
        kind, number, epoch = peer
        if kind == "L":
            self.launcher = identity
            self.outbox.put(identity, wire.HostReady(os.getpid()))
            if self.restoring is not None:
                self.restoring.begin()
        elif kind == "V" and message.role == wire.Role.VCPU and number < len(self.vcpus):
            if self.restoring is None:
                self.outbox.put(identity, wire.Welcome(0, 0))
            else:
                self.restoring.hello(number)
        elif kind == "S" and message.role == wire.Role.SWAPD and self._is_ours(number):
            self._daemon_hello(number, epoch, identity)
        else:
            raise WireError(Nack.STRANGER, f"no {kind}{number} in this run")

    def _is_ours(self, number: int) -> bool:
        """Whether the launcher starts that daemon; one elsewhere does not come by itself."""
        return number < len(self.daemons) and number not in self.remote.daemons

    def _daemon_hello(self, number: int, epoch: int, identity: bytes) -> None:
        daemon = self.daemons[number]
        again = epoch == daemon.epoch and daemon.up
        if daemon.gone or (epoch != daemon.next_epoch and not again):
            raise WireError(
                Nack.STALE_EPOCH, f"daemon {number}: epoch {epoch}, {daemon.next_epoch} may come next"
            )
        if again:
            # It asked twice: the first answer was on its way.
            self._send(identity, wire.Welcome(epoch, self._model_on(number)))
        elif daemon.up or not daemon.fenced:
            # It overtook the launcher's reports about its predecessor, which come over another connection.
            daemon.early = identity, epoch
        else:
            self.admit(number, identity, epoch)

    def admit(self, number: int, identity: bytes, epoch: int) -> None:
        """An incarnation of a daemon is up: whatever came before it is fenced."""
        daemon = self.daemons[number]
        daemon.identity, daemon.epoch, daemon.up = identity, epoch, True
        daemon.next_epoch = epoch + 1
        daemon.fenced = False
        daemon.early = None
        daemon.last_pong_ns = time.monotonic_ns()
        daemon.reported = False
        self._send(identity, wire.Welcome(epoch, self._model_on(number)))
        self._feed(self.swap, ev.DaemonUp(number, epoch))

    def _model_on(self, number: int) -> int:
        return int(self.started or not self.topology.swapd[number].model_from_barrier)

    def _exit(
        self, peer: tuple[str, int, int], identity: bytes, message: wire.Exit, _: Sequence[bytes]
    ) -> None:
        kind, cpu, _epoch = peer
        if kind != "V" or cpu >= len(self.vcpus):
            raise WireError(Nack.STRANGER, "EXIT from a peer that is no vCPU")
        machine = self.vcpus[cpu]
        if not machine.expects_exit():
            raise WireError(Nack.NOT_EXPECTED, f"vCPU {cpu} was not entered", wire.Kind.EXIT)
        if message.reason not in _EXIT_REASONS:
            raise WireError(Nack.FIELD, f"exit reason {message.reason} is unknown", wire.Kind.EXIT)
        self._observe(message)
        self._feed(machine, ev.ExitTaken(message))

    def _observe(self, message: wire.Exit | wire.IoDone | wire.Registers) -> None:
        """Later events are ordered after the message. A peer that is ahead of everybody by far would use up the counters of all."""
        if message.lamport > self.writer.lamport + LAMPORT_LEAP_MAX:
            raise WireError(Nack.FIELD, f"{type(message).__name__}: lamport {message.lamport} is far ahead")
        self.writer.observe(message.lamport)

    def _io_done(
        self, peer: tuple[str, int, int], identity: bytes, message: wire.IoDone, extra: Sequence[bytes]
    ) -> None:
        kind, number, epoch = peer
        if kind != "S" or number >= len(self.daemons):
            raise WireError(Nack.STRANGER, "IO_DONE from a peer that is no daemon")
        self._answered(identity, number, epoch, message, extra)

    def _answered(
        self, _identity: bytes, number: int, epoch: int, message: wire.IoDone, extra: Sequence[bytes]
    ) -> None:
        """Answers of a daemon."""
        daemon = self.daemons[number]
        if epoch != daemon.epoch or message.epoch != epoch or not daemon.up:
            self.obs.count(HostCounter.STALE_REPLIES, len(message.records))
            if self._has_just_died(daemon, epoch):
                return
            raise WireError(Nack.STALE_EPOCH, f"epoch {message.epoch}", wire.Kind.IO_DONE)
        self._observe(message)
        daemon.last_pong_ns = time.monotonic_ns()
        if daemon.pages_in_messages and not self._land_pages(number, message, extra):
            raise WireError(Nack.FIELD, "IO_DONE: pages and records do not match", wire.Kind.IO_DONE)
        for request, result, service_ns in message.records.tolist():
            self._feed(self.swap, ev.IoReply(number, epoch, request, result, service_ns))

    @staticmethod
    def _has_just_died(daemon: Daemon, epoch: int) -> bool:
        """Whether this is what an incarnation had said before it died, read after the launcher's report: late, and nobody's fault."""
        return epoch == daemon.epoch and not daemon.up

    def _land_pages(self, number: int, message: wire.IoDone, extra: Sequence[bytes]) -> bool:
        """tcp: copy the pages of good reads into their landing frames; only frames of requests in flight are ever written."""
        pages = iter(extra)
        for request, result, _service in message.records.tolist():
            if op_of(request) != OP_READ or result != PAGE_SIZE:
                continue
            page = next(pages, None)
            if page is None or len(page) != PAGE_SIZE:
                return False
            frame = self.swap.landing_frame(number, request)
            if frame is not None:
                self.memory.write_page(frame, page)
        return next(pages, None) is None

    def _pong(
        self, peer: tuple[str, int, int], identity: bytes, message: wire.Pong, _: Sequence[bytes]
    ) -> None:
        kind, number, epoch = peer
        if kind != "S" or number >= len(self.daemons):
            raise WireError(Nack.STRANGER, "PONG from a peer that is no daemon", wire.Kind.PONG)
        if epoch != self.daemons[number].epoch or not self.daemons[number].up:
            if self._has_just_died(self.daemons[number], epoch):
                return
            raise WireError(Nack.STALE_EPOCH, f"epoch {epoch}", wire.Kind.PONG)
        self.daemons[number].last_pong_ns = time.monotonic_ns()

    def _nacked(
        self, peer: tuple[str, int, int], identity: bytes, message: wire.NackMsg, _: Sequence[bytes]
    ) -> None:
        """A peer dropped something of ours: counted; what it was about is re-sent or timed out by its own rules."""
        self.obs.count(HostCounter.BAD_MESSAGES)

    # -- launcher ------------------------------------------------------------------------------------------
    def _from_launcher(self, peer: tuple[str, int, int], number: int) -> None:
        if peer[0] != "L":
            raise WireError(Nack.STRANGER, "only the launcher may say this")
        if number >= len(self.daemons):
            raise WireError(Nack.FIELD, f"daemon {number}: the topology has {len(self.daemons)}")

    def _daemon_down(
        self, peer: tuple[str, int, int], identity: bytes, message: wire.DaemonDown, _: Sequence[bytes]
    ) -> None:
        self._from_launcher(peer, message.daemon)
        daemon = self.daemons[message.daemon]
        daemon.up = False
        daemon.fenced = False
        daemon.next_epoch = message.epoch + 1
        self.outbox.forget(daemon.identity)
        # Or they would be as many as there were restarts. One that is still heard of is looked up again.
        self.peers = {known: who for known, who in self.peers.items() if who[:2] != ("S", message.daemon)}
        if daemon.early is not None and daemon.early[1] <= message.epoch:
            daemon.early = None
        self._feed(self.swap, ev.DaemonLost(message.daemon, message.epoch))

    def _daemon_fenced(
        self, peer: tuple[str, int, int], identity: bytes, message: wire.DaemonFenced, _: Sequence[bytes]
    ) -> None:
        self._from_launcher(peer, message.daemon)
        daemon = self.daemons[message.daemon]
        daemon.fenced = True
        self._feed(self.swap, ev.DaemonFenced(message.daemon, message.epoch))
        if daemon.early is not None:
            self.admit(message.daemon, *daemon.early)

    def _daemon_gone(
        self, peer: tuple[str, int, int], identity: bytes, message: wire.DaemonGone, _: Sequence[bytes]
    ) -> None:
        self._from_launcher(peer, message.daemon)
        if self.daemons[message.daemon].up or not self.daemons[message.daemon].fenced:
            raise WireError(
                Nack.NOT_EXPECTED, f"daemon {message.daemon} is not fenced", wire.Kind.DAEMON_GONE
            )
        self.give_up(message.daemon, message.reason)

    def give_up(self, number: int, reason: str) -> None:
        """A daemon never comes back. The run goes on with the other copies of its pages, or ends with the reason."""
        daemon = self.daemons[number]
        if daemon.gone:
            return
        daemon.gone = reason
        if daemon.up:
            # Elsewhere: its pages come in messages only, and none of them is taken any more.
            daemon.up = False
            self._feed(self.swap, ev.DaemonLost(number, daemon.epoch))
            self._feed(self.swap, ev.DaemonFenced(number, daemon.epoch))
        self._feed(self.swap, ev.DaemonGone(number))

    def _pages_lost(self, effect: ev.PagesLost) -> None:
        where = f"; {effect.pages} pages were only there" if effect.pages else ""
        self._to_launcher(wire.Failed(f"{self.daemons[effect.daemon].gone[:GONE_TEXT_MAX]}{where}"))

    def _stop_message(
        self, peer: tuple[str, int, int], identity: bytes, message: wire.Stop, _: Sequence[bytes]
    ) -> None:
        self._from_launcher(peer, 0)
        self._stop(message.reason)

    def _bye(
        self, peer: tuple[str, int, int], identity: bytes, message: wire.Bye, _: Sequence[bytes]
    ) -> None:
        self._from_launcher(peer, 0)
        for identity_of in self.cpu_identity:
            self._send(identity_of, wire.Bye(0))
        for daemon in self.daemons:
            if daemon.up:
                self._send(daemon.identity, wire.Bye(0))
        self.leaving = True

    # -- sending -------------------------------------------------------------------------------------------
    def _send(self, identity: bytes, message: Message, pages: Sequence[memoryview] = ()) -> bool:
        """False when the peer is gone or reads nothing: the protocol's own bounds and re-sends deal with that."""
        if (elsewhere := self.remote.by_name.get(identity)) is not None:
            return elsewhere.send(message, pages)
        try:
            if pages:
                self.router.send_multipart([identity, wire.encode(message), *pages], zmq.NOBLOCK)
            else:
                self.router.send(identity, zmq.NOBLOCK | zmq.SNDMORE)
                self.router.send(wire.encode(message), zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                return False
            raise
        return True

    def _to_launcher(self, message: Message) -> None:
        if self.launcher is not None:
            self.outbox.put(self.launcher, message)

    def _enter(self, effect: ev.Enter) -> None:
        self.writer.lamport += 1
        self.outbox.put(self.cpu_identity[effect.cpu], effect.record._replace(lamport=self.writer.lamport))

    def _kick(self, effect: ev.KickVcpu) -> None:
        """Send first, then ring: a vCPU that sees the bell will find the message."""
        self.writer.lamport += 1
        bell = effect.cpu * WORDS + VP_DOORBELL
        self.outbox.put(
            self.cpu_identity[effect.cpu],
            wire.Kick(self.writer.lamport, effect.request),
            lambda: self._ring(bell),
        )

    def _ring(self, bell: int) -> None:
        atomics.py_add(self.vcpu_pages, bell, np.uint64(1))

    def _send_io(self) -> None:
        """One message per daemon and round."""
        for number, requests in self.io.items():
            daemon = self.daemons[number]
            for first in range(0, len(requests), wire.BATCH_MAX):
                batch = requests[first : first + wire.BATCH_MAX]
                records = np.array([(r.request, r.op, r.frame, r.slot) for r in batch], wire.IO_DTYPE)
                pages: list[memoryview] = []
                if daemon.pages_in_messages:
                    pages = [self.memory.page(r.frame) for r in batch if r.op == OP_WRITE]
                self.writer.lamport += 1
                settled = self.swap.settled(number)
                message = wire.Io(batch[0].epoch, self.writer.lamport, settled, records)
                self._ask(number, batch, message, pages)
        self.io.clear()

    def _ask(
        self, number: int, _batch: Sequence[ev.SendIo], message: wire.Io, pages: Sequence[memoryview]
    ) -> None:
        """Requests to a daemon."""
        self._send(self.daemons[number].identity, message, pages)

    def _heartbeat(self, now: int) -> None:
        for number, daemon in enumerate(self.daemons):
            if number in self.remote.daemons:
                self.remote.heartbeat(number, now)
            if not daemon.up or number in self.remote.daemons:
                continue
            daemon.ping_nonce += 1
            self._send(daemon.identity, wire.Ping(daemon.epoch, daemon.ping_nonce))
            if now - daemon.last_pong_ns > PONG_BOUND_NS and not daemon.reported:
                daemon.reported = True
                self._to_launcher(wire.RestartWanted(number, daemon.epoch, "no heartbeat"))

    # -- the run's clock -----------------------------------------------------------------------------------
    def _set_timer(self, effect: ev.SetTimer) -> None:
        heapq.heappush(self.timers, (effect.deadline_ns, effect.cpu, effect.generation))
        if len(self.timers) > TIMERS_PER_VCPU * len(self.vcpus):
            # Deadlines that a guest put centuries away: only the last of each vCPU still means something.
            newest = {cpu: (ns, cpu, number) for ns, cpu, number in sorted(self.timers, key=lambda t: t[2])}
            self.timers = sorted(newest.values())

    def _ipi(self, effect: ev.SendIpi) -> None:
        if effect.target < self.topology.vm[effect.vm].vcpus:
            cpu = self.ctx.first_cpu(effect.vm) + effect.target
            self._feed(self.vcpus[cpu], from_command(cpu, effect.vector))

    def _to_vcpus(self, events: Iterable[Any]) -> None:
        for event in events:
            self._feed(self.vcpus[event.cpu], event)

    def _at_barrier(self, effect: ev.AtBarrier) -> None:
        """All tasks of all VMs are at the barrier: open it, start the clock and the daemons' models."""
        self.at_barrier[effect.vm] = max(self.at_barrier.get(effect.vm, 0), effect.tasks)
        expected = [int(self.ctx.segments[f"kernel-{v}"].u64[K_TASKS]) for v in range(len(self.topology.vm))]
        if self.started or any(self.at_barrier.get(v, 0) < n for v, n in enumerate(expected)):
            return
        now = time.monotonic_ns()
        self.obs.trace(Kind.BARRIER)
        self.control[CTL_START_NS] = np.uint64(now)
        atomics.py_store(self.control, CTL_BARRIER, np.uint64(1))
        self.start_clock(now)
        self._poke_all()

    def start_clock(self, start_ns: int) -> None:
        """The measured time runs, and began at ``start_ns``; so do the daemons' models."""
        self.started = True
        self.start_ns = start_ns
        self.stop_at_ns = start_ns + int(self.topology.run.seconds * 1e9)
        for daemon in self.daemons:
            if daemon.up:
                self.outbox.put(daemon.identity, wire.Model(1))
        self._to_launcher(wire.Started(start_ns))

    # -- images --------------------------------------------------------------------------------------------
    def _image_effects(self) -> dict[type[Any], Callable[[Any], None]]:
        return {
            ev.Paused: lambda e: self.saving.paused(e) if self.saving is not None else None,
            ev.PageSaved: lambda e: self.saving.page_saved(e) if self.saving is not None else None,
            ev.Restored: lambda e: self.restoring.restored(e) if self.restoring is not None else None,
            ev.PageLoaded: lambda e: self.restoring.page_loaded(e) if self.restoring is not None else None,
        }

    def _save_vm(
        self, peer: tuple[str, int, int], identity: bytes, message: wire.SaveVm, _: Sequence[bytes]
    ) -> None:
        """Refused where there is nothing to save any more: the run then ends as it would have."""
        self._from_launcher(peer, 0)
        if self.saving is not None or not self.started or self.stopped or self.finished:
            raise WireError(Nack.NOT_EXPECTED, "this run cannot be saved now", wire.Kind.SAVE_VM)
        self.saving = Saving(self, self._feed, self._to_launcher)

    def _registers(
        self, peer: tuple[str, int, int], identity: bytes, message: wire.Registers, _: Sequence[bytes]
    ) -> None:
        kind, cpu, _epoch = peer
        if kind != "V" or cpu >= len(self.vcpus) or self.saving is None:
            raise WireError(Nack.NOT_EXPECTED, "registers that nobody asked for", wire.Kind.REGISTERS)
        self._observe(message)
        self.saving.registers(cpu, message)

    def ask_registers(self, cpu: int) -> None:
        """Have a vCPU's process hand over what it holds."""
        self.writer.lamport += 1
        self.outbox.put(self.cpu_identity[cpu], wire.Save(self.writer.lamport))

    def give_registers(self, cpu: int, words: Any) -> None:
        """Let a fresh process go on from there."""
        self.writer.lamport += 1
        self.outbox.put(self.cpu_identity[cpu], wire.Registers(self.writer.lamport, words))

    def _memory_short(self, effect: ev.MemoryShort) -> None:
        for event in notices(effect, self.vcpus):
            self._feed(self.vm if type(event) is ev.NoticeLost else self.vcpus[event.cpu], event)

    def _out_of_memory(self, effect: ev.OutOfMemory) -> None:
        """No frame, no slot, and no guest has anything to give back: an orderly end instead of a hang."""
        if not self.finished:
            self.finished = True
            used = self.swap.slots_used
            self._to_launcher(
                wire.Failed(
                    f"out of memory: {effect.waiting} faults wait for a frame and all {used} swap slots are used"
                    " (raise swapd.size_mib or host.allowance_mib)"
                )
            )

    def _stop(self, reason: str) -> None:
        if self.stopped:
            return
        self.stopped = True
        self.obs.trace(Kind.STOP, a=0 if reason == "time" else 1)
        atomics.py_store(self.control, CTL_STOP, np.uint64(1))
        self._poke_all()

    def _poke_all(self, vm: int = -1) -> None:
        """News in shared memory for the vCPUs of one VM, or of all."""
        for machine in self.vcpus:
            if vm in (-1, machine.vm) and machine.where is not Where.OFF:
                self._feed(machine, ev.Poke(machine.cpu))

    def _powered_down(self, effect: ev.PoweredDown) -> None:
        self.powered_down += 1
        if self.powered_down == len(self.vcpus) and not self.finished:
            self.finished = True
            self._to_launcher(wire.Finished("all vCPUs powered down"))

    def close(self) -> None:
        """Sockets, trace file, input log, images."""
        if self.saving is not None:
            self._opened.callback(self.saving.close)
        self._opened.close()


_EXIT_REASONS: Final = frozenset(int(r) for r in wire.ExitReason)


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
