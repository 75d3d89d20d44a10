"""The vCPU's memory management unit: two-dimensional page walk, TLB, page-walk cache. Jitted, on shared arrays.

A guest virtual address is translated through the guest's 4-level table, which lies in guest memory, so every reference to it goes
through the nested table: up to 4 * (4 + 1) + 4 = 24 loads. Addresses in here are 48 bits: user addresses below 2**47, and the
kernel's direct map as ``KERNEL_VPN << 12 | gpa``, which needs the nested walk only.

Invariants
* A TLB entry holds the right to write (`DIRTY`) only if the dirty bits of the guest entry and of the nested entry were set before:
  the first store to a clean page walks. So a nested entry without ``NPT_D`` has no store behind it.
* Accessed and dirty bits are set by compare-exchange on an entry that is still present. Updating a guest entry is itself a guest
  write to the page-table page: it needs nested write permission and sets the nested dirty bit first.
* A frame number read from a table is compared with the number of frames before it is used; one that is too large, like a table
  index that is too large, counts as "not present".
* Translations are used only between guest entry and the next look at the flush generation (guest/run.py).

Not handled here: large pages, execute permission, write-protected supervisor access (CR0.WP is taken as set), 5 levels.
"""

from __future__ import annotations

from typing import Final, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from proto.atomics import cmpxchg, load
from proto.jit import lean_inline as inline
from proto.jit import lean_kernel as kernel
from proto.layout import (
    KERNEL_VPN,
    NPT_A,
    NPT_ADDR,
    NPT_D,
    NPT_P,
    NPT_W,
    PTE_A,
    PTE_ADDR,
    PTE_D,
    PTE_P,
    PTE_U,
    PTE_W,
    TLB_ENTRIES,
)
from proto.pagetable import i64, u64

U8: TypeAlias = NDArray[np.uint8]
U32: TypeAlias = NDArray[np.uint32]
U64: TypeAlias = NDArray[np.uint64]


class Vcpu(NamedTuple):
    """The arrays one vCPU works on. Built once by `make_vcpu`; kernels take it as one argument."""

    frames: U64
    """Host physical memory, 512 words a frame."""
    frames8: U8
    frames32: U32
    """The same memory, seen as bytes and as 32-bit words."""
    npt: U64
    kern: U64
    """Guest kernel segment of the VM."""
    control: U64
    """Page 0 of the control segment (``CTL_*``)."""
    vmc: U64
    """This VM's control page (``VMC_*``)."""
    vp: U64
    """This vCPU's page (``VP_*``)."""
    tlb: U64
    pwc: U64
    """Private to the process: TLB, and page-walk cache with the CR3 both belong to in its last word."""
    shadow: U32
    """Sequence numbers of the stamping workloads, one index space for the VM."""
    trace_accesses: U32
    trace_vpns: U64


# Access type, and at the same time the flags a TLB entry must have to serve it.
READ: Final = 1
"""Set in every valid entry."""
DIRTY: Final = 2
"""Asked for: the access is a write. In an entry: writable, dirty bits are set."""
USER: Final = 4
"""Asked for: CPL 3. In an entry: user mode may use it."""
WRITE: Final = READ | DIRTY
FLAGS: Final = 7
FRAME_BITS: Final = 24
FRAMES_MAX: Final = 1 << FRAME_BITS
VPN_BITS: Final = 36

PWC_ENTRIES: Final = 128
"""Leaf guest tables remembered: 128 * 2 MiB, a guest working set far beyond the TLB's reach of 8 MiB."""
PWC_CR3: Final = PWC_ENTRIES

# What a walk found.
OK: Final = 0
NESTED: Final = 1
"""No nested translation, or no nested write permission, for a guest-physical address."""
NOT_PRESENT: Final = 2
"""A guest table entry is not present: an ordinary guest page fault."""
PROTECTED: Final = 3
"""The guest entry forbids the access."""
BAD_ADDRESS: Final = 4
"""Kernel half from user mode, or not canonical."""


def make_vcpu(
    frames: U64,
    npt: U64,
    kern: U64,
    control: U64,
    vmc: U64,
    vp: U64,
    shadow: U32,
    trace_accesses: U32,
    trace_vpns: U64,
) -> Vcpu:
    """Put a vCPU's arrays together and give it an empty private TLB.

    Raises:
        ValueError: an array has the wrong dtype or shape, or there are more frames than a TLB word can name.
    """
    named = {
        "frames": frames,
        "npt": npt,
        "kern": kern,
        "control": control,
        "vmc": vmc,
        "vp": vp,
        "trace_vpns": trace_vpns,
    }
    for name, array in named.items():
        _check(name, array, np.dtype(np.uint64))
    _check("shadow", shadow, np.dtype(np.uint32))
    _check("trace_accesses", trace_accesses, np.dtype(np.uint32))
    if len(frames) % 512 or not 1 <= len(frames) // 512 <= FRAMES_MAX:
        raise ValueError(
            f"frames: {len(frames)} words, allowed: whole frames of 512 words, 1 to {FRAMES_MAX} of them"
        )
    if len(npt) % 512 or len(npt) < 4 * 512:
        raise ValueError(f"npt: {len(npt)} words, allowed: whole tables of 512 words, at least 4")
    return Vcpu(
        frames,
        frames.view(np.uint8),
        frames.view(np.uint32),
        npt,
        kern,
        control,
        vmc,
        vp,
        np.zeros(TLB_ENTRIES, np.uint64),
        np.zeros(PWC_ENTRIES + 1, np.uint64),
        shadow,
        trace_accesses,
        trace_vpns,
    )


def _check(name: str, array: U64 | U32, dtype: np.dtype[np.unsignedinteger]) -> None:
    if array.dtype != dtype or array.ndim != 1 or not array.flags.c_contiguous or not array.flags.writeable:
        found = f"{array.dtype}, {array.ndim} dimensions, writeable={array.flags.writeable}"
        raise ValueError(f"{name}: {found}; allowed: writable contiguous {dtype}, 1 dimension")


# ---------------------------------------------------------------- TLB


@inline
def tlb_lookup(tlb: U64, gva: int, access: int) -> int:
    """Host frame number of ``gva`` (u64, 48 bits) for ``access``, int64; -1 when the TLB cannot serve it.

    The whole page number is compared, so an address that is not canonical never hits.
    """
    vpn = gva >> u64(12)
    entry = tlb[vpn & u64(TLB_ENTRIES - 1)]
    if (entry >> u64(28)) == vpn and (entry & access) == access:
        return i64((entry >> u64(4)) & u64(FRAMES_MAX - 1))
    return i64(-1)


@inline
def tlb_flush(tlb: U64, pwc: U64) -> None:
    """Forget all translations. The CR3 they belong to stays noted."""
    for i in range(TLB_ENTRIES):
        tlb[i] = u64(0)
    for i in range(PWC_ENTRIES):
        pwc[i] = u64(0)


@inline
def tlb_set_cr3(tlb: U64, pwc: U64, cr3: int) -> bool:
    """Make the TLB belong to ``cr3``; True when that took a full flush."""
    if pwc[PWC_CR3] == cr3:
        return False
    tlb_flush(tlb, pwc)
    pwc[PWC_CR3] = cr3
    return True


@inline
def kernel_gva(gpa: int) -> int:
    """Address of ``gpa`` in the kernel's direct map, 48 bits."""
    return u64(KERNEL_VPN << 12) | gpa


@inline
def canonical(gva: int) -> int:
    """Sign-extended 64-bit form of a 48-bit address, as CR2 would show it."""
    if gva & u64(1 << 47):
        return gva | u64(0xFFFF_0000_0000_0000)
    return gva


# ---------------------------------------------------------------- nested walk


@inline
def nested_walk(npt: U64, frames_count: int, gfn: int, write: bool) -> int:
    """Translate ``gfn`` (u64): the leaf entry with A (and D for a write) set, or 0 when that is a nested fault. Four loads."""
    if gfn >> u64(36):
        return u64(0)
    tables = u64(len(npt) // 512)
    at = gfn >> u64(27)
    for level in range(3):
        link: int = load(npt, at)
        table = (link & u64(NPT_ADDR)) >> u64(12)
        if not (link & u64(NPT_P)) or table >= tables:
            return u64(0)
        at = table * u64(512) + ((gfn >> u64(18 - 9 * level)) & u64(511))
    while True:
        entry: int = load(npt, at)
        if not (entry & u64(NPT_P)) or ((entry & u64(NPT_ADDR)) >> u64(12)) >= frames_count:
            return u64(0)
        wanted = entry | u64(NPT_A)
        if write:
            if not (entry & u64(NPT_W)):
                return u64(0)
            wanted |= u64(NPT_D)
        # Compare-exchange, because the host may be taking the entry out: a bit must never reappear in a cleared entry.
        if entry == wanted or cmpxchg(npt, at, entry, wanted) == entry:
            return wanted


@inline
def leaf_frame(entry: int) -> int:
    """Host frame number of a nested leaf entry that `nested_walk` returned."""
    return (entry & u64(NPT_ADDR)) >> u64(12)


@inline
def _may_write(entry: int) -> bool:
    both = u64(NPT_W | NPT_D)
    return (entry & both) == both


# ---------------------------------------------------------------- two-dimensional walk


@kernel
def mark_guest_entry(frames: U64, npt: U64, table: int, index: int, seen: int, bits: int) -> int:
    """Set ``bits`` (A, D) in a guest table entry that was read as ``seen``.

    Args:
        frames: host memory, u64.
        npt: nested table, u64.
        table: gfn of the guest table, u64.
        index: entry in the table, u64 below 512.
        seen: what the walker read there, u64.
        bits: to be set, u64.

    Returns:
        The nested entry of the table page, now dirty; 0 when writing to it is a nested fault. If the guest entry changed meanwhile
        nothing was set: the caller reads it again.
    """
    nested = nested_walk(npt, u64(len(frames) // 512), table, True)
    if nested:
        cmpxchg(frames, leaf_frame(nested) * u64(512) + index, seen, seen | bits)
    return nested


@kernel
def find_leaf_table(frames: U64, npt: U64, cr3: int, vpn: int) -> tuple[int, int, int, int]:
    """Walk the three upper levels of the guest table.

    Returns:
        (status, nested entry of the leaf table, its gfn, 0), or on a fault (status, gpa of the entry in question, access of the nested
        fault, level of the guest entry 4..2); status int64, the others u64.
    """
    frames_count = u64(len(frames) // 512)
    table = cr3 >> u64(12)
    for step in range(3):
        index = (vpn >> u64(27 - 9 * step)) & u64(511)
        gpa = (table << u64(12)) | (index << u64(3))
        while True:
            nested = nested_walk(npt, frames_count, table, False)
            if not nested:
                return NESTED, gpa, u64(READ), u64(4 - step)
            entry = load(frames, leaf_frame(nested) * u64(512) + index)
            if not (entry & u64(PTE_P)):
                return NOT_PRESENT, gpa, u64(READ), u64(4 - step)
            if entry & u64(PTE_A):
                break
            if not mark_guest_entry(frames, npt, table, index, entry, u64(PTE_A)):
                return NESTED, gpa, u64(WRITE), u64(4 - step)
        table = (entry & u64(PTE_ADDR)) >> u64(12)
    nested = nested_walk(npt, frames_count, table, False)
    if not nested:
        return NESTED, (table << u64(12)) | ((vpn & u64(511)) << u64(3)), u64(READ), u64(1)
    return OK, nested, table, u64(0)


@inline
def _guest_leaf(
    frames: U64, npt: U64, pwc: U64, cr3: int, vpn: int, access: int
) -> tuple[int, int, int, int]:
    """The guest's leaf entry of ``vpn`` with A (and D) set: (OK, entry, 0, 0), or a fault as from `find_leaf_table`."""
    index = vpn & u64(511)
    slot = (vpn >> u64(9)) & u64(PWC_ENTRIES - 1)
    cached = pwc[slot]
    bits = u64(PTE_A)
    if access & u64(DIRTY):
        bits |= u64(PTE_D)
    if (cached >> u64(28)) == vpn >> u64(9) and cached & u64(READ):
        entry = load(frames, ((cached >> u64(4)) & u64(FRAMES_MAX - 1)) * u64(512) + index)
        # Without the A/D bits the table page has to be written to, for which the cached frame gives no right: full walk.
        if (entry & (bits | u64(PTE_P))) == (bits | u64(PTE_P)):
            return OK, entry, u64(0), u64(0)
    status, nested, table, level = find_leaf_table(frames, npt, cr3, vpn)
    if status != OK:
        return status, nested, table, level
    gpa = (table << u64(12)) | (index << u64(3))
    while True:
        entry = load(frames, leaf_frame(nested) * u64(512) + index)
        if not (entry & u64(PTE_P)):
            return NOT_PRESENT, gpa, u64(READ), u64(1)
        # Checked before the bits are set: a refused access must not mark the page as written.
        if not _permits(entry, access) or (entry & bits) == bits:
            break
        nested = mark_guest_entry(frames, npt, table, index, entry, bits)
        if not nested:
            return NESTED, gpa, u64(WRITE), u64(1)
    pwc[slot] = ((vpn >> u64(9)) << u64(28)) | (leaf_frame(nested) << u64(4)) | u64(READ)
    return OK, entry, u64(0), u64(0)


@inline
def _permits(entry: int, access: int) -> bool:
    """Whether a guest leaf entry allows ``access``. Upper levels always allow: the guest kernel sets W and U there."""
    if access & u64(DIRTY) and not (entry & u64(PTE_W)):
        return False
    return not (access & u64(USER) and not (entry & u64(PTE_U)))


@inline
def walk(frames: U64, npt: U64, tlb: U64, pwc: U64, gva: int, access: int) -> tuple[int, int, int, int]:
    """Translate after a TLB miss and fill the TLB.

    Args:
        frames: host memory, u64.
        npt: nested table, u64.
        tlb: u64[TLB_ENTRIES]; on success the entry of ``gva`` serves ``access``.
        pwc: page-walk cache; its last word is the CR3 of the walk (gpa of the root table).
        gva: u64; the kernel's direct map in its 48-bit form.
        access: READ or WRITE, with USER for CPL 3; u64.

    Returns:
        (status int64, x, y, z as u64): OK (frame, 0, 0); NESTED (gpa, access of the nested fault, level of the guest table the walk was
        reading, 0 for the page itself); NOT_PRESENT (gpa of the entry, READ, its level); PROTECTED and BAD_ADDRESS (0, 0, 0).
    """
    frames_count = u64(len(frames) // 512)
    vpn = gva >> u64(12)
    write = (access & u64(DIRTY)) != u64(0)
    entry = u64(PTE_W | PTE_D)
    if vpn & u64(KERNEL_VPN):
        if access & u64(USER) or vpn >> u64(VPN_BITS):
            return BAD_ADDRESS, u64(0), u64(0), u64(0)
        gpa = gva ^ u64(KERNEL_VPN << 12)
    else:
        if vpn >> u64(VPN_BITS):
            return BAD_ADDRESS, u64(0), u64(0), u64(0)
        status, entry, y, z = _guest_leaf(frames, npt, pwc, pwc[PWC_CR3], vpn, access)
        if status != OK:
            return status, entry, y, z
        if not _permits(entry, access):
            return PROTECTED, u64(0), u64(0), u64(0)
        gpa = (entry & u64(PTE_ADDR)) | (gva & u64(4095))
    nested = nested_walk(npt, frames_count, gpa >> u64(12), write)
    if not nested:
        return NESTED, gpa, access & u64(WRITE), u64(0)
    flags = u64(READ)
    if _may_write(nested) and (entry & u64(PTE_W)) and (entry & u64(PTE_D)):
        flags |= u64(DIRTY)
    if entry & u64(PTE_U):
        flags |= u64(USER)
    frame = leaf_frame(nested)
    tlb[vpn & u64(TLB_ENTRIES - 1)] = (vpn << u64(28)) | (frame << u64(4)) | flags
    return OK, frame, u64(0), u64(0)


@kernel
def translate(m: Vcpu, gva: int, access: int) -> tuple[int, int, int, int]:
    """`walk` without a look at the TLB, callable from Python with plain integers; `tlb_set_cr3` chooses the address space."""
    return walk(m.frames, m.npt, m.tlb, m.pwc, u64(gva), u64(access))


@kernel
def set_cr3(m: Vcpu, cr3: int) -> bool:
    """`tlb_set_cr3` for Python callers; ``cr3`` is the gpa of the root table."""
    return tlb_set_cr3(m.tlb, m.pwc, u64(cr3))


@kernel
def flush(m: Vcpu) -> None:
    """`tlb_flush` for Python callers."""
    tlb_flush(m.tlb, m.pwc)
