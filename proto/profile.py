"""Profiles: which rules hold. The one place where v3, v7 and mainline differ.

A profile is a set of rules, never a bug: historical bugs are not expressed here. Host and guest both read it, because a guest of
2010 on a host of 2010 is one experiment. Sources: spec §1.8 to §1.12 (v3), §1.13 and column m38 of §8.2 (v7), §3 (mainline).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from proto.kvm import (
    CPUID_FEATURE_ASYNC_PF,
    CPUID_FEATURE_ASYNC_PF_INT,
    CPUID_FEATURE_ASYNC_PF_V3,
    EN_AS_INT,
    EN_ENABLE,
    MSR_ASYNC_PF_EN,
    MSR_ASYNC_PF_EN_V3,
)
from proto.units import ASYNC_PF_PER_VCPU


@dataclass(frozen=True, slots=True)
class Profile:
    """One rule set. Each field names one difference."""

    name: str
    msr_en: int
    """Index of ASYNC_PF_EN (spec §0.3)."""
    cpuid: int
    """Feature bits the host advertises."""
    enabled_bits: int
    """Bits of EN that must all be set for 'PV async PF enabled' (mainline: 0 and 3)."""
    ready_by_interrupt: bool
    """Mode I: token word, interrupt, ACK. Else mode E: #PF with reason 2."""
    host_halt: bool
    """Mode H exists: where the event cannot be delivered the vCPU is put in a synthetic halt (from v6)."""
    gfn_hash: bool
    """A second fault on an outstanding gfn halts (from v6)."""
    limit: int
    """Faults outstanding per vCPU; 0 = no limit (v3)."""
    elide: bool
    """v3: a page that arrives before entry cancels its own not-present event."""
    announce_before_fetch: bool
    """The not-present step runs before the worker starts (spec §3.2)."""
    ready_needs_announced: bool
    """Ready is sent only for an injected not-present (mid 2020)."""
    skip_token_zero: bool
    """The id that gives token 0 is skipped (5.17)."""
    cancel_on_disable: bool
    """Disabling flushes the queue (not in v3)."""
    test_pending_exception: bool
    """can-do also looks at exceptions that are pending but not yet injected."""
    failed_write_halts: bool
    """A not-present whose word cannot be written halts the vCPU (mainline); before, it ran into the page again and halted then
    (spec §8.2)."""
    test_paging: bool
    """can-deliver needs CR0.PG (mainline)."""
    paging_on_requests_ready: bool
    """CR0.PG 0 -> 1 with async PF enabled requests READY (mainline, spec §1.16). No profile forgets anything at a change of PG (BZ-03)."""
    prefault: str
    """Retry before entry: 'switch-cr3' (v3), 'direct' (merged series), 'compare-cr3' (mainline). All are the same with nested paging."""
    guest_sleeps_in_kernel: bool
    """The guest kernel sleeps on kernel-mode faults where its preempt count allows (v3, v7); mainline: user mode only."""


V3: Final = Profile(
    name="v3", msr_en=MSR_ASYNC_PF_EN_V3, cpuid=CPUID_FEATURE_ASYNC_PF_V3, enabled_bits=EN_ENABLE, ready_by_interrupt=False,
    host_halt=False, gfn_hash=False, limit=0, elide=True, announce_before_fetch=False, ready_needs_announced=False,
    skip_token_zero=False, cancel_on_disable=False, test_pending_exception=True, failed_write_halts=False, test_paging=False,
    paging_on_requests_ready=False, prefault="switch-cr3", guest_sleeps_in_kernel=True,
)  # fmt: skip
V7: Final = Profile(
    name="v7", msr_en=MSR_ASYNC_PF_EN, cpuid=CPUID_FEATURE_ASYNC_PF, enabled_bits=EN_ENABLE, ready_by_interrupt=False,
    host_halt=True, gfn_hash=True, limit=ASYNC_PF_PER_VCPU, elide=False, announce_before_fetch=True, ready_needs_announced=True,
    skip_token_zero=False, cancel_on_disable=True, test_pending_exception=True, failed_write_halts=False, test_paging=False,
    paging_on_requests_ready=False, prefault="direct", guest_sleeps_in_kernel=True,
)  # fmt: skip
MAINLINE: Final = Profile(
    name="mainline", msr_en=MSR_ASYNC_PF_EN, cpuid=CPUID_FEATURE_ASYNC_PF | CPUID_FEATURE_ASYNC_PF_INT,
    enabled_bits=EN_ENABLE | EN_AS_INT, ready_by_interrupt=True,
    host_halt=True, gfn_hash=True, limit=ASYNC_PF_PER_VCPU, elide=False, announce_before_fetch=True, ready_needs_announced=True,
    skip_token_zero=True, cancel_on_disable=True, test_pending_exception=True, failed_write_halts=True, test_paging=True,
    paging_on_requests_ready=True, prefault="compare-cr3", guest_sleeps_in_kernel=False,
)  # fmt: skip

PROFILES: Final = {p.name: p for p in (V3, V7, MAINLINE)}
