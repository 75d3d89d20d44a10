"""What the rules of a profile ask for, as the checker needs it: one array of numbers per profile.

Sources: spec §0.2 to §0.4 (MSRs, CPUID, table G), §1.8 to §1.12 (v3), column m38 of §8.2 (v7), §3 (mainline). Deliberately not taken
from proto/profile.py: host and guest follow that one, and a wrong rule there must not excuse itself.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

C_MODE_I: Final = 0
"""Ready events by token word, interrupt and ACK; otherwise by #PF with reason 2."""
C_HALT: Final = 1
"""The synthetic halt and the gfn hash exist (from v6)."""
C_LIMIT: Final = 2
"""Faults outstanding per vCPU, 0: no bound."""
C_PAGING: Final = 3
"""Announced only with paging on."""
C_CANCEL: Final = 4
"""Disabling cancels what is outstanding."""
C_SKIP_ZERO: Final = 5
"""The id that would make token 0 is skipped."""
C_MSR_EN: Final = 6
C_RESERVED: Final = 7
"""Bits of EN that must be 0, missing CPUID bits included."""
C_ENABLED: Final = 8
"""Bits of EN that must all be 1 for enabled."""
C_RECORDED: Final = 9
"""Events of a recorded kernel: nothing of the shared area is seen, a cancelled fault leaves no event."""
C_UNORDERED: Final = 10
"""A completion may stand behind its ready event: the tracepoint is hit after the done list was let go (spec §4.2)."""
C_BOUND_NS: Final = 11
"""Longest answer that liveness allows."""
C_JOINED: Final = 12
"""The events begin in the middle of a run: what was before is unknown, and what may follow from it is not judged."""
CONFIG_WORDS: Final = 13

BOUND_NS: Final = 10_000_000_000
"""Far above what a busy machine needs for a kick (128 vCPUs per core: 0.2 s)."""

_MODE_I_RESERVED: Final = 0x30 | 0x4
"""Bits 5:4, and bit 2: nested vmexits are not advertised."""
_MODE_E_RESERVED: Final = 0x3C

_PROFILES: Final[dict[str, dict[int, int]]] = {
    "v3": {C_MSR_EN: 0x4B564D00, C_RESERVED: _MODE_E_RESERVED, C_ENABLED: 1},
    "v7": {
        C_HALT: 1, C_LIMIT: 64, C_CANCEL: 1, C_MSR_EN: 0x4B564D02, C_RESERVED: _MODE_E_RESERVED, C_ENABLED: 1,
    },
    "mainline": {
        C_MODE_I: 1, C_HALT: 1, C_LIMIT: 64, C_PAGING: 1, C_CANCEL: 1, C_SKIP_ZERO: 1, C_MSR_EN: 0x4B564D02,
        C_RESERVED: _MODE_I_RESERVED, C_ENABLED: 9,
    },
}  # fmt: skip
PROFILE_NAMES: Final = tuple(_PROFILES)


def config_of(
    profile: str,
    *,
    recorded: bool = False,
    unordered: bool = False,
    joined: bool = False,
    bound_ns: int = BOUND_NS,
) -> npt.NDArray[np.int64]:
    """i64[CONFIG_WORDS] of a profile. KeyError for a name that is not in PROFILE_NAMES."""
    config = np.zeros(CONFIG_WORDS, np.int64)
    for word, value in _PROFILES[profile].items():
        config[word] = value
    config[C_RECORDED] = recorded
    config[C_UNORDERED] = recorded or unordered
    config[C_JOINED] = joined
    config[C_BOUND_NS] = bound_ns
    return config
