"""The page server of a scenario in the real world, in place of a swap daemon: pages in memory, each served after the scenario's time.

It speaks a daemon's side of the wire (HELLO, IO, IO_DONE, PING). A write is acknowledged at once; a read is answered, with the page in
its landing frame, the service time of that page after its request came, however many are under way.

Not handled here: failures; a server that ends is the end of the run.
"""

from __future__ import annotations

import gc
import heapq
import os
import time
from typing import Final, NamedTuple

import numpy as np
import zmq

from launcher import scenario_real_part as part
from proto import link, wire
from proto.run import PROC_SWAPD, RunContext
from proto.trace import Kind
from proto.units import PAGE_SIZE
from proto.wire import OP_READ
from sim.events import Event
from sim.scenario_tables import FIRST_GFN
from sim.world import WITNESS

POLL_MS: Final = 500
MS: Final = 1_000_000


class Read(NamedTuple):
    """A read under way; ordered by when it is due."""

    due_ns: int
    sequence: int
    request: int
    frame: int
    slot: int
    gfn: int
    service_ns: int


class PageServer:
    """See the module docstring."""

    def __init__(self, ctx: RunContext, daemon: int, epoch: int) -> None:
        self.ctx = ctx
        self.epoch = epoch
        self.scenario = part.scenario_of(ctx)
        self.frames = ctx.segments["frames"].u8
        self.pages: dict[int, bytes] = {}
        self.reads: list[Read] = []
        self.events: list[Event] = []
        self.writer = ctx.trace(f"swapd-{daemon}-{epoch}", PROC_SWAPD + daemon)
        self.daemon = daemon
        self.leaving = False
        self._sequence = 0
        self.context = link.new_context()
        self.socket = link.connect_dealer(
            self.context, ctx.endpoint, link.swapd_identity(daemon, epoch, ctx.key)
        )

    def loop(self) -> None:
        """Until BYE."""
        self.writer.event(Kind.PROCESS_START, a=os.getpid())
        self._send(wire.Hello(wire.Role.SWAPD, self.daemon, self.epoch, os.getpid()))
        while not self.leaving:
            if self.socket.poll(self._timeout_ms()):
                self._handle(wire.decode(self.socket.recv()))
            self._serve(time.monotonic_ns())

    def _timeout_ms(self) -> int:
        if not self.reads:
            return POLL_MS
        return max(0, -(-(self.reads[0].due_ns - time.monotonic_ns()) // MS))

    def _handle(self, message: wire.Message) -> None:
        if isinstance(message, wire.Io):
            self.writer.observe(message.lamport)
            for request, op, frame, slot in message.records.tolist():
                if op == OP_READ:
                    self._read(request, frame, slot)
                else:
                    self.pages[slot] = self.frames[frame * PAGE_SIZE : (frame + 1) * PAGE_SIZE].tobytes()
                    self._answer(request, 0)
        elif isinstance(message, wire.Ping):
            self._send(wire.Pong(self.epoch, message.nonce))
        elif isinstance(message, wire.Bye):
            self.leaving = True

    def _read(self, request: int, frame: int, slot: int) -> None:
        gfn = int.from_bytes(self.pages[slot][-8:], "little") - WITNESS
        service_ns = self.scenario.service_of.get(gfn - FIRST_GFN, self.scenario.service_ns)
        now_ns = time.monotonic_ns()
        self.events.append(Event(now_ns, "pages", "request", 0, {"gfn": gfn}))
        self._sequence += 1
        heapq.heappush(
            self.reads, Read(now_ns + service_ns, self._sequence, request, frame, slot, gfn, service_ns)
        )

    def _serve(self, now_ns: int) -> None:
        """Answer what is due, one message per page: the host takes them one after the other."""
        while self.reads and self.reads[0].due_ns <= now_ns:
            read = heapq.heappop(self.reads)
            at = read.frame * PAGE_SIZE
            self.frames[at : at + PAGE_SIZE] = np.frombuffer(self.pages[read.slot], np.uint8)
            self.events.append(Event(time.monotonic_ns(), "pages", "copied", 0, {"gfn": read.gfn}))
            self._answer(read.request, read.service_ns)

    def _answer(self, request: int, service_ns: int) -> None:
        self.writer.lamport += 1
        records = np.array([(request, PAGE_SIZE, service_ns)], wire.DONE_DTYPE)
        self._send(wire.IoDone(self.epoch, self.writer.lamport, records))

    def _send(self, message: wire.Message) -> None:
        self.socket.send(wire.encode(message), zmq.NOBLOCK)

    def close(self) -> None:
        """Trace file and socket."""
        self.writer.event(Kind.PROCESS_END)
        self.writer.close()
        self.socket.close()
        self.context.term()


def main(ctx: RunContext, daemon: int, epoch: int) -> None:
    """Entry point of the page server."""
    server = PageServer(ctx, daemon, epoch)
    gc.freeze()
    try:
        server.loop()
        part.write(ctx.run_dir, part.PAGES, server.events, {})
    finally:
        server.close()
