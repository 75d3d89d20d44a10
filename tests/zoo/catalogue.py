"""All bugs of the zoo, in order, and those that have no animal here, with the reason."""

from __future__ import annotations

from typing import Final

from tests.zoo import bench_bugs, guest_bugs, host_bugs, machine_bugs, plan_bugs, restore_bugs
from tests.zoo.core import Bug

BUGS: Final[tuple[Bug, ...]] = tuple(
    sorted(
        (
            *host_bugs.BUGS,
            *guest_bugs.BUGS,
            *bench_bugs.BUGS,
            *machine_bugs.BUGS,
            *plan_bugs.BUGS,
            *restore_bugs.BUGS,
        ),
        key=lambda bug: bug.ident,
    )
)
"""Each is a patch that the production code does not have: clean without it, caught with it."""

AS_IN_KVM: Final[tuple[Bug, ...]] = bench_bugs.AS_IN_KVM
"""What KVM does to this day, and so does this host: caught in the code as it is."""

NOT_HERE: Final[dict[str, str]] = {
    "BZ-10": "sleeping in a context that counts no preemption: this guest always counts, and has no RCU readers",
    "BZ-13": "the worker puts the last reference to its VM: a worker is a record in a table and holds nothing",
    "BZ-14": "cancelling leaks references: there are none to leak",
    "BZ-15": "the memory is pinned by the wrong count: nothing is pinned",
    "BZ-16": "a host address without mapping is taken for one on swap: every memslot is backed as long as it exists",
    "BZ-17": "a failed fetch leaves garbage as its page: a completion carries no page, the fault is looked up again",
    "BZ-19": "async PF without a LAPIC in the host: the host always has it",
    "BZ-20": "#GP although CPUID advertises the register: both come from one rule set",
    "BZ-22": "a version that is never refreshed costs time only: there is nothing wrong to see",
    "BZ-24": "a request is served under the wrong CR3: with nested paging the host never switches it",
    "BZ-26": "completion while a nested guest runs: no nested guests",
    "BZ-27": "bit 2 after a backward migration: no nested guests, so nobody sets it",
    "BZ-31": "registers of a protected guest are read: no protected guests",
    "BZ-37": "the word is consumed between two levels: no nested guests",
    "BZ-38": "guest-private data in the host's 64 bytes: the guest keeps `enabled` in its own page",
    "BZ-42": "s390",
    "BZ-43": "s390",
    "BZ-44": "synthetic halt while HLT is not intercepted: HLT always is",
    "D-07": "host restarted with guests alive: cannot exist, the run ends with its host",
    "D-08": "torn shared area: cannot exist, each field is one aligned 32-bit store",
}
"""Bugs that cannot be shown, and why."""
