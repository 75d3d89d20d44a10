"""Segments: alignment, sharing, sizes, and that nothing is left behind."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import os
import socket
from pathlib import Path

import numpy as np
import pytest

from proto import segments
from proto.errors import UserError
from proto.layout import kernel_words, npt_tables
from proto.pcpu import pcpu_words
from proto.segments import HUGE_BYTES, Segment, attach, available_bytes, create, plan, unmap
from proto.stats import stats_words
from proto.topology import Host, Swapd, Topology, Vm

MIB = 1 << 20


def fds() -> list[str]:
    return sorted(os.listdir("/proc/self/fd"))  # noqa: PTH208


def mappings() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:asyncpf-")


def in_child(action: str, segment: Segment) -> int:
    """Fork, let the child look at ``segment``, return its exit status (bounded by the suite's time-out)."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            if action == "write":
                segment.u64[5] += np.uint64(37)
            if action == "unmap":
                unmap(segment)
                assert len(segment.u64) == 0
                assert mappings() == 0
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(pid, 0)[1]


def test_mappings_are_aligned_zero_writable_views_of_one_memory() -> None:
    made = create({"control": 4096, "vcpus": 3 * 4096, "npt-0": 5 * MIB})
    try:
        assert list(made) == ["control", "vcpus", "npt-0"]
        for name, segment in made.items():
            assert segment.name == name
            assert segment.address % HUGE_BYTES == 0
            assert segment.u64.ctypes.data == segment.u8.ctypes.data == segment.address
            assert (len(segment.u8), len(segment.u32) * 4, len(segment.u64) * 8) == (segment.size_bytes,) * 3
            assert not segment.u8.any()
            segment.u64[-1] = 0x0102030405060708
            assert segment.u8[-8] == 8
            assert segment.u32[-1] == 0x01020304
            assert segment.collapse_errno is None
    finally:
        for segment in made.values():
            segment.close()


def test_frames_are_tried_as_huge_pages_and_the_outcome_is_recorded() -> None:
    (frames,) = create({"frames": 4 * MIB}).values()
    try:
        assert frames.collapse_errno is not None
        if frames.collapse_errno == 0:
            rollup = Path("/proc/self/smaps").read_text()
            entry = rollup[rollup.index("memfd:asyncpf-frames") :]
            assert "ShmemPmdMapped:     4096 kB" in entry[: entry.index("VmFlags")]
        assert not frames.u8.any()
    finally:
        frames.close()


def test_refused_collapse_is_recorded_and_harmless(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "MADV_COLLAPSE", 9999)
    (frames,) = create({"frames": 2 * MIB}).values()
    try:
        assert frames.collapse_errno == errno.EINVAL
        frames.u64[:] = 7
        assert not frames.collapse()
    finally:
        frames.close()


def test_forked_child_shares_the_memory() -> None:
    (segment,) = create({"pcpu": 4096}).values()
    try:
        segment.u64[5] = 5
        assert in_child("write", segment) == 0
        assert segment.u64[5] == 42
    finally:
        segment.close()


def test_child_that_unmaps_does_not_disturb_the_others() -> None:
    (segment,) = create({"pcpu": 4096}).values()
    try:
        segment.u64[5] = 5
        assert in_child("unmap", segment) == 0
        assert segment.u64[5] == 5
    finally:
        segment.close()


def test_received_descriptors_map_the_same_memory() -> None:
    made = create({"frames": 2 * MIB, "control": 2 * 4096})
    ours, theirs = socket.socketpair()
    attached: dict[str, Segment] = {}
    try:
        with ours, theirs:
            socket.send_fds(ours, [b"fds"], [segment.fd for segment in made.values()])
            _, received, _, _ = socket.recv_fds(theirs, 16, len(made))
        for (name, segment), fd in zip(made.items(), received, strict=True):
            attached[name] = attach(name, fd, segment.size_bytes)
        for name, segment in made.items():
            other = attached[name]
            assert other.address != segment.address
            assert other.address % HUGE_BYTES == 0
            segment.u64[7] = 70
            other.u64[8] = 80
            assert (other.u64[7], segment.u64[8]) == (70, 80)
    finally:
        for segment in (*made.values(), *attached.values()):
            segment.close()


def test_wrong_descriptor_or_size_is_refused() -> None:
    (segment,) = create({"control": 4096}).values()
    try:
        for size in (8192, 4095, 0):
            with pytest.raises(ValueError, match=f"holds 4096 bytes, expected {size}"):
                attach("control", segment.fd, size)
    finally:
        segment.close()


def test_size_is_sealed() -> None:
    (segment,) = create({"control": 4096}).values()
    try:
        for size in (0, 8192):
            with pytest.raises(PermissionError):
                os.ftruncate(segment.fd, size)
        assert not fcntl.fcntl(segment.fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_WRITE
    finally:
        segment.close()


def test_nothing_is_left_behind() -> None:
    shm = sorted(os.listdir("/dev/shm"))  # noqa: PTH208
    before = fds()
    made = create({"frames": 2 * MIB, "control": 4096, "vcpus": 4096})
    assert sorted(os.listdir("/dev/shm")) == shm  # noqa: PTH208
    assert mappings() >= 3
    for segment in made.values():
        assert not os.get_inheritable(segment.fd)
        segment.close()
        segment.close()
        assert segment.address == 0
    assert mappings() == 0
    assert fds() == before


def test_more_than_the_free_memory_is_refused_before_anything_is_created(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    free, _ = available_bytes()
    before = fds()
    with pytest.raises(UserError) as caught:
        create({"control": 4096, "frames": free + (1 << 40)})
    assert "host.allowance_mib" in str(caught.value)
    assert "frames" in str(caught.value)
    assert fds() == before
    monkeypatch.setattr(segments, "available_bytes", lambda: (10 * MIB, "ten"))
    with pytest.raises(UserError, match=r"needs 10\.5 MiB.*\n.*at most ten"):
        create({"frames": 8 * MIB, "npt-0": 5 * MIB // 2})


def test_refusal_of_the_system_is_told_and_cleaned_up(monkeypatch: pytest.MonkeyPatch) -> None:
    before = fds()
    real = os.ftruncate
    sizes: list[int] = []

    def second_fails(fd: int, size: int) -> None:
        sizes.append(size)
        if len(sizes) == 2:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        real(fd, size)

    monkeypatch.setattr(os, "ftruncate", second_fails)
    with pytest.raises(UserError, match="segment vcpus: File too large"):
        create({"control": 4096, "vcpus": 8192, "pcpu": 4096})
    assert sizes == [4096, 8192]
    assert fds() == before
    assert mappings() == 0


def test_mapping_that_fails_leaves_no_reservation() -> None:
    before = Path("/proc/self/maps").read_text().count("\n")
    with Path("/dev/null").open() as null, pytest.raises(OSError, match=r".+"):
        Segment("control", null.fileno(), 64 * MIB)
    assert Path("/proc/self/maps").read_text().count("\n") <= before + 1


@pytest.mark.parametrize(
    ("membership", "folder", "names"),
    [
        ("0::/box\n", "box", ("memory.max", "memory.current")),
        ("4:memory:/box\n", "memory/box", ("memory.limit_in_bytes", "memory.usage_in_bytes")),
        ("4:cpu,memory:/hidden\n", "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")),
    ],
)
def test_container_limit_bounds_what_is_available(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, membership: str, folder: str, names: tuple[str, str]
) -> None:
    (tmp_path / "cgroup").write_text(membership)
    root = tmp_path / "fs"
    (root / folder).mkdir(parents=True)
    for name, value in zip(names, (64 * MIB, 24 * MIB), strict=True):
        (root / folder / name).write_text(f"{value}\n")
    monkeypatch.setattr(segments, "CGROUP", tmp_path / "cgroup")
    monkeypatch.setattr(segments, "CGROUP_ROOT", root)
    free, why = available_bytes()
    assert free == 40 * MIB
    assert "container" in why
    (root / folder / names[0]).write_text("max\n")
    assert available_bytes()[0] > 0
    assert "MemAvailable" in available_bytes()[1]


def test_plan_names_every_segment_with_whole_pages() -> None:
    topology = Topology(
        host=Host(allowance_mib=24),
        vm=(Vm(vcpus=2, memory_mib=48), Vm(vcpus=3, memory_mib=16)),
        swapd=(Swapd(), Swapd()),
    )
    sizes = plan(topology, [4, 6], [0, 5000], {"trace-0": 100_000})
    assert sizes["frames"] == 24 * MIB
    assert sizes["control"] == 4 * 4096
    assert sizes["vcpus"] == 5 * 4096
    assert sizes["npt-0"] == npt_tables(48 * 256) * 4096
    assert sizes["npt-1"] == npt_tables(16 * 256) * 4096
    for name, words in (
        ("pcpu", pcpu_words(5)),
        ("stats", stats_words(5, 2)),
        ("kernel-0", kernel_words(4, 2, 48 * 256)),
        ("kernel-1", kernel_words(6, 3, 16 * 256)),
    ):
        assert words * 8 <= sizes[name] < words * 8 + 4096
    assert (sizes["shadow-0"], sizes["shadow-1"]) == (4096, 5 * 4096)
    assert sizes["trace-0"] == 25 * 4096
    assert all(size % 4096 == 0 and size > 0 for size in sizes.values())
    assert len(sizes) == 5 + 2 * 3 + 1
    many = dataclasses.replace(topology, swapd=(Swapd(),) * 513)
    assert plan(many, [4, 6], [0, 5000], {})["control"] == 5 * 4096
