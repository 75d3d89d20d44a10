"""Temporary folders: those whose owner was killed go away with the next start, all others are left alone."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher import tempdirs
from launcher.tempdirs import LOCK_NAME

ROOT = Path(__file__).resolve().parents[2]
OWNER = (
    "import sys, time; from pathlib import Path; from launcher import tempdirs\n"
    "held = tempdirs.make('t-', Path(sys.argv[1])); (held.path / 'a').mkdir(); (held.path / 'a' / 'file').touch()\n"
    "print(held.path, flush=True); time.sleep(60)"
)
BOUND_S = 30


def _left(parent: Path) -> Path:
    """A folder whose owner has let it go without removing it."""
    held = tempdirs.make("t-", parent)
    os.close(held._lock_fd)
    (held.path / "h").touch()
    return held.path


def test_the_folder_of_a_killed_process_goes_and_that_of_a_living_one_stays(tmp_path: Path) -> None:
    mine = tempdirs.make("t-", tmp_path)
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert owner.stdout is not None
        theirs = Path(owner.stdout.readline().strip())
        assert tempdirs.sweep("t-", [tmp_path]) == []
        assert {path.name for path in tmp_path.iterdir()} == {mine.path.name, theirs.name}
        os.kill(owner.pid, signal.SIGKILL)
    finally:
        owner.kill()
        owner.communicate(timeout=BOUND_S)
    assert tempdirs.sweep("t-", [tmp_path, tmp_path]) == [theirs]
    assert list(tmp_path.iterdir()) == [mine.path]
    assert stat.S_IMODE(mine.path.stat().st_mode) == 0o700
    mine.remove()
    mine.remove()
    assert list(tmp_path.iterdir()) == []


def _without_lock(parent: Path) -> Path:
    path = _left(parent)
    (path / LOCK_NAME).unlink()
    return path


def _linked_lock(parent: Path) -> Path:
    path = _left(parent)
    (path / LOCK_NAME).rename(parent / "elsewhere")
    (path / LOCK_NAME).symlink_to(parent / "elsewhere")
    return path


def _open_to_others(parent: Path) -> Path:
    path = _left(parent)
    path.chmod(0o770)
    return path


def _other_name(parent: Path) -> Path:
    return _left(parent).rename(parent / "t-mine")


def _longer_name(parent: Path) -> Path:
    return _left(parent).rename(parent / "t-12345678-mine")


def _link(parent: Path) -> Path:
    (parent / "below").mkdir()
    link = parent / "t-12345678"
    link.symlink_to(_left(parent / "below"))
    return link


@pytest.mark.parametrize(
    "make", [_without_lock, _linked_lock, _open_to_others, _other_name, _longer_name, _link]
)
def test_what_is_not_surely_ours_stays(make: object, tmp_path: Path) -> None:
    assert callable(make)
    path = make(tmp_path)
    assert tempdirs.sweep("t-", [tmp_path]) == []
    assert (path / "h").exists()


def test_a_folder_of_another_user_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _left(tmp_path)
    monkeypatch.setattr("os.geteuid", lambda: os.getuid() + 1)
    assert tempdirs.sweep("t-", [tmp_path, tmp_path / "nowhere"]) == []
    assert path.exists()


def test_a_removal_that_was_cut_short_is_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _left(tmp_path)
    (path / "a").mkdir()

    def refuse(*_: object) -> None:
        raise OSError("busy")

    with monkeypatch.context() as patched:
        patched.setattr("shutil.rmtree", refuse)
        assert tempdirs.sweep("t-", [tmp_path]) == []
    assert (path / LOCK_NAME).exists()
    assert tempdirs.sweep("t-", [tmp_path]) == [path]


def test_links_inside_are_not_followed(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").touch()
    path = _left(tmp_path)
    (path / "link").symlink_to(kept)
    assert tempdirs.sweep("t-", [tmp_path]) == [path]
    assert (kept / "file").exists()


@pytest.mark.parametrize(
    ("age_s", "content", "goes"),
    [
        (2 * tempdirs.EMPTY_S, "", True),
        (2 * tempdirs.EMPTY_S, tempdirs.UNLOCKED_NAME, True),
        (2 * tempdirs.EMPTY_S, "file", False),
        (1.0, "", False),
        (1.0, tempdirs.UNLOCKED_NAME, False),
    ],
)
def test_a_folder_without_a_lock_goes_only_when_it_is_old_and_empty(
    age_s: float, content: str, goes: bool, tmp_path: Path
) -> None:
    folder = tmp_path / "t-abcdefgh"
    folder.mkdir(mode=0o700)
    if content:
        (folder / content).touch()
    os.utime(folder, (time.time() - age_s,) * 2)
    assert tempdirs.sweep("t-", [tmp_path]) == ([folder] if goes else [])
    assert folder.exists() != goes
