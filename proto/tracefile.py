"""The trace file ``.apft``: which words of which pages a real program read and wrote, in order.

Layout of version 1, little-endian, without gaps::

    fixed header   FIXED (magic, version, sizes, counts, checksums of the expanded sections)
    text           JSON object {command: [str], tool: str, recorded: str, ended: str}, UTF-8
    header check   u64, xxh3-64 of fixed header + text
    vpns           xz stream of u64[pages]: the distinct virtual page numbers, in the order of first touch
    accesses       xz stream of u32[accesses]: bit 0 write, bits 1..9 word of 8 bytes in the page,
                   bits 10..31 index into vpns

Expanded, the payload is ``vpns`` followed at once by ``accesses``: what the replay loop maps.

Invariants of a file that is written or accepted: at least one access; every page number occurs once;
page indices appear first in ascending order, so each is used and is below ``pages``; counts, sizes and
checksums agree with the contents.

This module reads and verifies; `proto.tracewriter` writes. Nothing is allocated on the word of a header that
the size of the file does not bear out.

Not handled here: instruction fetches, threads (the accesses of a program are one sequence), the contents of
memory, other versions.
"""

from __future__ import annotations

import io
import json
import lzma
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import xxhash

from proto.errors import UserError

U8 = npt.NDArray[np.uint8]
U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]

# The first byte is not ASCII and the line ends would be changed by a transfer in text mode, as in PNG's
# signature.
MAGIC = b"\x89APFT\r\n\x1a"
VERSION = 1
FIXED = struct.Struct("<8sII8Q")
CHECK = struct.Struct("<Q")

WORD_BITS = 9
PAGE_SHIFT = 1 + WORD_BITS
PAGES_MAX = 1 << (32 - PAGE_SHIFT)
ACCESSES_MAX = 1 << 32
VPN_MAX = 1 << 52
TEXT_BYTES_MAX = 1 << 20
# LZMA spends at least about 0.037 bytes on a match of 273 bytes: under 7400 to 1. A header that claims more
# is lying, and is refused before memory is allocated for it.
EXPANSION_MAX = 8192
EXPANSION_SLACK_BYTES = 4096
DECODER_MEMORY_BYTES = 64 << 20
CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class TraceInfo:
    """What the header of a trace says (checked for consistency; contents are checked on expansion)."""

    path: Path
    accesses: int
    reads: int
    writes: int
    pages: int
    command: tuple[str, ...]
    tool: str
    recorded: str
    ended: str
    file_bytes: int

    @property
    def expanded_bytes(self) -> int:
        """Bytes that `expand_into` writes: ``8 * pages + 4 * accesses``."""
        return 8 * self.pages + 4 * self.accesses


@dataclass(frozen=True, slots=True)
class _Header:
    info: TraceInfo
    vpns_at: int
    vpns_stored_bytes: int
    accesses_stored_bytes: int
    vpns_xxh3: int
    accesses_xxh3: int


def _bad(path: Path, what: str, *, key: str = "", found: object = None, allowed: str = "") -> UserError:
    return UserError(what, where=str(path), key=key, found=found, allowed=allowed)


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise _bad(
            path, f"cannot open the trace ({error.strerror})", allowed="a file made by `record`"
        ) from error


def open_trace(path: Path | str) -> TraceInfo:
    """Read and check the header of a trace; the payload is not looked at.

    Raises:
        UserError: missing, foreign, truncated or inconsistent file.
    """
    path = Path(path)
    with _open(path) as file:
        return _read_header(file, path).info


def expand_into(path: Path | str, buffer: Any) -> TraceInfo:
    """Expand the payload to the start of a caller's memory (a memfd's map, an array) and verify all of it.

    Args:
        path: the trace.
        buffer: writable, contiguous buffer of at least ``TraceInfo.expanded_bytes`` bytes; see `views` for
        its layout.
            Its contents are unspecified after an error.

    Raises:
        UserError: the file is bad in any way, or ``buffer`` is too small for it.
    """
    path = Path(path)
    with _open(path) as file:
        header = _read_header(file, path)
        target = np.frombuffer(buffer, np.uint8)
        if len(target) < header.info.expanded_bytes:
            allowed = f"at least {header.info.expanded_bytes}"
            raise _bad(path, "the buffer for the trace is too small", found=len(target), allowed=allowed)
        vpns, accesses = views(target, header.info)
        file.seek(header.vpns_at)
        for name, array, stored_bytes, expected in (
            ("vpns", vpns.view(np.uint8), header.vpns_stored_bytes, header.vpns_xxh3),
            ("accesses", accesses.view(np.uint8), header.accesses_stored_bytes, header.accesses_xxh3),
        ):
            _expand_section(file, path, name, array, stored_bytes)
            digest = xxhash.xxh3_64_intdigest(array.data)
            if digest != expected:
                raise _bad(
                    path, "checksum mismatch", key=name, found=f"{digest:016x}", allowed=f"{expected:016x}"
                )
    _check_contents(path, header.info, vpns, accesses)
    return header.info


def load_trace(path: Path | str) -> tuple[TraceInfo, U64, U32]:
    """Expand a trace into new memory.

    Returns:
        (info, ``vpns`` u64[pages], ``accesses`` u32[accesses]).

    Raises:
        UserError: as `expand_into`.
    """
    info = open_trace(path)
    buffer = np.empty(info.expanded_bytes, np.uint8)
    info = expand_into(path, buffer)
    vpns, accesses = views(buffer, info)
    return info, vpns, accesses


def views(buffer: Any, info: TraceInfo) -> tuple[U64, U32]:
    """The arrays in an expanded payload: ``vpns`` u64[pages] at byte 0, then ``accesses`` u32[accesses]."""
    vpns = np.frombuffer(buffer, np.uint64, info.pages)
    return vpns, np.frombuffer(buffer, np.uint32, info.accesses, 8 * info.pages)


def _read_header(file: BinaryIO, path: Path) -> _Header:
    file_bytes = file.seek(0, io.SEEK_END)
    file.seek(0)
    fixed = file.read(FIXED.size)
    if fixed[: len(MAGIC)] != MAGIC:
        found = fixed[: len(MAGIC)]
        raise _bad(path, "not an asyncpf trace", key="magic", found=found, allowed=repr(MAGIC))
    if len(fixed) < FIXED.size:
        raise _bad(
            path, "truncated trace", key="size", found=file_bytes, allowed=f"at least {FIXED.size} bytes"
        )
    (_, version, text_bytes, accesses, reads, writes, pages, vpns_stored, accesses_stored, *sums) = (
        FIXED.unpack(fixed)
    )
    if version != VERSION:
        raise _bad(
            path, "unknown version of the trace format", key="version", found=version, allowed=str(VERSION)
        )
    if text_bytes > TEXT_BYTES_MAX:
        raise _bad(path, "too large", key="text_bytes", found=text_bytes, allowed=f"at most {TEXT_BYTES_MAX}")
    expected = FIXED.size + text_bytes + CHECK.size + vpns_stored + accesses_stored
    if file_bytes != expected:
        what = "truncated trace" if file_bytes < expected else "data behind the end of the trace"
        raise _bad(path, what, key="size", found=file_bytes, allowed=f"{expected} bytes, as its header says")
    text = file.read(text_bytes)
    check = file.read(CHECK.size)
    digest = xxhash.xxh3_64_intdigest(fixed + text)
    if check != CHECK.pack(digest):
        raise _bad(
            path, "checksum mismatch", key="header", found=check.hex(), allowed=CHECK.pack(digest).hex()
        )
    _check_counts(path, accesses, reads, writes, pages)
    for name, stored, expanded in (
        ("vpns", vpns_stored, 8 * pages),
        ("accesses", accesses_stored, 4 * accesses),
    ):
        if expanded > stored * EXPANSION_MAX + EXPANSION_SLACK_BYTES:
            allowed = f"at most {EXPANSION_MAX} bytes for each of the {stored} stored"
            raise _bad(
                path, "cannot expand to what the header says", key=name, found=expanded, allowed=allowed
            )
    command, tool, recorded, ended = _parse_text(path, text)
    info = TraceInfo(path, accesses, reads, writes, pages, command, tool, recorded, ended, file_bytes)
    return _Header(info, FIXED.size + text_bytes + CHECK.size, vpns_stored, accesses_stored, sums[0], sums[1])


def _check_counts(path: Path, accesses: int, reads: int, writes: int, pages: int) -> None:
    if not 1 <= accesses <= ACCESSES_MAX:
        raise _bad(path, "out of range", key="accesses", found=accesses, allowed=f"1 to {ACCESSES_MAX}")
    if reads + writes != accesses:
        raise _bad(
            path,
            "reads and writes do not add up",
            key="reads",
            found=(reads, writes),
            allowed=f"sum {accesses}",
        )
    if not 1 <= pages <= min(PAGES_MAX, accesses):
        allowed = f"1 to {min(PAGES_MAX, accesses)}"
        raise _bad(path, "out of range", key="pages", found=pages, allowed=allowed)


def _parse_text(path: Path, text: bytes) -> tuple[tuple[str, ...], str, str, str]:
    allowed = "JSON {command: [str], tool: str, recorded: str, ended: str}"
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _bad(path, "unreadable text", key="header", found=text[:40], allowed=allowed) from error
    names = ("command", "tool", "recorded", "ended")
    if not isinstance(fields, dict) or set(fields) != set(names):
        raise _bad(path, "wrong fields", key="header", found=text[:40], allowed=allowed)
    command, *rest = (fields[name] for name in names)
    if not isinstance(command, list) or not all(isinstance(part, str) for part in (*command, *rest)):
        raise _bad(path, "wrong type of a field", key="header", found=text[:40], allowed=allowed)
    return tuple(command), rest[0], rest[1], rest[2]


def _blocks(file: BinaryIO, stored_bytes: int) -> Iterator[bytes]:
    left = stored_bytes
    while left and (data := file.read(min(left, CHUNK_BYTES))):
        left -= len(data)
        yield data


def _expand_section(file: BinaryIO, path: Path, name: str, target: U8, stored_bytes: int) -> None:
    """Expand exactly ``stored_bytes`` of the file to exactly the whole of ``target``, or raise."""
    xz = lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=DECODER_MEMORY_BYTES)
    blocks = _blocks(file, stored_bytes)
    at = 0
    try:
        while not xz.eof:
            data = b""
            if xz.needs_input and not (data := next(blocks, b"")):
                raise _bad(
                    path, "the compressed data ends early", key=name, found=at, allowed=f"{len(target)} bytes"
                )
            # One byte more than there is room for: a section that expands to too much shows itself without
            # being expanded.
            out = xz.decompress(data, min(CHUNK_BYTES, len(target) - at + 1))
            if len(out) > len(target) - at:
                raise _bad(
                    path, "expands to more than the header says", key=name, allowed=f"{len(target)} bytes"
                )
            target[at : at + len(out)] = np.frombuffer(out, np.uint8)
            at += len(out)
    except lzma.LZMAError as error:
        raise _bad(path, f"damaged compressed data ({error})", key=name) from error
    if at != len(target) or xz.unused_data or next(blocks, b""):
        raise _bad(
            path, "expands to another size than the header says", key=name, found=at, allowed=str(len(target))
        )


def _check_contents(path: Path, info: TraceInfo, vpns: U64, accesses: U32) -> None:
    """A checksum shows damage; these show a file whose maker was wrong, or malicious."""
    if int(vpns.max()) >= VPN_MAX:
        raise _bad(
            path, "page number out of range", key="vpns", found=int(vpns.max()), allowed=f"below {VPN_MAX}"
        )
    if len(np.unique(vpns)) != info.pages:
        raise _bad(path, "a page number occurs twice", key="vpns")
    writes = 0
    last = -1
    step = CHUNK_BYTES // 4
    for at in range(0, info.accesses, step):
        chunk = accesses[at : at + step]
        writes += int(np.count_nonzero(chunk & np.uint32(1)))
        pages = (chunk >> np.uint32(PAGE_SHIFT)).astype(np.int64)
        if int(pages.max()) >= info.pages:
            allowed = f"below {info.pages}"
            raise _bad(
                path, "page index out of range", key="accesses", found=int(pages.max()), allowed=allowed
            )
        newest = np.maximum.accumulate(np.concatenate(([last], pages)))
        if int(np.diff(newest).max()) > 1:
            raise _bad(path, "pages are not numbered in the order of first touch", key="accesses")
        last = int(newest[-1])
    if last != info.pages - 1:
        raise _bad(path, "pages that are never touched", key="pages", found=info.pages, allowed=str(last + 1))
    if writes != info.writes:
        raise _bad(path, "wrong count", key="writes", found=info.writes, allowed=str(writes))
