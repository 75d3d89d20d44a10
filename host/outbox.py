"""Messages that nobody asks for again: entries and kicks of a vCPU, what the launcher has to know, the switch of a daemon's model.

A send that finds no room, or no peer, fails without harm (`zmq.EAGAIN`, `zmq.EHOSTUNREACH`). Requests to daemons are then sent again by
the swap machine; what goes through here is kept, and tried again until it has left.

Invariants: what is kept for a peer leaves in its order and before anything newer; a vCPU or the launcher is owed few messages, since each
waits for an answer or for an end, so nothing here needs a bound of its own.

Not handled here: peers that are dead. The launcher sees their end, and the run ends with them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final

from proto.wire import Message

RETRY_MS: Final = 5
"""Between two tries, while something is kept."""


class Outbox:
    """``send(identity, message)`` says whether the message left."""

    __slots__ = ("_kept", "_send")

    def __init__(self, send: Callable[[bytes, Message], bool]) -> None:
        self._send = send
        self._kept: dict[bytes, deque[tuple[Message, Callable[[], None] | None]]] = {}

    def __bool__(self) -> bool:
        """Whether something has not left yet."""
        return bool(self._kept)

    def put(self, identity: bytes, message: Message, then: Callable[[], None] | None = None) -> None:
        """Send now, or as soon as it is possible; ``then`` is called when it has left."""
        if identity in self._kept or not self._send(identity, message):
            self._kept.setdefault(identity, deque()).append((message, then))
        elif then is not None:
            then()

    def forget(self, identity: bytes) -> None:
        """The peer is gone for good."""
        self._kept.pop(identity, None)

    def retry(self) -> None:
        """Send what can be sent."""
        for identity, waiting in list(self._kept.items()):
            while waiting and self._send(identity, waiting[0][0]):
                _, then = waiting.popleft()
                if then is not None:
                    then()
            if not waiting:
                del self._kept[identity]
