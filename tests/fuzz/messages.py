"""Conversations as bytes: who says which parts, so that a fuzzer can change both, and hypothesis can write them.

turn:  u8 identity, u8 page parts, u16 length of the first part, first part
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np

from proto import link, remote, wire
from proto.units import PAGE_SIZE

TURN: Final = struct.Struct("<BBH")
TURNS_MAX: Final = 64
IDENTITIES: Final = (
    link.vcpu_identity(0), link.vcpu_identity(1), link.swapd_identity(0, 0), link.swapd_identity(1, 0), link.launcher_identity(),
    link.swapd_identity(0, 1), link.vcpu_identity(2), b"stranger", b"", link.swapd_identity(9, 0xFFFF_FFFF),
)  # fmt: skip
HOSTS: Final = (
    remote.host_identity(7),
    remote.host_identity(8),
    b"H" + bytes(8),
    b"stranger",
    b"",
    link.swapd_identity(0, 0),
)
"""Of a daemon elsewhere."""
V0, V1, S0, S1, L = range(5)
WIDTHS: Final = {"B": 8, "H": 16, "I": 32, "Q": 64}


def pack(turns: Sequence[tuple[int, Any, int]]) -> bytes:
    """(index of the identity, message or raw bytes, number of page parts) each."""
    out = b""
    for who, message, pages in turns:
        raw = message if isinstance(message, bytes) else wire.encode(message)
        out += TURN.pack(who, pages, len(raw)) + raw
    return out


def unpack(data: bytes, identities: Sequence[bytes] = IDENTITIES) -> Iterator[tuple[bytes, list[bytes]]]:
    """(identity, parts), at most TURNS_MAX; what is cut off is said as far as it is there."""
    at = 0
    for _ in range(TURNS_MAX):
        if at + TURN.size > len(data):
            return
        who, pages, size = TURN.unpack_from(data, at)
        at += TURN.size
        parts = [data[at : at + size], *([bytes(PAGE_SIZE)] * (pages & 7))]
        if pages & 8:
            parts[-1] = parts[-1][:-1]
        at += size
        yield identities[who % len(identities)], parts


def ordinary_elsewhere() -> list[tuple[int, Any, int]]:
    """What a host says to a daemon elsewhere, in its first incarnation, while another one knocks."""
    write = np.array([(3, 1, 0, 5)], wire.IO_DTYPE)
    read = np.array([(4, 0, 1, 5), (6, 0, 2, 6)], wire.IO_DTYPE)
    return [
        (0, wire.Attach(7), 0), (0, wire.Welcome(1, 1), 0), (1, wire.Attach(8), 0), (0, wire.Io(1, 1, 2, write), 1),
        (0, wire.Io(1, 2, 4, read), 0), (1, wire.Io(1, 2, 4, read), 0), (0, wire.Ping(1, 1), 0), (0, wire.Bye(0), 0),
    ]  # fmt: skip


def largest(kind: wire.Kind, records: int = 1) -> Any:
    """The message of a kind with every field at the largest that is decoded."""
    spec = wire.SPECS[kind]
    names = spec.cls._fields
    values: list[Any] = [
        wire.LAMPORT_MAX if name == "lamport" else (1 << WIDTHS[width]) - 1
        for name, width in zip(names, spec.ints, strict=False)
    ]
    if spec.tail == "text":
        values.append("w" * wire.TEXT_MAX)
    elif spec.tail is not None:
        values.append(np.frombuffer(b"\xff" * records * np.dtype(spec.tail).itemsize, spec.tail))
    return spec.cls(*values)


def exit_of(reason: int, **fields: int) -> wire.Exit:
    """An exit record as a guest's kernel leaves it."""
    plain = wire.Exit(1, 1, reason, 0, 0, 0, 0, 0, 1, 0x5000, 0x5000, 0x5000, 0, 0, 0, 0, 0, 0)
    return plain._replace(**fields)


def ordinary() -> list[tuple[int, Any, int]]:
    """How a run begins: everybody is there, a vCPU boots, switches async PF on, touches pages, sends an interrupt."""
    from proto import kvm

    reason, role = wire.ExitReason, wire.Role
    hello = [
        (L, wire.Hello(role.LAUNCHER, 0, 0, 1), 0),
        (S0, wire.Hello(role.SWAPD, 0, 0, 1), 0),
        (S1, wire.Hello(role.SWAPD, 1, 0, 1), 0),
        (V0, wire.Hello(role.VCPU, 0, 0, 1), 0),
        (V1, wire.Hello(role.VCPU, 1, 0, 1), 0),
    ]
    done = np.array([(2, 4096, 10)], wire.DONE_DTYPE)
    exits = [
        exit_of(reason.BOOT),
        exit_of(reason.WRMSR, arg0=kvm.MSR_X2APIC_SPIV, arg1=0x1FF),
        exit_of(reason.WRMSR, arg0=kvm.MSR_ASYNC_PF_INT, arg1=kvm.VECTOR_PAGE_READY),
        exit_of(reason.WRMSR, arg0=0x4B564D02, arg1=0x1000 | 0x9),
        exit_of(reason.NESTED, cpl=3, if_=1),
        exit_of(reason.NESTED, gpa=0x6000, flags=0xFF),
        exit_of(reason.IPI, arg0=1, arg1=0xF0),
        exit_of(reason.RDMSR, arg0=kvm.MSR_ASYNC_PF_INT),
        exit_of(reason.KICK, accepted=0xF0F1, eois=1),
        exit_of(reason.HYPERCALL, arg0=wire.HC_AT_BARRIER, arg1=1),
        exit_of(reason.HYPERCALL, arg0=wire.HC_RELEASE, gpa=0x20000, arg1=0xFF),
        exit_of(reason.HYPERCALL, arg0=wire.HC_RELEASE),
        exit_of(reason.HYPERCALL, arg0=wire.HC_OOM, arg1=1, gpa=8, gva=3),
        exit_of(reason.HLT, timer_ns=1000),
    ]
    return [
        *hello, (V1, exits[0], 0), *((V0, one, 0) for one in exits),
        (S0, wire.IoDone(0, 1, done), 0), (S1, wire.IoDone(0, 1, done), 1), (S0, wire.Pong(0, 1), 0), (L, wire.Stop("time"), 0),
    ]  # fmt: skip


def ordinary_io(number: int) -> list[tuple[int, Any, int]]:
    """What a host says to a daemon."""
    pages = 1 if number else 0
    write = np.array([(3, 1, 0, 5)], wire.IO_DTYPE)
    read = np.array([(4, 0, 1, 5), (6, 0, 2, 6)], wire.IO_DTYPE)
    return [
        (0, wire.Welcome(0, 1), 0), (0, wire.Io(0, 1, 2, write), pages), (0, wire.Io(0, 2, 4, read), 0), (0, wire.Ping(0, 1), 0),
        (0, wire.Model(0), 0), (0, wire.Io(0, 3, 8, read), 0), (0, wire.Bye(0), 0),
    ]  # fmt: skip
