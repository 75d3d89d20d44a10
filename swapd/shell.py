"""The swap daemon's process: one loop over the link to the host and the engine's eventfd.

On ipc the daemon maps the host's frames and reads straight into them. On tcp it maps nothing: pages travel as message parts and
lie in a pool of its own while they are under way.

Bad messages are counted and answered with NACK; a message of another epoch is refused. The daemon keeps no map of its own, so
being killed at any moment loses nothing that it acknowledged.
"""

from __future__ import annotations

import gc
import mmap
import os
import time
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import zmq

from proto import link, wire
from proto.layout import CTL_ABORT
from proto.run import PROC_SWAPD, RunContext
from proto.topology import Swapd
from proto.trace import Kind
from proto.units import PAGE_SIZE
from proto.wire import OP_READ, OP_WRITE, Nack, WireError
from swapd import engine as engine_module
from swapd.engine import Engine, open_engine
from swapd.machine import Reply, Request, RequestQueue
from swapd.model import Delayer, ServiceModel, ServiceSpec
from swapd.timer import Timer

POLL_MS: Final = 500
HELLO_EVERY_NS: Final = 1_000_000_000
"""HELLO is said again until it is answered."""
DRAIN_MAX: Final = 64
TCP_BUFFERS: Final = 1024
"""Pages under way on a tcp link: several times the host's window, so that a buffer is always free."""

UNLIMITED: Final = 65_536
"""Servers of a modelled device without a bound: more than can ever be under way."""


def service_model(spec: Swapd, seed: int) -> Delayer | None:
    """The topology's what-if model; None for the device as it is."""
    if spec.model == "none":
        return None
    fields: dict[str, object] = {
        "kind": spec.model,
        "parallel": spec.model_parallel or UNLIMITED,
        "writes": spec.model_writes,
    }
    if spec.model in ("fixed", "lognormal", "exponential"):
        fields["scale_ns"] = int(spec.model_read_us * 1000)
    if spec.model == "lognormal":
        fields["sigma"] = spec.model_sigma
    return Delayer(ServiceModel(ServiceSpec.parse(fields), seed))


class _Buffers:
    """tcp: page buffers by request id. ipc: nothing, frames are the host's."""

    __slots__ = ("_free", "_of", "memory")

    def __init__(self) -> None:
        pool = mmap.mmap(-1, TCP_BUFFERS * PAGE_SIZE)
        self.memory = np.frombuffer(pool, np.uint8)
        self._free = list(range(TCP_BUFFERS))
        self._of: dict[int, int] = {}

    def take(self, ident: int) -> int:
        """A buffer for request ``ident``; WireError when the host has more under way than the contract allows."""
        if not self._free:
            raise WireError(Nack.NOT_EXPECTED, f"more than {TCP_BUFFERS} requests under way", wire.Kind.IO)
        self._of[ident] = buffer = self._free.pop()
        return buffer

    def __contains__(self, ident: int) -> bool:
        """Whether the request has a buffer (refused ones never got one)."""
        return ident in self._of

    def page(self, ident: int) -> npt.NDArray[np.uint8]:
        """The 4096 bytes of the request's buffer."""
        at = self._of[ident] * PAGE_SIZE
        return self.memory[at : at + PAGE_SIZE]

    def give(self, ident: int) -> None:
        """The request was answered."""
        self._free.append(self._of.pop(ident))


class SwapdShell:
    """See the module docstring."""

    def __init__(self, ctx: RunContext, daemon: int, epoch: int) -> None:
        self.ctx = ctx
        self.daemon = daemon
        self.epoch = epoch
        spec = ctx.topology.swapd[daemon]
        info = ctx.swap_files[daemon]
        self.buffers = _Buffers() if spec.transport == "tcp" else None
        memory = self.buffers.memory if self.buffers is not None else ctx.segments["frames"].u8
        frames = len(ctx.segments["frames"].u8) // PAGE_SIZE if self.buffers is None else 1 << 31
        self.queue = RequestQueue(
            frames,
            info.slots,
            service_model(spec, ctx.topology.run.seed + daemon),
            own_buffers=self.buffers is not None,
        )
        self.engine: Engine = open_engine(info.engine, info.fd, memory, spec.queue_depth)
        self.writer = ctx.trace(f"swapd-{daemon}-{epoch}", PROC_SWAPD + daemon)
        self.bad_messages = 0
        self.welcome = False
        self.hello_due_ns = 0
        self.leaving = False
        self.timer = Timer()
        self.context = link.new_context()
        endpoint = ctx.tcp_endpoint if spec.transport == "tcp" else ctx.endpoint
        self.socket = link.connect_dealer(self.context, endpoint, link.swapd_identity(daemon, epoch))
        self.poller = zmq.Poller()
        self.poller.register(self.socket, zmq.POLLIN)
        self.poller.register(self.engine.eventfd, zmq.POLLIN)
        self.poller.register(self.timer.fd, zmq.POLLIN)

    def loop(self) -> None:
        """Until BYE."""
        self.writer.event(Kind.PROCESS_START, a=os.getpid())
        while not self.leaving:
            if not self.welcome and time.monotonic_ns() >= self.hello_due_ns:
                self.hello_due_ns = time.monotonic_ns() + HELLO_EVERY_NS
                self._send(wire.Hello(wire.Role.SWAPD, self.daemon, self.epoch, os.getpid()))
            events = dict(self.poller.poll(POLL_MS))
            if self.socket in events:
                self._drain()
            if self.engine.eventfd in events:
                # Clear the counter before reaping: a completion in between rings again.
                os.read(self.engine.eventfd, 8)
            if self.timer.fd in events:
                self.timer.expired()
            self._complete()
            if self._aborted():
                return

    def _aborted(self) -> bool:
        control = self.ctx.segments.get("control")
        return control is not None and bool(control.u64[CTL_ABORT])

    def _drain(self) -> None:
        for _ in range(DRAIN_MAX):
            try:
                parts = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                self._handle(wire.decode(parts[0]), parts[1:])
            except WireError as error:
                self.bad_messages += 1
                self._send(wire.NackMsg(error.code, error.kind, error.text))

    def _handle(self, message: wire.Message, extra: Sequence[bytes]) -> None:
        if isinstance(message, wire.Io):
            self._io(message, extra)
        elif isinstance(message, wire.Ping):
            self._send(wire.Pong(self.epoch, message.nonce))
        elif isinstance(message, wire.Welcome):
            self.welcome = True
            self.queue.model(bool(message.model_on))
        elif isinstance(message, wire.Model):
            self.queue.model(bool(message.on))
        elif isinstance(message, wire.Bye):
            self.leaving = True
        elif isinstance(message, wire.NackMsg):
            self.bad_messages += 1
        else:
            raise WireError(Nack.NOT_EXPECTED, f"{type(message).__name__} is not for a daemon")

    def _io(self, message: wire.Io, extra: Sequence[bytes]) -> None:
        if message.epoch != self.epoch:
            raise WireError(Nack.STALE_EPOCH, f"epoch {message.epoch}, this is {self.epoch}", wire.Kind.IO)
        self.writer.observe(message.lamport)
        requests = [Request(i, op, frame, slot) for i, op, frame, slot in message.records.tolist()]
        pages = self._pages(requests, extra)
        start, at_once = self.queue.accept(requests, message.settled, time.monotonic_ns())
        if start:
            ops = np.empty((len(start), 4), np.uint64)
            for row, request in enumerate(start):
                frame = request.frame if self.buffers is None else self._buffer_for(request, pages)
                ops[row] = (request.id, request.op, request.slot, frame)
            self.engine.submit(ops)
        if at_once:
            self._answer(at_once)

    def _pages(self, requests: Sequence[Request], extra: Sequence[bytes]) -> dict[int, bytes]:
        """The pages of a message's writes by request id; WireError when parts and records do not match."""
        if self.buffers is None:
            if extra:
                raise WireError(Nack.FIELD, "pages in a message on an ipc link", wire.Kind.IO)
            return {}
        writes = [r.id for r in requests if r.op == OP_WRITE]
        if len(writes) != len(extra) or any(len(page) != PAGE_SIZE for page in extra):
            raise WireError(
                Nack.FIELD, f"{len(writes)} writes, {len(extra)} pages of 4096 bytes expected", wire.Kind.IO
            )
        return dict(zip(writes, extra, strict=True))

    def _buffer_for(self, request: Request, pages: dict[int, bytes]) -> int:
        assert self.buffers is not None
        buffer = self.buffers.take(request.id)
        if request.op == OP_WRITE:
            self.buffers.page(request.id)[:] = np.frombuffer(pages[request.id], np.uint8)
        return buffer

    def _complete(self) -> None:
        done = [(int(tag), int(res)) for tag, res in self.engine.reap().tolist()]
        replies, next_due_ns = self.queue.completed(done, time.monotonic_ns())
        self.timer.arm(next_due_ns)
        if replies:
            self._answer(replies)

    def _answer(self, replies: Sequence[Reply]) -> None:
        for first in range(0, len(replies), wire.BATCH_MAX):
            batch = replies[first : first + wire.BATCH_MAX]
            records = np.array([(r.id, r.result, r.service_ns) for r in batch], wire.DONE_DTYPE)
            self.writer.lamport += 1
            message = wire.IoDone(self.epoch, self.writer.lamport, records)
            self._send(message, self._read_pages(batch))

    def _read_pages(self, batch: Sequence[Reply]) -> list[bytes]:
        """tcp: the pages of good reads, in record order; their buffers are free again."""
        if self.buffers is None:
            return []
        pages = []
        for reply in batch:
            if reply.id not in self.buffers:
                continue
            if reply.request.op == OP_READ and reply.result == PAGE_SIZE:
                pages.append(self.buffers.page(reply.id).tobytes())
            self.buffers.give(reply.id)
        return pages

    def _send(self, message: wire.Message, pages: Sequence[bytes] = ()) -> None:
        """The host always reads; if its queue is full all the same, the reply is lost and the request is sent again."""
        try:
            self.socket.send_multipart([wire.encode(message), *pages], zmq.NOBLOCK)
        except zmq.Again:
            self.bad_messages += 1

    def close(self) -> None:
        """Engine, socket, trace file."""
        self.engine.close()
        self.timer.close()
        self.writer.event(Kind.PROCESS_END)
        self.writer.close()
        self.socket.close()
        self.context.term()


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
