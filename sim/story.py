"""One fault in words: its events in order, each with the rule that explains it and where that rule stands in KVM's rules ("spec")."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from host.async_pf import SETUP_LIMIT, SETUP_NO_MEMORY
from host.x86 import CANCEL_DESTROY, CANCEL_DISABLE, CANCEL_RESET, REQ_APF_HALT
from proto import kvm
from proto.wire import Inject
from sim.events import Event
from sim.scenario_run import Outcome
from sim.scenario_tables import FIRST_GFN

Fields = dict[str, int]
Line = tuple[str, str]
"""Sentence and place in the spec."""

_SETUP_FAILS: Final = {
    SETUP_LIMIT: "As many faults as allowed are outstanding",
    SETUP_NO_MEMORY: "No memory for a work item",
}
_CANCELS: Final = {
    CANCEL_DISABLE: "async PF was disabled",
    CANCEL_RESET: "the vCPU was reset",
    CANCEL_DESTROY: "the vCPU is gone",
}


def _page(fields: Fields) -> str:
    return f"page {fields['page'] if 'page' in fields else fields['gfn'] - FIRST_GFN}"


def _slot_write(f: Fields) -> Line:
    if f["offset"] == kvm.AREA_TOKEN:
        return (
            f"The token word of the shared area was 0, so the host may write it: {f['value']:#x}.",
            "§0.4, I24",
        )
    if f["value"] == kvm.REASON_READY:
        return "The host writes reason 2 (page ready) into the shared area.", "§0.4"
    return (
        "The host writes flags = 1 (page not present) into the shared area, before the exception.",
        "§3.2, I13",
    )


def _inj(f: Fields) -> Line:
    what = "not present" if f["kind"] == Inject.PF_NOT_PRESENT else "ready"
    return f"The next entry injects #PF ({what}) with CR2 = token {f['vector_or_cr2']:#x}.", "§0.5, §3.4"


def _req(f: Fields) -> Line:
    if f["bit"] == REQ_APF_HALT:
        return (
            "The guest cannot be told or was told already: the vCPU asks itself for a synthetic halt.",
            "§1.15",
        )
    return "The done list was empty: the host requests a look at it before the next entry.", "§3.3"


def _prefault(_: Fields) -> Line:
    return (
        "Before the guest hears of it, the host maps the page, so that the retry does not exit again.",
        "§1.9, §3.3",
    )


def _task(f: Fields) -> str:
    return f"task {f['task']}"


_TELL: Final[dict[str, Callable[[Fields], Line]]] = {
    "TOUCH": lambda f: (f"{_task(f).capitalize()} touches {_page(f)}.", "§3.1"),
    "TRY_ASYNC_GET_PAGE": lambda f: (
        f"No nested entry: an exit. gfn {f['gfn']:#x} needs I/O and the vCPU may fault asynchronously.",
        "§3.1",
    ),
    "ASYNC_PF_REPEATED_FAULT": lambda f: (
        f"gfn {f['gfn']:#x} is in the vCPU's hash: it is being fetched already, no second work item.", "§1.14, I19"
    ),
    "SETUP_FAIL": lambda f: (
        f"{_SETUP_FAILS.get(f['why'], 'It fails')}: the token id is used up, the fault goes on synchronously.", "§3.2, §0.5"
    ),
    "MEMSLOTS": lambda f: (f"The memslots have generation {f['generation']} now.", "§1.7"),
    "RESET": lambda _: ("The vCPU is reset: MSRs are 0, nothing is outstanding.", "§1.16"),
    "ASYNC_PF_NOT_PRESENT": lambda f: (
        f"A work item is queued with token {f['token']:#x} and the gfn goes into the hash; then the guest is to be told.", "§3.2"
    ),
    "SLOT_WRITE": _slot_write,
    "INJ": _inj,
    "NOTPRES": lambda f: (
        f"The guest's handler reads and clears the word, finds 1, and puts {_task(f)} to sleep on the token.", "§2.2, §2.3"
    ),
    "request": lambda f: (f"The paging device is asked for {_page(f)}.", "§3.3"),
    "copied": lambda f: (f"{_page(f).capitalize()} has arrived.", "§3.3"),
    "REQ": _req,
    "HALT_ON": lambda _: ("The vCPU halts synthetically: no guest instruction until something makes it runnable.", "§1.15, I35"),
    "HALT_OFF": lambda _: ("The halt ends; the instruction will be executed again.", "§1.15"),
    "KICK": lambda _: ("The vCPU is in guest mode and owes no acknowledgement: it is kicked out.", "§3.3, I48"),
    "ASYNC_PF_COMPLETED": lambda f: (f"The worker of token {f['token']:#x} is done: its item is on the done list.", "§3.3"),
    "SLOT_READ0": lambda _: ("The token word reads 0 and the LAPIC is on: one completion may be handed over.", "§3.3"),
    "PREFAULT": _prefault,
    "ASYNC_PF_READY": lambda f: (f"Token {f['token']:#x} leaves the done list, its gfn leaves the hash.", "§3.3, I28"),
    "APIC_ACCEPT_IRQ": lambda f: (f"Vector {f['vector']:#x} is raised in the vCPU's own LAPIC.", "§3.3, I26"),
    "READY": lambda f: (
        f"The guest takes the ready event while {_task(f)} runs and makes the sleeper of {f['token']:#x} runnable.", "§2.4, §2.7"
    ),
    "CLEAR": lambda _: ("The guest clears the word: the host may write the next one.", "§0.4, I25"),
    "ACK": lambda _: ("The guest acknowledges: nothing is pending any more, the host looks at the done list.", "§3.3"),
    "CANCEL": lambda f: (f"Token {f['token']:#x} is forgotten: {_CANCELS.get(f['why'], 'cancelled')}.", "§1.16, I34"),
    "DONE": lambda f: (f"{_task(f).capitalize()} executes the access again: {_page(f)} is there.", "§1.9"),
}  # fmt: skip


def tell(outcome: Outcome) -> list[str]:
    """The story of the first fault that needed I/O, one line per event."""
    events = outcome.events
    first = next((e for e in events if e.name == "request"), None)
    if first is None:
        return [
            "Nothing here needs I/O: every page is mapped at its first touch, without an event (spec §1.6)."
        ]
    gfn = first.fields["gfn"]
    page = gfn - FIRST_GFN
    lines = [f"The first fault of {outcome.scenario.name}: page {page}, profile {outcome.scenario.profile}."]
    queued = False
    for event in _of_fault(events, gfn):
        told = _TELL.get(event.name)
        if told is None:
            continue
        sentence, place = told(event.fields)
        queued = queued or event.name == "ASYNC_PF_NOT_PRESENT"
        if event.name == "request" and not queued:
            sentence, place = (
                f"No asynchronous fault here: the vCPU waits in the host for page {page}.",
                "§3.1, §8.2",
            )
        lines.append(f"{event.t_ns / 1000:>12.1f} us  {event.src:<5}  {sentence} (spec {place})")
    return lines


_ASIDE: Final = frozenset(("SLOT_WRITE", "REQ", "SLOT_READ0", "KICK", "HALT_ON", "HALT_OFF"))
"""Kinds that name no page: they belong to the fault when they stand beside one of its events, in the same instant."""


def _of_fault(events: Iterable[Event], gfn: int) -> list[Event]:
    """The events of one page's first fault, up to the end of the touch that began it."""
    token = owner = -1
    chosen: list[Event] = []
    aside: list[Event] = []
    for event in events:
        fields = event.fields
        if event.name in _ASIDE:
            if chosen and chosen[-1].t_ns == event.t_ns and chosen[-1].name != "ACK":
                chosen.append(event)
            else:
                aside.append(event)
            continue
        mine = gfn in (fields.get("gfn"), fields.get("page", -1) + FIRST_GFN, fields.get("gva", -1) >> 12)
        if event.name == "ASYNC_PF_NOT_PRESENT" and mine and token < 0:
            token = fields["token"]
        if event.name in ("CLEAR", "ACK"):
            mine = bool(chosen) and chosen[-1].name in ("READY", "CLEAR")
        if not mine and (token < 0 or fields.get("token") != token):
            continue
        chosen += [one for one in aside if one.t_ns == event.t_ns]
        aside.clear()
        chosen.append(event)
        if event.name == "TOUCH" and owner < 0:
            owner = fields["task"]
        if event.name == "DONE" and fields["task"] == owner:
            break
    return chosen
