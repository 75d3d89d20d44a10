"""State of a vCPU as a VMM saves and restores it (spec §1.2, §1.16): CPUID, LAPIC, MSRs, mp_state, pending exception.

Invariants
* The async queue, the done list, the gfn hash and the synthetic halt are not part of it: the guest executes its instruction again,
  and enabling async PF at the destination broadcasts to everybody who slept.
* Restore goes in `RESTORE_ORDER`, through the same rules as any host-initiated write: CPUID before what it gates, the LAPIC before
  anything that may raise an interrupt, the vector (INT) before the enable register (EN). What is refused ends it there.

One thing more than KVM saves: the counter that tokens are made of. KVM begins again at 0. With an exception pending at the save, in
mode E, a new fault may then be announced before the broadcast is, with the token of a task that still sleeps.

Not handled here: when a vCPU may be saved (host/vcpu.py), the guest's own registers (guest/registers.py), files (proto/image.py).
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

from host.events import Restored
from proto import kvm
from proto.lives import HALT
from proto.machine import Path
from proto.profile import Profile
from proto.trace import Kind
from proto.wire import Inject

if TYPE_CHECKING:
    from host.vcpu import VcpuMachine

VERSION: Final = 1


class MpState(IntEnum):
    """KVM_MP_STATE_*, with KVM's numbers."""

    RUNNABLE = 0
    UNINITIALIZED = 1
    """Powered down: nothing else of it counts."""
    HALTED = 3
    """HLT executed by the guest, nothing to wake it yet."""


class VcpuState(NamedTuple):
    """What is saved of one vCPU."""

    cpuid: int
    irr: tuple[int, ...]
    isr: tuple[int, ...]
    spiv: int
    msrs: tuple[tuple[int, int], ...]
    """(index, value) of everything in the save list."""
    mp_state: int
    exception: tuple[int, int] | None
    """(Inject, value) that the next entry was to inject."""
    next_id: int

    @classmethod
    def of(cls, m: VcpuMachine) -> Self:
        """The state of a vCPU that is not running."""
        x86, lapic = m.x86, m.lapic
        pending = None if m.exception is None else (int(m.exception[0]), m.exception[1])
        return cls(
            x86.cpuid, tuple(sorted(lapic.irr)), tuple(lapic.isr), lapic.spiv,
            tuple((index, x86.read_msr(index)) for index in save_list(x86.profile)),
            int(m.mp_state), pending, x86.id,
        )  # fmt: skip

    def to_plain(self) -> dict[str, Any]:
        """Numbers, lists and strings only."""
        return {
            "version": VERSION,
            "cpuid": self.cpuid,
            "lapic": {"irr": list(self.irr), "isr": list(self.isr), "spiv": self.spiv},
            "msrs": [list(pair) for pair in self.msrs],
            "mp_state": self.mp_state,
            "exception": None if self.exception is None else list(self.exception),
            "next_id": self.next_id,
        }

    @classmethod
    def from_plain(cls, plain: Any) -> Self:
        """Inverse of `to_plain`. ValueError, with the key, for what cannot be a vCPU's state."""
        if not isinstance(plain, dict) or plain.get("version") != VERSION:
            found = plain.get("version") if isinstance(plain, dict) else plain
            raise ValueError(f"vCPU state of version {found!r}, allowed: {VERSION}")
        get = _Reader(plain)
        lapic = _Reader(get.table("lapic"), "lapic.")
        exception = get.numbers("exception", 64, length=2) if plain.get("exception") is not None else None
        if exception is not None and exception[0] not in _INJECTABLE:
            raise ValueError(f"exception: kind {exception[0]}, allowed: {sorted(_INJECTABLE)}")
        mp_state = get.number("mp_state", 8)
        if mp_state not in tuple(MpState):
            raise ValueError(f"mp_state: {mp_state}, allowed: {[int(m) for m in MpState]}")
        return cls(
            get.number("cpuid", 32), lapic.numbers("irr", 8), lapic.numbers("isr", 8), lapic.number("spiv", 64),
            get.pairs("msrs"), mp_state, None if exception is None else (exception[0], exception[1]),
            get.number("next_id", 32),
        )  # fmt: skip


class _Reader:
    """Typed access to a table that came from a file."""

    def __init__(self, plain: dict[str, Any], prefix: str = "") -> None:
        self._plain = plain
        self._prefix = prefix

    def _value(self, key: str, kind: type[Any]) -> Any:
        value = self._plain.get(key)
        if type(value) is not kind:
            raise ValueError(f"{self._prefix}{key}: {value!r} is no {kind.__name__}")
        return value

    def table(self, key: str) -> dict[str, Any]:
        return dict(self._value(key, dict))

    def number(self, key: str, bits: int) -> int:
        return _unsigned(self._value(key, int), bits, self._prefix + key)

    def numbers(self, key: str, bits: int, length: int = -1) -> tuple[int, ...]:
        values = self._value(key, list)
        if length >= 0 and len(values) != length:
            raise ValueError(f"{self._prefix}{key}: {len(values)} values, allowed: {length}")
        return tuple(_unsigned(value, bits, self._prefix + key) for value in values)

    def pairs(self, key: str) -> tuple[tuple[int, int], ...]:
        pairs = [_Reader({key: pair}, self._prefix).numbers(key, 64, 2) for pair in self._value(key, list)]
        return tuple((index, value) for index, value in pairs)


def _unsigned(value: Any, bits: int, key: str) -> int:
    if type(value) is not int or not 0 <= value < 1 << bits:
        raise ValueError(f"{key}: {value!r}, allowed: an unsigned number of {bits} bits")
    return value


_INJECTABLE: Final = frozenset(
    int(kind) for kind in Inject if kind not in (Inject.NONE, Inject.OUT_OF_MEMORY)
)


def save_list(profile: Profile) -> tuple[int, ...]:
    """KVM_GET_MSR_INDEX_LIST, the part of async PF, in KVM's order; ACK reads 0 and its 0 acknowledges nothing."""
    if profile.ready_by_interrupt:
        return profile.msr_en, kvm.MSR_ASYNC_PF_INT, kvm.MSR_ASYNC_PF_ACK
    return (profile.msr_en,)


# -- restore -----------------------------------------------------------------------------------------------
def restore(m: VcpuMachine, plain: dict[str, Any]) -> Path:
    """Give the fresh vCPU ``m`` a saved state; emits `Restored`."""
    refused = ""
    try:
        state = VcpuState.from_plain(plain)
    except ValueError as error:
        m.emit(Restored(m.cpu, str(error)))
        return
    if state.mp_state != MpState.UNINITIALIZED:
        m.obs.trace(
            Kind.STATE_RESTORE, vcpu=m.vcpu_id, vm=m.vm, a=state.mp_state, c=dict(state.msrs).get(m.x86.profile.msr_en, 0)
        )  # fmt: skip
        for part in RESTORE_ORDER:
            yield f"restore.{part}"
            refused = yield from _PARTS[part](m, state)
            if refused:
                break
    m.emit(Restored(m.cpu, refused))


def _restore_cpuid(m: VcpuMachine, state: VcpuState) -> Path:
    missing = state.cpuid & ~m.x86.profile.cpuid
    if missing:
        return f"CPUID feature bits {missing:#x}, which this host does not have ({m.x86.profile.name})"
    m.x86.cpuid = state.cpuid
    yield "cpuid"
    return ""


def _restore_lapic(m: VcpuMachine, state: VcpuState) -> Path:
    m.lapic.irr = set(state.irr)
    m.lapic.isr = list(state.isr)
    return (yield from _write_msr(m, kvm.MSR_X2APIC_SPIV, state.spiv))


def _restore_int(m: VcpuMachine, state: VcpuState) -> Path:
    """Everything of the save list but EN."""
    refused = ""
    for index, value in state.msrs:
        if index != m.x86.profile.msr_en and not refused:
            refused = yield from _write_msr(m, index, value)
    return refused


def _restore_en(m: VcpuMachine, state: VcpuState) -> Path:
    """Broadcasts if async PF was enabled, so that every task that slept is restarted."""
    refused = ""
    for index, value in state.msrs:
        if index == m.x86.profile.msr_en:
            refused = yield from _write_msr(m, index, value)
    return refused


def _restore_events(m: VcpuMachine, state: VcpuState) -> Path:
    if state.mp_state == MpState.HALTED:
        m.halt = HALT.go(m.halt, "hlt")
    m.exception = None if state.exception is None else (Inject(state.exception[0]), state.exception[1])
    m.x86.id = state.next_id
    yield "events"
    return ""


def _write_msr(m: VcpuMachine, index: int, value: int) -> Path:
    """A host-initiated write: as the guest's, but who is refused is the VMM."""
    if (yield from m.x86.write_msr(index, value)):
        return f"MSR {index:#x} := {value:#x}"
    return ""


_PARTS: Final[dict[str, Callable[[VcpuMachine, VcpuState], Path]]] = {
    "cpuid": _restore_cpuid,
    "lapic": _restore_lapic,
    "int": _restore_int,
    "en": _restore_en,
    "events": _restore_events,
}
RESTORE_ORDER: Final = tuple(_PARTS)
