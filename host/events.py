"""What the host's machines tell each other: vcpu machines, the vm machine and the swap machine share nothing but these records.

`ask` numbers belong to the asking vcpu machine; an `Answer` with the same number ends its path's wait.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any, Final, NamedTuple

from host.slots import Memslot
from proto.image import Content
from proto.wire import Entry, Exit

STALE: Final = -2
"""Answer to a host access to guest memory: the slots have another generation than the translation that came with it."""


class Gup(IntEnum):
    """How far a get_user_pages request may go (the ladder, spec §1.5, §1.6)."""

    NOWAIT = 0
    """Fast and no-I/O rungs only; `Found.NEEDS_IO` otherwise."""
    WAIT = 1
    """All rungs: the asking vCPU is held until the page is mapped."""
    PREFAULT = 2
    """As NOWAIT, on behalf of a completed async fault: never starts anything (I18)."""


class Found(IntEnum):
    """Answer to a get_user_pages request."""

    FAST = 0
    """Was in memory (mapped, or in the swap cache with its frame)."""
    ZERO_FILL = 1
    SWAP_CACHE = 2
    """The page was on its way out and was taken back without I/O."""
    SWAPPED_IN = 3
    NEEDS_IO = 4
    NO_SLOT = 5
    """No memslot there."""
    BAD = 6
    """Could not be read from swap: hardware poison."""
    NO_MEMORY = 7
    """The request was taken back before there was an answer (`CancelPage`): the guest executes its instruction again."""


# ---- vcpu machine -> vm machine --------------------------------------------------------------------------
class GetPage(NamedTuple):
    """Map the page behind ``gfn`` for the guest."""

    cpu: int
    ask: int
    vm: int
    gfn: int
    write: bool
    how: Gup


class Translate(NamedTuple):
    """gfn -> host virtual page through the current memslots; answer: Hvp or -1, and the generation it belongs to."""

    cpu: int
    ask: int
    vm: int
    gfn: int


class Fetch(NamedTuple):
    """The worker of an async fault: bring host virtual page ``hvp`` into memory for write, whatever maps it by then (spec §3.3)."""

    cpu: int
    work: int
    hvp: int


class CancelFetch(NamedTuple):
    """The vCPU forgot this work; no `Fetched` is wanted any more. The read itself goes on."""

    cpu: int
    work: int
    hvp: int


class GuestRead32(NamedTuple):
    """Host access to guest memory (the shared area) through a remembered translation: ``hvp`` (-1: not backed), made with the slots of
    ``generation``. Answer: the word, -1 when it is not backed, `STALE` when the generation has passed.
    """

    cpu: int
    ask: int
    vm: int
    gpa: int
    hvp: int
    generation: int


class GuestWrite32(NamedTuple):
    """As `GuestRead32`; answer 1 + the word that was there, 0 when it is not backed, `STALE`."""

    cpu: int
    ask: int
    vm: int
    gpa: int
    value: int
    hvp: int
    generation: int


class CancelPage(NamedTuple):
    """The vCPU has to go back to its guest (`MemoryNotice`): `GetPage` number ``ask``, if it has no answer yet, gets NO_MEMORY."""

    cpu: int
    ask: int


class ReleasePages(NamedTuple):
    """The guest does not need pages any more: bit i of ``mask`` names gfn + i. Answer: how many held something. ``mask`` 0: the answer
    comes when no vCPU can reach the old contents of what was released before.
    """

    cpu: int
    ask: int
    vm: int
    gfn: int
    mask: int


class MemoryGiven(NamedTuple):
    """Answer of a guest to notice ``number``. ``flags``: OOM_* of proto/wire.py."""

    vm: int
    number: int
    pages: int
    flags: int


class NoticeLost(NamedTuple):
    """Nobody took notice ``number``, or whoever did was reset or powered down before it answered. ``nobody``: no vCPU could take it."""

    vm: int
    number: int
    nobody: bool


# ---- vm machine -> vcpu machine --------------------------------------------------------------------------
class Answer(NamedTuple):
    """Answer to a request of ``cpu``. ``waited``: the vCPU was held for I/O, for a free frame or for a change of the memslots. ``hvp``: the
    page. Of a translation and of an access: ``generation`` of the slots now. Of a write: ``dirty``, the page is marked.
    """

    cpu: int
    ask: int
    value: int
    waited: bool
    hvp: int = -1
    generation: int = 0
    dirty: bool = False


class Fetched(NamedTuple):
    """The worker of ``work`` is done; done does not mean present (spec §3.3)."""

    cpu: int
    work: int


# ---- shell -> vcpu machine -------------------------------------------------------------------------------
class ExitTaken(NamedTuple):
    """The vCPU left guest mode."""

    record: Exit


class TimerDue(NamedTuple):
    """The guest's timer tick is due while its vCPU is held in the host."""

    cpu: int
    generation: int


class Interrupt(NamedTuple):
    """An interrupt for this vCPU's LAPIC (IPI from another vCPU)."""

    cpu: int
    vector: int


class Reset(NamedTuple):
    """INIT: the vCPU is reset as soon as it is outside guest mode, then waits for `Startup` (spec §1.16)."""

    cpu: int


class Startup(NamedTuple):
    """Start a vCPU that was reset. Any other vCPU ignores it."""

    cpu: int


class MemoryNotice(NamedTuple):
    """The host has no memory left: tell the guest as soon as possible. ``number`` 0: its vCPUs have to look who was chosen to die."""

    cpu: int
    number: int


class Poke(NamedTuple):
    """Run-wide news in shared memory (barrier opened, stop): wake the vCPU wherever it is."""

    cpu: int


class Pause(NamedTuple):
    """Stop at the next save point: an exit from which the guest goes on by executing its instruction again; answer `Paused`."""

    cpu: int


class Restore(NamedTuple):
    """Give a fresh vCPU this state (`host.state.VcpuState.to_plain`); answer `Restored`. It goes on with its RESUME exit."""

    cpu: int
    state: dict[str, Any]


# ---- vcpu machine -> shell -------------------------------------------------------------------------------
class Enter(NamedTuple):
    """Send the entry record."""

    cpu: int
    record: Entry


class KickVcpu(NamedTuple):
    """Send a KICK, then ring the doorbell."""

    cpu: int
    request: int


class SetTimer(NamedTuple):
    """Deliver `TimerDue` at ``deadline_ns`` unless a newer generation was set."""

    cpu: int
    generation: int
    deadline_ns: int


class SendIpi(NamedTuple):
    """Interrupt to vcpu_id ``target`` of VM ``vm``; ``vector`` is the low word of the command register (proto/kvm.py ICR_*)."""

    vm: int
    target: int
    vector: int


class AtBarrier(NamedTuple):
    """Tasks of ``vm`` that wait at the start barrier, as its kernel counts them."""

    vm: int
    tasks: int


class ResetMachine(NamedTuple):
    """The guest asks, on ``cpu``, for a reset of its whole machine (reboot). That vCPU is being reset already."""

    vm: int
    cpu: int


class WasReset(NamedTuple):
    """A `Reset` has been carried out: this vCPU waits for its start-up."""

    cpu: int


class PoweredDown(NamedTuple):
    """The vCPU has nothing left to run."""

    cpu: int


class Paused(NamedTuple):
    """The vCPU stands at a save point, or is powered down. Its state may be read once all of its VM stand."""

    cpu: int


class Restored(NamedTuple):
    """``refused``: what the host would not take, "" when all went in."""

    cpu: int
    refused: str


# ---- shell -> vm machine ---------------------------------------------------------------------------------
class SetMemslots(NamedTuple):
    """Replace the memslots of ``vm``. ``moves``: (first page, new first page, pages) of host memory that changes its host address
    with its contents (mremap). `MemslotsSet` says when it is done.
    """

    vm: int
    slots: tuple[Memslot, ...]
    moves: tuple[tuple[int, int, int], ...] = ()


# ---- vm machine -> shell -----------------------------------------------------------------------------------
class MemoryShort(NamedTuple):
    """Swap is full and what still can be paged is too little: a vCPU of ``vm`` has to get notice ``number``; 0: all of its vCPUs."""

    vm: int
    number: int


class OutOfMemory(NamedTuple):
    """Memory is short, and no guest has anything left to give back."""

    waiting: int


class MemslotsSet(NamedTuple):
    """The layout asked for is in force, no vCPU translates with the old one."""

    vm: int
    generation: int


# ---- shell <-> vm machine: images ------------------------------------------------------------------------
class SavePage(NamedTuple):
    """Read host virtual page ``hvp``, wherever it is, by the ladder of any synchronous access; answer `PageSaved`."""

    hvp: int


class PageSaved(NamedTuple):
    """``data``: 4096 bytes of a page with contents, else empty."""

    hvp: int
    content: Content
    data: bytes


class LoadSlots(NamedTuple):
    """Give a fresh host the memslots of an image, of all VMs, before any page."""

    slots: tuple[Memslot, ...]


class LoadPage(NamedTuple):
    """Give a never-touched page of a fresh host its contents; answer `PageLoaded`, as soon as there is a frame."""

    hvp: int
    content: Content
    data: bytes


class PageLoaded(NamedTuple):
    """The page is in memory and dirty, or needs no frame."""

    hvp: int


class Walk(NamedTuple):
    """Begin to go over all pages (host/saving.py)."""


class NextPage(NamedTuple):
    """The turn of this page: save it, or load it."""

    hvp: int


class WalkDone(NamedTuple):
    """Every page has been saved, or loaded."""


# ---- vm machine <-> swap machine -------------------------------------------------------------------------
class SwapIn(NamedTuple):
    """Read ``slot`` into landing frame ``frame`` for host virtual page ``hvp``."""

    hvp: int
    slot: int
    frame: int


class SwapInBad(NamedTuple):
    """What `SwapInDone` brought from ``copy`` has another sum: try again, or another copy, with ``frame`` to land in."""

    hvp: int
    slot: int
    frame: int
    copy: int


class SwapOut(NamedTuple):
    """Write ``frame`` (checksum ``xxh3``) for ``hvp``, into ``slot`` again or into a new one (-1). ``serial`` names the attempt."""

    serial: int
    hvp: int
    frame: int
    slot: int
    xxh3: int


class CancelRead(NamedTuple):
    """Page ``hvp`` was given back while ``slot`` was read for it: nobody waits for the read any more. Its frames are lent until they
    come back; answer `ReadCancelled`.
    """

    hvp: int
    slot: int


class ReadCancelled(NamedTuple):
    """No `SwapInDone` of that read comes after this."""

    hvp: int
    slot: int


class SlotFree(NamedTuple):
    """Nobody needs what is in ``slot`` any more."""

    slot: int


class SwapInDone(NamedTuple):
    """``ok``: the bytes in ``frame`` came from the device; ``xxh3`` is the sum that the write of ``copy`` recorded. Not ok: no copy can
    be read. ``rewrite``: the slot has fewer copies than it should have, and could have them: the page is to be written anew.
    """

    hvp: int
    slot: int
    frame: int
    ok: bool
    xxh3: int
    copy: int
    rewrite: bool


class LendFrame(NamedTuple):
    """A second read of ``hvp`` wants a landing frame of its own; answer `FrameLent`."""

    hvp: int


class FrameLent(NamedTuple):
    """``frame`` is the swap machine's until `FrameBack`, or until the page arrives in it; -1: none is free, or nobody waits any more."""

    hvp: int
    frame: int


class FrameBack(NamedTuple):
    """No I/O can land in this lent frame any more."""

    frame: int


class SlotsLost(NamedTuple):
    """Daemon ``daemon`` is gone, and with it the only copy of ``slots``. ``fatal``: the run cannot do without it in any case."""

    daemon: int
    slots: tuple[int, ...]
    fatal: bool


class WritesStand(NamedTuple):
    """``stand``: no daemon takes writes from now on; else one does again."""

    stand: bool


class SwapOutDone(NamedTuple):
    """``ok``: ``slot`` holds the page. Not ok: the page stays in memory; ``full`` when there was no slot."""

    serial: int
    hvp: int
    slot: int
    frame: int
    ok: bool
    full: bool


# ---- shell <-> vm machine, swap machine ------------------------------------------------------------------
class LookAtGrace(NamedTuple):
    """Look whether flush acknowledgements have come in; reclaim goes on from there."""


class LookAtRequests(NamedTuple):
    """Time has passed: ask again for what a daemon that is up has not answered for long, ask another for what is late (hedges)."""


class IoReply(NamedTuple):
    """One reply of a daemon."""

    daemon: int
    epoch: int
    request: int
    result: int
    service_ns: int


class DaemonUp(NamedTuple):
    """A daemon said HELLO with this epoch."""

    daemon: int
    epoch: int


class DaemonLost(NamedTuple):
    """Its process has ended; its I/O may still land."""

    daemon: int
    epoch: int


class DaemonFenced(NamedTuple):
    """No I/O of that epoch can land any more."""

    daemon: int
    epoch: int


class DaemonGone(NamedTuple):
    """A fenced daemon never comes back."""

    daemon: int


class PagesLost(NamedTuple):
    """The run cannot go on: ``pages`` were on daemon ``daemon`` only, which is gone; 0 when nothing was there, but no other can do it."""

    daemon: int
    pages: int


class SendIo(NamedTuple):
    """One request for a daemon; the shell puts what one round produced into one message."""

    daemon: int
    epoch: int
    request: int
    op: int
    slot: int
    frame: int
