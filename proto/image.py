"""The image of a saved run: memory, vCPU states, guest kernels, in one file that says when it is not what it should be.

    header   4096 bytes: magic, version, page size, number of host virtual pages, then offset, length and sum of what follows
    pages    4096 bytes each, only pages with contents, in the order in which they were saved
    sections byte blocks with a name (guest kernels, vCPU pages, shadows), see docs/memory-map.md
    map      16 bytes for each host virtual page: `Content`, place among the pages, xxh3 of its bytes
    meta     msgpack: what was saved (identity), vCPU records, memslots, directory of the sections

The header is written last: a file whose writer died is no image. Everything read is checked by sum; numbers little-endian.

Invariant: a reader gives out only bytes whose sum is right, and never trusts an offset before it compared it with the file's size.

Not handled here: what the records mean (host/state.py, guest/registers.py), who may restore what (launcher/restart.py).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from enum import IntEnum
from pathlib import Path
from typing import Any, Final, Self

import msgpack
import numpy as np
import xxhash

from proto.errors import UserError
from proto.units import PAGE_SIZE

MAGIC: Final = b"\x89APFVM\r\n"
VERSION: Final = 1
HEADER: Final = struct.Struct("<8sIIQQQQQQQQ")
"""magic, version, page bytes, pages in the map, pages in the file, map offset, xxh3 of the map, meta offset, meta bytes, xxh3 of the
meta, xxh3 of all that comes before in the header.
"""
HEADER_BYTES: Final = PAGE_SIZE
MAP_DTYPE: Final = np.dtype([("content", "<u4"), ("place", "<u4"), ("xxh3", "<u8")])
META_BYTES_MAX: Final = 64 << 20
SECTION_NAMES_MAX: Final = 1 << 12
LIST_MAX: Final = 2 * SECTION_NAMES_MAX
"""Entries of one list or table in the meta: vCPUs, tasks, sections. msgpack makes room for as many as a list claims, list in list."""
ALLOWED: Final = "an image that `run --save-at T --image FILE` wrote to its end"


class Content(IntEnum):
    """What a page of an image is."""

    NONE = 0
    """Never touched."""
    ZERO = 1
    DATA = 2
    BAD = 3
    """Lost: hardware poison."""


class ImageWriter:
    """Writes an image of ``pages`` host virtual pages; `finish` makes it one. OSError as from the file system."""

    def __init__(self, path: Path, pages: int) -> None:
        """Create the file, or overwrite it."""
        self.path = path
        self._map = np.zeros(pages, MAP_DTYPE)
        self._places = 0
        self._sections: list[list[Any]] = []
        self._at = HEADER_BYTES
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            self._file = os.fdopen(fd, "wb")
        except BaseException:
            os.close(fd)
            raise
        try:
            self._file.write(bytes(HEADER_BYTES))
        except BaseException:
            self._file.close()
            raise

    @property
    def places(self) -> int:
        """Pages with contents so far."""
        return self._places

    def add_page(self, hvp: int, content: Content, data: bytes) -> None:
        """One page; ``data``: 4096 bytes if it has contents. All pages come before any section."""
        assert not self._sections
        self._map[hvp] = (content, self._places, xxhash.xxh3_64_intdigest(data))
        if content is Content.DATA:
            assert len(data) == PAGE_SIZE
            self._file.write(data)
            self._places += 1
            self._at += PAGE_SIZE

    def add_section(self, name: str, data: bytes | memoryview) -> None:
        """A block of bytes."""
        size = len(data)
        self._sections.append([name, self._at, size, xxhash.xxh3_64_intdigest(data)])
        self._file.write(data)
        self._at += size

    def finish(self, meta: Mapping[str, Any]) -> None:
        """Map, meta and header; then the file is an image."""
        table = self._map.tobytes()
        body = msgpack.packb({**meta, "sections": self._sections})
        map_at, meta_at = self._at, self._at + len(table)
        self._file.write(table)
        self._file.write(body)
        sums = xxhash.xxh3_64_intdigest(table), xxhash.xxh3_64_intdigest(body)
        head = HEADER.pack(
            MAGIC, VERSION, PAGE_SIZE, len(self._map), self._places, map_at, sums[0], meta_at, len(body), sums[1], 0
        )[:-8]  # fmt: skip
        self._file.flush()
        self._file.seek(0)
        self._file.write(head + struct.pack("<Q", xxhash.xxh3_64_intdigest(head)))
        self._file.close()

    def close(self) -> None:
        """Let the file go, finished or not."""
        self._file.close()


class ImageReader:
    """An image whose header, map and meta are right. `page` and `section` check what they give out.

    ``meta``: as given to `ImageWriter.finish`; ``pages``: number of host virtual pages; ``places``: of those with contents. UserError,
    with what is wrong where, for a file that is not an image.
    """

    def __init__(self, path: Path) -> None:
        """Open and check."""
        self.path = path
        try:
            self._file = path.open("rb", buffering=0)
        except OSError as error:
            raise self._unreadable(error) from error
        try:
            self._size = self._size_of()
            self._check()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        """As a context it is closed at the end."""
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let the file go."""
        self._file.close()

    def page(self, hvp: int) -> tuple[Content, bytes]:
        """(what it is, its 4096 bytes or none). UserError when the bytes are not those that were saved."""
        content, place, xxh3 = self._map[hvp].tolist()
        if content != Content.DATA:
            return Content(content), b""
        data = self._read(HEADER_BYTES + place * PAGE_SIZE, PAGE_SIZE, f"page {hvp}")
        self._compare(data, xxh3, f"page {hvp}")
        return Content.DATA, data

    def section(self, name: str) -> bytes:
        """A block of bytes. UserError when there is none of that name, or it is damaged."""
        for found, offset, size, xxh3 in self.meta["sections"]:
            if found == name:
                data = self._read(offset, size, f"section {name}")
                self._compare(data, xxh3, f"section {name}")
                return data
        raise self._bad(f"no section {name}")

    def check_pages(self) -> None:
        """Read every page once. UserError at the first that is damaged."""
        for hvp in np.flatnonzero(self._map["content"] == Content.DATA).tolist():
            self.page(hvp)

    # -- parts ---------------------------------------------------------------------------------------------
    def _check(self) -> None:
        head = self._read(0, HEADER.size, "header")
        magic, version, page_bytes, pages, places, map_at, map_sum, meta_at, meta_bytes, meta_sum, own = (
            HEADER.unpack(head)
        )
        if magic != MAGIC:
            raise self._bad("not an image, or not complete", found=magic)
        if version != VERSION:
            raise UserError(
                "an image of another version",
                where=str(self.path),
                found=version,
                allowed=f"version {VERSION}",
            )
        self._compare(head[:-8], own, "header")
        self.pages, self.places = pages, places
        if page_bytes != PAGE_SIZE or meta_bytes > META_BYTES_MAX:
            raise self._bad("header: sizes that no writer writes", found=(page_bytes, meta_bytes))
        table = self._read(map_at, pages * MAP_DTYPE.itemsize, "map")
        self._compare(table, map_sum, "map")
        self._map = np.frombuffer(table, MAP_DTYPE)
        full = self._map["content"] == Content.DATA
        if (
            self._map["content"].max(initial=0) > max(Content)
            or (full & (self._map["place"] >= places)).any()
        ):
            raise self._bad("map: entries that no writer writes")
        body = self._read(meta_at, meta_bytes, "meta")
        self._compare(body, meta_sum, "meta")
        self.meta = self._unpacked(body)

    def _unpacked(self, body: bytes) -> dict[str, Any]:
        try:
            meta = msgpack.unpackb(body, max_array_len=LIST_MAX, max_map_len=LIST_MAX, max_ext_len=0)
        except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
            raise self._bad("meta: not msgpack") from error
        if not isinstance(meta, dict) or not isinstance(meta.get("sections"), list):
            raise self._bad("meta: no table with sections")
        for entry in meta["sections"]:
            kinds = [type(value) for value in entry] if isinstance(entry, list) else []
            if (
                kinds != [str, int, int, int]
                or min(entry[1:]) < 0
                or len(meta["sections"]) > SECTION_NAMES_MAX
            ):
                raise self._bad("meta: a bad entry of the directory of sections", found=entry)
        return meta

    def _read(self, offset: int, size: int, what: str) -> bytes:
        if offset + size > self._size:
            raise self._bad(
                f"{what}: the file ends before it", found=f"{self._size} bytes, {offset + size} needed"
            )
        data = self._pread(offset, size)
        while len(data) < size:
            more = self._pread(offset + len(data), size - len(data))
            if not more:
                raise self._bad(f"{what}: the file ends before it")
            data += more
        return data

    def _pread(self, offset: int, size: int) -> bytes:
        try:
            return os.pread(self._file.fileno(), size, offset)
        except OSError as error:
            raise self._unreadable(error) from error

    def _size_of(self) -> int:
        try:
            return os.fstat(self._file.fileno()).st_size
        except OSError as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: OSError) -> UserError:
        return UserError("the image cannot be read", where=str(self.path), found=error.strerror)

    def _compare(self, data: bytes, xxh3: int, what: str) -> None:
        if xxhash.xxh3_64_intdigest(data) != xxh3:
            raise self._bad(f"{what}: damaged, its bytes are not those that were saved")

    def _bad(self, text: str, found: object = None) -> UserError:
        return UserError(text, where=str(self.path), found=found, allowed=ALLOWED)
