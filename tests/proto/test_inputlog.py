"""The file of an input log: cut, damaged and forged ones are read up to the damage or refused, never more."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import msgpack
import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proto import inputlog
from proto.errors import UserError
from proto.inputlog import BLOCK, HEAD, Description, InputLog, InputLogWriter
from tests.proto.rerun_machine import TYPES, Told, rerun, tell_story

ROOT = Path(__file__).resolve().parents[2]
CALLS = 8
DESCRIPTION = Description("adders", "run", ("one", "two"), tuple(TYPES.shapes()), (), parks=False)


@pytest.fixture
def story(tmp_path: Path) -> Path:
    tell_story(tmp_path / "log.bin")
    return tmp_path / "log.bin"


def replayed(path: Path) -> tuple[int, str, bool]:
    """(calls that were the same, note, whether something differed)."""
    log = InputLog(path)
    try:
        again = rerun(log)
        found = again.run(log.calls())
        return again.calls, log.note, found is not None
    finally:
        log.close()


def blocks_at(path: Path) -> int:
    head = path.read_bytes()[: HEAD.size]
    return int(HEAD.size + HEAD.unpack(head)[2] + 8)


def forged(path: Path, payload: bytes) -> None:
    """A log with one block whose checksum is right."""
    path.unlink(missing_ok=True)
    writer = InputLogWriter(path, DESCRIPTION)
    writer.close()
    with path.open("ab") as file:
        file.write(BLOCK.pack(len(payload), xxhash.xxh3_64_intdigest(payload)) + payload)


def test_a_whole_log_has_no_note(story: Path) -> None:
    assert replayed(story) == (CALLS, "", False)
    assert inputlog.ended_early(story) == ""


def test_calls_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "log.bin"
    writer = InputLogWriter(path, DESCRIPTION)
    writer.append(1, inputlog.ON, 1 << 60, [(0, (5,))], [1, 2, -3], [(1, (7,))])
    writer.append(0, inputlog.RESUME, 10, 4, [], "broken")
    writer.append(0, inputlog.ON, 11, [], list(range(20_000)), [])
    writer.close()
    log = InputLog(path)
    one, two, three = log.calls()
    log.close()
    assert one == (1, 1, inputlog.ON, 1 << 60, ((0, (5,)),), (1, 2, -3), ((1, (7,)),), "")
    assert two == (2, 0, inputlog.RESUME, 10, 4, (), (), "broken")
    assert three.acts == tuple(range(20_000))


def test_every_cut_is_replayed_up_to_it_and_says_so(story: Path) -> None:
    data = story.read_bytes()
    begin = blocks_at(story)
    for size in range(len(data)):
        story.write_bytes(data[:size])
        if size < begin:
            with pytest.raises(UserError):
                InputLog(story)
            continue
        calls, note, differs = replayed(story)
        assert not differs
        assert (calls, bool(note)) == (0, size > begin), size


def test_every_damaged_byte_is_refused_or_replayed_up_to_it(story: Path) -> None:
    data = story.read_bytes()
    for at in range(len(data)):
        for flip in (1, 0x80, 0xFF):
            damaged = bytearray(data)
            damaged[at] ^= flip
            story.write_bytes(damaged)
            try:
                calls, note, differs = replayed(story)
            except UserError:
                assert at < blocks_at(story) or at < HEAD.size
                continue
            assert not differs
            # The status word is no part of what was recorded: another status only becomes the note.
            assert (calls, bool(note)) == (CALLS if at < HEAD.size else 0, True), at


def test_blocks_before_the_damage_are_replayed(tmp_path: Path) -> None:
    path = tmp_path / "log.bin"
    told = Told(path)
    sizes = []
    for i in range(5):
        told.recorder.on(told.machines[1], [], i)
        told.log.flush()
        sizes.append(path.stat().st_size)
    told.log.close()
    data = bytearray(path.read_bytes())
    data[sizes[2] + BLOCK.size] ^= 1
    path.write_bytes(data)
    assert replayed(path) == (3, f"damaged at byte {sizes[2]}: wrong checksum", False)
    path.write_bytes(data[: sizes[3] - 1])
    assert replayed(path) == (3, f"cut at byte {sizes[3] - 1}", False)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=3) | st.binary(max_size=3),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=20,
)  # fmt: skip
CALL_LIKE = st.tuples(
    st.integers(-1, 2), st.integers(-1, 2), st.integers(-5, 5),
    st.lists(st.tuples(st.integers(-1, 4), st.lists(VALUES, max_size=2))) | VALUES,
    st.lists(st.lists(st.integers(-1, 3))) | VALUES,
    st.lists(st.tuples(st.integers(-1, 4), st.lists(VALUES, max_size=2))) | VALUES,
)  # fmt: skip


@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(CALL_LIKE | VALUES, max_size=4), st.binary(max_size=4))
def test_forged_contents_never_break_the_reader(tmp_path: Path, calls: list[Any], tail: bytes) -> None:
    path = tmp_path / "forged.bin"
    forged(path, msgpack.packb(calls) + tail)
    done, note, differs = replayed(path)
    assert done <= len(calls)
    assert note or differs or (done == len(calls) and not tail)


@pytest.mark.parametrize(
    "payload",
    [
        b"\xdd\xff\xff\xff\xff" * 1000,
        b"\xdc\x20\x00" * 1300,
        b"\xc6\xff\xff\xff\xff" + bytes(100),
        b"\xdf\xff\xff\xff\xff" + bytes(100),
        b"\xc9\xff\xff\xff\xff" + bytes(100),
        b"\x91" * 100_000,
    ],
    ids=["array32", "nested arrays", "bin32", "map32", "ext32", "depth"],
)
def test_a_forged_length_allocates_little(tmp_path: Path, payload: bytes) -> None:
    path = tmp_path / "forged.bin"
    forged(path, payload)
    tracemalloc.start()
    try:
        calls, note, _ = replayed(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert calls == 0
    assert note.startswith("damaged")
    assert peak < 100 << 20


@pytest.mark.parametrize("size", [0, inputlog.BLOCK_BYTES_MAX + 1, 0xFFFF_FFFF])
def test_a_block_of_an_impossible_size_is_not_read(tmp_path: Path, size: int) -> None:
    path = tmp_path / "log.bin"
    InputLogWriter(path, DESCRIPTION).close()
    with path.open("ab") as file:
        file.write(BLOCK.pack(size, 0) + bytes(100))
    calls, note, _ = replayed(path)
    assert (calls, note.partition(": ")[2]) == (0, f"a block of {size} bytes")


def test_something_else_and_other_versions_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "log.bin"
    with pytest.raises(UserError, match="no input log there"):
        InputLog(path)
    path.write_bytes(b"\x89APFEV\r\n" + bytes(5000))
    with pytest.raises(UserError, match="not an input log"):
        InputLog(path)
    path.write_bytes(HEAD.pack(inputlog.MAGIC, 2, 10, 0) + bytes(100))
    with pytest.raises(UserError, match="another version"):
        InputLog(path)
    path.write_bytes(HEAD.pack(inputlog.MAGIC, 1, 0xFFFF_FFFF, 0) + bytes(100))
    with pytest.raises(UserError, match="cut or damaged"):
        InputLog(path)


@pytest.mark.parametrize(
    "description",
    [None, 5, [], ["a", "b", [], [], [], False], ["a", "b", ["one"], [["x"]], [], False], ["a", 1, ["one"], [], [], False]],
)  # fmt: skip
def test_a_forged_description_is_refused(tmp_path: Path, description: Any) -> None:
    path = tmp_path / "log.bin"
    body = msgpack.packb(description)
    head = HEAD.pack(inputlog.MAGIC, inputlog.VERSION, len(body), inputlog.STATUS_CLOSED)
    path.write_bytes(head + body + struct.pack("<Q", xxhash.xxh3_64_intdigest(body)))
    with pytest.raises(UserError, match="description is damaged"):
        InputLog(path)


def test_what_was_flushed_survives_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "log.bin"
    program = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from tests.proto.rerun_machine import Add, Told\n"
        "told = Told(Path(sys.argv[1]))\n"
        "told.recorder.on(told.machines[1], [Add(1)], 1)\n"
        "told.log.flush()\n"
        "told.recorder.on(told.machines[1], [Add(2)], 2)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], cwd=ROOT, check=False, timeout=60, env={**os.environ, "PYTHONPATH": "."}
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL
    assert replayed(path) == (1, "not closed: its process was killed", False)
    assert inputlog.ended_early(path) == "not closed: its process was killed"


def test_a_full_log_ends_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputlog, "LOG_BYTES_MAX", 2000)
    path = tmp_path / "log.bin"
    told = Told(path)
    for i in range(200):
        told.recorder.on(told.machines[1], [], i)
        told.log.flush()
    told.log.close()
    assert path.stat().st_size <= 2000
    calls, note, differs = replayed(path)
    assert 0 < calls < 200
    assert (note, differs) == ("full", False)


def test_a_call_that_is_too_large_ends_the_log_after_the_calls_before(tmp_path: Path) -> None:
    path = tmp_path / "log.bin"
    told = Told(path)
    told.recorder.on(told.machines[1], [], 1)
    told.log.append(1, inputlog.ON, 2, [], [bytes(inputlog.BLOCK_BYTES_MAX)], [])
    told.recorder.on(told.machines[1], [], 3)
    told.log.close()
    assert replayed(path) == (1, "a call was too large to be recorded", False)


def test_a_disk_that_takes_no_more_ends_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "log.bin"
    told = Told(path)
    told.recorder.on(told.machines[1], [], 1)
    told.log.flush()
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[:5]))
    told.recorder.on(told.machines[1], [], 2)
    told.log.flush()
    monkeypatch.undo()
    told.recorder.on(told.machines[1], [], 3)
    told.log.close()
    calls, note, differs = replayed(path)
    assert (calls, differs) == (1, False)
    assert note.startswith("cut at byte")
    assert inputlog.ended_early(path) == "the disk was full"


def test_an_existing_file_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "log.bin"
    path.write_text("mine")
    with pytest.raises(UserError, match="cannot be written"):
        InputLogWriter(path, DESCRIPTION)
    assert path.read_text() == "mine"
