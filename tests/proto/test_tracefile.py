"""The trace file: what is written is read back, and nothing else is accepted."""

from __future__ import annotations

import json
import lzma
import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from proto import tracefile
from proto.errors import UserError
from proto.tracefile import CHECK, FIXED, expand_into, load_trace, open_trace, views
from proto.tracewriter import FILTERS, TraceWriter

TRACES = Path(__file__).resolve().parents[2] / "traces"
SHIPPED = ("sort", "sqlite")

U64 = npt.NDArray[np.uint64]
Bools = npt.NDArray[np.bool_]

FIELDS = (
    "magic",
    "version",
    "text_bytes",
    "accesses",
    "reads",
    "writes",
    "pages",
    "vpns_stored",
    "accesses_stored",
    "vpns_xxh3",
    "accesses_xxh3",
)
TEXT = json.dumps({"command": ["true"], "tool": "t", "recorded": "r", "ended": "e"}).encode()


def write(path: Path, words: U64, is_write: Bools, cuts: tuple[int, ...] = ()) -> None:
    with TraceWriter(path, command=["prog", "ü\udcff"], tool="tool 1", recorded="today") as writer:
        for part, flags in zip(np.split(words, cuts), np.split(is_write, cuts), strict=True):
            assert writer.append(part, flags) == len(part)
        writer.finish("exit status 0")


def sample(path: Path) -> None:
    words = np.array([512 * 7 + 1, 512 * 3, 512 * 7 + 511, 512 * 9] * 50, np.uint64)
    write(path, words, np.arange(len(words)) % 3 == 0)


def forge(path: Path, vpns: list[int], accesses: list[int], /, text: bytes = TEXT, **lies: Any) -> None:
    """A file with right sizes and checksums over whatever contents; ``lies`` replace header fields."""
    raw = (np.array(vpns, "<u8").tobytes(), np.array(accesses, "<u4").tobytes())
    stored = [lzma.compress(part, lzma.FORMAT_XZ, lzma.CHECK_NONE, filters=FILTERS) for part in raw]
    stored = [lies.pop("vpns_data", stored[0]), lies.pop("accesses_data", stored[1])]
    writes = sum(access & 1 for access in accesses)
    sums = [xxhash.xxh3_64_intdigest(part) for part in raw]
    sizes = [len(part) for part in stored]
    counts = [len(accesses), len(accesses) - writes, writes, len(vpns)]
    honest = [tracefile.MAGIC, tracefile.VERSION, len(text), *counts, *sizes, *sums]
    fields = dict(zip(FIELDS, honest, strict=True)) | lies
    header = FIXED.pack(*(fields[name] for name in FIELDS)) + text
    path.write_bytes(header + CHECK.pack(xxhash.xxh3_64_intdigest(header)) + b"".join(stored))


def refused(path: Path, match: str) -> None:
    with pytest.raises(UserError, match=match) as caught:
        load_trace(path)
    assert str(path) in str(caught.value)


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_round_trip_of_any_accesses_in_any_pieces(data: st.DataObject, tmp_path_factory: Any) -> None:
    word = st.one_of(st.integers(0, 2**61 - 1), st.integers(0, 4096))
    accesses = data.draw(st.lists(st.tuples(word, st.booleans()), min_size=1, max_size=200))
    cuts = tuple(sorted(data.draw(st.lists(st.integers(0, len(accesses)), max_size=4))))
    words = np.array([a for a, _ in accesses], np.uint64)
    is_write = np.array([w for _, w in accesses], np.bool_)
    path = tmp_path_factory.mktemp("trace") / "t.apft"
    write(path, words, is_write, cuts)
    info, vpns, packed = load_trace(path)
    assert list(vpns) == list(dict.fromkeys(int(word) >> 9 for word in words))
    assert np.array_equal(
        (vpns[packed >> 10] << np.uint64(9)) | ((packed >> 1) & 511).astype(np.uint64), words
    )
    assert np.array_equal((packed & 1).astype(np.bool_), is_write)
    assert (info.accesses, info.writes, info.pages) == (len(words), is_write.sum(), len(vpns))
    assert info.command == ("prog", "ü\udcff")
    assert (info.tool, info.recorded, info.ended) == ("tool 1", "today", "exit status 0")


def test_expands_into_a_memfd(tmp_path: Path) -> None:
    path = tmp_path / "t.apft"
    sample(path)
    info = open_trace(path)
    descriptor = os.memfd_create("trace")
    try:
        os.ftruncate(descriptor, 4096)
        with mmap.mmap(descriptor, 4096) as memory:
            expand_into(path, memory)
            got = [array.copy() for array in views(memory, info)]
    finally:
        os.close(descriptor)
    _, vpns, accesses = load_trace(path)
    assert np.array_equal(got[0], vpns)
    assert np.array_equal(got[1], accesses)
    with pytest.raises(UserError, match="too small"):
        expand_into(path, bytearray(info.expanded_bytes - 1))


def test_a_trace_longer_than_one_block_of_every_kind(tmp_path: Path) -> None:
    path = tmp_path / "t.apft"
    words = np.random.default_rng(1).integers(0, 512 * 300_000, 600_000).astype(np.uint64)
    write(path, words, words % np.uint64(2) == 0, (200_000, 400_000))
    info, vpns, packed = load_trace(path)
    assert np.array_equal(vpns[packed >> 10], words >> np.uint64(9))
    assert info.expanded_bytes > 2 * tracefile.CHUNK_BYTES


def test_the_most_compressible_trace_is_not_taken_for_a_lie(tmp_path: Path) -> None:
    path = tmp_path / "t.apft"
    write(path, np.zeros(4_000_000, np.uint64), np.zeros(4_000_000, np.bool_))
    assert load_trace(path)[0].accesses == 4_000_000


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    whole = tmp_path / "whole.apft"
    sample(whole)
    data = whole.read_bytes()
    cut = tmp_path / "cut.apft"
    for size in range(len(data)):
        cut.write_bytes(data[:size])
        with pytest.raises(UserError, match="truncated" if size >= 8 else "not an asyncpf trace"):
            open_trace(cut)
    cut.write_bytes(data + b"\0")
    refused(cut, "data behind the end")


def test_every_flipped_bit_is_refused(tmp_path: Path) -> None:
    whole = tmp_path / "whole.apft"
    sample(whole)
    data = whole.read_bytes()
    path = tmp_path / "flipped.apft"
    vpns, accesses = (array.tobytes() for array in load_trace(whole)[1:])
    for at in range(len(data)):
        flipped = bytearray(data)
        flipped[at] ^= 1 << (at % 8)
        path.write_bytes(flipped)
        try:
            _, got_vpns, got_accesses = load_trace(path)
        except UserError:
            continue
        # The xz container has reserved bytes that carry nothing; the contents must then be the same.
        assert (got_vpns.tobytes(), got_accesses.tobytes()) == (vpns, accesses), at


@pytest.mark.parametrize("data", [b"", b"\0" * 500, b"\xfd7zXZ\0" * 90, b"#!/bin/sh\n" * 50])
def test_foreign_files_are_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "foreign.apft"
    path.write_bytes(data)
    refused(path, "not an asyncpf trace")


def test_missing_file_and_folder_are_refused(tmp_path: Path) -> None:
    refused(tmp_path / "none.apft", "cannot open")
    refused(tmp_path, "cannot open")
    with pytest.raises(UserError, match="cannot write"):
        TraceWriter(tmp_path / "none" / "t.apft", command=["x"], tool="")


def test_the_forger_makes_good_files(tmp_path: Path) -> None:
    path = tmp_path / "t.apft"
    forge(path, [5, 4], [0, 1, 1 << 10])
    info, vpns, accesses = load_trace(path)
    assert (info.reads, info.writes, list(vpns), list(accesses)) == (2, 1, [5, 4], [0, 1, 1024])


@pytest.mark.parametrize(
    ("lies", "match"),
    [
        ({"version": 2}, "unknown version"),
        ({"text_bytes": 2**21}, "text_bytes: too large"),
        ({"text_bytes": len(TEXT) - 1}, "size"),
        ({"accesses": 0, "reads": 0, "writes": 0}, "accesses: out of range"),
        ({"accesses": 2**32 + 1, "reads": 2**32}, "accesses: out of range"),
        ({"accesses": 2**32, "reads": 2**32 - 1}, "cannot expand"),
        ({"accesses": 2**63, "reads": 2**63 - 1}, "accesses: out of range"),
        ({"reads": 3}, "do not add up"),
        ({"reads": 1, "writes": 2}, "writes: wrong count"),
        ({"pages": 0}, "pages: out of range"),
        ({"pages": 4}, "pages: out of range"),
        ({"pages": 1}, "more than the header says"),
        ({"pages": 3}, "another size"),
        ({"accesses": 4, "reads": 3}, "another size"),
        ({"accesses": 2, "reads": 1}, "more than the header says"),
        ({"vpns_xxh3": 1}, "vpns: checksum mismatch"),
        ({"accesses_xxh3": 1}, "accesses: checksum mismatch"),
        ({"vpns_stored": 2**63}, "truncated"),
        ({"accesses_data": b""}, "ends early"),
        ({"accesses_data": b"rubbish" * 9}, "damaged"),
    ],
)
def test_lying_headers_are_refused(tmp_path: Path, lies: dict[str, Any], match: str) -> None:
    path = tmp_path / "t.apft"
    forge(path, [5, 4], [0, 1, 1 << 10], **lies)
    refused(path, match)


@pytest.mark.parametrize(
    ("vpns", "accesses", "match"),
    [
        ([5, 4], [0, 2 << 10], "page index out of range"),
        ([5, 4], [0, 0xFFFFFFFF], "page index out of range"),
        ([5, 4], [1 << 10, 0], "order of first touch"),
        ([5, 4, 3], [0, 2 << 10, 1 << 10], "order of first touch"),
        ([5, 4], [0, 0], "never touched"),
        ([5, 5], [0, 1 << 10], "occurs twice"),
        ([2**52], [0], "page number out of range"),
    ],
)
def test_wrong_contents_under_right_checksums_are_refused(
    tmp_path: Path, vpns: list[int], accesses: list[int], match: str
) -> None:
    path = tmp_path / "t.apft"
    forge(path, vpns, accesses)
    refused(path, match)


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"{}", b"\xff", b"[" * 5000, TEXT.replace(b'["true"]', b"[1]")]
)
def test_wrong_texts_are_refused(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "t.apft"
    forge(path, [5], [0], text=text)
    refused(path, "unreadable text|wrong")


def test_data_behind_a_compressed_section_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.apft"
    stored = lzma.compress(np.array([0], "<u4").tobytes(), lzma.FORMAT_XZ, lzma.CHECK_NONE, filters=FILTERS)
    forge(path, [5], [0], accesses_data=stored + stored)
    refused(path, "another size")


def test_the_limits_of_the_format_cut_a_recording_and_leave_a_valid_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracefile, "PAGES_MAX", 3)
    path = tmp_path / "t.apft"
    words = np.array([0, 512, 0, 1024, 512, 2048, 0], np.uint64)
    with TraceWriter(path, command=["x"], tool="") as writer:
        assert writer.append(words, np.zeros(7, np.bool_)) == 5
        assert writer.append(words[5:], np.zeros(2, np.bool_)) == 0
        monkeypatch.setattr(tracefile, "ACCESSES_MAX", 6)
        assert writer.append(words[:3], np.ones(3, np.bool_)) == 1
        writer.finish("limit")
    info, _, accesses = load_trace(path)
    assert (info.pages, info.writes, [int(a) >> 10 for a in accesses]) == (3, 1, [0, 1, 0, 2, 1, 0])


def test_nothing_is_left_by_an_empty_or_unfinished_recording(tmp_path: Path) -> None:
    path = tmp_path / "t.apft"
    path.write_bytes(b"old")
    with (
        TraceWriter(path, command=["x"], tool="") as writer,
        pytest.raises(UserError, match="would be empty"),
    ):
        writer.finish("exit status 0")
    with TraceWriter(path, command=["x"], tool="") as writer:
        writer.append(np.zeros(5, np.uint64), np.zeros(5, np.bool_))
    assert [entry.name for entry in tmp_path.iterdir()] == ["t.apft"]
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_traces_are_whole_and_large_enough(name: str) -> None:
    info, _, _ = load_trace(TRACES / f"{name}.apft")
    assert info.accesses >= 1_000_000
    assert info.pages >= 1500
    assert info.file_bytes <= 2_000_000
    assert info.ended == "exit status 0"
    assert f"{info.accesses:,}" in (TRACES / "README.md").read_text()
