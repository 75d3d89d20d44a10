"""Numbers that host and guest agree on because KVM fixed them: MSRs, CPUID bits, shared-area offsets, vectors, the gfn hash.

Sources: spec §0.2 to §0.6 (CPUID, MSRs, shared area, token, constants).
"""

from __future__ import annotations

from typing import Final

CPUID_FEATURE_ASYNC_PF_V3: Final = 1 << 3
CPUID_FEATURE_ASYNC_PF: Final = 1 << 4
CPUID_FEATURE_ASYNC_PF_VMEXIT: Final = 1 << 10
CPUID_FEATURE_ASYNC_PF_INT: Final = 1 << 14

MSR_ASYNC_PF_EN_V3: Final = 0x4B56_4D00
MSR_ASYNC_PF_EN: Final = 0x4B56_4D02
MSR_ASYNC_PF_INT: Final = 0x4B56_4D06
MSR_ASYNC_PF_ACK: Final = 0x4B56_4D07
MSR_X2APIC_EOI: Final = 0x80B
MSR_X2APIC_SPIV: Final = 0x80F
SPIV_ENABLE: Final = 0x100

EN_ENABLE: Final = 1
EN_SEND_ALWAYS: Final = 2
EN_AS_VMEXIT: Final = 4
EN_AS_INT: Final = 8
EN_ADDRESS: Final = 0xFFFF_FFFF_FFFF_FFC0

AREA_FLAGS: Final = 0
"""u32 reason (mode E) or flags (mode I)."""
AREA_TOKEN: Final = 4
"""u32 token of the ready event (mode I)."""
AREA_BYTES: Final = 64
REASON_NOT_PRESENT: Final = 1
REASON_READY: Final = 2

VECTOR_TIMER: Final = 0xEC
VECTOR_CALL: Final = 0xFB
"""Another CPU wants something done here (Linux: CALL_FUNCTION_VECTOR)."""
VECTOR_PAGE_READY: Final = 0xF3
"""The vector Linux uses; spec §0.6 calls the number unconfirmed, the recorded kernels use it."""
VECTOR_RESCHEDULE: Final = 0xFD

ICR_VECTOR: Final = 0xFF
ICR_MODE: Final = 0x700
"""Delivery mode in the APIC's interrupt command register, as in an exit for an interrupt to another CPU."""
ICR_FIXED: Final = 0
ICR_INIT: Final = 0x500
ICR_STARTUP: Final = 0x600

GFN_HASH_BITS: Final = 6
GFN_HASH_SLOTS: Final = 1 << GFN_HASH_BITS
SLEEPER_HASH_BITS: Final = 8
_HASH_MULTIPLIER: Final = 0x61C8_8647

TOKEN_ID_MASK: Final = 0xF_FFFF


def hash_32(value: int, bits: int) -> int:
    """The kernel's multiplicative hash of a 32-bit value (spec §0.6)."""
    return ((value * _HASH_MULTIPLIER) & 0xFFFF_FFFF) >> (32 - bits)


def make_token(attempt_id: int, vcpu_id: int) -> int:
    """Token = ((id mod 2^20) << 12) | vcpu_id (spec §0.5)."""
    return ((attempt_id & TOKEN_ID_MASK) << 12) | vcpu_id
