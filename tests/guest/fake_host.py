"""A host for vCPU processes under test: a thread with a ROUTER that serves nested faults from frames of its own (frame = gfn)."""

from __future__ import annotations

import heapq
import os
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np

from guest.boot import init_kernel, plan_tasks
from proto import layout as L  # noqa: N812 - a table of constants
from proto import link, pcpu, segments, wire
from proto.atomics import py_add, py_store
from proto.kvm import MSR_ASYNC_PF_ACK, MSR_ASYNC_PF_EN, VECTOR_PAGE_READY, make_token
from proto.pagetable import npt_clear, npt_set
from proto.run import RunContext
from proto.topology import Host, Run, Task, Topology, Vm
from proto.units import TOKEN_WAKE_ALL, WORDS_PER_PAGE
from proto.wire import Entry, Exit, ExitReason, Held, Inject, pack_vectors

PROFILE_OF = {"sync": "mainline", "halt": "mainline", "exception": "v7", "interrupt": "mainline"}
FETCH_NS = 500_000
GUEST_MIB = 8
EVICT_AT = 120
"""Pages in memory before all of them are taken away."""


@contextmanager
def context(mode: str, tasks: tuple[Task, ...], **vm: Any) -> Iterator[RunContext]:
    """A run of one VM with one vCPU, its segments and kernel; everything is given back."""
    topology = Topology(
        run=Run(mode=mode, profile=PROFILE_OF[mode]),
        host=Host(allowance_mib=GUEST_MIB, pcpus=1),
        vm=(Vm(name="vm0", vcpus=1, memory_mib=GUEST_MIB, task=tasks, **vm),),
    )
    plan = plan_tasks(topology.vm[0])
    made = segments.create(segments.plan(topology, [len(plan.tasks)], [1 << 20], {}))
    eventfds = pcpu.make_eventfds(1)
    with tempfile.TemporaryDirectory() as folder:
        init_kernel(made["kernel-0"].u64, plan.tasks, 1, GUEST_MIB * 256, 1)
        yield RunContext(
            "test", Path(folder), f"ipc://{folder}/h", "", topology, made, eventfds, (), trace_bytes=8 << 20
        )
    for fd in eventfds:
        os.close(fd)
    for segment in made.values():
        segment.close()


class FakeHost:
    """Serves one vCPU until it is done, then says BYE. ``tamper`` sees every exit first and may send what it likes."""

    def __init__(self, ctx: RunContext, tamper: Callable[[FakeHost, Exit], None] | None = None) -> None:
        self.ctx = ctx
        self.mode = ctx.topology.run.mode
        self.tamper = tamper
        self.control = ctx.segments["control"].u64
        self.page = ctx.segments["vcpus"].u64
        self.npt = ctx.segments["npt-0"].u64
        self.words = ctx.segments["frames"].u32
        self.tasks = int(ctx.segments["kernel-0"].u64[L.K_TASKS])
        self.exits: list[Exit] = []
        self.nacks: list[wire.NackMsg] = []
        self.error: BaseException | None = None
        self.said_hello = False
        self.silent = False
        self.bye_at: ExitReason = ExitReason.DONE
        self.save_at = -1
        """Number of the exit at which the vCPU is saved, and that is all."""
        self.saved: wire.Registers | None = None
        """What it handed over."""
        self.registers: wire.Registers | None = None
        """What a fresh vCPU gets in place of WELCOME."""
        self._held: Exit | None = None
        self._held_since_ns = 0
        self._held_for: int | None = None
        self._in_guest = False
        self._kicked = False
        self._area = 0
        self._unacked = False
        self._irr: set[int] = set()
        self._done: deque[int] = deque()
        self._fetches: list[tuple[int, int, int]] = []
        self._attempts = 0
        self._mapped: set[int] = set()
        self._evicted: set[int] = set()
        self._leaving = False
        self._context = link.new_context()
        self._router = link.bind_router(self._context, ctx.endpoint)
        self._thread = threading.Thread(target=self._main, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._leaving = True
        self._thread.join(10)
        assert not self._thread.is_alive()
        self._router.close(0)
        self._context.term()
        if self.error is not None:
            raise self.error

    # -- the loop ------------------------------------------------------------------------------------------------------
    def _main(self) -> None:
        try:
            while not self._leaving:
                timeout_ms = 20
                if self._fetches:
                    timeout_ms = max(0, min(20, (self._fetches[0][0] - time.monotonic_ns()) // 1_000_000))
                if self._router.poll(timeout_ms):
                    _, raw = self._router.recv_multipart()
                    self._receive(wire.decode(raw))
                self._completions()
        except BaseException as error:  # noqa: BLE001 - shown by __exit__
            self.error = error

    def send_raw(self, raw: bytes) -> None:
        """Any bytes to the vCPU."""
        self._router.send_multipart([link.vcpu_identity(0), raw])

    def send(self, message: wire.Message) -> None:
        """A message to the vCPU."""
        self.send_raw(wire.encode(message))

    def ring(self) -> None:
        """The doorbell."""
        py_add(self.page, L.VP_DOORBELL, np.uint64(1))

    def _receive(self, message: wire.Message) -> None:
        if isinstance(message, wire.Hello):
            self.said_hello = True
            if not self.silent:
                self.send(self.registers or wire.Welcome(0, 0))
        elif isinstance(message, wire.NackMsg):
            self.nacks.append(message)
        elif isinstance(message, wire.Registers):
            self.saved = message
            self.send(wire.Bye(0))
        else:
            assert isinstance(message, Exit)
            self._exit(message)

    def _exit(self, record: Exit) -> None:
        self.exits.append(record)
        self._in_guest = False
        self._kicked = False
        self._irr -= set(wire.unpack_vectors(record.accepted))
        if self.tamper is not None:
            self.tamper(self, record)
        if record.reason == self.bye_at:
            self.send(wire.Bye(0))
            return
        if record.seq == self.save_at:
            self.send(wire.Save(0))
            return
        self._held, self._held_since_ns, self._held_for = record, time.monotonic_ns(), None
        if len(self._mapped) >= EVICT_AT:
            self._evict()
        reason = record.reason
        if reason == ExitReason.NESTED and not self._fault(record):
            return
        if reason == ExitReason.WRMSR:
            self._wrmsr(record)
        elif reason == ExitReason.HYPERCALL and record.arg1 >= self.tasks:
            py_store(self.control, L.CTL_BARRIER, np.uint64(1))
        self._deliver()
        if reason == ExitReason.HLT and not self._irr and self._inject is None and not self._barrier_news():
            self._held_for = -1
            return
        self._enter(Held.NONE)

    _inject: tuple[Inject, int] | None = None
    _told_barrier = False

    def _barrier_news(self) -> bool:
        news = bool(self.control[L.CTL_BARRIER]) and not self._told_barrier
        self._told_barrier |= news
        return news

    def _enter(self, kind: Held) -> None:
        record, self._held = self._held, None
        assert record is not None
        held_ns = time.monotonic_ns() - self._held_since_ns if kind else 0
        inject, cr2 = self._inject or (Inject.NONE, 0)
        self._inject = None
        irr = pack_vectors(sorted(self._irr, reverse=True))
        self._in_guest = True
        self.send(Entry(record.seq, record.lamport + 1, inject, 0, cr2, irr, 0, kind, held_ns, 0))

    def _map(self, gfn: int) -> None:
        npt_set(self.npt, gfn, gfn, True)
        self._mapped.add(gfn)
        self._evicted.discard(gfn)

    def _evict(self) -> None:
        """Unmap everything; the vCPU is outside guest mode, and since frame = gfn the contents stay where they are."""
        for gfn in self._mapped:
            npt_clear(self.npt, gfn)
        self._evicted |= self._mapped
        self._mapped.clear()
        py_add(self.control, WORDS_PER_PAGE + L.VMC_FLUSH_GEN, np.uint64(1))

    # -- faults ----------------------------------------------------------------------------------------------------------
    def _fault(self, record: Exit) -> bool:
        """True: enter now. Data pages of user mode cost I/O the first time, everything else is there at once."""
        gfn = record.gpa >> 12
        slow = record.cpl == 3 and not record.flags & L.XF_WALK and gfn in self._evicted
        if not slow:
            self._map(gfn)
            return True
        due_ns = time.monotonic_ns() + FETCH_NS
        outstanding = any(f[2] == gfn for f in self._fetches)
        if not outstanding:
            self._attempts += 1
        token = make_token(self._attempts, 0)
        if self.mode in ("sync", "halt") or outstanding or not self._area:
            if not outstanding:
                heapq.heappush(self._fetches, (due_ns, 0, gfn))
            self._held_for = gfn
            return False
        heapq.heappush(self._fetches, (due_ns, token, gfn))
        self.words[self._area // 4] = 1
        self._inject = Inject.PF_NOT_PRESENT, token
        return True

    def _wrmsr(self, record: Exit) -> None:
        if record.arg0 == MSR_ASYNC_PF_EN:
            self._area = record.arg1 & ~63
            self._done.append(TOKEN_WAKE_ALL)
        elif record.arg0 == MSR_ASYNC_PF_ACK:
            self._unacked = False

    def _completions(self) -> None:
        now_ns = time.monotonic_ns()
        while self._fetches and self._fetches[0][0] <= now_ns:
            _, token, gfn = heapq.heappop(self._fetches)
            self._map(gfn)
            if token:
                self._done.append(token)
            if self._held is not None and self._held_for == gfn:
                self._enter(Held.BLOCKED if self.mode == "sync" else Held.HALTED)
        if self._held is not None and self._held_for == -1:
            self._deliver()
            if self._irr or self._inject or self._barrier_news():
                self._enter(Held.IDLE)
        elif self._done and self._in_guest and not self._kicked:
            self._kicked = True
            self.send(wire.Kick(0, 1))
            self.ring()

    def _deliver(self) -> None:
        """Hand a completion over, if the guest can take one."""
        if not self._done or self._inject is not None or self._held is None:
            return
        if self.mode == "exception":
            if self._held.if_:
                self.words[self._area // 4] = 2
                self._inject = Inject.PF_READY, self._done.popleft()
        elif not self._unacked and self.words[self._area // 4 + 1] == 0:
            self.words[self._area // 4 + 1] = self._done.popleft()
            self._unacked = True
            self._irr.add(VECTOR_PAGE_READY)
