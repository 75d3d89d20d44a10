"""The swap daemons of a simulated run: the daemon's request queue, a device with service times, links that misbehave, deaths and fences.

A killed daemon's operations under way may still land until the fence, whole or in part, as direct I/O of a killed process does. Then the
launcher's reports follow in their order: lost, fenced, and the next epoch says hello; or that it is gone for good. Its file outlives it.

Invariants: a link keeps the order of its messages unless a fault of the plan says otherwise; no operation of an old epoch lands after its
fence was reported; an operation that a queue accepted is done once.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from functools import partial
from typing import Any, Final, NamedTuple

from host import events as ev
from host.copies import SLOTS_PER_DAEMON
from host.memory import HostMemory
from proto.units import PAGE_SIZE
from proto.wire import OP_READ
from sim.agenda import Agenda
from sim.chance import Chance
from sim.faults import READ, TO_DAEMON, WRITE, Faults
from sim.plan import US, SimPlan
from swapd.machine import Reply, Request, RequestQueue

REPORT_NS: Final = 20_000
"""From a death to the launcher's report of it, at most."""
RESTART_NS: Final = 200_000
"""From the fence to the hello of the next epoch, at most."""
LATE_NS: Final = 100_000
"""How long after its daemon's death an operation may still land."""
HELLO_NS: Final = 5_000
COPY_NS: Final = 100_000
"""From a message to its second copy, at most."""

ToHost = Callable[[Any], None]


class _Operation(NamedTuple):
    """One operation of a device. ``snapshot``: what a write writes, where the device has read the frame at its start."""

    request: Request
    snapshot: bytes | None


class _Daemon:
    """One daemon and its file."""

    __slots__ = ("bad", "blocks", "epoch", "last_ns", "queue", "stalled_until_ns", "under_way", "up")

    def __init__(self) -> None:
        self.blocks: dict[int, bytes] = {}
        self.bad: set[int] = set()
        """Blocks that cannot be read any more."""
        self.epoch = -1
        self.up = False
        self.queue: RequestQueue | None = None
        self.under_way: dict[int, _Operation] = {}
        self.stalled_until_ns = 0
        self.last_ns = [0, 0]
        """When the last message arrives: to the daemon, to the host."""


class Daemons:
    """All daemons of a plan. ``to_host``: hands an event to the host's swap machine. ``actors``: of the daemons in the agenda."""

    def __init__(
        self, plan: SimPlan, memory: HostMemory, agenda: Agenda, chance: Chance, faults: Faults, actors: list[int], link_actors: list[int],
        to_host: ToHost,
    ) -> None:  # fmt: skip
        self._plan = plan
        self._memory = memory
        self._agenda = agenda
        self._chance = chance
        self._faults = faults
        self._actors = actors
        self._link_actors = link_actors
        self._to_host = to_host
        self._daemons = [_Daemon() for _ in plan.daemons]
        self.deaths = 0
        self.gone: set[int] = set()
        """Daemons that do not come back."""

    def start(self) -> None:
        """The first epoch of every daemon comes up."""
        for d in range(len(self._daemons)):
            self._agenda.after(self._chance.between(1, HELLO_NS), self._actors[d], partial(self._hello, d, 0))

    def _hello(self, d: int, epoch: int) -> None:
        one = self._daemons[d]
        one.epoch, one.up = epoch, True
        one.queue = RequestQueue(self._memory.frame_count, self._plan.daemons[d].slots, None)
        self._to_host(ev.DaemonUp(d, epoch))

    def block(self, copy: int) -> bytes:
        """What is in a block of a daemon's file: daemon * SLOTS_PER_DAEMON + block."""
        d, block = divmod(copy, SLOTS_PER_DAEMON)
        return self._daemons[d].blocks.get(block, bytes(PAGE_SIZE))

    # -- links ---------------------------------------------------------------------------------------------
    def _send(self, d: int, actor: int, direction: int, action: Callable[[], None]) -> None:
        """In order, unless a fault of the link says otherwise."""
        one, agenda = self._daemons[d], self._agenda
        at_ns = max(one.last_ns[direction], agenda.now_ns + self._chance.link_ns())
        delivery = self._faults.deliver(d)
        if not delivery.copies:
            return
        if not delivery.later_ns:
            one.last_ns[direction] = at_ns
        at_ns += delivery.later_ns
        if delivery.copies > 1:
            agenda.at(at_ns + self._chance.between(0, COPY_NS), actor, action)
        agenda.at(at_ns, actor, action)

    def request(self, d: int, epoch: int, settled: int, requests: list[Request]) -> None:
        """The host sends a batch of requests."""
        self._send(d, self._actors[d], 0, lambda: self._receive(d, epoch, settled, requests))

    def _answer(self, d: int, epoch: int, replies: list[Reply]) -> None:
        if replies:
            self._send(d, self._link_actors[d], 1, lambda: self._deliver(d, epoch, replies))

    def _deliver(self, d: int, epoch: int, replies: list[Reply]) -> None:
        for reply in replies:
            self._to_host(ev.IoReply(d, epoch, reply.id, reply.result, reply.service_ns))

    # -- the daemon ----------------------------------------------------------------------------------------
    def _receive(self, d: int, epoch: int, settled: int, requests: list[Request]) -> None:
        one, now = self._daemons[d], self._agenda.now_ns
        if not one.up or epoch != one.epoch or one.queue is None:
            return
        if now < one.stalled_until_ns:
            self._agenda.at(
                one.stalled_until_ns, self._actors[d], lambda: self._receive(d, epoch, settled, requests)
            )
            return
        self._faults.see(TO_DAEMON, d)
        killed = self._killed(d)
        if not killed and (stop := self._faults.take("stop", d)) is not None:
            one.stalled_until_ns = now + stop.spec.for_ns
        start, at_once = one.queue.accept(requests, settled, now)
        for request in start:
            self._start(d, one, request)
        if killed:
            self._die(d, one)
        else:
            self._answer(d, epoch, at_once)

    def _killed(self, d: int) -> bool:
        """Whether it dies now, perhaps for good; the last one that is left always comes back."""
        if len(self.gone) < len(self._daemons) - 1 and self._faults.take("gone", d) is not None:
            self.gone.add(d)
            return True
        return self._faults.take("kill", d) is not None

    def _start(self, d: int, one: _Daemon, request: Request) -> None:
        early = request.op != OP_READ and self._chance.one_in(2)
        one.under_way[request.id] = _Operation(
            request, bytes(self._memory.page(request.frame)) if early else None
        )
        plan, epoch = self._plan.daemons[d], one.epoch
        ns = self._chance.between(plan.service_us * US, plan.service_us_max * US) + 1
        self._agenda.after(ns, self._actors[d], lambda: self._complete(d, epoch, request.id))

    def _complete(self, d: int, epoch: int, ident: int) -> None:
        one = self._daemons[d]
        if not one.up or epoch != one.epoch or ident not in one.under_way:
            return
        if self._agenda.now_ns < one.stalled_until_ns:
            self._agenda.at(one.stalled_until_ns, self._actors[d], lambda: self._complete(d, epoch, ident))
            return
        assert one.queue is not None
        result = self._transfer(d, one, one.under_way.pop(ident))
        replies, _ = one.queue.completed([(ident, result)], self._agenda.now_ns)
        self._answer(d, epoch, replies)

    # -- the device ----------------------------------------------------------------------------------------
    def _transfer(self, d: int, one: _Daemon, operation: _Operation) -> int:
        """Move the page and return the result, as the device of this plan does."""
        request = operation.request
        if request.op == OP_READ:
            self._faults.see(READ, d)
            return self._read(d, one, request)
        self._faults.see(WRITE, d)
        if self._faults.take("write_error", d) is not None:
            one.blocks[request.slot] = self._torn(one, operation)
            return -errno.EIO
        one.blocks[request.slot] = operation.snapshot or bytes(self._memory.page(request.frame))
        return PAGE_SIZE

    def _read(self, d: int, one: _Daemon, request: Request) -> int:
        """A read: one fault at most, and none where it fails anyway (as swapd/faulty.py)."""
        take = self._faults.take
        if request.slot in one.bad:
            return -errno.EIO
        if take("bad_block", d) is not None:
            one.bad.add(request.slot)
            return -errno.EIO
        if take("read_error", d) is not None:
            return -errno.EIO
        page = one.blocks.get(request.slot, bytes(PAGE_SIZE))
        if take("short_read", d) is not None:
            self._memory.page(request.frame)[: PAGE_SIZE // 2] = page[: PAGE_SIZE // 2]
            return PAGE_SIZE // 2
        if take("bit_flip", d) is not None:
            at = self._chance.between(0, PAGE_SIZE - 1)
            page = page[:at] + bytes([page[at] ^ 1 << self._chance.between(0, 7)]) + page[at + 1 :]
        self._memory.write_page(request.frame, page)
        return PAGE_SIZE

    def _torn(self, one: _Daemon, operation: _Operation) -> bytes:
        """A block whose first half was written."""
        new = operation.snapshot or bytes(self._memory.page(operation.request.frame))
        old = one.blocks.get(operation.request.slot, bytes(PAGE_SIZE))
        half = PAGE_SIZE // 2
        return new[:half] + old[half:]

    # -- death ---------------------------------------------------------------------------------------------
    def _die(self, d: int, one: _Daemon) -> None:
        """SIGKILL: nothing is answered any more; what the device has begun may still land until the fence."""
        one.up = False
        self.deaths += 1
        epoch, agenda, chance = one.epoch, self._agenda, self._chance
        fence_ns = agenda.now_ns + chance.between(1, REPORT_NS)
        agenda.at(fence_ns, self._actors[d], lambda: self._to_host(ev.DaemonLost(d, epoch)))
        for operation in one.under_way.values():
            if chance.one_in(3):
                continue
            lands_ns = agenda.now_ns + chance.between(0, LATE_NS)
            fence_ns = max(fence_ns, lands_ns)
            whole = not chance.one_in(3)
            agenda.at(lands_ns, self._actors[d], partial(self._land, one, operation, whole))
        one.under_way.clear()
        agenda.at(fence_ns + 1, self._actors[d], lambda: self._fenced(d, epoch))

    def _land(self, one: _Daemon, operation: _Operation, whole: bool) -> None:
        request = operation.request
        if request.op == OP_READ:
            length = PAGE_SIZE if whole else PAGE_SIZE // 2
            page = one.blocks.get(request.slot, bytes(PAGE_SIZE))
            self._memory.page(request.frame)[:length] = page[:length]
        elif whole:
            one.blocks[request.slot] = operation.snapshot or bytes(self._memory.page(request.frame))
        else:
            one.blocks[request.slot] = self._torn(one, operation)

    def _fenced(self, d: int, epoch: int) -> None:
        self._to_host(ev.DaemonFenced(d, epoch))
        if d in self.gone:
            self._to_host(ev.DaemonGone(d))
            return
        self._agenda.after(
            self._chance.between(1, RESTART_NS), self._actors[d], lambda: self._hello(d, epoch + 1)
        )
