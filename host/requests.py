"""What is under way between the host and its swap daemons: reads, writes, their requests, and each daemon's queue.

Data only; what happens to it is in host/swap.py and host/reads.py.
"""

from __future__ import annotations

from collections import deque

from host.events import SwapOut
from proto.lives import DaemonState


class Read:
    """One page on its way in, whoever is asked for it. ``live``: its attempts; ``spare``: its frames in which nothing can land."""

    __slots__ = ("done", "hedge", "hvp", "live", "slot", "spare", "started_ns", "wants_frame")

    def __init__(self, hvp: int, slot: int, now_ns: int) -> None:
        self.hvp = hvp
        self.slot = slot
        self.started_ns = now_ns
        self.live: list[Request] = []
        self.spare: list[int] = []
        self.done = False
        self.wants_frame = False
        self.hedge = False
        """Whether the frame it wants is for a hedge."""


class Write:
    """One page on its way out to all copies of its slot. ``good``: copies that have it; ``left``: those that have not answered."""

    __slots__ = ("event", "good", "left", "slot")

    def __init__(self, event: SwapOut, slot: int) -> None:
        self.event = event
        self.slot = slot
        self.good: list[int] = []
        self.left = 0


class Request:
    """One attempt: a read or write of one copy, from its start to its answer."""

    __slots__ = ("attempts", "copy", "frame", "hedge", "id", "job", "op", "sent_epoch", "sent_ns", "since_ns")

    def __init__(self, ident: int, op: int, copy: int, frame: int, job: Read | Write) -> None:
        self.id = ident
        self.op = op
        self.copy = copy
        self.frame = frame
        self.job = job
        self.attempts = 0
        self.sent_epoch = -1
        self.sent_ns = 0
        """When it was sent last."""
        self.since_ns = 0
        """When it was sent first, to this epoch."""
        self.hedge = False


class Daemon:
    """What the host knows of one daemon: requests waiting and out."""

    __slots__ = ("epoch", "out", "queue", "state")

    def __init__(self) -> None:
        self.queue: deque[Request] = deque()
        self.out: dict[int, Request] = {}
        self.epoch = 0
        self.state = DaemonState.FENCED

    @property
    def backlog(self) -> int:
        """Requests that it has not answered."""
        return len(self.queue) + len(self.out)
