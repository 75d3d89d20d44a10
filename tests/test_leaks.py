"""The leak check of conftest.py is itself checked: a test that leaves something behind must fail."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHM = 'SHM = Path("/dev/shm")'
LEAKS = {
    "process": """
import subprocess
def test_it(): subprocess.Popen(["sleep", "60"])
""",
    "orphan": """
import subprocess
def test_it(): subprocess.run(["sh", "-c", "sleep 60 >/dev/null 2>&1 &"], check=True)
""",
    "temporary file": """
import tempfile
def test_it(): tempfile.mkstemp()
""",
    "shared memory": """
import pathlib
def test_it(): pathlib.Path(__file__).with_name("shm").joinpath("leak").touch()
""",
}
CLEAN = """
import os, subprocess, tempfile
def test_it():
    subprocess.run(["sh", "-c", "sleep 0.1 >/dev/null 2>&1 &"], check=True)
    with tempfile.TemporaryFile(): pass
"""


def _run(folder: Path, text: str) -> subprocess.CompletedProcess[str]:
    # A folder of its own in place of /dev/shm, which the tests of others watch at the same time.
    text_of_check = (ROOT / "tests" / "conftest.py").read_text()
    assert text_of_check.count(SHM) == 1
    (folder / "shm").mkdir()
    (folder / "conftest.py").write_text(text_of_check.replace(SHM, f"SHM = Path({str(folder / 'shm')!r})"))
    (folder / "test_leak.py").write_text(text)
    options = ["-q", "-p", "no:cacheprovider", "--rootdir", str(folder), "--basetemp", str(folder / "base")]
    return subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(folder / "test_leak.py")],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_ADDOPTS": ""},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("kind", LEAKS)
def test_leak_fails_the_test(kind: str, tmp_path: Path) -> None:
    done = _run(tmp_path, LEAKS[kind])
    assert done.returncode == 1, done.stdout + done.stderr
    assert "the test left behind: " in done.stdout


def test_clean_test_passes(tmp_path: Path) -> None:
    done = _run(tmp_path, CLEAN)
    assert done.returncode == 0, done.stdout + done.stderr
