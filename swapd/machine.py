"""The daemon's pure part: which requests are under way, what the modelled device makes of them, what is answered when.

Requests are done once by (epoch, id), however often they come: an id that is under way is not started again, one that was answered is
answered again from memory. Doing it again would be wrong: the first answer may have arrived, and then its frame, or its block, may belong
to somebody else by now. The host says which ids it will never ask for again (``settled``): older ones are forgotten, and ignored should
they turn up. Where the daemon's buffers are its own (tcp) a read that was answered is done again, since its page was not kept.

A request that names a frame outside the mapped memory, an unknown operation or a block beyond the file is answered with -EINVAL and never
reaches the engine.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from typing import Final, NamedTuple

from proto.wire import OP_READ
from swapd.model import Delayer

OP_MAX: Final = 1
ANSWERED_MAX: Final = 1 << 16
"""Answers remembered at most: far above the host's window, so only a host that never settles anything gets there; the oldest go."""


class Request(NamedTuple):
    """One request as it came."""

    id: int
    op: int
    frame: int
    slot: int


class Reply(NamedTuple):
    """One answer: bytes moved or -errno, and the time since the request came."""

    id: int
    result: int
    service_ns: int
    request: Request


class RequestQueue:
    """Requests of this incarnation. ``frames``: frames it may name; ``slots``: blocks of the file; ``own_buffers``: pages are not
    read into the host's frames.
    """

    __slots__ = (
        "_answered",
        "_delayer",
        "_frames",
        "_model_on",
        "_own_buffers",
        "_settled",
        "_slots",
        "_under_way",
    )

    def __init__(
        self, frames: int, slots: int, delayer: Delayer | None, *, own_buffers: bool = False
    ) -> None:
        self._frames = frames
        self._slots = slots
        self._delayer = delayer
        self._model_on = False
        self._own_buffers = own_buffers
        self._under_way: dict[int, tuple[Request, int, bool]] = {}
        self._answered: dict[int, Reply] = {}
        """By id, in the order in which they were answered."""
        self._settled = 0

    def __len__(self) -> int:
        """Requests under way."""
        return len(self._under_way)

    def model(self, on: bool) -> None:
        """Switch the service-time model for requests that come from now on."""
        self._model_on = on and self._delayer is not None

    def accept(
        self, requests: Iterable[Request], settled: int, now_ns: int
    ) -> tuple[list[Request], list[Reply]]:
        """(what the engine shall start, what is answered at once: refused, or answered before)."""
        self._forget(settled)
        start: list[Request] = []
        at_once: list[Reply] = []
        for request in requests:
            if request.id in self._under_way or request.id < self._settled:
                continue
            if request.op > OP_MAX or request.frame >= self._frames or request.slot >= self._slots:
                at_once.append(Reply(request.id, -errno.EINVAL, 0, request))
                continue
            before = self._answered.get(request.id)
            if before is not None and not (self._own_buffers and request.op == OP_READ):
                at_once.append(before)
                continue
            delayed = self._model_on and self._delayer is not None
            if delayed and self._delayer is not None:
                self._delayer.admit(request.id, now_ns, request.op == 1)
            self._under_way[request.id] = (request, now_ns, delayed)
            start.append(request)
        return start, at_once

    def _forget(self, settled: int) -> None:
        if settled > self._settled:
            self._settled = settled
            for ident in [one for one in self._answered if one < settled]:
                del self._answered[ident]

    def completed(self, done: Iterable[tuple[int, int]], now_ns: int) -> tuple[list[Reply], int | None]:
        """Real completions (id, result) in; (answers due now, when the next one is due) out."""
        answers: list[tuple[int, int]] = []
        held: list[tuple[int, int]] = []
        for ident, result in done:
            (held if self._under_way[ident][2] else answers).append((ident, result))
        next_ns = None
        if self._delayer is not None:
            due = self._delayer.poll(held, now_ns)
            answers += due.answers
            next_ns = due.next_ns
        return [self._reply(ident, result, now_ns) for ident, result in answers], next_ns

    def _reply(self, ident: int, result: int, now_ns: int) -> Reply:
        request, since_ns, _ = self._under_way.pop(ident)
        reply = self._answered[ident] = Reply(ident, result, now_ns - since_ns, request)
        if len(self._answered) > ANSWERED_MAX:
            del self._answered[next(iter(self._answered))]
        return reply
