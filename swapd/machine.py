"""The daemon's pure part: which requests are under way, what the modelled device makes of them, what is answered when.

Requests are idempotent by (epoch, id): an id that is under way is not started twice; one that was answered and comes again is
done again, which changes nothing (same slot, same frame). A request that names a frame outside the mapped memory, an unknown
operation or a block beyond the file is answered with -EINVAL and never reaches the engine.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from typing import Final, NamedTuple

from swapd.model import Delayer

OP_MAX: Final = 1


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
    """Requests under way in this incarnation. ``frames``: frames it may name; ``slots``: blocks of the file."""

    __slots__ = ("_delayer", "_frames", "_model_on", "_slots", "_under_way")

    def __init__(self, frames: int, slots: int, delayer: Delayer | None) -> None:
        self._frames = frames
        self._slots = slots
        self._delayer = delayer
        self._model_on = False
        self._under_way: dict[int, tuple[Request, int, bool]] = {}

    def __len__(self) -> int:
        """Requests under way."""
        return len(self._under_way)

    def model(self, on: bool) -> None:
        """Switch the service-time model for requests that come from now on."""
        self._model_on = on and self._delayer is not None

    def accept(self, requests: Iterable[Request], now_ns: int) -> tuple[list[Request], list[Reply]]:
        """(what the engine shall start, what is refused at once)."""
        start: list[Request] = []
        refused: list[Reply] = []
        for request in requests:
            if request.id in self._under_way:
                continue
            if request.op > OP_MAX or request.frame >= self._frames or request.slot >= self._slots:
                refused.append(Reply(request.id, -errno.EINVAL, 0, request))
                continue
            delayed = self._model_on and self._delayer is not None
            if delayed and self._delayer is not None:
                self._delayer.admit(request.id, now_ns, request.op == 1)
            self._under_way[request.id] = (request, now_ns, delayed)
            start.append(request)
        return start, refused

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
        return Reply(ident, result, now_ns - since_ns, request)
