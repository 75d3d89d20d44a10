"""Who talks to the host: the processes of the run, known by their routing ids, and what holds for all that they say.

Invariants: only ids that were made with the key of the run are remembered; a daemon's are forgotten with it, so that restarts leave
nothing behind; no message moves the event counter further than all peers together could have in 19 hours.

Not handled here: what each may say (the handlers of the shell and its parts), how ids are made (proto/link.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from proto import link, wire
from proto.trace import TraceWriter
from proto.wire import Nack, WireError

Peer = tuple[str, int, int]
"""(kind, number, epoch): kind is "V" for a vCPU, "S" for a swap daemon, "L" for the launcher."""
Handler = Callable[[Peer, bytes, Any, Sequence[bytes]], None]
"""``handler(peer, identity, message, extra)``; extra: frames behind the message. WireError for what the peer may not say."""

LAMPORT_LEAP_MAX: Final = 1 << 36
"""Events that a peer may have recorded since its last message: a million each second for 19 hours."""


class Peers:
    """Those that have spoken. ``key``: of the run."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self.known: dict[bytes, Peer] = {}

    def of(self, identity: bytes) -> Peer | None:
        """Who has this routing id. Known ones are remembered: a run has some for each process, and strangers have none."""
        peer = self.known.get(identity)
        if peer is None and (peer := link.parse_identity(identity, self._key)) is not None:
            self.known[identity] = peer
        return peer

    def forget(self, kind: str, number: int) -> None:
        """All incarnations of a process. One that is still heard of is looked up again."""
        self.known = {identity: who for identity, who in self.known.items() if who[:2] != (kind, number)}


def only_launcher(peer: Peer) -> None:
    """WireError when it is somebody else."""
    if peer[0] != "L":
        raise WireError(Nack.STRANGER, "only the launcher may say this")


def observe(writer: TraceWriter, message: wire.Exit | wire.IoDone | wire.Registers) -> None:
    """Later events are ordered after the message. A peer that is ahead of everybody by far would use up the counters of all."""
    if message.lamport > writer.lamport + LAMPORT_LEAP_MAX:
        raise WireError(Nack.FIELD, f"{type(message).__name__}: lamport {message.lamport} is far ahead")
    writer.observe(message.lamport)
