"""The bootstrap: what it makes, when it makes nothing, and what it says when it cannot.

Commands go to a fake runner, which makes what venv and pip would make; one test makes a real, empty
environment.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import NoReturn

import pytest

import launch
from launcher import bootstrap, kernel_cache
from launcher.bootstrap import BootstrapError, Environment

ROOT = Path(__file__).resolve().parents[2]
LACKING = ["zmq"]


class FakeCommands:
    """Stands for venv and pip: records each command, makes the interpreter, fails where told to.

    fail_at: a word of a command; that command returns 1, or raises `error` after having done half of its
    work.
    """

    def __init__(self) -> None:
        self.commands: list[list[str]] = []
        self.environments: list[Mapping[str, str]] = []
        self.fail_at = ""
        self.error: BaseException | None = None
        self.before: Callable[[], None] | None = None

    def __call__(self, command: Sequence[str], environment: Mapping[str, str]) -> int:
        self.commands.append(list(command))
        self.environments.append(environment)
        if self.before is not None:
            self.before()
        if "venv" in command:
            python = Path(command[-1]) / "bin" / "python"
            python.parent.mkdir()
            python.symlink_to(sys.executable)
        if self.fail_at and self.fail_at in command:
            if self.error is not None:
                raise self.error
            return 1
        return 0

    def kinds(self) -> list[str]:
        """What was done since the last call: venv, run, test or probe."""
        kinds = []
        for command in self.commands:
            if "venv" in command:
                kinds.append("venv")
            elif "pip" in command:
                kinds.append(Path(command[-1]).stem)
            else:
                kinds.append("probe")
        self.commands.clear()
        return kinds


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "requirements").mkdir()
    (tmp_path / "requirements" / "run.txt").write_text("one==1 \\\n    --hash=sha256:00\n")
    (tmp_path / "requirements" / "test.txt").write_text("one==1 \\\n    --hash=sha256:00\ntwo==2\n")
    return tmp_path


@pytest.fixture
def fake() -> FakeCommands:
    return FakeCommands()


@pytest.fixture
def environment(checkout: Path, fake: FakeCommands) -> Environment:
    return Environment(checkout, run=fake)


# launch.py itself


def test_help_needs_only_the_standard_library() -> None:
    done = subprocess.run(
        [sys.executable, "-S", "-E", str(ROOT / "launch.py"), "--help"],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert done.returncode == 0, done.stderr
    assert "compare" in done.stdout


def test_launch_parses_on_older_pythons() -> None:
    ast.parse((ROOT / "launch.py").read_text(), feature_version=(3, 8))


def test_older_python_gets_a_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launch, "OLDEST_PYTHON", (99, 0))
    assert launch.main([]) == 2
    assert "3.11 or newer" in capsys.readouterr().err


def test_bootstrap_error_is_a_message_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_args: object, **_options: object) -> NoReturn:
        raise BootstrapError("no such thing")

    monkeypatch.setattr(bootstrap, "prepare", fail)
    assert launch.main(["topologies"]) == 2
    assert capsys.readouterr().err == "asyncpf: error: no such thing\n"


# prepare


def test_starts_at_once_when_everything_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "missing_modules", lambda _needs: [])
    monkeypatch.setattr(bootstrap, "Environment", None)  # using it would fail
    bootstrap.prepare("test", [], installed=False)
    assert Path(os.environ[kernel_cache.VARIABLE]).is_dir()


def test_restarts_in_the_environment_with_the_same_arguments(
    monkeypatch: pytest.MonkeyPatch, environment: Environment
) -> None:
    class Replaced(Exception):
        """Stands for execv, which does not return."""

    def execv(path: str, command: list[str]) -> NoReturn:
        raise Replaced(path, command)

    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setattr(bootstrap, "missing_modules", lambda _needs: LACKING)
    monkeypatch.setattr(bootstrap, "Environment", lambda _root: environment)
    with pytest.raises(Replaced) as caught:
        bootstrap.prepare("run", ["run", "x.toml", "--seed", "1"], installed=False)
    python = str(environment.python)
    script = str(bootstrap.APP_DIR / "launch.py")
    assert caught.value.args == (python, [python, script, "run", "x.toml", "--seed", "1"])


def test_an_installed_wheel_makes_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "missing_modules", lambda _needs: LACKING)
    monkeypatch.setattr(bootstrap, "Environment", None)
    with pytest.raises(BootstrapError, match="zmq; install asyncpf again"):
        bootstrap.prepare("run", [], installed=True)


def test_missing_modules_are_found_without_importing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bootstrap.MODULES, "run", ("this", "no_such_module_of_asyncpf"))
    assert bootstrap.missing_modules("run") == ["no_such_module_of_asyncpf"]
    assert "this" not in sys.modules


# making the environment


def test_a_new_environment(
    environment: Environment, fake: FakeCommands, capsys: pytest.CaptureFixture[str]
) -> None:
    assert environment.ensure("run", LACKING) == environment.python
    pip = fake.commands[1]
    assert {"--require-hashes", "--only-binary", "--no-cache-dir"} <= set(pip)
    assert pip[-2:] == ["--requirement", str(environment.root / "requirements" / "run.txt")]
    assert fake.kinds() == ["venv", "run"]
    for variables in fake.environments:
        assert Path(variables["TMPDIR"]).parent == environment.folder, "temporary files leave the checkout"
    said = capsys.readouterr().err.splitlines()
    assert all(line.startswith("asyncpf: ") for line in said)
    assert any("installing 1 packages" in line for line in said)
    assert sorted(path.name for path in environment.root.iterdir()) == [".cache", ".venv", "requirements"]


def test_a_complete_environment_is_used_without_running_anything(
    environment: Environment, fake: FakeCommands, capsys: pytest.CaptureFixture[str]
) -> None:
    environment.ensure("run", LACKING)
    fake.kinds()
    capsys.readouterr()
    assert environment.ensure("run", LACKING) == environment.python
    assert fake.kinds() == []
    assert capsys.readouterr().err == ""


def test_the_test_set_is_added_to_the_run_set(environment: Environment, fake: FakeCommands) -> None:
    environment.ensure("run", LACKING)
    environment.ensure("test", LACKING)
    assert fake.kinds() == ["venv", "run", "test"]
    environment.ensure("run", LACKING)
    environment.ensure("test", LACKING)
    assert fake.kinds() == []


def test_the_test_set_serves_the_run(environment: Environment, fake: FakeCommands) -> None:
    environment.ensure("test", LACKING)
    environment.ensure("run", LACKING)
    assert fake.kinds() == ["venv", "test"]


def test_what_is_added_leaves_the_other_sets_complete(
    checkout: Path, environment: Environment, fake: FakeCommands
) -> None:
    (checkout / "requirements" / "plot.txt").write_text("one==1 \\\n    --hash=sha256:00\nthree==3\n")
    environment.ensure("test", LACKING)
    environment.ensure("plot", ["matplotlib"])
    assert fake.kinds() == ["venv", "test", "plot"]
    for needs in ("run", "test", "plot"):
        environment.ensure(needs, LACKING)
    assert fake.kinds() == []
    (checkout / "requirements" / "test.txt").write_text("one==1 \\\n    --hash=sha256:00\ntwo==3\n")
    environment.ensure("plot", LACKING)
    environment.ensure("test", LACKING)
    assert fake.kinds() == ["test"]


def test_an_installed_program_says_which_extra_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "missing_modules", lambda _needs: ["matplotlib"])
    with pytest.raises(BootstrapError, match=r"not installed: matplotlib; install asyncpf\[plot\]"):
        bootstrap.prepare("plot", [], installed=True)


@pytest.mark.parametrize("fail_at", ["venv", "pip"])
@pytest.mark.parametrize("error", [None, KeyboardInterrupt()], ids=["failed", "interrupted"])
def test_an_incomplete_environment_is_made_again(
    environment: Environment, fake: FakeCommands, fail_at: str, error: BaseException | None
) -> None:
    fake.fail_at, fake.error = fail_at, error
    with pytest.raises(KeyboardInterrupt if error else BootstrapError):
        environment.ensure("run", LACKING)
    (environment.folder / "half").touch()
    fake.kinds()
    fake.fail_at = ""
    environment.ensure("run", LACKING)
    assert fake.kinds() == ["venv", "run"]
    assert not (environment.folder / "half").exists()


def test_an_interrupted_addition_is_made_again(environment: Environment, fake: FakeCommands) -> None:
    environment.ensure("run", LACKING)
    fake.fail_at, fake.error = "pip", KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        environment.ensure("test", LACKING)
    fake.kinds()
    fake.fail_at = ""
    environment.ensure("run", LACKING)
    assert fake.kinds() == ["venv", "run"]


def test_a_changed_lock_file_makes_it_again(environment: Environment, fake: FakeCommands) -> None:
    environment.ensure("run", LACKING)
    environment.lock_file("run").write_text("one==2\n")
    environment.ensure("run", LACKING)
    assert fake.kinds() == ["venv", "run", "venv", "run"]


def test_a_lost_interpreter_makes_it_again(environment: Environment, fake: FakeCommands) -> None:
    environment.ensure("run", LACKING)
    environment.python.unlink()
    environment.python.symlink_to("/nonexistent/python")
    environment.ensure("run", LACKING)
    assert fake.kinds() == ["venv", "run", "venv", "run"]


@pytest.mark.parametrize("stamp", ["", "null", "[]", '{"sets": 3}', '{"python": 1, "sets": {}}', "\0"])
def test_a_strange_stamp_counts_as_none(environment: Environment, fake: FakeCommands, stamp: str) -> None:
    environment.ensure("run", LACKING)
    (environment.folder / bootstrap.STAMP).write_text(stamp)
    environment.ensure("run", LACKING)
    assert fake.kinds() == ["venv", "run", "venv", "run"]


def test_leftovers_of_a_killed_bootstrap_are_removed(environment: Environment) -> None:
    leftover = environment.root / ".venv.tmp-1"
    leftover.mkdir()
    (leftover / "file").touch()
    environment.ensure("run", LACKING)
    assert not leftover.exists()


# what it must not touch


def _foreign(environment: Environment) -> Path:
    environment.python.parent.mkdir(parents=True)
    environment.python.symlink_to(sys.executable)
    return environment.folder


def test_a_foreign_environment_that_serves_is_used(environment: Environment, fake: FakeCommands) -> None:
    _foreign(environment)
    assert environment.ensure("run", LACKING) == environment.python
    assert fake.kinds() == ["probe"]


def test_a_foreign_environment_that_lacks_something_is_refused(
    environment: Environment, fake: FakeCommands
) -> None:
    folder = _foreign(environment)
    fake.fail_at = "zmq"
    with pytest.raises(BootstrapError, match=r"not made by launch\.py"):
        environment.ensure("run", LACKING)
    assert sorted(path.name for path in folder.rglob("*")) == ["bin", "python"]


def test_a_damaged_environment_does_not_restart_for_ever(
    environment: Environment, fake: FakeCommands
) -> None:
    environment.ensure("run", LACKING)
    fake.kinds()
    environment.prefix = environment.folder
    with pytest.raises(BootstrapError, match=r"damaged \(not found: zmq\)"):
        environment.ensure("run", LACKING)
    assert fake.kinds() == []


# what it says


@pytest.mark.parametrize("module", ["venv", "ensurepip"])
def test_a_python_without_venv_names_the_package(
    environment: Environment, fake: FakeCommands, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    find_spec = importlib.util.find_spec

    def without(name: str) -> ModuleSpec | None:
        return None if name == module else find_spec(name)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    with pytest.raises(BootstrapError, match=rf"no module {module}; .*apt install python3-venv"):
        environment.ensure("run", LACKING)
    assert fake.kinds() == []
    assert not environment.folder.exists()


def test_a_failed_installation_says_what_and_what_next(environment: Environment, fake: FakeCommands) -> None:
    fake.fail_at = "pip"
    with pytest.raises(BootstrapError, match=r"could not install .*run\.txt \(exit code 1\).*begins afresh"):
        environment.ensure("run", LACKING)


def test_a_checkout_that_cannot_be_written(environment: Environment, fake: FakeCommands) -> None:
    (environment.root / ".cache").touch()
    with pytest.raises(BootstrapError, match=r"\.cache"):
        environment.ensure("run", LACKING)
    assert fake.kinds() == []


# two at a time


def test_two_bootstraps_make_one_environment(
    checkout: Path, environment: Environment, fake: FakeCommands, monkeypatch: pytest.MonkeyPatch
) -> None:
    second_waits = threading.Event()
    monkeypatch.setattr(bootstrap, "LOCK_POLL_S", 0.01)
    monkeypatch.setattr(bootstrap, "say", lambda text: second_waits.set() if "waiting" in text else None)
    second = threading.Thread(target=lambda: Environment(checkout, run=fake).ensure("run", LACKING))

    def start_second() -> None:
        fake.before = None
        second.start()
        assert second_waits.wait(30)

    fake.before = start_second
    environment.ensure("run", LACKING)
    second.join(30)
    assert not second.is_alive()
    assert fake.kinds() == ["venv", "run"]


def test_waiting_for_another_bootstrap_is_bounded(
    checkout: Path, environment: Environment, fake: FakeCommands
) -> None:
    def start_second() -> None:
        with pytest.raises(BootstrapError, match="held for 0 s by another start"):
            Environment(checkout, run=fake, lock_wait_s=0).ensure("run", LACKING)

    fake.before = start_second
    environment.ensure("run", LACKING)
    assert fake.kinds() == ["venv", "run"]


# for real


def test_a_real_environment(checkout: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name in ("run", "test"):
        (checkout / "requirements" / f"{name}.txt").write_text("# nothing\n")
    environment = Environment(checkout)
    python = environment.ensure("run", LACKING)
    assert capfd.readouterr().out == "", "stdout belongs to the command"
    program = "import json, sys; print(json.dumps([sys.prefix, sys.base_prefix]))"
    done = subprocess.run([python, "-c", program], capture_output=True, text=True, check=True, timeout=30)
    assert json.loads(done.stdout) == [str(environment.folder), sys.base_prefix]
    assert sorted(path.name for path in checkout.iterdir()) == [".cache", ".venv", "requirements"]
