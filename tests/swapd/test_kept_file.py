"""A swap file with a name: what it says of itself, and whose files are left alone."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swapd import kept_file
from swapd.kept_file import Header, open_kept
from swapd.swapfile import SwapFileError

BLOCK = 4096
SLOTS = 16
BOOT = "01234567-89ab-cdef-0123-456789abcdef"


@pytest.fixture
def path(disk: Path) -> Path:
    return disk / "swap"


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return tmp_path


def make(path: Path, slots: int = SLOTS) -> kept_file.KeptFile:
    return open_kept(path, slots, allow_tmpfs=True)


def test_a_new_file_is_private_and_has_room_for_its_header(path: Path) -> None:
    kept = make(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.stat().st_size == (SLOTS + 1) * BLOCK == kept.file.size_bytes
    header = kept.header()
    assert header is not None
    assert (header.epoch, header.session, header.slots) == (0, 0, SLOTS)
    kept.fence()
    assert kept.header() == header
    kept.close()


def test_epochs_rise_and_contents_last_as_long_as_their_session(path: Path) -> None:
    kept = make(path)
    first = kept.next_epoch(keep_session=True)
    assert first.epoch == 1
    kept.put(dataclasses.replace(first, session=7))
    kept.close()
    kept = make(path, 0)
    second = kept.next_epoch(keep_session=True)
    assert (second.epoch, second.session, second.file) == (2, 7, first.file)
    third = kept.next_epoch(keep_session=False)
    assert (third.epoch, third.session) == (3, 0)
    assert third.file != first.file
    kept.close()


def test_contents_do_not_outlive_the_machine(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = make(path)
    first = dataclasses.replace(kept.next_epoch(keep_session=True), session=7)
    kept.put(first)
    monkeypatch.setattr(kept_file, "_boot", lambda: BOOT)
    after = kept.next_epoch(keep_session=True)
    assert after.file != first.file
    assert after.session == 0
    kept.close()


def test_the_header_does_not_touch_the_last_slot(path: Path) -> None:
    kept = make(path)
    kept.close()
    page = bytes(range(256)) * 16
    with path.open("r+b") as file:
        file.seek((SLOTS - 1) * BLOCK)
        file.write(page)
    kept = make(path)
    kept.next_epoch(keep_session=True)
    kept.fence()
    kept.close()
    assert path.read_bytes()[(SLOTS - 1) * BLOCK : SLOTS * BLOCK] == page


def test_a_fence_that_was_cut_short_is_made_up_for(path: Path) -> None:
    make(path).close()
    os.truncate(path, (SLOTS + 2) * BLOCK)
    kept = make(path, 0)
    assert path.stat().st_size == (SLOTS + 1) * BLOCK
    assert kept.file.slots == SLOTS
    kept.close()


@pytest.mark.parametrize("data", [b"x", b"\0" * 8 * BLOCK, b"private" * BLOCK])
def test_a_file_of_somebody_else_is_not_touched(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    with pytest.raises(SwapFileError, match="no swap file of ours"):
        make(path)
    assert path.read_bytes() == data


def test_what_is_no_file_is_refused(disk: Path) -> None:
    target = disk / "target"
    target.write_bytes(b"precious")
    (disk / "link").symlink_to(target)
    os.mkfifo(disk / "pipe")
    for name in ("link", "pipe", "none/swap"):
        with pytest.raises(SwapFileError):
            make(disk / name)
    assert target.read_bytes() == b"precious"


def test_another_size_is_refused(path: Path) -> None:
    make(path).close()
    with pytest.raises(SwapFileError, match="16 slots, 17 were asked for"):
        make(path, SLOTS + 1)


def test_two_supervisors_cannot_have_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_file, "LOCK_WAIT_S", 0.1)
    kept = make(path)
    with pytest.raises(SwapFileError, match="in use"):
        make(path)
    kept.close()
    make(path).close()


def test_a_damaged_header_stops_the_next_start(path: Path) -> None:
    kept = make(path)
    with path.open("r+b") as file:
        file.seek(SLOTS * BLOCK + 10)
        file.write(b"\xff\xfe\xfd")
    assert kept.header() is None
    with pytest.raises(SwapFileError, match="damaged"):
        kept.next_epoch(keep_session=True)
    kept.close()


def test_a_header_survives_its_block() -> None:
    header = Header((1 << 64) - 1, (1 << 32) - 1, 5, 6, BOOT)
    assert Header.unpack(header.pack()) == header


@given(st.binary(max_size=2 * BLOCK))
def test_no_block_breaks_the_reader(data: bytes) -> None:
    assert Header.unpack(data) is None
    assert Header.unpack(data.ljust(BLOCK, b"\0")[:BLOCK]) is None


@given(at=st.integers(0, 87), bit=st.integers(0, 7))
def test_every_bit_of_a_header_counts(at: int, bit: int) -> None:
    block = bytearray(Header(1, 2, 3, 4, BOOT).pack())
    block[at % (kept_file._FIELDS.size + 8)] ^= 1 << bit
    assert Header.unpack(bytes(block)) is None
