"""The in-kernel local APIC of one vCPU, as far as async PF needs it: software enable, IRR, ISR.

Delivery is like hardware with virtual-interrupt delivery: pending vectors travel in the entry record, the guest takes them by
itself when IF allows, and the next exit record says which were accepted and how many EOIs were done. So IRR here is exact at every
exit, the only time anybody may decide on it.

Not handled: priorities below one another (the guest's handlers end each interrupt before the next), logical destinations, NMIs.
"""

from __future__ import annotations

from typing import Final

from proto.kvm import SPIV_ENABLE
from proto.wire import pack_vectors, unpack_vectors

VECTORS: Final = 256


class Lapic:
    """IRR and ISR as sets of vectors."""

    __slots__ = ("irr", "isr", "spiv")

    def __init__(self) -> None:
        self.irr: set[int] = set()
        self.isr: list[int] = []
        self.spiv = 0

    def reset(self) -> None:
        """INIT: software-disabled, nothing pending, nothing in service."""
        self.irr.clear()
        self.isr.clear()
        self.spiv = 0

    @property
    def enabled(self) -> bool:
        """Software-enabled through SPIV."""
        return bool(self.spiv & SPIV_ENABLE)

    def raise_fixed(self, vector: int) -> bool:
        """A fixed interrupt; False when the APIC refuses it (disabled). A vector that is pending already is merged, as in IRR."""
        if not self.enabled:
            return False
        self.irr.add(vector)
        return True

    def took(self, accepted: int, eois: int) -> list[int]:
        """What the guest did since the last entry: packed accepted vectors, number of EOIs. Returns the accepted vectors."""
        vectors = unpack_vectors(accepted)
        for vector in vectors:
            self.irr.discard(vector)
            self.isr.append(vector)
        del self.isr[max(0, len(self.isr) - eois) :]
        # A guest that never says EOI: the register has a bit for each vector, no more.
        del self.isr[:-VECTORS]
        return vectors

    def pending(self) -> int:
        """IRR for the entry record, highest vector first, at most four."""
        return pack_vectors(sorted(self.irr, reverse=True))
