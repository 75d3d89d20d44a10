"""Writes trace files (format: `proto.tracefile`) while the accesses come in.

Holds a few MiB and the set of page numbers, whatever the length of the trace. The named file appears only when it
is complete, by a rename; what is collected before is in a file without a name, so nothing is left behind when
the writer is killed.

Not handled here: how a file is checked (the reader trusts no writer, this one neither).
"""

from __future__ import annotations

import datetime as dt
import json
import lzma
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
import numpy.typing as npt
import xxhash

from proto import tracefile
from proto.errors import UserError
from proto.tracefile import (
    CHECK,
    CHUNK_BYTES,
    FIXED,
    MAGIC,
    PAGE_SHIFT,
    TEXT_BYTES_MAX,
    VERSION,
    WORD_BITS,
    TraceInfo,
)

U64 = npt.NDArray[np.uint64]
Bools = npt.NDArray[np.bool_]

# Literals are positioned modulo 4, as accesses are u32; the 4 MiB dictionary spans a million accesses. The
# xz container's own check is off: the header carries an xxh3 of the expanded bytes.
FILTERS: list[dict[str, Any]] = [
    {"id": lzma.FILTER_LZMA2, "preset": 4, "dict_size": 4 << 20, "lc": 0, "lp": 2, "pb": 2}
]


class _Section:
    """One compressed section, collected in a file without a name."""

    def __init__(self, folder: Path) -> None:
        self.file: BinaryIO = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed by close()
        self._xz = lzma.LZMACompressor(format=lzma.FORMAT_XZ, check=lzma.CHECK_NONE, filters=FILTERS)
        self._hash = xxhash.xxh3_64()
        self.stored_bytes = 0

    def put(self, data: bytes) -> None:
        self._hash.update(data)
        self.stored_bytes += self.file.write(self._xz.compress(data))

    def finish(self) -> int:
        """End the stream; returns the xxh3-64 of what went in."""
        self.stored_bytes += self.file.write(self._xz.flush())
        self.file.seek(0)
        return self._hash.intdigest()

    def close(self) -> None:
        self.file.close()


class TraceWriter:
    """Streams accesses into a new trace file; a context manager that discards the work when its body raises.

    Call `append` any number of times, then `finish` once. ``path`` is not touched before `finish`.

    Raises:
        UserError: the folder of ``path`` is missing or cannot be written to.
    """

    def __init__(self, path: Path, *, command: Sequence[str], tool: str, recorded: str = "") -> None:
        self.path = path
        self.command = tuple(command)
        self.tool = tool
        self.recorded = recorded or dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
        self.accesses = 0
        self.writes = 0
        self._index: dict[int, int] = {}
        try:
            self._section = _Section(path.parent)
        except OSError as error:
            raise UserError(
                f"cannot write a trace here ({error.strerror})",
                where=str(path),
                allowed="a file in a writable folder",
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._section.close()

    @property
    def pages(self) -> int:
        """Distinct pages touched so far."""
        return len(self._index)

    def append(self, words: U64, is_write: Bools) -> int:
        """Append accesses in order.

        Args:
            words: u64[n], numbers of the aligned 8-byte words (virtual address >> 3).
            is_write: bool[n].

        Returns:
            How many were taken: fewer than ``n`` when the format's limit of pages or accesses is reached.

        Raises:
            UserError: the disk is full or failed.
        """
        taken = min(len(words), tracefile.ACCESSES_MAX - self.accesses)
        vpns = words[:taken] >> np.uint64(WORD_BITS)
        distinct, first, inverse = np.unique(vpns, return_index=True, return_inverse=True)
        indices = np.empty(len(distinct), np.uint32)
        for at in np.argsort(first).tolist():
            vpn = int(distinct[at])
            index = self._index.get(vpn)
            if index is None:
                if len(self._index) == tracefile.PAGES_MAX:
                    taken = int(first[at])
                    break
                index = self._index[vpn] = len(self._index)
            indices[at] = index
        in_page = (words[:taken] & np.uint64((1 << WORD_BITS) - 1)).astype(np.uint32)
        pages = indices[inverse.reshape(-1)[:taken]]
        write = is_write[:taken].astype(np.uint32)
        packed = (pages << np.uint32(PAGE_SHIFT)) | (in_page << np.uint32(1)) | write
        try:
            self._section.put(packed.astype("<u4").tobytes())
        except OSError as error:
            raise UserError(f"cannot write the trace ({error.strerror})", where=str(self.path)) from error
        self.accesses += taken
        self.writes += int(np.count_nonzero(is_write[:taken]))
        return taken

    def finish(self, ended: str) -> TraceInfo:
        """Put the file in place, atomically, and say what is in it.

        Args:
            ended: why the recording ended, for the reader.

        Raises:
            UserError: no access was recorded, or the file cannot be written.
        """
        if not self.accesses:
            raise UserError("the trace would be empty: no data access was recorded", where=str(self.path))
        folder = self.path.parent
        vpns = _Section(folder)
        try:
            vpns.put(np.fromiter(self._index, "<u8", len(self._index)).tobytes())
            vpns_xxh3 = vpns.finish()
            accesses_xxh3 = self._section.finish()
            header = self._header(ended, vpns, vpns_xxh3, accesses_xxh3)
            self._place(header, vpns)
        except OSError as error:
            raise UserError(f"cannot write the trace ({error.strerror})", where=str(self.path)) from error
        finally:
            vpns.close()
            self._section.close()
        return tracefile.open_trace(self.path)

    def _header(self, ended: str, vpns: _Section, vpns_xxh3: int, accesses_xxh3: int) -> bytes:
        fields = {"command": self.command, "tool": self.tool, "recorded": self.recorded, "ended": ended}
        text = json.dumps(fields).encode()
        if len(text) > TEXT_BYTES_MAX:
            raise UserError(
                "the command line is too long for a trace header",
                where=str(self.path),
                found=len(text),
                allowed=f"at most {TEXT_BYTES_MAX} bytes",
            )
        fixed = FIXED.pack(
            MAGIC,
            VERSION,
            len(text),
            self.accesses,
            self.accesses - self.writes,
            self.writes,
            len(self._index),
            vpns.stored_bytes,
            self._section.stored_bytes,
            vpns_xxh3,
            accesses_xxh3,
        )
        return fixed + text + CHECK.pack(xxhash.xxh3_64_intdigest(fixed + text))

    def _place(self, header: bytes, vpns: _Section) -> None:
        descriptor, name = tempfile.mkstemp(prefix=f".{self.path.name}.", dir=self.path.parent)
        part = Path(name)
        try:
            with os.fdopen(descriptor, "wb") as out:
                out.write(header)
                for section in (vpns, self._section):
                    while data := section.file.read(CHUNK_BYTES):
                        out.write(data)
            part.chmod(0o644)
            part.replace(self.path)
        finally:
            part.unlink(missing_ok=True)
