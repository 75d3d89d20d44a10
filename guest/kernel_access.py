"""Guest memory as kernel code touches it: through the direct map, interrupts off, each access begun anew until it succeeds.

Invariant: between two attempts lies one exit for a nested fault, which the host answers when the page is there (IF=0: nothing async).

Not handled here: accesses of tasks, which guest mode makes itself (guest/run.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from guest.events import Access32, ClearPage
from proto.layout import VC_KERNEL_NESTED, VC_NESTED
from proto.machine import Path
from proto.wire import ExitReason

if TYPE_CHECKING:
    from guest.machine import GuestCpu


class KernelAccess:
    """Accesses of one CPU's kernel."""

    __slots__ = ("_cpu",)

    def __init__(self, cpu: GuestCpu) -> None:
        self._cpu = cpu

    def word32(self, gpa: int, *, write: bool = False, value: int = 0) -> Path:
        """One aligned 32-bit access at ``gpa``; returns the word."""
        while True:
            ask = self._cpu.new_ask()
            self._cpu.emit(Access32(ask.ask_id, gpa, write, value))
            got = yield ask
            if got.ok:
                return got.value
            yield from self._fetch()

    def clear_page(self, gpa: int) -> Path:
        """Fill the page at ``gpa`` with zeros."""
        while True:
            ask = self._cpu.new_ask()
            self._cpu.emit(ClearPage(ask.ask_id, gpa))
            got = yield ask
            if got.ok:
                return
            yield from self._fetch()

    def _fetch(self) -> Path:
        """The nested fault of an attempt."""
        cpu = self._cpu
        cpu.acc.add(VC_NESTED)
        cpu.acc.add(VC_KERNEL_NESTED)
        yield from cpu.exits.take_undisturbed(ExitReason.NESTED, fault=cpu.exits.fault())
