"""The invariants I1..I50 (spec §4.4) by number: what they say, which profiles have them, what of them events show.

Two sources of events: a `run` of ours, and a `recorded` kernel, whose log has KVM's tracepoints and a few events of its guest, but
nothing of the shared area, of halts or of the guest's sleeper table.

Not handled here: how they are checked (host_side.py, ready_side.py, guest_side.py, msr.py, engine.py).
"""

from __future__ import annotations

from typing import Final, NamedTuple

from report.check.state import INVARIANTS

ALL: Final = ("v3", "v7", "mainline")
FROM_V6: Final = ("v7", "mainline")
MODE_E: Final = ("v3", "v7")
MODE_I: Final = ("mainline",)

NO_HASH: Final = "no gfn hash in this profile"
NO_HALT: Final = "no synthetic halt in this profile"
NO_WORD: Final = "ready events are #PFs in this profile, there is no token word"
BY_INTERRUPT: Final = "ready events are interrupts in this profile"

SAFETY, LIVENESS = "safety", "liveness"


class Rule(NamedTuple):
    """One invariant.

    absent: why the other profiles do not have it. part: what of it is checked in a run when not all of it is. recorded: "" = as in a
    run, as far as `recorded_part` says; otherwise why a recorded kernel's events do not show it.
    """

    number: int
    text: str
    profiles: tuple[str, ...] = ALL
    absent: str = ""
    kind: str = SAFETY
    part: str = ""
    recorded: str = ""
    recorded_part: str = ""

    def why_not(self, profile: str, *, recorded: bool) -> str:
        """Why it is skipped for such events; "" if it is checked."""
        if profile not in self.profiles:
            return f"not in profile {profile}: {self.absent}"
        return f"not visible: {self.recorded}" if recorded and self.recorded else ""

    def checked_part(self, *, recorded: bool) -> str:
        """What of it is checked, "" = all."""
        return self.recorded_part or self.part if recorded else self.part


_AREA: Final = "no tracepoint of a kernel shows the shared area"
_STATE: Final = "the tracepoint of an injection holds no guest state"
_HALTS: Final = "no tracepoint shows the synthetic halt"
_SLEEPERS: Final = "the guest's log does not show its sleeper table"
_CR3: Final = "no tracepoint holds the MMU context; with nested paging there is one per guest"

RULES: Final = (
    Rule(1, "two unfinished faults of a VM never share a token"),
    Rule(2, "a token is the fault's number above, the id of the faulting vCPU below; numbers go up by one",
         recorded_part="numbers go up: failed attempts use some up unseen"),
    Rule(3, "no token is 0, and no page's token is that of the broadcast", MODE_I,
         "token 0 is harmless where ready events are #PFs"),
    Rule(4, "a vCPU has at most 64 faults outstanding", FROM_V6, "it has no bound"),
    Rule(5, "the count of queued items is right", FROM_V6, "it has no bound, so nothing shows the count",
         recorded="failed set-ups leave no tracepoint"),
    Rule(6, "the gfn hash holds exactly the pages of live items", FROM_V6, NO_HASH,
         recorded_part="a fault called repeated is on a page with a live item"),
    Rule(7, "no page has two live items on one vCPU", FROM_V6, NO_HASH),
    Rule(8, "every entry of the gfn hash can be found", FROM_V6, NO_HASH,
         recorded="no tracepoint shows positions in the hash; a lost entry shows as I7"),
    Rule(9, "not-present is injected only with interrupts allowed (v3: where it sends to kernel mode)", recorded=_STATE),
    Rule(10, "not-present is injected only when no other exception or event is pending", recorded=_STATE,
         part="pending exceptions; events to be injected again are in no event"),
    Rule(11, "not-present reaches kernel mode only if the guest asked for it", recorded=_STATE),
    Rule(12, "not-present is injected only with paging on", MODE_I, "it does not look at CR0.PG", recorded=_STATE),
    Rule(13, "not-present is injected only while enabled, after its word was written",
         recorded_part="only while enabled"),
    Rule(14, "two async #PFs are never queued at once", recorded_part="no double fault is injected"),
    Rule(15, "the announcing word is 0 when the host writes it", recorded=_AREA),
    Rule(16, "each async #PF is taken by the guest once as what it is, and no other #PF is taken for one"),
    Rule(17, "the token that the handler reads is the one that was injected"),
    Rule(18, "a prefault starts nothing and shows the guest nothing",
         part="between the prefault and its ready event", recorded="no tracepoint shows prefaults"),
    Rule(19, "a fault on a page in the hash halts the vCPU and adds no item", FROM_V6, NO_HASH, recorded=_HALTS),
    Rule(20, "ready comes only after the fetch has ended",
         recorded_part="every ready event has a completion, before it or behind it"),
    Rule(21, "ready is sent once for a token"),
    Rule(22, "a delivered ready event has a delivered not-present event: same token, vCPU and enable epoch"),
    Rule(23, "ready events come in the order in which the fetches ended",
         recorded="the tracepoint of a completion is hit after the done list was let go"),
    Rule(24, "the token word is 0 when the host writes it", MODE_I, NO_WORD, recorded=_AREA),
    Rule(25, "between two writes of the token word the guest has cleared it", MODE_I, NO_WORD, recorded=_AREA),
    Rule(26, "nothing is dequeued with the LAPIC off, and every token written is followed by its interrupt", MODE_I,
         NO_WORD, recorded_part="nothing is dequeued with the LAPIC off"),
    Rule(27, "ready is injected only with interrupts allowed and no exception queued", MODE_E, BY_INTERRUPT,
         recorded=_STATE),
    Rule(28, "a page leaves the hash before its ready event or with it", FROM_V6, NO_HASH,
         recorded_part="no fault is called repeated after its page's ready event"),
    Rule(29, "a prefault happens in the MMU context of the fault", recorded=_CR3),
    Rule(30, "the host writes the shared area only while enabled", recorded=_AREA),
    Rule(31, "the host writes only the words of the shared area that the profile defines", recorded=_AREA),
    Rule(32, "writes of the shared area use the current memslots and mark the page dirty",
         recorded=_AREA),
    Rule(33, "writes of the MSRs are accepted and refused by table G",
         part="all of it but the address: an enable may be refused because no memslot backs it"),
    Rule(34, "disabling leaves nothing behind: no item, no completion, no worker", FROM_V6,
         "it only forgets where to write", part="items and their later events"),
    Rule(35, "the guest executes nothing in a synthetic halt", FROM_V6, NO_HALT, recorded=_HALTS),
    Rule(36, "a synthetic halt is asked for only while a fault is outstanding", FROM_V6, NO_HALT, recorded=_HALTS),
    Rule(37, "the synthetic halt is invisible when the state is saved", FROM_V6, NO_HALT,
         recorded="no tracepoint shows what a save reads"),
    Rule(38, "a vCPU with completions to take is never left blocked", recorded=_HALTS),
    Rule(39, "at most one node per token; a dummy only where the wake came first", recorded=_SLEEPERS),
    Rule(40, "a task runs no user code between its wait and its wake", recorded=_SLEEPERS),
    Rule(41, "a context that must not sleep never switches", part="until its node is taken out", recorded=_SLEEPERS),
    Rule(42, "tasks are switched with interrupts on, the sleeper table is changed with interrupts off",
         recorded="no event holds the interrupt flag of kernel code"),
    Rule(43, "a broadcast on a CPU wakes all sleepers of that CPU and no others", recorded=_SLEEPERS),
    Rule(44, "no node outlives its task", recorded=_SLEEPERS),
    Rule(45, "when all is quiet the sleeper table is empty and no dummy is left", kind=LIVENESS, recorded=_SLEEPERS),
    Rule(46, "nothing touches a vCPU after it was destroyed", part="its events; reference counts are in none",
         recorded="no tracepoint shows the end of a vCPU"),
    Rule(47, "every injected not-present is answered: ready, or a cancel with a wake-up", kind=LIVENESS),
    Rule(48, "a completion that can be delivered is delivered without an unrelated exit", kind=LIVENESS,
         part="in time, and before the vCPU goes", recorded="the end of a recording is no end of the vCPU"),
    Rule(49, "a halted vCPU does not go round for nothing", kind=LIVENESS, part="100 times in a row", recorded=_HALTS),
    Rule(50, "teardown ends, and a fetch that fails for ever does not cycle", kind=LIVENESS,
         part="a page is not announced 256 times in a row"),
)  # fmt: skip
"""By number, without gaps."""

assert [rule.number for rule in RULES] == list(range(1, INVARIANTS + 1))
