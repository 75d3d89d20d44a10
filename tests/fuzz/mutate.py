"""Valid inputs made hostile, for hypothesis: flipped bytes, cuts, splices, length fields at their extremes, words that are none."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Final

from hypothesis import strategies as st

EXTREMES: Final = (
    0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x1_0000, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 53) + 1, (1 << 58) - 1,
    1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 4096, (1 << 64) - 2, (1 << 64) - 1,
)  # fmt: skip
WORDS: Final = (
    b"9" * 5000, b"0x" + b"f" * 40, b"-1", b"1e400", b"-1e308", b"nan", b"NaN", b"inf", b"-Infinity", b"true", b'""', b"[]", b"{}", b"[[]]",
    b"[" * 3000, b"{a=" * 400, b'"\\ud800"', b"\x00", b"\xff\xfe", b"1_0", b"0b1", b"1979-05-27T07:32:00Z", b"\xe2\x80\xa8", b"\n", b"=",
    b".0.", b"\xd9\xa3", b"18446744073709551616", b'"' + b"a" * 300 + b'"', b'"' + b"a" * 3000 + b'"', b"'''", b"\\u0000", b"../../",
    b"-0.0",
)  # fmt: skip

_EITHER: Final = st.booleans()

Change = Callable[[bytes, st.DataObject], bytes]


def _at(data: bytes, draw: st.DataObject) -> int:
    return draw.draw(st.integers(0, len(data)))


def flip(data: bytes, draw: st.DataObject) -> bytes:
    """One byte."""
    if not data:
        return data
    at = draw.draw(st.integers(0, len(data) - 1))
    return data[:at] + bytes([draw.draw(st.integers(0, 255))]) + data[at + 1 :]


def cut(data: bytes, draw: st.DataObject) -> bytes:
    """Only the beginning."""
    return data[: _at(data, draw)]


def leave_out(data: bytes, draw: st.DataObject) -> bytes:
    """A piece is missing."""
    first, last = sorted((_at(data, draw), _at(data, draw)))
    return data[:first] + data[last:]


def twice(data: bytes, draw: st.DataObject) -> bytes:
    """A piece comes again somewhere else."""
    first, last = sorted((_at(data, draw), _at(data, draw)))
    at = _at(data, draw)
    return data[:at] + data[first:last] + data[at:]


def extreme(data: bytes, draw: st.DataObject) -> bytes:
    """A number of 1 to 8 bytes, of either byte order, mostly where numbers are."""
    code = draw.draw(st.sampled_from("BHIQ"))
    width = struct.calcsize(code)
    value = draw.draw(st.sampled_from(EXTREMES)) & ((1 << 8 * width) - 1)
    raw = struct.pack(draw.draw(st.sampled_from("<>")) + code, value)
    places = max(0, len(data) - width)
    at = draw.draw(st.integers(0, min(places, 700)) | st.integers(0, places))
    at -= at % draw.draw(st.sampled_from((1, width)))
    return data[:at] + raw + data[at + width :]


def word(data: bytes, draw: st.DataObject) -> bytes:
    """In place of what stands behind an equals sign, a colon or a blank, or anywhere."""
    new = draw.draw(st.sampled_from(WORDS))
    starts = [i + 1 for i, byte in enumerate(data) if byte in b"= :"]
    at = draw.draw(st.sampled_from(starts)) if starts else 0
    if not starts or draw.draw(_EITHER):
        at = _at(data, draw)
    end = at
    while end < len(data) and data[end] not in b"\n,}] ":
        end += 1
    return data[:at] + new + data[end if draw.draw(_EITHER) else at :]


BINARY: Final = (flip, cut, leave_out, twice, extreme, extreme)
TEXT: Final = (flip, cut, leave_out, twice, word, word)
CHANGES_MAX: Final = 3


@st.composite
def hostile(draw: st.DrawFn, seeds: list[bytes], text: bool) -> bytes:
    """A seed with up to three changes; now and then the ends of two seeds, or anything."""
    kind = draw(st.integers(0, 9))
    if kind == 0:
        return draw(st.binary(max_size=300))
    data = draw(st.sampled_from(seeds))
    source = draw(st.data())
    if kind == 1:
        other = draw(st.sampled_from(seeds))
        return data[: _at(data, source)] + other[_at(other, source) :]
    for _ in range(draw(st.integers(1, CHANGES_MAX))):
        data = draw(st.sampled_from(TEXT if text else BINARY))(data, source)
    return data
