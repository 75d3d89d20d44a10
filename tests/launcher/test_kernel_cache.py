"""The folder of compiled kernels changes with every source they depend on, and only with those."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launcher import kernel_cache
from launcher.kernel_cache import KernelCacheError, prepare, source_hash

NOW_S = 1_000_000.0

SOURCES = {
    "proto/__init__.py": "",
    "proto/jit.py": "import numba\n",
    "proto/layout.py": "PAGE = 4096\n",
    "proto/tables.py": "from proto import units\nSIZE = units.BYTES\n",
    "proto/units.py": "BYTES = 8\n",
    "guest/__init__.py": "",
    "guest/walk.py": (
        "from proto.jit import kernel\nfrom proto.layout import (\n    PAGE,\n)\nimport proto.tables as t\n"
    ),
    "guest/shell.py": "import os\nfrom guest import walk\n",
}


@pytest.fixture
def app(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv(kernel_cache.VARIABLE)
    root = tmp_path / "app"
    for name, text in SOURCES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    "name", ["proto/jit.py", "proto/layout.py", "proto/tables.py", "proto/units.py", "guest/walk.py"]
)
def test_sources_of_kernels_change_the_folder(app: Path, name: str) -> None:
    before = source_hash(app)
    with (app / name).open("a") as file:
        file.write("# changed\n")
    assert source_hash(app) != before


def test_other_sources_do_not(app: Path) -> None:
    before = source_hash(app)
    (app / "guest" / "shell.py").write_text("import sys\nfrom guest import walk\n")
    (app / "guest" / "more.py").write_text("import sys\n")
    assert source_hash(app) == before


def test_a_new_kernel_file_changes_the_folder(app: Path) -> None:
    before = source_hash(app)
    (app / "guest" / "more.py").write_text("from proto import (\n    jit,\n)\n")
    assert source_hash(app) != before


@pytest.mark.parametrize(
    "text",
    [
        "import numba\n",
        "x = 1\nimport numba as nb\n",
        "if x:\n    from numba import njit\n",
        "from numba.extending import intrinsic\n",
        "import os, llvmlite.ir\n",
        "from proto.jit import kernel  # comment\n",
    ],
)
def test_every_way_to_import_a_compiler_is_seen(app: Path, text: str) -> None:
    before = source_hash(app)
    (app / "guest" / "more.py").write_text(text)
    assert source_hash(app) != before


@pytest.mark.parametrize("text", ["# import numba\n", "important = 1\n", "x = 'from numba import'\n"])
def test_what_only_looks_like_an_import_is_not(app: Path, text: str) -> None:
    before = source_hash(app)
    (app / "guest" / "more.py").write_text(text)
    assert source_hash(app) == before


def test_compiler_settings_change_the_folder(app: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = source_hash(app)
    monkeypatch.setenv("NUMBA_BOUNDSCHECK", "1")
    assert source_hash(app) != before


def test_every_kernel_file_of_this_project_is_found() -> None:
    root = Path(kernel_cache.__file__).resolve().parent.parent
    sources = kernel_cache._read_sources(root)
    decorated = {name for name, text in sources.items() if b"\n@kernel" in text or b"\n@inline" in text}
    assert decorated
    assert decorated <= set(kernel_cache._kernel_modules(sources))


def test_a_checkout_keeps_its_own_cache(app: Path) -> None:
    folder = prepare(app, installed=False)
    assert folder == app / ".cache" / "numba" / source_hash(app)
    assert folder.is_dir()
    assert os.environ[kernel_cache.VARIABLE] == str(folder)


@pytest.mark.parametrize("variable", ["absolute", "relative", ""])
def test_an_installed_one_uses_the_users_cache(
    app: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", {"absolute": str(tmp_path / "xdg")}.get(variable, variable))
    base = tmp_path / ("xdg" if variable == "absolute" else "home/.cache")
    assert prepare(app, installed=True) == base / "asyncpf" / "numba" / source_hash(app)
    assert not (app / ".cache").exists()


def test_a_setting_of_the_user_is_kept(app: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(kernel_cache.VARIABLE, "/elsewhere")
    assert prepare(app, installed=False) == Path("/elsewhere")
    assert not (app / ".cache").exists()


def _age(parent: Path, ages_s: dict[str, float]) -> None:
    for name, age_s in ages_s.items():
        (parent / name).mkdir(parents=True)
        (parent / name / "kernel.nbc").touch()
        os.utime(parent / name, (NOW_S - age_s, NOW_S - age_s))


def test_old_folders_are_removed_but_for_the_newest(app: Path) -> None:
    parent = app / ".cache" / "numba"
    hour_s = kernel_cache.KEEP_S
    _age(parent, {f"{number:016x}": (2 + number) * hour_s for number in range(4)})
    current = prepare(app, installed=False, now_s=NOW_S)
    assert {path.name for path in parent.iterdir()} == {current.name, f"{0:016x}"}


def test_folders_that_may_be_in_use_and_foreign_names_stay(app: Path) -> None:
    parent = app / ".cache" / "numba"
    recent = {f"{number:016x}": number * 60.0 for number in range(4)}
    _age(parent, {**recent, "of-somebody": 1e6})
    current = prepare(app, installed=False, now_s=NOW_S)
    assert {path.name for path in parent.iterdir()} == {current.name, "of-somebody", *recent}


def test_a_cache_that_cannot_be_written_is_an_error(app: Path) -> None:
    (app / ".cache").touch()
    with pytest.raises(KernelCacheError, match=f"cannot be written .*{kernel_cache.VARIABLE}"):
        prepare(app, installed=False)
    assert kernel_cache.VARIABLE not in os.environ
