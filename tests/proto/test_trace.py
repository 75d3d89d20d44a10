"""Event files: what survives, what is refused, what order comes out."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import struct
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proto import trace, trace_writer
from proto.errors import UserError
from proto.trace import EVENT, FIELDS, Kind, TraceWriter, event_dicts, merge, read_events, read_file, read_run

SMALL = 1 << 20
FORK = multiprocessing.get_context("fork")


def events_dir(run_dir: Path) -> Path:
    folder = run_dir / "events"
    folder.mkdir(exist_ok=True)
    return folder


def written(path: Path, count: int, proc: int = 3) -> Path:
    with TraceWriter(path, proc, SMALL) as writer:
        for i in range(count):
            writer.event(Kind.SWAP_IN, a=i)
    return path


def test_every_field_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "vcpu-1.bin"
    top = (1 << 64) - 1
    with TraceWriter(path, 7, SMALL) as writer:
        assert writer.event(Kind.G_NP, vcpu=65535, vm=9, token=0xFFFF_FFFF, a=top, b=2, c=3, cause=4) == 1
        writer.observe(100)
        assert writer.event(Kind.MSR_WR, 1, a=0x4B564D02) == 101
    got = read_file(path)
    assert (got.name, got.proc, got.closed, got.dropped, got.note) == ("vcpu-1", 7, True, 0, "")
    first, second = got.events
    assert first[["lamport", "seq", "kind", "proc", "vcpu", "vm", "token"]].item() == (
        1, 0, Kind.G_NP, 7, 65535, 9, 0xFFFF_FFFF
    )  # fmt: skip
    assert first[["a", "b", "c", "cause"]].item() == (top, 2, 3, 4)
    assert (second["lamport"], second["seq"], second["vcpu"]) == (101, 1, 1)
    assert got.start_ns <= first["t_ns"] <= second["t_ns"]
    assert path.stat().st_size == trace.HEADER_BYTES + 2 * 64


def test_record_is_64_bytes_in_the_agreed_order() -> None:
    assert EVENT.itemsize == 64
    names = EVENT.names
    assert names == (
        "lamport", "t_ns", "seq", "kind", "proc", "vcpu", "vm", "token", "a", "b", "cause", "c"
    )  # fmt: skip


def record_then_wait(path: Path, count: int, pipe: Connection) -> None:
    writer = TraceWriter(path, 1, SMALL)
    for i in range(count):
        writer.event(Kind.SWAP_OUT, a=i)
    pipe.send("written")
    signal.pause()


def test_events_of_a_killed_process_survive(tmp_path: Path) -> None:
    path = tmp_path / "swapd-0.bin"
    ours, theirs = FORK.Pipe()
    child = FORK.Process(target=record_then_wait, args=(path, 5000, theirs))
    child.start()
    try:
        assert ours.poll(30)
        ours.recv()
    finally:
        child.kill()
        child.join(10)
    assert child.exitcode == -signal.SIGKILL
    got = read_file(path)
    assert got.events["a"].tolist() == list(range(5000))
    assert not got.closed
    assert got.note == ""


def record_forever(path: Path, pipe: Connection) -> None:
    writer = TraceWriter(path, 1, 8 << 20)
    pipe.send("started")
    for i in range(120_000):
        writer.event(Kind.SWAP_OUT, a=i, b=i, c=i, cause=i)
    signal.pause()


def test_kill_at_any_moment_leaves_only_whole_records(tmp_path: Path) -> None:
    for attempt in range(4):
        path = tmp_path / f"{attempt}.bin"
        ours, theirs = FORK.Pipe()
        child = FORK.Process(target=record_forever, args=(path, theirs))
        child.start()
        try:
            assert ours.poll(30)
            ours.recv()
            while not len(read_file(path).events) and child.is_alive():
                pass
        finally:
            child.kill()
            child.join(10)
        got = read_file(path)
        assert got.note == ""
        assert len(got.events)
        for field in ("a", "b", "c", "cause"):
            assert np.array_equal(got.events[field], np.arange(len(got.events)))


def test_cut_file_gives_the_events_before_the_cut_and_says_where(tmp_path: Path) -> None:
    path = written(tmp_path / "host.bin", 10)
    os.truncate(path, trace.HEADER_BYTES + 4 * 64 + 13)
    got = read_file(path)
    assert got.events["a"].tolist() == [0, 1, 2, 3]
    assert got.note == f"host.bin: cut at byte {4096 + 4 * 64 + 13}: 4 of 10 events"


@settings(deadline=None, max_examples=40)
@given(size=st.integers(0, 4096 + 10 * 64))
def test_any_cut_is_survived(tmp_path_factory: pytest.TempPathFactory, size: int) -> None:
    path = written(tmp_path_factory.mktemp("cut") / "host.bin", 10)
    os.truncate(path, size)
    got = read_file(path)
    assert len(got.events) == max(0, size - 4096) // 64
    assert bool(got.note) == (size < 4096 + 640)


@pytest.mark.parametrize("field", ["seq", "proc", "lamport"])
def test_damage_ends_the_events_and_is_told(tmp_path: Path, field: str) -> None:
    path = written(tmp_path / "host.bin", 10)
    data = bytearray(path.read_bytes())
    records = np.frombuffer(data, EVENT, 10, trace.HEADER_BYTES)
    records[field][6] = 0
    path.write_bytes(data)
    got = read_file(path)
    assert got.events["a"].tolist() == [0, 1, 2, 3, 4, 5]
    assert got.note == f"host.bin: damaged at byte {4096 + 6 * 64}: 6 of 10 events"


def test_count_beyond_the_file_does_not_ask_for_memory(tmp_path: Path) -> None:
    path = written(tmp_path / "host.bin", 2)
    data = bytearray(path.read_bytes())
    struct.pack_into("<Q", data, trace_writer.COUNT_WORD * 8, 1 << 60)
    path.write_bytes(data)
    got = read_file(path)
    assert len(got.events) == 0, "2**60 records later these two would have other numbers"
    assert "0 of 1152921504606846976 events" in got.note


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    for content in (
        b"\x7fELF" + bytes(8000),
        b"hello",
        bytes(5000),
        trace_writer.MAGIC[:-1] + b"\r" + bytes(5000),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match="not an event file") as caught:
            read_file(path)
        assert caught.value.where == str(path)


def test_other_versions_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "host.bin", 2)
    data = bytearray(path.read_bytes())
    data[8] = trace.VERSION + 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="another version") as caught:
        read_file(path)
    assert caught.value.found == trace.VERSION + 1
    assert f"version {trace.VERSION}" in caught.value.allowed


def test_unknown_kinds_are_refused_with_the_version(tmp_path: Path) -> None:
    path = tmp_path / "host.bin"
    with TraceWriter(path, 0, SMALL) as writer:
        writer.event(Kind.STOP)
        writer.event(9999)
    with pytest.raises(
        UserError, match=f"unknown kind of event in a file of version {trace.VERSION}"
    ) as caught:
        read_file(path)
    assert caught.value.found == 9999


def test_full_file_drops_counts_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "host.bin"
    with TraceWriter(path, 0, 100 * 64 + 63) as writer:
        for i in range(130):
            assert writer.event(Kind.KICK, a=i) == i + 1
        assert (writer.count, writer.dropped) == (100, 30)
    got = read_file(path)
    assert got.events["a"].tolist() == list(range(100))
    assert got.dropped == 30
    assert got.note == "host.bin: full: 30 later events were not recorded"


def test_full_disk_stops_recording_without_a_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "host.bin"
    real = os.posix_fallocate
    segment_bytes = trace_writer.SEGMENT_EVENTS * 64

    def nearly_full(fd: int, offset: int, size: int) -> None:
        if offset >= trace.HEADER_BYTES + segment_bytes:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(fd, offset, size)

    monkeypatch.setattr(os, "posix_fallocate", nearly_full)
    room = trace_writer.SEGMENT_EVENTS
    with TraceWriter(path, 0, SMALL) as writer:
        for _ in range(room + 50):
            writer.event(Kind.KICK)
        assert (writer.count, writer.dropped) == (room, 50)
    assert len(read_file(path).events) == room


def test_existing_file_and_missing_folder_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "host.bin", 1)
    with pytest.raises(UserError, match="cannot be created"):
        TraceWriter(path, 0, SMALL)
    assert len(read_file(path).events) == 1
    with pytest.raises(UserError, match="cannot be created"):
        TraceWriter(tmp_path / "missing" / "host.bin", 0, SMALL)


def test_failed_writers_leave_no_descriptor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted(os.listdir("/proc/self/fd"))  # noqa: PTH208

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("ftruncate", "posix_fallocate"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, refuse)
            with pytest.raises(UserError):
                TraceWriter(tmp_path / f"{name}.bin", 0, SMALL)
    writer = TraceWriter(tmp_path / "good.bin", 0, SMALL)
    writer.close()
    writer.close()
    assert sorted(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_effects_come_after_their_causes_whatever_the_clocks_say(tmp_path: Path) -> None:
    folder = events_dir(tmp_path)
    host = TraceWriter(folder / "host.bin", 0, SMALL)
    vcpus = [TraceWriter(folder / f"vcpu-{i}.bin", 1 + i, SMALL) for i in range(3)]
    expected = []
    for turn in range(30):
        vcpu = vcpus[turn % 3]
        for _ in range(turn % 4):
            vcpu.event(Kind.SWITCH)
        host.observe(vcpu.event(Kind.G_NP, token=turn))
        vcpu.observe(host.event(Kind.ASYNC_PF_READY, token=turn))
        vcpu.event(Kind.G_WAKE, token=turn)
        expected.append([Kind.G_NP, Kind.ASYNC_PF_READY, Kind.G_WAKE])
    for writer in (host, *vcpus):
        writer.close()
    events = read_events(tmp_path)
    key = [record[["lamport", "proc", "seq"]].item() for record in events]
    assert key == sorted(key)
    for turn, kinds in enumerate(expected):
        # SWITCH has token 0 as well
        mine = events[(events["token"] == turn) & (events["kind"] != Kind.SWITCH)]
        assert mine["kind"].tolist() == kinds


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 3), st.integers(0, 9)), max_size=40))
def test_merge_sorts_by_lamport_then_process_then_number(keys: list[tuple[int, int, int]]) -> None:
    parts = []
    for lamport, proc, seq in keys:
        part = np.zeros(1, EVENT)
        part["lamport"], part["proc"], part["seq"] = lamport, proc, seq
        parts.append(part)
    merged = merge(parts)
    assert [r[["lamport", "proc", "seq"]].item() for r in merged] == sorted(keys)


def test_run_collects_notes_and_refuses_an_empty_directory(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no event files"):
        read_run(tmp_path)
    folder = events_dir(tmp_path)
    written(folder / "host.bin", 5, 0)
    os.truncate(written(folder / "vcpu-0.bin", 5, 1), 4096 + 64)
    run = read_run(tmp_path)
    assert run.notes == ["vcpu-0.bin: cut at byte 4160: 1 of 5 events"]
    assert (len(run.events), len(run.files)) == (6, 2)


def test_every_kind_names_its_fields() -> None:
    assert set(FIELDS) == set(Kind)
    assert all(len(fields) <= 3 and len(set(fields)) == len(fields) for fields in FIELDS.values())
    reserved = set(EVENT.names or ()) - {"kind"}
    assert not any(reserved & set(fields) for fields in FIELDS.values())


def test_events_as_json_carry_names(tmp_path: Path) -> None:
    path = tmp_path / "vcpu-0.bin"
    with TraceWriter(path, 1, SMALL) as writer:
        writer.event(Kind.ASYNC_PF_NOT_PRESENT, vcpu=2, vm=1, token=0x1002, a=0x5000)
        writer.event(Kind.G_HLT)
    first, second = (json.loads(json.dumps(d)) for d in event_dicts(read_file(path).events))
    assert first["kind"] == "ASYNC_PF_NOT_PRESENT"
    assert (first["token"], first["gva"], first["vcpu"], first["vm"]) == (0x1002, 0x5000, 2, 1)
    assert second.keys() == {"lamport", "t_ns", "proc", "seq", "vm", "vcpu", "kind"}


def test_event_ids_are_unique_and_not_zero() -> None:
    ids = {trace.event_id(proc, seq) for proc in (0, 1, 3000) for seq in (0, 1, (1 << 32) - 1)}
    assert len(ids) == 9
    assert 0 not in ids
    assert max(ids) < 1 << 64
