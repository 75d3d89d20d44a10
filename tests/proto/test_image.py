"""The image file: round trip, and every way in which a file can be no image."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import msgpack
import pytest
import xxhash

from proto.errors import UserError
from proto.image import HEADER, HEADER_BYTES, MAP_DTYPE, Content, ImageReader, ImageWriter
from proto.units import PAGE_SIZE

PAGES = [
    (Content.NONE, b""),
    (Content.DATA, b"\x01" * PAGE_SIZE),
    (Content.ZERO, b""),
    (Content.BAD, b""),
    (Content.DATA, bytes(range(256)) * 16),
]
META = {"identity": {"vm": [1, 2]}, "elapsed_ns": 7, "words": [(1 << 64) - 1]}
SECTION = b"kernel" * 100


def written(path: Path, *, order: tuple[int, ...] = (4, 0, 1, 3, 2)) -> Path:
    image = ImageWriter(path, len(PAGES))
    for hvp in order:
        image.add_page(hvp, *PAGES[hvp])
    assert image.places == 2
    image.add_section("kernel-0", SECTION)
    image.add_section("empty", b"")
    image.finish(META)
    return path


def test_round_trip_in_any_order_of_the_pages(tmp_path: Path) -> None:
    for order in ((0, 1, 2, 3, 4), (4, 0, 1, 3, 2)):
        with ImageReader(written(tmp_path / "image", order=order)) as image:
            assert [image.page(hvp) for hvp in range(len(PAGES))] == PAGES
            assert image.section("kernel-0") == SECTION
            assert image.section("empty") == b""
            assert {key: image.meta[key] for key in META} == META
            assert (image.pages, image.places) == (5, 2)
            image.check_pages()
    assert (tmp_path / "image").stat().st_mode & 0o777 == 0o600


def test_an_unfinished_file_is_no_image(tmp_path: Path) -> None:
    image = ImageWriter(tmp_path / "image", 1)
    image.add_page(0, *PAGES[1])
    image.close()
    with pytest.raises(UserError, match="not an image, or not complete"):
        ImageReader(tmp_path / "image")


def flip(offset: int) -> Callable[[bytearray], None]:
    def change(raw: bytearray) -> None:
        raw[offset] ^= 1

    return change


def cut(size: int) -> Callable[[bytearray], None]:
    def change(raw: bytearray) -> None:
        del raw[size:]

    return change


PAGES_END = HEADER_BYTES + 2 * PAGE_SIZE
MAP_AT = PAGES_END + len(SECTION)
META_AT = MAP_AT + len(PAGES) * MAP_DTYPE.itemsize


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda raw: raw.clear(), "header: the file ends before it"),
        (flip(0), "not an image, or not complete"),
        (flip(8), "an image of another version"),
        (flip(20), "header: damaged"),
        (flip(MAP_AT), "map: damaged"),
        (flip(META_AT + 1), "meta: damaged"),
        (cut(META_AT + 1), "meta: the file ends before it"),
        (cut(MAP_AT), "map: the file ends before it"),
        (cut(PAGES_END), "map: the file ends before it"),
    ],
)
def test_a_damaged_file_is_refused_when_it_is_opened(
    tmp_path: Path, change: Callable[[bytearray], None], says: str
) -> None:
    path = written(tmp_path / "image")
    raw = bytearray(path.read_bytes())
    change(raw)
    path.write_bytes(raw)
    with pytest.raises(UserError, match=says) as caught:
        ImageReader(path)
    assert caught.value.where == str(path)


def test_a_damaged_page_or_section_is_refused_when_it_is_read(tmp_path: Path) -> None:
    path = written(tmp_path / "image")
    raw = bytearray(path.read_bytes())
    raw[HEADER_BYTES + 17] ^= 1
    raw[PAGES_END + 3] ^= 1
    path.write_bytes(raw)
    with ImageReader(path) as image:
        assert image.page(1) == PAGES[1]
        with pytest.raises(UserError, match="page 4: damaged"):
            image.page(4)
        with pytest.raises(UserError, match="page 4: damaged"):
            image.check_pages()
        with pytest.raises(UserError, match="section kernel-0: damaged"):
            image.section("kernel-0")
        with pytest.raises(UserError, match="no section other"):
            image.section("other")


def forged(path: Path, meta: object, entries: list[tuple[int, int, int]]) -> Path:
    """A file with right sums and wrong contents."""
    table = b"".join(struct.pack("<IIQ", *entry) for entry in entries)
    body = msgpack.packb(meta)
    head = HEADER.pack(
        b"\x89APFVM\r\n", 1, PAGE_SIZE, len(entries), 1, HEADER_BYTES + PAGE_SIZE, xxhash.xxh3_64_intdigest(table),
        HEADER_BYTES + PAGE_SIZE + len(table), len(body), xxhash.xxh3_64_intdigest(body), 0,
    )[:-8]  # fmt: skip
    head += struct.pack("<Q", xxhash.xxh3_64_intdigest(head))
    path.write_bytes(head.ljust(HEADER_BYTES, b"\0") + bytes(PAGE_SIZE) + table + body)
    return path


GOOD_ENTRY = (Content.DATA, 0, xxhash.xxh3_64_intdigest(bytes(PAGE_SIZE)))


@pytest.mark.parametrize(
    ("meta", "entries", "says"),
    [
        ([], [GOOD_ENTRY], "no table with sections"),
        ({}, [GOOD_ENTRY], "no table with sections"),
        ({"sections": [7]}, [GOOD_ENTRY], "bad entry of the directory"),
        ({"sections": [["a", -1, 1, 1]]}, [GOOD_ENTRY], "bad entry of the directory"),
        ({"sections": [["a", 1, 1]]}, [GOOD_ENTRY], "bad entry of the directory"),
        ({"sections": []}, [(4, 0, 0)], "map: entries that no writer writes"),
        ({"sections": []}, [(Content.DATA, 1, 0)], "map: entries that no writer writes"),
    ],
)
def test_right_sums_do_not_help_wrong_contents(
    tmp_path: Path, meta: object, entries: list[tuple[int, int, int]], says: str
) -> None:
    with pytest.raises(UserError, match=says):
        ImageReader(forged(tmp_path / "image", meta, entries))


def test_a_section_beyond_the_file(tmp_path: Path) -> None:
    path = forged(tmp_path / "image", {"sections": [["far", 1 << 60, 8, 0]]}, [GOOD_ENTRY])
    with ImageReader(path) as image, pytest.raises(UserError, match="section far: the file ends before it"):
        image.section("far")


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        ImageReader(tmp_path / "none")
