"""Notices to a guest that memory is short: which of its vCPUs take one, and how a vCPU does. The latter is part of the vcpu machine.

Invariant: a numbered notice that a vCPU took ends with an answer of its guest, or is lost when that vCPU is reset or powers down.

Not handled here: when a guest is told (host/shortage.py), what it does then (guest/oom.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from host.events import CancelPage, MemoryGiven, MemoryNotice, MemoryShort, NoticeLost
from proto.lives import Where
from proto.machine import Path
from proto.trace import Kind
from proto.wire import OOM_PENDING, Exit

if TYPE_CHECKING:
    from host.vcpu import VcpuMachine


def notices(effect: MemoryShort, vcpus: Sequence[VcpuMachine]) -> list[Any]:
    """Events for the machines that have to hear of ``effect``: `MemoryNotice` for vCPUs, or `NoticeLost` for the vm machine.

    Policy of whoever routes events between the host's machines. A numbered notice goes to one vCPU, the first that is on; one that waits
    for its start-up only when there is no other. Number 0 goes to all.
    """
    able = [v for v in vcpus if v.vm == effect.vm and v.started and v.where not in (Where.OFF, Where.PAUSED)]
    if not effect.number:
        return [MemoryNotice(v.cpu, 0) for v in able]
    if not able:
        return [NoticeLost(effect.vm, effect.number, nobody=True)]
    return [MemoryNotice(min(able, key=lambda v: (v.mp_init, v.cpu)).cpu, effect.number)]


class Notice:
    """The notice of one vCPU."""

    __slots__ = ("_m", "_told", "due")

    def __init__(self, machine: VcpuMachine) -> None:
        self._m = machine
        self.due: int | None = None
        """The guest has to be told, at the next entry without another exception."""
        self._told = 0
        """Number of the notice that this guest CPU took and has not answered."""

    def come(self, event: MemoryNotice) -> Path | None:
        """Whatever this vCPU waits for, it goes back to its guest. One that is held for a page executes its instruction again."""
        m = self._m
        self.due = max(event.number, self.due or 0)
        if m.where in (Where.OFF, Where.PAUSED):
            self.lose()
            return None
        if m.page_ask:
            m.emit(CancelPage(m.cpu, m.page_ask))
        m.kick(0)
        return m.wake()

    def take(self) -> int:
        """It goes with this entry."""
        number, self.due = self.due or 0, None
        self._told = number or self._told
        self._m.trace(Kind.OOM_NOTICE, a=number)
        return number

    def answer(self, record: Exit) -> None:
        """Any CPU of the guest may answer: the one that stopped last gives the memory back. Until then a reset of who was told loses it."""
        m = self._m
        m.trace(Kind.OOM_ANSWER, a=record.arg1, b=record.gpa, c=record.gva)
        if self._told == record.arg1 and not record.gva & OOM_PENDING:
            self._told = 0
        m.emit(MemoryGiven(m.vm, record.arg1, record.gpa, record.gva))

    def lose(self) -> None:
        """The guest CPU begins anew, or is no more: it will not answer."""
        if number := self.due or self._told:
            self._m.emit(NoticeLost(self._m.vm, number, nobody=False))
        self.due = None
        self._told = 0
