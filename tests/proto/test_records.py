"""Records as plain values: what comes back is what went in, and nothing else comes back."""

from __future__ import annotations

from enum import IntEnum
from typing import Any, NamedTuple

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from host.logged import TYPES
from proto.machine import MachineError
from proto.records import RecordError, RecordTypes, show_value


class Colour(IntEnum):
    RED = 1
    BLUE = 2


class Inner(NamedTuple):
    number: int
    name: str


class Outer(NamedTuple):
    flag: bool
    colour: Colour
    inner: Inner
    maybe: Inner | None = None


class Other(NamedTuple):
    number: int


class Many(NamedTuple):
    pairs: tuple[tuple[int, Colour], ...]
    inner: tuple[Inner, ...] = ()
    data: bytes = b""
    state: dict[str, Any] = {}  # noqa: RUF012 - read only


SOME = RecordTypes((Outer, Other, Many), {"Other.number": Colour})
INNER = st.builds(Inner, st.integers(0, 2**64 - 1), st.text(max_size=5))
OUTER = st.builds(Outer, st.booleans(), st.sampled_from(Colour), INNER, st.none() | INNER)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 2**64 - 1) | st.text(max_size=3) | st.binary(max_size=3),
    lambda inner: st.lists(inner, max_size=5).map(tuple),
    max_leaves=12,
)


def packed(types: RecordTypes, record: Any) -> Any:
    return msgpack.unpackb(msgpack.packb(types.plain(record)), use_list=False)


@given(OUTER)
def test_a_record_comes_back_with_its_types(record: Outer) -> None:
    plain = packed(SOME, record)
    back = SOME.read(plain)
    assert back == record
    assert (type(back), type(back.colour), type(back.inner)) == (Outer, Colour, Inner)
    assert SOME.same(plain, record)


def test_tuples_bytes_and_plain_parts_come_back() -> None:
    record = Many(
        ((1, Colour.RED), (2, Colour.BLUE)), (Inner(1, "x"),), b"abc", {"msr": 5, "irr": [1, [2, {"a": []}]]}
    )
    back = SOME.read(packed(SOME, record))
    assert back == record
    assert SOME.same(packed(SOME, record), record)
    assert not SOME.same(packed(SOME, record), record._replace(state={"msr": 5, "irr": [1]}))
    assert (type(back.pairs[1][1]), type(back.inner[0])) == (Colour, Inner)
    assert SOME.show(back).startswith("Many(pairs=((1, RED), (2, BLUE)), inner=(Inner(")


@given(OUTER, OUTER)
def test_other_records_are_not_the_same(one: Outer, two: Outer) -> None:
    assert SOME.same(packed(SOME, one), two) == (one == two)
    assert not SOME.same(packed(SOME, Other(1)), one)


@given(PLAIN)
def test_whatever_is_no_record_is_refused(plain: Any) -> None:
    try:
        record = SOME.read(plain)
    except RecordError:
        assert not SOME.same(plain, Outer(True, Colour.RED, Inner(1, "")))
    else:
        assert packed(SOME, record) == plain


@pytest.mark.parametrize(
    "plain",
    [(), (0,), (3, (1,)), (-1, (1,)), (True, (1,)), (1, 1), (1, ()), (1, (1, 2)), (1, ("1",)), (0, (True, 3, (1, ""), None)),
     (2, ((1,), (), b"", {})), (2, (((1, 1, 1),), (), b"", {})), (2, (((1, 9),), (), b"", {})),
     (2, ((), (), "", {})), (2, ((), (), b"", 1))],
)  # fmt: skip
def test_each_way_to_be_no_record(plain: Any) -> None:
    with pytest.raises(RecordError):
        SOME.read(plain)


def test_shapes_name_every_type_once_those_with_numbers_first() -> None:
    shapes = dict(SOME.shapes())
    assert list(shapes) == ["Outer", "Other", "Many", "Inner"]
    assert shapes["Outer"] == ("flag", "colour", "inner", "maybe")


def test_a_record_for_people_leaves_out_zeros() -> None:
    assert SOME.show(Outer(False, Colour.BLUE, Inner(0, "x"))) == "Outer(colour=BLUE, inner=Inner(name='x'))"
    assert SOME.show(Other(2)) == "Other(number=BLUE)"
    assert SOME.show(Other(7)) == "Other(number=7)"
    assert show_value(1 << 40) == "0x10000000000"
    assert show_value(bytes(100)).endswith("... 100 bytes")


def test_a_type_without_a_number_is_our_bug() -> None:
    with pytest.raises(MachineError, match="Inner"):
        SOME.plain(Inner(1, ""))


def test_a_field_that_cannot_be_recorded_is_our_bug() -> None:
    class Bad(NamedTuple):
        found: dict[int, int]

    with pytest.raises(MachineError, match=r"Bad\.found"):
        RecordTypes((Bad,))


def test_every_event_and_effect_of_the_host_has_a_number() -> None:
    names = {cls.__name__ for cls in TYPES.classes}
    assert {"ExitTaken", "Enter", "GetPage", "Answer", "SwapOutDone", "DaemonFenced", "OutOfMemory"} <= names
