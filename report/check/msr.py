"""Compiled rules of the MSRs: table G (spec §0.3), enabling and disabling."""

from __future__ import annotations

from typing import Any, Final

from proto.jit import lean_kernel as kernel
from report.check.profiles import (
    C_CANCEL,
    C_ENABLED,
    C_MODE_I,
    C_MSR_EN,
    C_RECORDED,
    C_RESERVED,
)
from report.check.records import close_if_over, hold, is_live
from report.check.state import (
    F_CANCEL,
    NONE,
    NR,
    T_FLAGS,
    V_AREA,
    V_EN,
    V_EPOCH,
    V_LAPIC,
    V_LIVE,
    V_PREFAULT,
    V_RECORDS,
    V_RESTORED,
    V_SEND_ALWAYS,
    V_TOKEN_WORD,
    V_VECTOR,
    V_WAKEALL,
    V_WORD,
    V_WRITTEN,
    Tables,
    i64,
)

MSR_EN_V3: Final = 0x4B564D00
MSR_EN: Final = 0x4B564D02
MSR_INT: Final = 0x4B564D06
MSR_ACK: Final = 0x4B564D07
MSR_SPIV: Final = 0x80F
SPIV_ENABLE: Final = 0x100
SEND_ALWAYS: Final = 2
ADDRESS: Final = ~0x3F


@kernel
def on_msr_write(s: Tables, row: int, at: int, e: Any) -> None:
    """MSR_WR: the outcome (I33), then what it changes. A refused write changes nothing that rules look at."""
    index, value, failed = i64(e["a"]), i64(e["b"]), e["c"] != 0
    if index == MSR_SPIV:
        if not failed:
            s.v[row, V_LAPIC] = value & SPIV_ENABLE != 0
    elif index == s.config[C_MSR_EN]:
        _write_en(s, row, at, value, failed)
    elif index in (MSR_INT, MSR_ACK):
        exists = s.config[C_MODE_I] == 1
        refuse = not exists or (index == MSR_INT and value >> 8 != 0)
        hold(s, row, NR[33], failed == refuse, at, NONE, NONE)
        if index == MSR_INT and not failed:
            s.v[row, V_VECTOR] = value & 0xFF
    elif index in (MSR_EN, MSR_EN_V3):
        # The register of another profile.
        hold(s, row, NR[33], failed, at, NONE, NONE)


@kernel
def _write_en(s: Tables, row: int, at: int, value: int, failed: bool) -> None:
    refuse = value & s.config[C_RESERVED] != 0
    enables = value & s.config[C_ENABLED] == s.config[C_ENABLED]
    # G6: whether a memslot backs the address is in no event, so an enable may be refused for it.
    hold(s, row, NR[33], failed if refuse else (not failed or enables), at, NONE, NONE)
    if failed:
        return
    if enables:
        _enable(s, row, value)
    else:
        s.v[row, V_EN] = 0
        if s.config[C_RECORDED]:
            _cancel_all(s, row)
        if s.config[C_CANCEL]:
            hold(s, row, NR[34], s.v[row, V_LIVE] == 0, at, NONE, NONE)


@kernel
def _enable(s: Tables, row: int, value: int) -> None:
    if s.v[row, V_EN] != 1:
        s.v[row, V_EPOCH] += 1
    if s.v[row, V_RESTORED]:
        # Words of the area are guest memory, which was saved.
        s.v[row, V_RESTORED] = 0
    elif s.v[row, V_EN] != 1 or s.v[row, V_AREA] != value & ADDRESS:
        # The guest gives a zeroed area (spec §1.2).
        s.v[row, V_WORD] = 0
        s.v[row, V_WRITTEN] = 0
        s.v[row, V_TOKEN_WORD] = 0
    s.v[row, V_EN] = 1
    s.v[row, V_AREA] = value & ADDRESS
    s.v[row, V_SEND_ALWAYS] = value & SEND_ALWAYS != 0
    s.v[row, V_WAKEALL] = 1


@kernel
def _cancel_all(s: Tables, row: int) -> None:
    """A kernel cancels without a tracepoint."""
    for k in range(s.v[row, V_RECORDS] - 1, -1, -1):
        if is_live(s.t[row, k, T_FLAGS]):
            s.t[row, k, T_FLAGS] |= F_CANCEL
            close_if_over(s, row, k)
    s.v[row, V_LIVE] = 0
    s.v[row, V_PREFAULT] = 0
