"""Codec: round trips, every kind of refusal, and the contract page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proto import wire
from proto.wire import SPECS, Kind, Nack, WireError
from proto.wire_page import SENDERS, with_tables

ROOT = Path(__file__).parents[2]
BITS = {"B": 8, "H": 16, "I": 32, "Q": 64}


def example(kind: Kind) -> Any:
    spec = SPECS[kind]
    values: list[Any] = [
        wire.LAMPORT_MAX if name == "lamport" else (1 << BITS[w]) - 1
        for name, w in zip(spec.cls._fields, spec.ints, strict=False)
    ]
    if spec.tail == "text":
        values.append("why")
    elif spec.tail is not None:
        values.append(np.zeros(3, spec.tail))
    return spec.cls(*values)


def same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("kind", list(Kind))
def test_round_trip_of_every_kind_at_its_largest(kind: Kind) -> None:
    message = example(kind)
    assert same(wire.decode(wire.encode(message)), message)
    assert kind in SENDERS


@pytest.mark.parametrize("kind", list(Kind))
def test_every_integer_field_is_checked(kind: Kind) -> None:
    parts = list(msgpack.unpackb(wire.encode(example(kind))))
    for position, width in enumerate(SPECS[kind].ints, start=2):
        for bad in ((1 << BITS[width]) if width != "Q" else -1, -1, 1.5, "1", None, b"1", [1]):
            changed = list(parts)
            changed[position] = bad
            with pytest.raises(WireError) as caught:
                wire.decode(msgpack.packb(changed))
            assert caught.value.code is Nack.FIELD
            assert caught.value.kind == kind


@pytest.mark.parametrize("kind", [kind for kind in Kind if "lamport" in SPECS[kind].cls._fields])
def test_a_counter_leaves_room_for_those_of_its_receiver(kind: Kind) -> None:
    beyond = example(kind)._replace(lamport=wire.LAMPORT_MAX + 1)
    with pytest.raises(WireError) as caught:
        wire.decode(wire.encode(beyond))
    assert (caught.value.code, caught.value.kind) == (Nack.FIELD, kind)


@pytest.mark.parametrize("kind", list(Kind))
def test_missing_and_extra_fields(kind: Kind) -> None:
    parts = list(msgpack.unpackb(wire.encode(example(kind))))
    for changed in (parts[:-1], [*parts, 0]):
        with pytest.raises(WireError):
            wire.decode(msgpack.packb(changed))


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b"", Nack.MALFORMED),
        (b"\xc1", Nack.MALFORMED),
        (msgpack.packb(7), Nack.MALFORMED),
        (msgpack.packb([]), Nack.MALFORMED),
        (msgpack.packb([1]), Nack.MALFORMED),
        (msgpack.packb(["1", 1]), Nack.MALFORMED),
        (msgpack.packb([2, 1, 0, 0, 0, 0]), Nack.VERSION),
        (msgpack.packb([1, 99]), Nack.UNKNOWN_KIND),
        (msgpack.packb([1, -1]), Nack.UNKNOWN_KIND),
        (msgpack.packb([1, 1 << 63]), Nack.UNKNOWN_KIND),
        (b"\x00" * (wire.MESSAGE_BYTES_MAX + 1), Nack.OVERSIZED),
        (b"\xdd\xff\xff\xff\xff", Nack.MALFORMED),
        (b"\x91" * 2000, Nack.MALFORMED),
        (msgpack.packb({1: 2}), Nack.MALFORMED),
    ],
)
def test_refusals(raw: bytes, code: Nack) -> None:
    with pytest.raises(WireError) as caught:
        wire.decode(raw)
    assert caught.value.code is code


@pytest.mark.parametrize("size", [0, 1, 23, 25, 24 * (wire.BATCH_MAX + 1)])
def test_batches_of_a_wrong_size(size: int) -> None:
    with pytest.raises(WireError):
        wire.decode(msgpack.packb([1, Kind.IO, 0, 0, b"\0" * size]))


def test_long_text_is_refused() -> None:
    with pytest.raises(WireError):
        wire.decode(msgpack.packb([1, Kind.FAILED, "x" * (wire.TEXT_MAX + 1)]))


@settings(deadline=None, max_examples=400)
@given(st.binary(max_size=300))
def test_no_bytes_raise_anything_but_wire_error(raw: bytes) -> None:
    try:
        wire.decode(raw)
    except WireError:
        return


msgpack_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats()
    | st.text()
    | st.binary(),
    lambda inner: st.lists(inner, max_size=20) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=40,
)


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(list(Kind)), st.lists(msgpack_values, max_size=20))
def test_no_well_formed_msgpack_raises_anything_else_either(kind: Kind, fields: list[Any]) -> None:
    try:
        message = wire.decode(msgpack.packb([1, kind, *fields]))
    except WireError:
        return
    assert type(message) is SPECS[kind].cls


@given(st.lists(st.integers(1, 255), max_size=4))
def test_vectors_pack_and_unpack(vectors: list[int]) -> None:
    assert wire.unpack_vectors(wire.pack_vectors(vectors)) == vectors


def test_the_contract_page_is_the_code() -> None:
    page = (ROOT / "docs" / "wire.md").read_text()
    assert with_tables(page) == page, "run: python -m proto.wire_page docs/wire.md"
