"""Input logs: everything that the machines of one process were told, read and did, so that they can be run again.

A file is a fixed head (magic, version, length of the description, status), the description in msgpack with its checksum, then blocks:
length, checksum, calls in msgpack. A call is what one `Machine.on` (or `Machine.resume`) was given, what it did outside of itself
in order (reads with their values, writes, observations: *acts*), and its effects. A block is one msgpack array of calls.

Invariants
* A block is whole or not there: what was flushed survives the end of the process by any signal.
* A reader takes the longest prefix of whole blocks and says where and why it stopped; a log of another version, or of other record
  types, is refused with `UserError`. It needs memory for one block at a time, bounded by BLOCK_BYTES_MAX and ITEMS_MAX.
* Writing never ends the run: when the file has reached its limit or the disk is full, the log ends there and its head says so.

Not handled here: what a call means (proto/rerun.py), which types and acts a role has (host/logged.py).
"""

from __future__ import annotations

import operator
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple

import msgpack
import xxhash

from proto.errors import UserError
from proto.files import write_all
from proto.records import Shape

MAGIC: Final = b"\x89APFIN\r\n"
VERSION: Final = 1
FOLDER: Final = "inputs"
SUFFIX: Final = ".bin"

HEAD: Final = struct.Struct("<8sIIQ")
"""magic, version, bytes of the description, STATUS_*."""
STATUS_AT: Final = 16
BLOCK: Final = struct.Struct("<IQ")
"""bytes of the payload, xxh3-64 of the payload."""
STATUS_OPEN: Final = 0
"""Being written, or its writer was killed."""
STATUS_CLOSED: Final = 1
STATUS_FULL: Final = 2
"""LOG_BYTES_MAX reached."""
STATUS_NO_SPACE: Final = 3
"""The disk took no more."""
STATUS_TOO_LARGE: Final = 4
"""A call that does not fit into a block."""
STATUS_TEXT: Final = {
    STATUS_OPEN: "not closed: its process was killed",
    STATUS_CLOSED: "closed in order",
    STATUS_FULL: "full",
    STATUS_NO_SPACE: "the disk was full",
    STATUS_TOO_LARGE: "a call was too large to be recorded",
}

CALLS_PER_BLOCK: Final = 128
"""Few enough that packing them is no pause (a quarter of a millisecond), enough that a call costs little."""
BLOCK_BYTES_MAX: Final = 4 << 20
ITEMS_MAX: Final = 8192
"""Longest list in a block; longer lists of acts are cut into several. Bounds what a forged length can make a reader allocate."""
DESCRIPTION_BYTES_MAX: Final = 256 << 10
MACHINES_MAX: Final = 4096
LOG_BYTES_MAX: Final = 2 << 30
"""A quarter of an hour of a busy host."""

ON: Final = 0
RESUME: Final = 1
"""Kinds of calls."""


class Op(NamedTuple):
    """A kind of act: its name, its arguments' names, one letter per result: i int, b bool, y bytes."""

    name: str
    args: tuple[str, ...]
    results: str = ""


class Description(NamedTuple):
    """What a log says about itself. ``parks``: paths may rest at named steps, so each step asks (act 0)."""

    role: str
    run_id: str
    machines: tuple[str, ...]
    shapes: tuple[Shape, ...]
    ops: tuple[Op, ...]
    parks: bool = False


class Call(NamedTuple):
    """One call as it lies in the log. ``inputs``: plain records, for RESUME the index of the parked path; ``acts``: flat, op code first;
    ``effects``: plain records; ``raised``: what the machine raised, or "".
    """

    number: int
    machine: int
    kind: int
    now_ns: int
    inputs: Any
    acts: tuple[Any, ...]
    effects: tuple[Any, ...]
    raised: str


class InputLogWriter:
    """Writes a log. Created by the process that writes."""

    __slots__ = ("_calls", "_fd", "_last_ns", "_pack", "_size", "path", "status")

    def __init__(self, path: Path, description: Description) -> None:
        """Create ``path`` (must not exist). UserError when that is impossible."""
        self.path = path
        self.status = STATUS_OPEN
        self._calls: list[Any] = []
        self._last_ns = 0
        self._pack = msgpack.Packer(default=operator.index, autoreset=True).pack
        body = msgpack.packb(tuple(description))
        data = HEAD.pack(MAGIC, VERSION, len(body), STATUS_OPEN) + body + _sum(body)
        self._size = len(data)
        try:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                write_all(self._fd, data)
            except OSError:
                os.close(self._fd)
                raise
        except OSError as error:
            raise UserError(
                f"the input log cannot be written: {error.strerror}", where=str(path), allowed="a new file"
            ) from error

    def append(
        self, machine: int, kind: int, now_ns: int, inputs: Any, acts: Sequence[Any], effects: Any
    ) -> None:
        """Add one call; ``effects`` is a string when the machine raised. Packed and written with CALLS_PER_BLOCK others, or by `flush`.

        ``acts`` is copied, everything else must not change any more.
        """
        if self.status != STATUS_OPEN:
            return
        chunks = [acts[:]] if len(acts) <= ITEMS_MAX else _chunks(acts)
        self._calls.append((machine, kind, now_ns - self._last_ns, inputs, chunks, effects))
        self._last_ns = now_ns
        if len(self._calls) >= CALLS_PER_BLOCK:
            self.flush()

    def flush(self) -> None:
        """Hand what was added to the kernel: from here it survives the process."""
        calls, self._calls = self._calls, []
        if calls:
            self._write(calls)

    def _write(self, calls: list[Any]) -> None:
        if self.status != STATUS_OPEN:
            return
        payload = self._pack(calls)
        if len(payload) > BLOCK_BYTES_MAX and len(calls) > 1:
            self._write(calls[: len(calls) // 2])
            self._write(calls[len(calls) // 2 :])
            return
        if len(payload) > BLOCK_BYTES_MAX or any(_too_long(call) for call in calls):
            self._end(STATUS_TOO_LARGE)
            return
        block = BLOCK.pack(len(payload), xxhash.xxh3_64_intdigest(payload)) + payload
        if self._size + len(block) > LOG_BYTES_MAX:
            self._end(STATUS_FULL)
            return
        try:
            written = os.write(self._fd, block)
        except OSError:
            written = 0
        self._size += written
        if written < len(block):
            self._end(STATUS_NO_SPACE)

    def close(self) -> None:
        """Write what is left and mark the log as closed; safe to call twice."""
        if self._fd < 0:
            return
        self.flush()
        if self.status == STATUS_OPEN:
            self._end(STATUS_CLOSED)
        os.close(self._fd)
        self._fd = -1

    def _end(self, status: int) -> None:
        """Nothing is recorded after this. The word lies in a block of the disk that exists already."""
        self.status = status
        with suppress(OSError):
            os.pwrite(self._fd, struct.pack("<Q", status), STATUS_AT)


class InputLog:
    """Reads a log. `calls` may be used once; `note` then says why it ended early, or is empty."""

    __slots__ = ("_file", "_status", "description", "note", "path")

    def __init__(self, path: Path) -> None:
        """Open it and read its description. Raises UserError."""
        self.path = path
        self.note = ""
        try:
            self._file: BinaryIO = path.open("rb")
        except OSError as error:
            raise UserError(
                f"no input log there: {error.strerror}",
                where=str(path),
                allowed="the log of a run with --log-inputs",
            ) from error
        try:
            self.description = self._read_description()
        except BaseException:
            self._file.close()
            raise

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    @property
    def status(self) -> str:
        """How the log ended, in words."""
        return STATUS_TEXT[self._status]

    def calls(self) -> Iterator[Call]:
        """The calls up to the end or the first damage."""
        number = 0
        now_ns = 0
        at = self._file.tell()
        if self._status != STATUS_CLOSED:
            self.note = self.status
        while payload := self._read_block(at):
            try:
                block = msgpack.unpackb(
                    payload, use_list=False, max_array_len=ITEMS_MAX, max_map_len=ITEMS_MAX, max_ext_len=0
                )
                for plain in block:
                    call = _call(plain, number + 1, now_ns, len(self.description.machines))
                    number, now_ns = call.number, call.now_ns
                    yield call
            except (ValueError, TypeError, msgpack.UnpackException) as error:
                self._damaged(at, f"what is no call: {str(error) or type(error).__name__}")
                return
            at += BLOCK.size + len(payload)

    def _damaged(self, at: int, what: str) -> None:
        self.note = f"damaged at byte {at}: {what}"

    def _read_block(self, at: int) -> bytes:
        """The payload of the block at byte ``at``; empty at the end, with a note when something is wrong."""
        head = self._file.read(BLOCK.size)
        if not head:
            return b""
        if len(head) < BLOCK.size:
            self.note = f"cut at byte {at + len(head)}"
            return b""
        size, checksum = BLOCK.unpack(head)
        if not 0 < size <= BLOCK_BYTES_MAX:
            self._damaged(at, f"a block of {size} bytes")
            return b""
        payload = self._file.read(size)
        if len(payload) < size:
            self.note = f"cut at byte {at + BLOCK.size + len(payload)}"
            return b""
        if xxhash.xxh3_64_intdigest(payload) != checksum:
            self._damaged(at, "wrong checksum")
            return b""
        return payload

    def _read_description(self) -> Description:
        where = str(self.path)
        head = self._file.read(HEAD.size)
        if head[: len(MAGIC)] != MAGIC:
            raise UserError("not an input log", where=where, found=head[: len(MAGIC)], allowed="an input log")
        if len(head) < HEAD.size:
            raise UserError("an input log that is cut inside its head", where=where)
        _, version, size, self._status = HEAD.unpack(head)
        if version != VERSION:
            raise UserError(
                "an input log of another version", where=where, found=version, allowed=f"version {VERSION}"
            )
        if self._status not in STATUS_TEXT:
            raise UserError("an input log with a damaged head", where=where, found=self._status)
        body = self._file.read(size) if size <= DESCRIPTION_BYTES_MAX else b""
        if len(body) < size or self._file.read(8) != _sum(body):
            raise UserError("an input log whose description is cut or damaged", where=where)
        try:
            return _description(
                msgpack.unpackb(body, use_list=False, max_array_len=ITEMS_MAX, max_map_len=0, max_ext_len=0)
            )
        except (ValueError, TypeError, msgpack.UnpackException) as error:
            raise UserError("an input log whose description is damaged", where=where) from error


def folder(number: int) -> str:
    """Folder of the logs of a run's set of processes number 1, 2, ...: each restart of a run begins a new one."""
    return FOLDER if number == 1 else f"{FOLDER}-{number}"


def path_of(run_dir: Path, role: str, number: int = 1) -> Path:
    """Where a role's log of a set of processes lies."""
    return run_dir / folder(number) / f"{role}{SUFFIX}"


def logs(run_dir: Path) -> list[Path]:
    """Every input log of a run."""
    return sorted(run_dir.glob(f"{FOLDER}/*{SUFFIX}")) + sorted(run_dir.glob(f"{FOLDER}-*/*{SUFFIX}"))


def ended_early(path: Path) -> str:
    """Why a log that was written does not reach the end of its run; "" when it does."""
    with path.open("rb") as file:
        head = file.read(HEAD.size)
    status = HEAD.unpack(head)[3] if len(head) == HEAD.size else STATUS_OPEN
    return "" if status == STATUS_CLOSED else STATUS_TEXT.get(status, "damaged")


def _sum(data: bytes) -> bytes:
    return struct.pack("<Q", xxhash.xxh3_64_intdigest(data))


def _chunks(acts: Sequence[Any]) -> list[Sequence[Any]]:
    return [acts[i : i + ITEMS_MAX] for i in range(0, len(acts), ITEMS_MAX)]


def _too_long(call: Any) -> bool:
    """Whether a call has more inputs, effects or chunks of acts than a reader takes."""
    _, _, _, inputs, chunks, effects = call
    return any(isinstance(part, list) and len(part) > ITEMS_MAX for part in (inputs, chunks, effects))


def _call(plain: Any, number: int, last_ns: int, machines: int) -> Call:
    """Raises ValueError or TypeError when ``plain`` is no call."""
    machine, kind, delta_ns, inputs, chunks, effects = plain
    if type(machine) is not int or not 0 <= machine < machines:
        raise ValueError(f"machine {machine!r} of {machines}")
    if kind not in (ON, RESUME) or type(delta_ns) is not int:
        raise ValueError("kind and time are numbers")
    if type(inputs) is not (tuple if kind == ON else int) or type(chunks) is not tuple:
        raise ValueError("inputs or acts are of another kind")
    raised = ""
    if type(effects) is str:
        raised, effects = effects, ()
    if type(effects) is not tuple:
        raise ValueError("effects are of another kind")
    acts = chunks[0] if len(chunks) == 1 else tuple(item for chunk in chunks for item in chunk)
    if type(acts) is not tuple:
        raise ValueError("acts are of another kind")
    return Call(number, machine, kind, last_ns + delta_ns, inputs, acts, effects, raised)


def _description(plain: Any) -> Description:
    """Raises ValueError or TypeError when ``plain`` is none."""
    role, run_id, machines, shapes, ops, parks = plain
    description = Description(
        _text(role),
        _text(run_id),
        tuple(_text(name) for name in machines),
        tuple((_text(name), tuple(_text(field) for field in fields)) for name, fields in shapes),
        tuple(Op(_text(name), tuple(_text(arg) for arg in args), _text(kinds)) for name, args, kinds in ops),
        bool(parks),
    )
    if not 0 < len(description.machines) <= MACHINES_MAX:
        raise ValueError("number of machines")
    return description


def _text(value: Any) -> str:
    if type(value) is not str:
        raise TypeError(f"{value!r} is no text")
    return value
