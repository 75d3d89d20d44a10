"""What a number is, and the limits with their reasons.

Address types follow KVM's names: a guest virtual address is not a guest physical one, a gfn is not a host frame.
"""

from __future__ import annotations

from typing import Final, NewType

Gva = NewType("Gva", int)
"""Guest virtual address, bytes."""
Gpa = NewType("Gpa", int)
"""Guest physical address, bytes."""
Gfn = NewType("Gfn", int)
"""Guest frame number: Gpa >> 12."""
Hvp = NewType("Hvp", int)
"""Host virtual page: index into the host page table. A memslot maps gfn -> Hvp."""
Hfn = NewType("Hfn", int)
"""Host frame number: index of a 4 KiB frame in the frames segment."""
SwapSlot = NewType("SwapSlot", int)
"""Index of a 4 KiB block of one daemon's swap file, plus daemon * SLOTS_PER_DAEMON_MAX (see host/swap.py)."""
Token = NewType("Token", int)
"""async-PF token, u32 (spec §0.5)."""
VcpuId = NewType("VcpuId", int)
"""vCPU number inside its VM (spec §0.5: < 4096)."""

PAGE_SHIFT: Final = 12
PAGE_SIZE: Final = 1 << PAGE_SHIFT
WORDS_PER_PAGE: Final = PAGE_SIZE // 8

ASYNC_PF_PER_VCPU: Final = 64
"""Faults outstanding per vCPU in v7 and mainline (spec §0.6)."""
TOKEN_WAKE_ALL: Final = 0xFFFF_FFFF
"""The broadcast token (spec §0.5)."""
MAX_VCPUS: Final = 1024
"""vCPUs of one run: 1024 forked processes were measured to need 2.3 GiB; more was never tried."""
KICK_CHECK_OPS: Final = 64
"""Guest operations between two looks at the doorbell and the flush generation; rarer than every 16 costs nothing measurable."""
FLUSH_BATCH: Final = 64
"""Victims unmapped under one flush generation."""
