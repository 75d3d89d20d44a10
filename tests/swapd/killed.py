"""The host's memory and swap machines over real daemon processes that are killed: hundreds of requests in flight, every page checked.

`World` asks for pages as many vCPUs would: a page is checked and perhaps written anew the moment it is mapped. There are four times as
many pages as frames, so frames and slots are reused all the time. What a page must hold is known here, outside of everything that
is tested.
"""

from __future__ import annotations

import mmap
import os
import random
import signal
import time
from collections import Counter, deque
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import numpy as np
import zmq

from host import events as ev
from host.events import Found, Gup
from host.memory import HostMemory, VmMemory
from host.slots import Memslot
from host.swap import SwapMachine
from host.vm import Limits, VmMachine
from launcher.zygote import die_with_parent
from proto import link, segments, wire
from proto.layout import npt_tables
from proto.run import RunContext, SwapFileInfo
from proto.stats import HostCounter
from proto.topology import Host, Run, Swapd, Topology, Vm
from proto.units import PAGE_SIZE
from proto.wire import OP_WRITE
from swapd import shell as swapd_shell
from swapd import swapfile
from tests.host.harness import Recorder
from tests.sweep.guest import Memory, stamp

FRAMES: Final = 1024
PAGES: Final = 4096
ASKS: Final = 600
"""Pages asked for at a time."""
DEPTH: Final = 64
BOUND_S: Final = 60.0


class World:
    """One VM, one daemon. ``wrong``: pages that were not as written last. ``epoch``: of the daemon that is at work."""

    def __init__(self, folder: Path, disk: Path, engine: str, seed: int) -> None:
        self._opened = ExitStack()
        self._rng = random.Random(seed)
        self.obs = Recorder()
        self.wrong: list[int] = []
        self.slow_device = False
        self.late: list[tuple[int, int, int]] = []
        self.versions = np.zeros(PAGES, np.int64)
        self.checked = 0
        self.epoch = 0
        self.pids: dict[int, int] = {}
        self._hello: dict[int, bytes] = {}
        self._admitted = -1
        self._routed: deque[tuple[Any, Any]] = deque()
        self._io: list[ev.SendIo] = []
        self._asked: dict[int, tuple[int, bool]] = {}
        self._asks = 0
        self._asking = True
        self._lamport = 0
        self._looked_s = 0.0
        try:
            self._build(folder, disk, engine)
        except BaseException:
            self.close()
            raise

    def _build(self, folder: Path, disk: Path, engine: str) -> None:
        sizes = {"frames": FRAMES * PAGE_SIZE, "npt-0": npt_tables(PAGES) * PAGE_SIZE, "control": PAGE_SIZE}
        made = segments.create(sizes)
        for segment in made.values():
            self._opened.callback(segment.close)
        self.file = swapfile.create(disk, 2 * PAGES)
        self._opened.callback(self.file.close)
        npt, frames = made["npt-0"].u64, made["frames"].u64
        nobody = np.zeros(512, np.uint64)
        self.memory = HostMemory(frames, nobody, [VmMemory(npt, np.zeros(512, np.uint64), 0, 1)])
        self._guest = Memory(frames, npt)
        self.vm = VmMachine(self.memory, [Memslot(0, 0, PAGES, 0)], Limits(128, 256, 1, False), self.obs)
        self.swap = SwapMachine([self.file.slots], self.obs)
        info = SwapFileInfo(self.file.fd, self.file.slots, self.file.direct, self.file.fs_type, engine)
        topology = Topology(
            run=Run(), host=Host(allowance_mib=4), vm=(Vm(memory_mib=16),), swapd=(Swapd(queue_depth=DEPTH),)
        )
        self.ctx = RunContext(
            "fence", folder, f"ipc://{folder}/h", "", topology, {"frames": made["frames"]}, (), [info],
            trace_bytes=1 << 16,
        )  # fmt: skip
        swapd_shell.warm()
        self._context = link.new_context()
        self._opened.callback(self._context.destroy, 0)
        self._router = link.bind_router(self._context, self.ctx.endpoint)

    # -- daemons -------------------------------------------------------------------------------------------
    def start(self, epoch: int) -> None:
        """Fork a daemon, as the zygote does."""
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                die_with_parent(signal.SIGKILL)
                if os.getppid() == parent:
                    swapd_shell.main(self.ctx, 0, epoch)
                    code = 0
            finally:
                os._exit(code)
        self.pids[epoch] = pid

    def kill(self) -> Counter[int]:
        """SIGKILL and reap the daemon at work. Returns what was in flight, by operation."""
        flight = self.in_flight()
        if self.slow_device:
            self.late = [(one.op, one.frame, one.copy) for one in self.swap.daemons[0].out.values()]
        pid = self.pids.pop(self.epoch)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        self._feed(self.swap, ev.DaemonLost(0, self.epoch))
        return flight

    def stop(self) -> set[tuple[int, int]]:
        """SIGSTOP: the daemon at work stands still. Returns the frames and slots that it was told, as (frame, slot)."""
        os.kill(self.pids[self.epoch], signal.SIGSTOP)
        return self.named()

    def named(self) -> set[tuple[int, int]]:
        """Frames and slots of unanswered requests."""
        return {(one.frame, one.copy) for one in self.swap.daemons[0].out.values()}

    def free(self) -> tuple[set[int], set[int]]:
        """Frames and slots that may be given to anybody."""
        frames = set(self.vm.frames.free[: self.vm.frames.free_count].tolist())
        return frames, set(range(self.file.slots)) - set(self.swap.copies.blocks_used())

    def fence(self) -> None:
        """As the launcher does between the death and the successor."""
        self.land()
        swapfile.fence(self.file.fd, self.file.size_bytes)

    def land(self) -> None:
        """What a slow device still had to do when its daemon died (`late`) is done now: blocks go where they were to go then."""
        late, self.late = self.late, []
        with mmap.mmap(-1, PAGE_SIZE) as block:
            for op, frame, slot in late:
                if op == OP_WRITE:
                    block[:] = bytes(self.memory.page(frame))
                    os.pwritev(self.file.fd, [block], slot * PAGE_SIZE)
                else:
                    os.preadv(self.file.fd, [block], slot * PAGE_SIZE)
                    self.memory.write_page(frame, block[:])

    def fenced(self) -> None:
        """Tell the machines so; the next epoch may come."""
        self._feed(self.swap, ev.DaemonFenced(0, self.epoch))
        self.epoch += 1
        self._admit()

    def in_flight(self) -> Counter[int]:
        """Requests that the daemon has and that were not answered."""
        return Counter(request.op for request in self.swap.daemons[0].out.values())

    def has_come(self, epoch: int) -> bool:
        """Whether a daemon has said HELLO."""
        return epoch in self._hello

    def _admit(self) -> None:
        identity = self._hello.get(self.epoch)
        if identity is not None and self._admitted < self.epoch:
            self._admitted = self.epoch
            self._send(identity, wire.Welcome(self.epoch, 0))
            self._feed(self.swap, ev.DaemonUp(0, self.epoch))

    # -- the loop ------------------------------------------------------------------------------------------
    def until(self, over: Callable[[], bool]) -> None:
        """Go on until something is so."""
        deadline_s = time.monotonic() + BOUND_S
        while not over():
            assert time.monotonic() < deadline_s, f"not within {BOUND_S} s: {self.in_flight()}"
            self.turn()

    def turn(self) -> None:
        """Ask, hear, send."""
        while self._asking and len(self._asked) < ASKS:
            self._ask(self._rng.randrange(PAGES), self._rng.random() < 0.5)
        if self._router.poll(1):
            self._hear()
        if self.vm.grace_pending:
            self._feed(self.vm, ev.LookAtGrace())
        if time.monotonic() - self._looked_s > 0.5:
            self._looked_s = time.monotonic()
            self._feed(self.swap, ev.LookAtRequests())
        if self._io:
            self._send_io()

    def fill(self) -> None:
        """Write every page."""
        self._go_over(write=True)
        self._asking = True

    def finish(self) -> None:
        """Read every page once more; then nothing is under way."""
        self._go_over(write=False)

    def _go_over(self, *, write: bool) -> None:
        self._asking = False
        self.until(lambda: not self._asked)
        for first in range(0, PAGES, ASKS):
            for gfn in range(first, min(PAGES, first + ASKS)):
                self._ask(gfn, write)
            self.until(lambda: not self._asked)

    def _ask(self, gfn: int, write: bool) -> None:
        self._asks += 1
        self._asked[self._asks] = gfn, write
        self._feed(self.vm, ev.GetPage(0, self._asks, 0, gfn, write, Gup.WAIT))

    def _answered(self, event: ev.Answer) -> None:
        gfn, write = self._asked.pop(event.ask)
        if event.value == Found.BAD:
            self.wrong.append(gfn)
            return
        page = self._guest.page(gfn, write=write)
        if page is None:
            self._ask(gfn, write)
            return
        version = int(self.versions[gfn])
        self.checked += 1
        if version and not np.array_equal(page, stamp(gfn, version)):
            self.wrong.append(gfn)
        if write:
            self.versions[gfn] = version + 1
            page[:] = stamp(gfn, version + 1)

    def _feed(self, machine: Any, event: Any) -> None:
        self._routed.append((machine, event))
        while self._routed:
            target, one = self._routed.popleft()
            for effect in target.on((one,), time.monotonic_ns()):
                self._perform(effect)

    def _perform(self, effect: Any) -> None:
        kind = type(effect)
        if kind is ev.Answer:
            self._answered(effect)
        elif kind is ev.SendIo:
            self._io.append(effect)
        elif kind in (ev.SwapIn, ev.SwapInBad, ev.SwapOut, ev.SlotFree):
            self._routed.append((self.swap, effect))
        elif kind in (ev.SwapInDone, ev.SwapOutDone, ev.FrameBack, ev.WritesStand):
            self._routed.append((self.vm, effect))
        else:
            raise AssertionError(f"unexpected: {effect}")

    def _hear(self) -> None:
        for _ in range(64):
            try:
                identity, raw = self._router.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            peer, message = link.parse_identity(identity), wire.decode(raw)
            assert peer is not None
            if isinstance(message, wire.Hello):
                self._hello[message.epoch] = identity
                self._admit()
            elif isinstance(message, wire.IoDone) and peer[2] == self._admitted == self.epoch:
                for request, result, ns in message.records.tolist():
                    self._feed(self.swap, ev.IoReply(0, message.epoch, request, result, ns))

    def _send(self, identity: bytes, message: wire.Message) -> None:
        try:
            self._router.send_multipart([identity, wire.encode(message)], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                raise

    def _send_io(self) -> None:
        waiting, self._io = self._io, []
        identity = self._hello[self._admitted]
        for first in range(0, len(waiting), wire.BATCH_MAX):
            batch = waiting[first : first + wire.BATCH_MAX]
            self._lamport += 1
            records = np.array([(r.request, r.op, r.frame, r.slot) for r in batch], wire.IO_DTYPE)
            self._send(identity, wire.Io(batch[0].epoch, self._lamport, self.swap.settled(0), records))

    @property
    def damage(self) -> int:
        """Pages that were wrong, and sums that did not fit."""
        return len(self.wrong) + self.obs.counts[HostCounter.CHECKSUM_ERRORS]

    def busy(self, least: int) -> bool:
        """At least so many requests are in flight, some of them of either kind."""
        flight = self.in_flight()
        return sum(flight.values()) >= least and min(flight[OP_WRITE], flight[1 - OP_WRITE]) >= least // 16

    def close(self) -> None:
        """Processes, sockets, memory."""
        for pid in self.pids.values():
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        self.pids.clear()
        self._opened.close()
