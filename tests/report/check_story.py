"""Builds event lists for the checker's tests: a correct life of faults, step by step, from which a test leaves out or doubles one.

Every step logs what host and guest of a run log, in their order. Tokens are made from (number, vCPU).
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from proto.trace import EVENT, Events, Kind
from report.check.checker import Checker
from report.check.verdict import Verdict

WAKE_ALL: Final = 0xFFFF_FFFF
USER: Final = 3 | 1 << 2 | 1 << 4
"""State of an injection: CPL 3, IF 1, no shadow, paging on, nothing pending."""
IF, PG, PENDING = 1 << 2, 1 << 4, 1 << 5
VECTOR: Final = 0xF3
MSR_EN, MSR_INT, MSR_ACK, MSR_SPIV = 0x4B564D02, 0x4B564D06, 0x4B564D07, 0x80F
SECOND_NS: Final = 1_000_000_000


class Story:
    """Events in order; ``now_ns`` moves by 1 us per event."""

    def __init__(self, profile: str = "mainline") -> None:
        self.profile = profile
        self.now_ns = 0
        self.rows: list[dict[str, int]] = []

    def add(self, kind: Kind, cpu: int = 0, token: int = 0, a: int = 0, b: int = 0, c: int = 0) -> None:
        """One event; the guest's come from process 1 + cpu, the host's from process 0."""
        self.now_ns += 1000
        guest = 64 <= kind < 96
        self.rows.append(
            {"kind": kind, "vcpu": cpu, "token": token, "a": a, "b": b, "c": c, "proc": 1 + cpu if guest else 0,
             "t_ns": self.now_ns, "lamport": len(self.rows) + 1, "seq": len(self.rows)}
        )  # fmt: skip

    # -- steps -------------------------------------------------------------------------------------------------
    def boot(self, cpu: int = 0, *, send_always: bool = False, enable: bool = True) -> None:
        """SPIV, vector, enable; the broadcast that follows from it."""
        mode_i = self.profile == "mainline"
        self.add(Kind.MSR_WR, cpu, a=MSR_SPIV, b=0x1FF)
        if not enable:
            return
        if mode_i:
            self.add(Kind.MSR_WR, cpu, a=MSR_INT, b=VECTOR)
        index = 0x4B564D00 if self.profile == "v3" else MSR_EN
        self.add(Kind.MSR_WR, cpu, a=index, b=0x9001 | (8 if mode_i else 0) | (2 if send_always else 0))
        self.broadcast(cpu)

    def broadcast(self, cpu: int = 0) -> None:
        """Wake-all without sleepers."""
        self.add(Kind.ASYNC_PF_READY, cpu, WAKE_ALL)
        self.deliver(cpu, WAKE_ALL)
        self.take_ready(cpu, WAKE_ALL)
        self.consumed(cpu, WAKE_ALL)

    def fault(self, number: int, gfn: int, cpu: int = 0) -> int:
        """A fault that goes async; returns its token."""
        token = number << 12 | cpu
        self.add(Kind.TRY_ASYNC_GET_PAGE, cpu, a=gfn << 12, b=gfn)
        self.add(Kind.ASYNC_PF_NOT_PRESENT, cpu, token, a=gfn << 12)
        return token

    def inject(self, token: int, cpu: int = 0, *, state: int = USER, old: int = 0) -> None:
        """The host announces it."""
        self.add(Kind.SLOT_WRITE, cpu, 1, a=0, b=1, c=old)
        self.add(Kind.INJ, cpu, token, a=1, b=token, c=state)

    def handle(self, token: int, cpu: int = 0) -> None:
        """The guest takes the #PF."""
        self.add(Kind.G_CLEAR, cpu, token, a=0, b=1)
        self.add(Kind.G_NP, cpu, token, a=1, b=token, c=3)

    def sleep(self, token: int, cpu: int = 0, *, task: int = 1, variant: int = 0) -> None:
        """Its task waits; variant 1: the CPU halts."""
        self.add(Kind.G_WAIT, cpu, token, a=task, b=task - 1, c=variant)

    def asleep(self, number: int, gfn: int, cpu: int = 0, *, task: int = 1) -> int:
        """A fault up to the sleeping task; returns its token."""
        token = self.fault(number, gfn, cpu)
        self.inject(token, cpu)
        self.handle(token, cpu)
        self.sleep(token, cpu, task=task)
        return token

    def halt(self, cpu: int = 0) -> None:
        """The synthetic halt."""
        self.add(Kind.REQ, cpu, a=1)
        self.add(Kind.HALT_ON, cpu, a=1)

    def done(self, token: int, cpu: int = 0) -> None:
        """Its fetch ends."""
        self.add(Kind.ASYNC_PF_COMPLETED, cpu, token)

    def ready(self, token: int, cpu: int = 0) -> None:
        """It is dequeued."""
        self.add(Kind.PREFAULT, cpu, token)
        self.add(Kind.ASYNC_PF_READY, cpu, token)

    def deliver(self, cpu: int, token: int, *, old: int = 0) -> None:
        """The guest is told."""
        if self.profile == "mainline":
            self.add(Kind.SLOT_WRITE, cpu, token, a=4, b=token, c=old)
            self.add(Kind.APIC_ACCEPT_IRQ, cpu, token, a=VECTOR)
        else:
            self.add(Kind.SLOT_WRITE, cpu, 2, a=0, b=2, c=old)
            self.add(Kind.INJ, cpu, token, a=2, b=token, c=USER)

    def take_ready(self, cpu: int, token: int) -> None:
        """The guest takes the ready event."""
        if self.profile == "mainline":
            self.add(Kind.G_IRQ, cpu, a=VECTOR)
        else:
            self.add(Kind.G_CLEAR, cpu, token, a=0, b=2)
            self.add(Kind.G_IRQ, cpu, token, a=14)

    def wake(self, token: int, cpu: int = 0, *, task: int = 1, variant: int = 0) -> None:
        """A node is taken out (0), a dummy added (1), all are woken (2)."""
        self.add(Kind.G_WAKE, cpu, token, a=task, b=task - 1, c=variant)

    def consumed(self, cpu: int, token: int) -> None:
        """Mode I: clear and acknowledge."""
        if self.profile == "mainline":
            self.add(Kind.G_CLEAR, cpu, token, a=4, b=token)
            self.add(Kind.ACK, cpu, a=1)
            self.add(Kind.MSR_WR, cpu, a=MSR_ACK, b=1)

    def hears(self, token: int, cpu: int = 0) -> None:
        """The ready event, up to the guest's taking it."""
        self.ready(token, cpu)
        self.deliver(cpu, token)
        self.take_ready(cpu, token)

    def finds_nobody(self, token: int, cpu: int = 0) -> None:
        """The page comes, and nobody sleeps: a dummy is added."""
        self.done(token, cpu)
        self.hears(token, cpu)
        self.wake(token, cpu, variant=1)
        self.consumed(cpu, token)

    def told(self, token: int, cpu: int = 0, *, task: int = 1) -> None:
        """From the ready event to the woken task."""
        self.hears(token, cpu)
        self.wake(token, cpu, task=task)
        self.consumed(cpu, token)
        self.resume(token, cpu, task=task)

    def resume(self, token: int, cpu: int = 0, *, task: int = 1) -> None:
        """Its task runs again."""
        self.add(Kind.SWITCH, cpu, a=0, b=task, c=1)
        self.add(Kind.G_RESUME, cpu, token, a=task)

    def life(self, number: int, gfn: int, cpu: int = 0, *, task: int = 1) -> int:
        """A whole fault; returns its token."""
        token = self.asleep(number, gfn, cpu, task=task)
        self.done(token, cpu)
        self.told(token, cpu, task=task)
        return token

    def cancel(self, token: int, cpu: int = 0, *, why: int = 3) -> None:
        """The host forgets it; 3: the vCPU is destroyed."""
        self.add(Kind.CANCEL, cpu, token, a=why)

    # -- what comes out ----------------------------------------------------------------------------------------
    def events(self) -> Events:
        """As an array, dtype EVENT."""
        out = np.zeros(len(self.rows), EVENT)
        for record, row in zip(out, self.rows, strict=True):
            for key, value in row.items():
                record[key] = value
        return out

    def check(self, *, recorded: bool = False, **end: Any) -> Verdict:
        """The verdict on all of it, as of a run that ended by itself."""
        checker = Checker(self.profile, recorded=recorded)
        checker.feed(self.events())
        return checker.finish("story", **end)


def on_two_vcpus(lives: int, *, lost: bool = False) -> Story:
    """Faults on two vCPUs, told alternately; lost: the guest forgets one sleeper."""
    story = Story()
    story.boot()
    story.boot(1)
    for number in range(1, lives + 1):
        for cpu in (0, 1):
            story.life(number, 10 + number, cpu)
    if lost:
        token = story.asleep(lives + 1, 10)
        story.done(token)
        story.hears(token)
        story.consumed(0, token)
    return story


def numbers(verdict: Verdict) -> set[int]:
    """The invariants that are violated."""
    return {one.number for one in verdict.violated}
