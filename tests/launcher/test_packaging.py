"""The wheel, as somebody gets it who runs `pip install .`, and the locked requirements."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
LOCKS = ("run", "test", "dev", "fuzz", "plot")
APP_FOLDERS = (
    "proto",
    "host",
    "guest",
    "swapd",
    "sim",
    "report",
    "launcher",
    "topologies",
    "scenarios",
    "traces",
)
_PIN = re.compile(r"^([a-z0-9._-]+)==(\S+) \\$", re.MULTILINE)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip(
        "hatchling", reason="the build backend, hatchling, is not installed (requirements/test.txt has it)"
    )
    folder = tmp_path_factory.mktemp("wheel")
    _run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)], cwd=ROOT)
    (path,) = folder.glob("asyncpf-*.whl")
    return path


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the wheel is installed into, without its dependencies."""
    pytest.importorskip("pip", reason="this Python has no pip to install the wheel with")
    folder = tmp_path_factory.mktemp("site")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
    ]
    _run([*pip, "--target", str(folder), str(wheel)], cwd=folder)
    return folder


def _run(command: list[str], cwd: Path, **variables: str) -> str:
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def test_one_top_level_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        top = {name.split("/")[0] for name in archive.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == {"asyncpf"}


def test_everything_that_runs_is_in_it(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        shipped = {name.removeprefix("asyncpf/_app/") for name in archive.namelist() if "/_app/" in name}
    present = [path for folder in APP_FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()]
    expected = {str(path.relative_to(ROOT)) for path in present if "__pycache__" not in path.parts}
    assert shipped == expected | {"launch.py"}


def test_the_installed_command(site: Path, tmp_path: Path) -> None:
    """`asyncpf` and `python -m asyncpf` are `python launch.py`; the current directory does not matter."""
    variables = {"PYTHONPATH": str(site), "XDG_CACHE_HOME": str(tmp_path), "NUMBA_CACHE_DIR": ""}
    expected = _run([sys.executable, str(ROOT / "launch.py"), "--help"], cwd=tmp_path)
    assert _run([sys.executable, "-m", "asyncpf", "--help"], cwd=tmp_path, **variables) == expected
    assert _run([str(site / "bin" / "asyncpf"), "--help"], cwd=tmp_path, **variables) == expected


def test_installed_tests_are_refused_with_a_reason(site: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "asyncpf", "test"],
        env={**os.environ, "PYTHONPATH": str(site), "XDG_CACHE_HOME": str(tmp_path), "NUMBA_CACHE_DIR": ""},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 2, done.stderr
    assert "the tests are not installed" in done.stderr
    assert [path.name for path in (tmp_path / "asyncpf" / "numba").iterdir()], (
        "the kernel cache is the user's"
    )


def test_importing_asyncpf_adds_no_generic_names(site: Path) -> None:
    program = (
        f"import asyncpf.__main__, importlib.util as u; print([n for n in {APP_FOLDERS} if u.find_spec(n)])"
    )
    assert _run([sys.executable, "-P", "-c", program], cwd=site, PYTHONPATH=str(site)).strip() == "[]"


# the locked requirements


def _lock(name: str) -> str:
    return (ROOT / "requirements" / f"{name}.txt").read_text()


def _pins(name: str) -> dict[str, str]:
    return dict(_PIN.findall(_lock(name)))


def _project() -> dict[str, Any]:
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return project


def _names(requirements: list[str]) -> set[str]:
    return {re.split(r"[<>=!~;\[ ]", requirement)[0] for requirement in requirements}


@pytest.mark.parametrize("name", LOCKS)
def test_every_package_is_pinned_with_hashes(name: str) -> None:
    blocks = re.split(r"\n(?=\S)", _lock(name).strip())
    for block in blocks:
        assert _PIN.match(block), block.splitlines()[0]
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", block), block.splitlines()[0]


@pytest.mark.parametrize("name", LOCKS)
def test_no_index_is_named(name: str) -> None:
    assert not re.search(r"://|--(extra-)?index|--find-links|--trusted-host|/opt/|/root/|/home/", _lock(name))


@pytest.mark.parametrize(
    ("smaller", "larger"), [("run", "test"), ("test", "dev"), ("test", "fuzz"), ("run", "plot")]
)
def test_the_larger_set_contains_the_smaller(smaller: str, larger: str) -> None:
    assert _pins(smaller).items() <= _pins(larger).items()


def test_plot_and_test_fit_into_one_environment() -> None:
    test, plot = _pins("test"), _pins("plot")
    shared = test.keys() & plot.keys()
    assert {name: test[name] for name in shared} == {name: plot[name] for name in shared}


def test_every_dependency_is_locked() -> None:
    project = _project()
    extras = project["optional-dependencies"]
    assert _names(project["dependencies"]) <= _pins("run").keys()
    assert _names(extras["test"]) <= _pins("test").keys()
    assert _names(extras["dev"]) <= _pins("dev").keys()
    assert _names(extras["fuzz"]) <= _pins("fuzz").keys()
    assert _names(extras["plot"]) <= _pins("plot").keys()
    assert not _names(extras["plot"]) & (_pins("run").keys() | _pins("test").keys()), "only who asks gets it"


def test_every_dependency_has_a_reason() -> None:
    project = _project()
    text = (ROOT / "pyproject.toml").read_text()
    extras = project["optional-dependencies"]
    for requirement in [*project["dependencies"], *(one for extra in extras.values() for one in extra)]:
        assert re.search(rf'^    "{re.escape(requirement)}", +# \w.{{10,}}$', text, re.MULTILINE), requirement
