"""The wire: every message between processes, its fields, bounds and encoding. `docs/wire.md` is the same contract for readers.

A message is one msgpack array ``[version, kind, field...]``. Integer fields have a fixed width; a value of another type or outside
its width is refused. Batches carry their records as one ``bin`` of packed 24- or 16-byte records (one event is a batch of one).
On tcp links the pages of write requests and read replies follow as further ZeroMQ message parts of exactly 4096 bytes each, in
record order.

What is refused raises `WireError`; shells count it, answer with NACK and go on. Nothing here trusts a length before checking it.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from enum import IntEnum
from typing import Any, Final, NamedTuple

import msgpack
import numpy as np
import numpy.typing as npt

VERSION: Final = 1
BATCH_MAX: Final = 1024
MESSAGE_BYTES_MAX: Final = 32 * 1024
"""Longest first part: a full batch has BATCH_MAX * 24 bytes of records."""
LAMPORT_MAX: Final = (1 << 63) - 1
"""Highest counter in a message: its receiver records events above it, and their counters have to fit in 64 bits."""
TEXT_MAX: Final = 400


class Kind(IntEnum):
    """Message kinds; the number is what travels."""

    HELLO = 1
    WELCOME = 2
    NACK = 3
    BYE = 4
    EXIT = 10
    ENTRY = 11
    KICK = 12
    SAVE = 13
    REGISTERS = 14
    IO = 20
    IO_DONE = 21
    PING = 22
    PONG = 23
    MODEL = 24
    ATTACH = 25
    OFFER = 26
    HOST_READY = 30
    STARTED = 31
    FINISHED = 32
    FAILED = 33
    RESTART_WANTED = 34
    DAEMON_DOWN = 35
    DAEMON_FENCED = 36
    DAEMON_GONE = 37
    STOP = 38
    SAVE_VM = 39
    SAVED = 40


class Role(IntEnum):
    """Who says HELLO."""

    LAUNCHER = 1
    VCPU = 2
    SWAPD = 3


class ExitReason(IntEnum):
    """Why a vCPU left guest mode (EXIT.reason)."""

    BOOT = 1
    NESTED = 2
    KICK = 3
    HLT = 4
    WRMSR = 5
    RDMSR = 6
    IPI = 7
    """arg0 = destination vcpu_id, arg1 = vector and delivery mode as in the APIC's command register (fixed, INIT, start-up)."""
    HYPERCALL = 8
    """arg0 = HC_*."""
    DONE = 9
    """Every task of this CPU has finished; it powers down."""
    CR0 = 10
    """Write to CR0: arg0 = the new value of its PG bit; `cr0_pg` is the old one."""
    RESUME = 20
    """A restored vCPU goes on: its first exit in a fresh process, in place of BOOT."""


HC_AT_BARRIER: Final = 1
"""Tasks of this VM reached the start barrier; arg1 = how many so far."""
HC_RESET: Final = 2
"""Reset the machine: every vCPU of this VM, then the first one starts."""
HC_RELEASE: Final = 3
"""Guest pages that nobody needs any more: bit i of arg1 names the page of `gpa` + 4096 * i. They read as zeros from now on. arg1 = 0: wait
until no vCPU can reach their old contents."""
HC_OOM: Final = 4
"""Answer to OUT_OF_MEMORY: arg1 = its number, `gpa` = number of pages given back, `gva` = OOM_* bits."""
OOM_KILLED: Final = 1
"""A task was chosen to die for it."""
OOM_PENDING: Final = 2
"""It, or one before, still executes on another CPU: every vCPU has to look. Another answer follows."""


class Inject(IntEnum):
    """ENTRY.inject: the exception the guest takes at this entry."""

    NONE = 0
    PF_NOT_PRESENT = 1
    """#PF, CR2 = token, announcing word written."""
    PF_READY = 2
    """#PF of mode E, CR2 = token."""
    MACHINE_CHECK = 3
    GP = 4
    RESET = 5
    """Not an exception: the vCPU was reset, the guest starts from its beginning with nothing in its registers and its TLB."""
    OUT_OF_MEMORY = 6
    """The host has no memory left. CR2 = number of the notice: give some back and say so (HC_OOM); 0: look whether your task has to die."""


class Held(IntEnum):
    """ENTRY.held_kind: what kept the vCPU in the host for ENTRY.held_ns."""

    NONE = 0
    BLOCKED = 1
    HALTED = 2
    IDLE = 3


class Nack(IntEnum):
    """NACK.code."""

    MALFORMED = 1
    OVERSIZED = 2
    VERSION = 3
    UNKNOWN_KIND = 4
    FIELD = 5
    NOT_EXPECTED = 6
    STALE_EPOCH = 7
    STRANGER = 8
    BUSY = 9
    """The daemon works for another host."""


class Hello(NamedTuple):
    """First message of every peer."""

    role: int
    number: int
    epoch: int
    pid: int


class Welcome(NamedTuple):
    """Answer to HELLO; ``model_on`` tells a daemon whether its service-time model applies."""

    epoch: int
    model_on: int


class NackMsg(NamedTuple):
    """A message was dropped."""

    code: int
    kind: int
    text: str


class Bye(NamedTuple):
    """The run is over: leave."""

    code: int


class Exit(NamedTuple):
    """Exit record of a vCPU: the complete state that the host may decide on until the entry record."""

    seq: int
    lamport: int
    reason: int
    flags: int
    cpl: int
    if_: int
    shadow: int
    pending: int
    cr0_pg: int
    gpa: int
    gva: int
    cr3: int
    timer_ns: int
    accepted: int
    eois: int
    arg0: int
    arg1: int
    cause: int


class Entry(NamedTuple):
    """Entry record: what the vCPU does next."""

    seq: int
    lamport: int
    inject: int
    error: int
    cr2: int
    irr: int
    value: int
    held_kind: int
    held_ns: int
    cause: int


class Kick(NamedTuple):
    """Leave guest mode: a request waits (the wake-up interrupt of a running vCPU)."""

    lamport: int
    request: int


class Save(NamedTuple):
    """Host to a vCPU that waits for its entry: hand over your registers."""

    lamport: int


class Registers(NamedTuple):
    """What a vCPU holds outside shared memory; ``words``: REGISTER_DTYPE array (guest/registers.py says which is which).

    vCPU to host: answer to SAVE. Host to a fresh vCPU: in place of WELCOME, go on from here.
    """

    lamport: int
    words: npt.NDArray[np.void]


class Io(NamedTuple):
    """Requests to a daemon; ``records``: IO_DTYPE array. ``settled``: ids below it are answered and will not be asked for again."""

    epoch: int
    lamport: int
    settled: int
    records: npt.NDArray[np.void]


class IoDone(NamedTuple):
    """Replies of a daemon; ``records``: DONE_DTYPE array."""

    epoch: int
    lamport: int
    records: npt.NDArray[np.void]


class Ping(NamedTuple):
    """Heartbeat, host to daemon."""

    epoch: int
    nonce: int


class Pong(NamedTuple):
    """Heartbeat answer."""

    epoch: int
    nonce: int


class Model(NamedTuple):
    """Switch the service-time model on (1) or off (0)."""

    on: int


class Attach(NamedTuple):
    """Host to a daemon elsewhere: work for me. ``session``: drawn by the host process; its pages are kept until it says BYE."""

    session: int


class Offer(NamedTuple):
    """A daemon elsewhere, in answer to ATTACH: its incarnation, which contents its file has, and how many blocks."""

    epoch: int
    file: int
    slots: int
    pid: int


class HostReady(NamedTuple):
    """Host to launcher: sockets are bound."""

    pid: int


class Started(NamedTuple):
    """Host to launcher: the barrier opened."""

    start_ns: int


class Finished(NamedTuple):
    """Host to launcher: every vCPU has powered down."""

    reason: str


class Failed(NamedTuple):
    """Host to launcher: the run cannot go on."""

    reason: str


class RestartWanted(NamedTuple):
    """Host to launcher: a daemon stopped answering."""

    daemon: int
    epoch: int
    reason: str


class DaemonDown(NamedTuple):
    """Launcher to host: the daemon's process ended; nothing more is sent to it."""

    daemon: int
    epoch: int


class DaemonFenced(NamedTuple):
    """Launcher to host: no I/O of that epoch can land any more."""

    daemon: int
    epoch: int


class DaemonGone(NamedTuple):
    """Launcher to host: restart budget used up, the daemon never comes back. Answered with FAILED where the run cannot go on without it."""

    daemon: int
    reason: str


class Stop(NamedTuple):
    """Launcher to host: end the measured time now, in an orderly way."""

    reason: str


class SaveVm(NamedTuple):
    """Launcher to host: pause every vCPU and write the image of all VMs into the run directory."""

    reason: str


class Saved(NamedTuple):
    """Host to launcher: the image is complete; the vCPUs stay where they are. ``pages``: with contents."""

    pages: int


OP_READ: Final = 0
OP_WRITE: Final = 1
IO_DTYPE: Final = np.dtype([("id", "<u8"), ("op", "<u4"), ("frame", "<u4"), ("slot", "<u8")])
"""One request: id (unique per run), OP_*, host frame (ignored on tcp), block of the daemon's file."""
DONE_DTYPE: Final = np.dtype([("id", "<u8"), ("result", "<i8"), ("service_ns", "<u8")])
"""One reply: bytes moved or -errno; time from submission to completion in the daemon."""
REGISTER_DTYPE: Final = np.dtype([("word", "<u8")])
"""One register."""
POWERED_DOWN: Final = 0
"""The only word of REGISTERS for a vCPU that is powered down and stays so."""

Message = (
    Hello | Welcome | NackMsg | Bye | Exit | Entry | Kick | Save | Registers | Io | IoDone | Ping | Pong | Model | Attach | Offer
    | HostReady | Started | Finished | Failed | RestartWanted | DaemonDown | DaemonFenced | DaemonGone | Stop
    | SaveVm | Saved
)  # fmt: skip


class WireError(Exception):
    """A message that is not in the contract. ``code`` is a `Nack`, ``kind`` the kind number if it could be read, else 0."""

    def __init__(self, code: Nack, text: str, kind: int = 0) -> None:
        super().__init__(text)
        self.code = code
        self.text = text[:TEXT_MAX]
        self.kind = kind


class Spec(NamedTuple):
    """Layout of a kind: leading integers by struct format, then an optional tail ('text' or the dtype of a batch)."""

    cls: type[Any]
    ints: str
    tail: str | np.dtype[Any] | None = None


SPECS: Final[dict[Kind, Spec]] = {
    Kind.HELLO: Spec(Hello, "BIII"),
    Kind.WELCOME: Spec(Welcome, "IB"),
    Kind.NACK: Spec(NackMsg, "HI", "text"),
    Kind.BYE: Spec(Bye, "B"),
    Kind.EXIT: Spec(Exit, "IQBBBBBBBQQQQIIQQQ"),
    Kind.ENTRY: Spec(Entry, "IQBIQIQBQQ"),
    Kind.KICK: Spec(Kick, "QB"),
    Kind.SAVE: Spec(Save, "Q"),
    Kind.REGISTERS: Spec(Registers, "Q", REGISTER_DTYPE),
    Kind.IO: Spec(Io, "IQQ", IO_DTYPE),
    Kind.IO_DONE: Spec(IoDone, "IQ", DONE_DTYPE),
    Kind.PING: Spec(Ping, "IQ"),
    Kind.PONG: Spec(Pong, "IQ"),
    Kind.MODEL: Spec(Model, "B"),
    Kind.ATTACH: Spec(Attach, "Q"),
    Kind.OFFER: Spec(Offer, "IQQI"),
    Kind.HOST_READY: Spec(HostReady, "I"),
    Kind.STARTED: Spec(Started, "Q"),
    Kind.FINISHED: Spec(Finished, "", "text"),
    Kind.FAILED: Spec(Failed, "", "text"),
    Kind.RESTART_WANTED: Spec(RestartWanted, "HI", "text"),
    Kind.DAEMON_DOWN: Spec(DaemonDown, "HI"),
    Kind.DAEMON_FENCED: Spec(DaemonFenced, "HI"),
    Kind.DAEMON_GONE: Spec(DaemonGone, "H", "text"),
    Kind.STOP: Spec(Stop, "", "text"),
    Kind.SAVE_VM: Spec(SaveVm, "", "text"),
    Kind.SAVED: Spec(Saved, "Q"),
}
"""The contract. B, H, I, Q = unsigned 8, 16, 32, 64 bits."""

_KIND_OF: Final = {spec.cls: kind for kind, spec in SPECS.items()}


def kind_of(message: Message) -> Kind:
    """The kind number of a message."""
    return _KIND_OF[type(message)]


_CHECKS: Final = {
    int(kind): (
        spec.cls,
        struct.Struct("<" + spec.ints).pack,
        len(spec.ints),
        spec.tail,
        spec.cls._fields.index("lamport") if "lamport" in spec.cls._fields else -1,
    )
    for kind, spec in SPECS.items()
}
_packer: Final = msgpack.Packer(autoreset=True)


def encode(message: Message) -> bytes:
    """One message as msgpack. Values are trusted here: what leaves was built by our own machines."""
    kind = _KIND_OF[type(message)]
    last = message[-1]
    if isinstance(last, np.ndarray):
        return _packer.pack((VERSION, kind, *message[:-1], last.tobytes()))  # type: ignore[no-any-return]
    return _packer.pack((VERSION, kind, *message))  # type: ignore[no-any-return]


def decode(raw: bytes | memoryview) -> Message:
    """Check and decode one message. Raises `WireError`, never anything else, whatever the bytes."""
    if len(raw) > MESSAGE_BYTES_MAX:
        raise WireError(Nack.OVERSIZED, f"message of {len(raw)} bytes, at most {MESSAGE_BYTES_MAX} allowed")
    try:
        parts = msgpack.unpackb(
            raw, use_list=False, strict_map_key=False, max_array_len=64, max_map_len=0, max_ext_len=0
        )
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise WireError(Nack.MALFORMED, f"not msgpack: {type(error).__name__}") from error
    if type(parts) is not tuple or len(parts) < 2 or type(parts[0]) is not int or type(parts[1]) is not int:
        raise WireError(Nack.MALFORMED, "not an array [version, kind, ...]")
    if parts[0] != VERSION:
        raise WireError(Nack.VERSION, f"version {parts[0]}, this side speaks {VERSION}")
    check = _CHECKS.get(parts[1])
    if check is None:
        raise WireError(Nack.UNKNOWN_KIND, f"kind {parts[1]} is unknown")
    cls, pack, ints, tail, lamport_at = check
    fields = parts[2:]
    expected = ints + (tail is not None)
    if len(fields) != expected:
        raise WireError(
            Nack.FIELD, f"{cls.__name__}: {len(fields)} fields, {expected} expected", _safe(parts[1])
        )
    try:
        pack(*fields[:ints])
    except (struct.error, TypeError) as error:
        raise WireError(Nack.FIELD, f"{cls.__name__}: {error}", _safe(parts[1])) from error
    if lamport_at >= 0 and fields[lamport_at] > LAMPORT_MAX:
        raise WireError(
            Nack.FIELD,
            f"{cls.__name__}: lamport {fields[lamport_at]} is above {LAMPORT_MAX}",
            _safe(parts[1]),
        )
    if tail is None:
        return cls(*fields)  # type: ignore[no-any-return]
    return _with_tail(cls, fields, tail, parts[1])


def _safe(kind: int) -> int:
    return kind if 0 <= kind < 1 << 32 else 0


def _with_tail(cls: type[Any], fields: Sequence[Any], tail: str | np.dtype[Any], kind: int) -> Message:
    last = fields[-1]
    if tail == "text":
        if type(last) is not str or len(last) > TEXT_MAX:
            raise WireError(
                Nack.FIELD, f"{cls.__name__}: text of at most {TEXT_MAX} characters expected", kind
            )
        return cls(*fields)  # type: ignore[no-any-return]
    dtype = np.dtype(tail)
    if (
        type(last) is not bytes
        or len(last) % dtype.itemsize
        or not 0 < len(last) <= BATCH_MAX * dtype.itemsize
    ):
        raise WireError(
            Nack.FIELD,
            f"{cls.__name__}: a bin of 1..{BATCH_MAX} records of {dtype.itemsize} bytes expected",
            kind,
        )
    return cls(*fields[:-1], np.frombuffer(last, dtype))  # type: ignore[no-any-return]


def pack_vectors(vectors: Sequence[int]) -> int:
    """Up to four interrupt vectors in one u32, highest priority in the low byte; the rest waits for the next record."""
    packed = 0
    for i, vector in enumerate(vectors[:4]):
        packed |= (vector & 0xFF) << (8 * i)
    return packed


def unpack_vectors(packed: int) -> list[int]:
    """Inverse of `pack_vectors`."""
    out = []
    while packed:
        out.append(packed & 0xFF)
        packed >>= 8
    return out
