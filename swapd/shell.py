"""The swap daemon's process: one loop over the link to the host and the engine's eventfd.

On ipc the daemon maps the host's frames and reads straight into them. On tcp it maps nothing: pages travel as message parts and
lie in a pool of its own while they are under way.

Bad messages are counted and answered with NACK; a message of another epoch is refused. The daemon keeps no map of its own, so
being killed at any moment loses nothing that it acknowledged.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Final

import zmq

from proto import link, wire
from proto.faults import FaultMachine
from proto.layout import CTL_ABORT
from proto.run import PROC_SWAPD, RunContext
from proto.topology_faults import schedule
from proto.trace import Kind
from proto.units import PAGE_SIZE
from proto.wire import Nack, WireError
from swapd import engine as engine_module
from swapd.engine import open_engine
from swapd.faulty import DaemonFaults, FaultyEngine
from swapd.machine import RequestQueue
from swapd.service import Buffers, IoEngine, Service, service_model

POLL_MS: Final = 500
FAULTS_POLL_MS: Final = 20
"""With faults that may close the connection: how late such a time may be noticed."""
HELLO_EVERY_NS: Final = 1_000_000_000
"""HELLO is said again until it is answered."""
DRAIN_MAX: Final = 64


class SwapdShell:
    """See the module docstring."""

    def __init__(self, ctx: RunContext, daemon: int, epoch: int) -> None:
        self._opened = ExitStack()
        """What `close` gives back, the last one first, whatever fails meanwhile."""
        try:
            self._build(ctx, daemon, epoch)
        except BaseException:
            self._opened.close()
            raise

    def _build(self, ctx: RunContext, daemon: int, epoch: int) -> None:
        self.ctx = ctx
        self.daemon = daemon
        self.epoch = epoch
        spec = ctx.topology.swapd[daemon]
        info = ctx.swap_files[daemon]
        # On tcp it could be on another machine: pages lie in buffers of its own.
        buffers = Buffers() if spec.transport == "tcp" else None
        memory = buffers.memory if buffers is not None else ctx.segments["frames"].u8
        frames = len(memory) // PAGE_SIZE if buffers is None else 1 << 31
        queue = RequestQueue(
            frames,
            info.slots,
            service_model(spec, ctx.topology.run.seed + daemon),
            own_buffers=buffers is not None,
        )
        self.writer = ctx.trace(f"swapd-{daemon}-{epoch}", PROC_SWAPD + daemon)
        self._opened.callback(self.writer.close)
        engine: IoEngine = open_engine(info.engine, info.fd, memory, spec.queue_depth)
        self._opened.callback(engine.close)
        self.faults = self._faults()
        if self.faults is not None:
            engine = FaultyEngine(engine, memory, self.faults, time.monotonic_ns)
        self.service = Service(queue, engine, buffers, epoch, self.writer, self._send)
        self._opened.callback(self.service.close)
        self.bad_messages = 0
        self.welcome = False
        self.hello_due_ns = 0
        self.has_said_hello = False
        self.leaving = False
        self.context = link.new_context()
        self._opened.callback(self.context.destroy)
        tcp = spec.transport == "tcp"
        self.endpoint = ctx.tcp_endpoint if tcp else ctx.endpoint
        self.password = link.tcp_password(ctx.key) if tcp else b""
        self.poller = zmq.Poller()
        self.service.register(self.poller)
        self.socket: zmq.Socket[bytes] | None = None
        """None while the connection is closed on purpose."""
        self.connect_due_ns = 0
        self._connect()

    def _faults(self) -> DaemonFaults | None:
        """The schedule, where there is one."""
        if (segment := self.ctx.segments.get("faults")) is None:
            return None
        topology = self.ctx.topology
        specs = schedule(topology.fault, len(topology.swapd), topology.run.seconds, topology.run.seed)
        machine = FaultMachine(specs, segment.u64.data)
        return DaemonFaults(machine, self.daemon, topology.run.seed, self.writer)

    def _connect(self) -> None:
        identity = link.swapd_identity(self.daemon, self.epoch, self.ctx.key)
        self.socket = link.connect_dealer(self.context, self.endpoint, identity, self.password)
        self.poller.register(self.socket, zmq.POLLIN)
        self.welcome = False
        self.hello_due_ns = 0

    def _disconnect(self) -> None:
        assert self.socket is not None
        self.poller.unregister(self.socket)
        self.socket.close(linger=0)
        self.socket = None

    def loop(self) -> None:
        """Until BYE."""
        self.writer.event(Kind.PROCESS_START, a=os.getpid())
        while not self.leaving and not self._aborted():
            self.once()

    def once(self) -> None:
        """Wait for something, and do what it wants."""
        now_ns = time.monotonic_ns()
        if self.faults is not None:
            self._on_faults(self.faults, now_ns)
        if self.socket is not None and not self.welcome and now_ns >= self.hello_due_ns:
            self._hello(now_ns)
        events = dict(self.poller.poll(POLL_MS if self.faults is None else FAULTS_POLL_MS))
        if self.socket is not None and self.socket in events:
            self._drain(self.socket)
        self.service.turn(events)

    def _hello(self, now_ns: int) -> None:
        if self.hello_due_ns and self.connect_due_ns:
            # The host may still have held the former connection to be this daemon when this one was made.
            self._disconnect()
            self._connect()
        self.hello_due_ns = now_ns + HELLO_EVERY_NS
        self._send(wire.Hello(wire.Role.SWAPD, self.daemon, self.epoch, os.getpid()))
        # The step is a start: neither a repetition nor a new connection is one.
        if self.faults is not None and not self.has_said_hello:
            self.faults.step("daemon.hello", now_ns)
        self.has_said_hello = True

    def _on_faults(self, faults: DaemonFaults, now_ns: int) -> None:
        """Close the connection, or make it again."""
        if self.socket is not None:
            if self.welcome and (firing := faults.take("disconnect", now_ns)) is not None and firing.nth:
                self.connect_due_ns = now_ns + firing.spec.for_ns
                self._disconnect()
        elif now_ns >= self.connect_due_ns:
            self._connect()

    def _aborted(self) -> bool:
        control = self.ctx.segments.get("control")
        return control is not None and bool(control.u64[CTL_ABORT])

    def _drain(self, socket: zmq.Socket[bytes]) -> None:
        for _ in range(DRAIN_MAX):
            try:
                parts = socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self.take(parts)

    def take(self, parts: Sequence[bytes]) -> None:
        """One message of the host, whatever it is."""
        try:
            self._handle(wire.decode(parts[0]), parts[1:])
        except WireError as error:
            self.bad_messages += 1
            self._send(wire.NackMsg(error.code, error.kind, error.text))

    def _handle(self, message: wire.Message, extra: Sequence[bytes]) -> None:
        if isinstance(message, wire.Io):
            self.service.io(message, extra)
        elif isinstance(message, wire.Ping):
            self._send(wire.Pong(self.epoch, message.nonce))
        elif isinstance(message, wire.Welcome):
            self.welcome = True
            self.service.queue.model(bool(message.model_on))
        elif isinstance(message, wire.Model):
            self.service.queue.model(bool(message.on))
        elif isinstance(message, wire.Bye):
            self.leaving = True
        elif isinstance(message, wire.NackMsg):
            self.bad_messages += 1
        else:
            raise WireError(Nack.NOT_EXPECTED, f"{type(message).__name__} is not for a daemon")

    def _send(self, message: wire.Message, pages: Sequence[bytes] = ()) -> None:
        """The host always reads; if its queue is full all the same, the reply is lost and the request is sent again."""
        if self.socket is None:
            return
        try:
            self.socket.send_multipart([wire.encode(message), *pages], zmq.NOBLOCK)
        except zmq.Again:
            self.bad_messages += 1

    def close(self) -> None:
        """Engine, socket, trace file."""
        with self._opened:
            self.writer.event(Kind.PROCESS_END)


def warm() -> None:
    """Compile every kernel of the daemon (in the zygote, before the fork)."""
    engine_module.warm()


def main(ctx: RunContext, daemon: int, epoch: int) -> None:
    """Entry point of daemon number ``daemon``, incarnation ``epoch``."""
    shell = SwapdShell(ctx, daemon, epoch)
    gc.freeze()
    try:
        shell.loop()
    finally:
        shell.close()
