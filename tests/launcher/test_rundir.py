"""Run directories: made private, removed when temporary, left alone when named."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from launcher import rundir
from launcher.rundir import SOCKET_PATH_BYTES_MAX
from proto.errors import UserError


def test_a_temporary_one_is_private_and_goes_away() -> None:
    made = rundir.create(None, on_disk=True)
    assert stat.S_IMODE(made.path.stat().st_mode) == 0o700
    assert made.path.name.startswith("asyncpf-")
    assert made.cleanup == [made.socket, made.path]
    made.socket.touch()
    made.remove()
    assert not made.path.exists()


def test_the_next_run_removes_what_a_killed_one_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    used, left = (rundir.create(None, on_disk=False) for _ in range(2))
    assert used.path.parent == left.path.parent == tmp_path
    long = rundir.create(tmp_path / ("y" * SOCKET_PATH_BYTES_MAX), on_disk=False)
    for run in (left, long):
        for folder in run.folders:
            os.close(folder._lock_fd)
    gone = {left.path, long.socket_dir}
    assert gone <= set(rundir.sweep())
    assert {path for path in (used.path, long.path, *gone) if path.exists()} == {used.path, long.path}
    used.remove()


def test_a_named_one_stays_without_its_socket(tmp_path: Path) -> None:
    made = rundir.create(tmp_path / "a" / "b", on_disk=True)
    made.socket.touch()
    made.image.touch()
    (made.path / "summary.json").touch()
    assert made.cleanup == [made.socket, made.image]
    made.remove()
    assert {path.name for path in made.path.iterdir()} == {"logs", "events", "summary.json"}


@pytest.mark.parametrize("existed", [True, False])
def test_discarding_leaves_what_was_there_before(existed: bool, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    if existed:
        folder.mkdir()
    made = rundir.create(folder, on_disk=True)
    made.log("zygote-0").touch()
    made.discard()
    assert folder.exists() is existed
    assert not existed or list(folder.iterdir()) == []


def test_a_long_path_gets_a_short_socket(tmp_path: Path) -> None:
    made = rundir.create(tmp_path / ("y" * SOCKET_PATH_BYTES_MAX), on_disk=True)
    assert made.socket_dir != made.path
    assert len(str(made.socket)) <= SOCKET_PATH_BYTES_MAX
    assert stat.S_IMODE(made.socket_dir.stat().st_mode) == 0o700
    assert made.cleanup == [made.socket_dir, made.image]
    made.remove()
    assert not made.socket_dir.exists()
    assert made.path.exists()


def test_what_cannot_be_a_run_directory_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for where in (file, file / "below", Path("/proc/asyncpf")):
        with pytest.raises(UserError) as caught:
            rundir.create(where, on_disk=True)
        assert caught.value.where == "--out"
        assert caught.value.found == str(where)
    assert file.is_file()


def test_log_tails_are_short_and_never_fail(tmp_path: Path) -> None:
    made = rundir.create(tmp_path / "run", on_disk=True)
    assert made.log_tail("vcpu-0") == []
    made.log("vcpu-0").write_bytes(b"\xff\n" + b"".join(b"line %d\n" % i for i in range(1000)))
    assert made.log_tail("vcpu-0", lines=2) == ["line 998", "line 999"]


def test_a_directory_of_somebody_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    folder.mkdir(mode=0o755)
    if os.geteuid() == 0:
        os.chown(folder, 12_345, 12_345)
    else:
        monkeypatch.setattr("os.geteuid", lambda: os.getuid() + 1)
    with pytest.raises(UserError, match="belongs to somebody else"):
        rundir.create(folder, on_disk=True)
    assert list(folder.iterdir()) == []
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755, "it is not ours to change"
