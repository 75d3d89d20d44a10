"""What a simulated guest CPU asks of its world, what the world answers, and the records that both leave behind.

A CPU is sequential: one request is open at a time, carries ``ask`` and is answered by a record with the same number (proto/machine.py).
Times are virtual nanoseconds.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from proto.wire import Entry, Exit


# ---- requests: guest CPU -> world ------------------------------------------------------------------------
class Leave(NamedTuple):
    """Execute for ``after_ns``, then leave guest mode with this record; answer `Back`."""

    ask: int
    after_ns: int
    record: Exit


class Spin(NamedTuple):
    """Execute for ``ns`` (None: until the host forces an exit); answer `Spun`."""

    ask: int
    ns: int | None


class Off(NamedTuple):
    """Nothing left to do: leave guest mode for good after ``after_ns`` with this record."""

    after_ns: int
    record: Exit


class EndRun(NamedTuple):
    """The script says that the run is over."""

    after_ns: int


class PageOut(NamedTuple):
    """The script wants this page on swap before anybody executes another instruction; answer `Spun`."""

    ask: int
    gfn: int


class SaveRestore(NamedTuple):
    """The script wants the VM saved and restored into a fresh host; answer `Spun`, kicked: the exit goes to the old one."""

    ask: int


class ChangeSlots(NamedTuple):
    """The script wants guest frame ``gfn`` on other host memory (``do`` slot_move; ``fresh``: without its contents), without memory
    (slot_delete), or with the one it had (slot_add); answer `Spun` when no vCPU translates with the old layout any more.
    """

    ask: int
    do: str
    gfn: int
    fresh: bool


class Said(NamedTuple):
    """A line of the guest's own log, ``after_ns`` later than the last answer."""

    after_ns: int
    name: str
    fields: dict[str, int]


# ---- answers: world -> guest CPU -------------------------------------------------------------------------
class PowerOn(NamedTuple):
    """The CPU starts: the first event."""


class Back(NamedTuple):
    """The host's entry record."""

    ask: int
    entry: Entry


class Spun(NamedTuple):
    """``kicked``: the host wants an exit; ``left_ns``: what of the time has not passed."""

    ask: int
    kicked: bool
    left_ns: int = 0


# ---- records ---------------------------------------------------------------------------------------------
class Event(NamedTuple):
    """Something that happened. ``src``: guest, host or pages; ``vcpu``: vcpu_id; ``fields``: see docs/protocol-scenarios.md."""

    t_ns: int
    src: str
    name: str
    vcpu: int
    fields: dict[str, int]

    def plain(self) -> dict[str, Any]:
        """As a JSON object, time in microseconds as in recorded runs."""
        return {"us": self.t_ns / 1000, "src": self.src, "ev": self.name, "vcpu": self.vcpu, **self.fields}
