"""All bugs of the zoo, in order, and those that have no animal here, with the reason."""

from __future__ import annotations

from typing import Final

from tests.zoo import bench_bugs, guest_bugs, host_bugs, machine_bugs, restore_bugs
from tests.zoo.core import Bug

BUGS: Final[tuple[Bug, ...]] = tuple(
    sorted(
        (*host_bugs.BUGS, *guest_bugs.BUGS, *bench_bugs.BUGS, *machine_bugs.BUGS, *restore_bugs.BUGS),
        key=lambda bug: bug.ident,
    )
)
"""Each is a patch that the production code does not have: clean without it, caught with it."""

AS_IN_KVM: Final[tuple[Bug, ...]] = bench_bugs.AS_IN_KVM
"""What KVM does to this day, and so does this host: caught in the code as it is."""

NOT_HERE: Final[dict[str, str]] = {
    "D-07": "host restarted with guests alive: cannot exist, the run ends with its host",
    "D-08": "torn shared area: cannot exist, each field is one aligned 32-bit store",
}
"""Bugs that cannot be shown, and why."""
