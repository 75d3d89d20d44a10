"""A guest for the conversation: two vCPUs that fault, sleep, wake, write stamped pages and read them again, and check every word.

Each vCPU is a generator of exit records that is sent entry records. It executes nothing in between: it is outside guest mode whenever
the host looks, so a flush never waits for it, and what it does to a page happens between two turns of the host.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any, Final

import numpy as np

from proto import kvm, wire
from proto.layout import APF_AREA_GPA, NPT_A, NPT_D, NPT_P, NPT_W, XF_IF, XF_KERNEL, XF_RESTART, XF_WRITE
from proto.pagetable import _leaf_tables
from proto.wire import Entry, Exit, ExitReason, Inject

Script = Generator[Exit, Entry, Any]

FIRST_GFN: Final = 16
PAGES: Final = 44
TRIES: Final = 200
BROADCAST: Final = 0xFFFF_FFFF
_PLAIN: Final = Exit(0, 1, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0x5000, 0, 0, 0, 0, 0, 0)


class WrongPageError(AssertionError):
    """A page does not hold what was written to it: what must never happen."""


class Memory:
    """What a guest sees: pages behind the nested table."""

    def __init__(self, frames: np.ndarray, npt: np.ndarray) -> None:
        self._pages = frames.reshape(-1, 512)
        self._npt = npt
        tables = len(npt) // 512
        self._leaves_at = (tables - _leaf_tables(tables)) * 512

    def page(self, gfn: int, *, write: bool) -> np.ndarray | None:
        """u64[512], or None: a nested fault."""
        at = self._leaves_at + gfn
        entry = int(self._npt[at])
        if not entry & NPT_P or (write and not entry & NPT_W):
            return None
        self._npt[at] = np.uint64(entry | NPT_A | (NPT_D if write else 0))
        found: np.ndarray = self._pages[(entry >> 12) & 0xFFFF_FFFF]
        return found


class Cpu:
    """One vCPU. ``at_gate(name)``: says whether the script may go on behind this point; until then it idles."""

    def __init__(
        self, number: int, memory: Memory, versions: dict[int, int], may_pass: Callable[[str], bool]
    ) -> None:
        self.number = number
        self._memory = memory
        self._versions = versions
        self._may_pass = may_pass
        self._sequence = 0
        self._ready: set[int] = set()
        self.slept = 0
        self.waits = False
        """At a gate that is closed."""
        self.done = False

    def script(self) -> Script:
        """From power-on to power-off."""
        yield from self._boot()
        mine = range(FIRST_GFN + self.number, FIRST_GFN + PAGES, 2)
        for gfn in mine:
            yield from self._write(gfn, 1)
        yield from self._say(ExitReason.HYPERCALL, arg0=wire.HC_AT_BARRIER, arg1=self.number + 1)
        yield from self._say(ExitReason.IPI, arg0=1 - self.number, arg1=kvm.VECTOR_CALL)
        yield from self._say(ExitReason.HLT, if_=1, timer_ns=200_000)
        for gate in ("second", "third"):
            yield from self._idle_until(gate)
            for gfn in mine:
                yield from self._check(gfn)
                if gfn % 3 == 0:
                    yield from self._write(gfn, self._versions[gfn] + 1)
        yield from self._idle_until("end")
        self.done = True
        yield self._exit(ExitReason.DONE)

    def resumed(self) -> Script:
        """After a restore: everything is as it was."""
        entry = yield from self._say(ExitReason.RESUME, cpl=3, if_=1, flags=XF_RESTART | XF_IF)
        yield from self._interrupts(entry)
        for gfn in range(FIRST_GFN + self.number, FIRST_GFN + PAGES, 2):
            yield from self._check(gfn)
        yield from self._idle_until("end")
        self.done = True
        yield self._exit(ExitReason.DONE)

    def _exit(self, reason: ExitReason, **fields: int) -> Exit:
        self._sequence += 1
        return _PLAIN._replace(seq=self._sequence, reason=reason, **fields)

    def _say(self, reason: ExitReason, **fields: int) -> Generator[Exit, Entry, Entry]:
        entry = yield self._exit(reason, **fields)
        if entry.inject in (Inject.GP, Inject.RESET, Inject.MACHINE_CHECK):
            raise WrongPageError(f"vCPU {self.number} was given {Inject(entry.inject).name}")
        return entry

    def _boot(self) -> Script:
        area = APF_AREA_GPA + 64 * self.number
        yield from self._say(ExitReason.BOOT)
        for index, value in (
            (kvm.MSR_X2APIC_SPIV, 0x1FF),
            (kvm.MSR_ASYNC_PF_INT, kvm.VECTOR_PAGE_READY),
            (kvm.MSR_ASYNC_PF_EN, area | kvm.EN_ENABLE | kvm.EN_AS_INT),
        ):
            yield from self._say(ExitReason.WRMSR, arg0=index, arg1=value)
        yield from self._look()

    def _idle_until(self, gate: str) -> Script:
        while not self._may_pass(gate):
            self.waits = True
            # A save point, too.
            entry = yield from self._say(
                ExitReason.HLT, if_=1, cpl=3, flags=XF_RESTART | XF_IF, timer_ns=5_000_000
            )
            yield from self._interrupts(entry)
        self.waits = False

    # -- memory --------------------------------------------------------------------------------------------
    def _write(self, gfn: int, version: int) -> Script:
        page = yield from self._reach(gfn, write=True)
        page[:] = stamp(gfn, version)
        self._versions[gfn] = version

    def _check(self, gfn: int) -> Script:
        page = yield from self._reach(gfn, write=False)
        if not np.array_equal(page, stamp(gfn, self._versions[gfn])):
            raise WrongPageError(f"gfn {gfn} is not as written last (version {self._versions[gfn]})")

    def _reach(self, gfn: int, *, write: bool) -> Generator[Exit, Entry, np.ndarray]:
        """A page as a task touches it: vCPU 0 in user mode, so that the host may let it sleep, vCPU 1 in the kernel."""
        for _ in range(TRIES):
            page = self._memory.page(gfn, write=write)
            if page is not None:
                return page
            mode = (
                {"cpl": 3, "if_": 1, "flags": XF_WRITE * write | XF_IF}
                if self.number == 0
                else {"flags": XF_WRITE * write | XF_KERNEL}
            )
            entry = yield from self._say(ExitReason.NESTED, gpa=gfn << 12, gva=gfn << 12, **mode)
            if entry.inject == Inject.PF_NOT_PRESENT:
                yield from self._sleep(entry)
            elif self.number == 0:
                yield from self._interrupts(entry)
        raise WrongPageError(f"gfn {gfn} faults for ever")

    def _area(self, offset: int, value: int | None = None) -> Generator[Exit, Entry, int]:
        """A word of the shared area, by kernel code; stored if there is a value."""
        gpa = APF_AREA_GPA + 64 * self.number + offset
        while (page := self._memory.page(gpa >> 12, write=True)) is None:
            yield from self._say(ExitReason.NESTED, gpa=gpa, gva=gpa, flags=XF_WRITE | XF_KERNEL)
        words = page.view(np.uint32)
        at = (gpa & 0xFFF) >> 2
        if value is not None:
            words[at] = value
        return int(words[at])

    # -- async page faults ---------------------------------------------------------------------------------
    def _sleep(self, entry: Entry) -> Script:
        """The task sleeps; the CPU halts until the page is ready."""
        token = entry.cr2
        yield from self._area(kvm.AREA_FLAGS, 0)
        self.slept += 1
        yield from self._interrupts(entry)
        while token not in self._ready and BROADCAST not in self._ready:
            entry = yield from self._say(ExitReason.HLT, if_=1, flags=XF_IF)
            yield from self._interrupts(entry)
        self._ready.discard(token)
        self._ready.discard(BROADCAST)

    def _look(self) -> Script:
        entry = yield from self._say(ExitReason.KICK)
        yield from self._interrupts(entry)
        self._ready.discard(BROADCAST)

    def _interrupts(self, entry: Entry) -> Script:
        """Take what is pending; each ends with its EOI."""
        for _ in range(TRIES):
            pending = wire.unpack_vectors(entry.irr)
            if not pending:
                return
            vector = pending[0]
            taken = {"accepted": wire.pack_vectors([vector]), "eois": 1}
            if vector == kvm.VECTOR_PAGE_READY:
                token = yield from self._area(kvm.AREA_TOKEN)
                self._ready.add(token)
                yield from self._area(kvm.AREA_TOKEN, 0)
                entry = yield from self._say(ExitReason.WRMSR, arg0=kvm.MSR_ASYNC_PF_ACK, arg1=1, **taken)
            else:
                entry = yield from self._say(ExitReason.KICK, **taken)
        raise WrongPageError(f"vCPU {self.number} is interrupted for ever")


def stamp(gfn: int, version: int) -> np.ndarray:
    """u64[512]: words that differ between pages, versions and places."""
    return np.arange(512, dtype=np.uint64) + np.uint64((gfn << 40) | (version << 16) | 1)
