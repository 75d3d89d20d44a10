"""What a daemon does for a host, whatever the link: requests in, I/O, replies out.

Purpose: `Service` joins the pure request queue, the I/O engine and, where pages travel in messages, the buffers that they lie in
meanwhile. The two shells (swapd/shell.py, swapd/remote.py) only carry messages.

Invariants: a buffer belongs to one request from its start to its answer; a message whose pages and records do not match is refused as a
whole, before anything of it is started.

Not handled here: who may ask (the shells), which request is done once (swapd/machine.py).
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt
import zmq

from proto import wire
from proto.topology import Swapd
from proto.units import PAGE_SIZE
from proto.wire import OP_READ, OP_WRITE, Nack, WireError
from swapd.machine import Reply, Request, RequestQueue
from swapd.model import Delayer, ServiceModel, ServiceSpec
from swapd.timer import Timer

TCP_BUFFERS: Final = 1024
"""Pages under way on a tcp link: several times the host's window, so that a buffer is always free."""

PAGES_PER_REPLY: Final = 16
"""ZeroMQ counts messages, not bytes: with this at most 64 MiB (`link.HWM` messages) are kept for a host that reads no replies."""

UNDER_WAY_MAX: Final = 4096
"""Requests under way on an ipc link: 16 times the host's window, and what the engine has room for."""

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


class Buffers:
    """Page buffers by request id, for links on which pages travel in messages."""

    __slots__ = ("_free", "_of", "memory")

    def __init__(self) -> None:
        pool = mmap.mmap(-1, TCP_BUFFERS * PAGE_SIZE)
        self.memory = np.frombuffer(pool, np.uint8)
        self._free = list(range(TCP_BUFFERS))
        self._of: dict[int, int] = {}

    def check_room(self, requests: int) -> None:
        """WireError when the host has more under way than the contract allows."""
        if requests > len(self._free):
            raise WireError(Nack.NOT_EXPECTED, f"more than {TCP_BUFFERS} requests under way", wire.Kind.IO)

    def take(self, ident: int) -> int:
        """A buffer for request ``ident``; there must be one."""
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


class Clock(Protocol):
    """A Lamport counter."""

    lamport: int

    def observe(self, lamport: int) -> None:
        """Something was received."""


class IoEngine(Protocol):
    """What a service needs of its engine (swapd/engine.py, or swapd/faulty.py)."""

    next_ns: int | None
    """When to reap without being told; None: never."""

    @property
    def eventfd(self) -> int:
        """Readable when there may be something to reap."""

    def submit(self, ops: np.ndarray) -> None:
        """Accept operations."""

    def reap(self) -> np.ndarray:
        """What is over."""

    def close(self) -> None:
        """Wait for what has begun."""


class Service:
    """One incarnation of a daemon. `send(message, pages)` is how replies leave; `clock` is where Lamport counters are kept."""

    def __init__(
        self,
        queue: RequestQueue,
        engine: IoEngine,
        buffers: Buffers | None,
        epoch: int,
        clock: Clock,
        send: Callable[[wire.Message, Sequence[bytes]], None],
    ) -> None:
        self.queue = queue
        self.engine = engine
        self.buffers = buffers
        self.epoch = epoch
        self._clock = clock
        self._send = send
        self._timer = Timer()

    def register(self, poller: zmq.Poller) -> None:
        """Have the poller wait for what the service waits for, too."""
        poller.register(self.engine.eventfd, zmq.POLLIN)
        poller.register(self._timer.fd, zmq.POLLIN)

    def turn(self, events: Mapping[Any, int]) -> None:
        """After a poll: answer what is over."""
        if self._timer.fd in events:
            self._timer.expired()
        done = [(int(tag), int(res)) for tag, res in self.engine.reap().tolist()]
        replies, next_due_ns = self.queue.completed(done, time.monotonic_ns())
        due = [at for at in (next_due_ns, self.engine.next_ns) if at is not None]
        self._timer.arm(min(due, default=None))
        if replies:
            self._answer(replies)

    def io(self, message: wire.Io, extra: Sequence[bytes]) -> None:
        """Requests of the host. WireError, and nothing is started, for those of another epoch and for pages that do not match."""
        if message.epoch != self.epoch:
            raise WireError(Nack.STALE_EPOCH, f"epoch {message.epoch}, this is {self.epoch}", wire.Kind.IO)
        self._clock.observe(message.lamport)
        requests = [Request(i, op, frame, slot) for i, op, frame, slot in message.records.tolist()]
        pages = self._pages(requests, extra)
        # Before any of them counts as under way: one that is, and was not started, would never be answered.
        if self.buffers is not None:
            self.buffers.check_room(len(requests))
        elif len(self.queue) + len(requests) > UNDER_WAY_MAX:
            raise WireError(Nack.NOT_EXPECTED, f"more than {UNDER_WAY_MAX} requests under way", wire.Kind.IO)
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

    def _answer(self, replies: Sequence[Reply]) -> None:
        most = wire.BATCH_MAX if self.buffers is None else PAGES_PER_REPLY
        for first in range(0, len(replies), most):
            batch = replies[first : first + most]
            records = np.array([(r.id, r.result, r.service_ns) for r in batch], wire.DONE_DTYPE)
            self._clock.lamport += 1
            message = wire.IoDone(self.epoch, self._clock.lamport, records)
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

    def close(self) -> None:
        """Give the timer back; the engine is its opener's."""
        self._timer.close()
