"""The command line: which command, with what, and what becomes of errors. No command runs for real."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from launcher import bootstrap, cli, options
from proto.errors import UserError


def test_without_arguments_it_compares_the_quickstart() -> None:
    request = cli.parse([])
    assert request.command.name == "compare"
    assert request.args.topology == "topologies/quickstart.toml"
    assert request.args.modes == ("sync", "halt", "interrupt")
    assert request.args.repeat == 1


def test_run_takes_everything() -> None:
    words = "run a.toml --mode halt --profile v7 --set a.b=8 --set x=1 --seconds 2.5 --seed 7 --out d --json"
    args = cli.parse(words.split()).args
    assert (args.topology, args.mode, args.profile) == ("a.toml", "halt", "v7")
    assert args.changes == ["a.b=8", "x=1"]
    assert (args.seconds, args.seed, args.out, args.json) == (2.5, 7, Path("d"), True)


def test_a_figure_needs_what_draws_it() -> None:
    words = ["chaos", "a.toml", "--modes", "sync,interrupt", "--down", "1s", "--repeat", "3"]
    request = cli.parse(words)
    assert request.needs == "run"
    assert (request.args.modes, request.args.away_ns, request.args.repeat) == (
        ("sync", "interrupt"),
        1_000_000_000,
        3,
    )
    assert cli.parse([*words, "--plot", "x.svg"]).needs == "plot"
    assert cli.parse(["topologies"]).needs == "run"


def test_chaos_reads_durations() -> None:
    args = cli.parse(["chaos", "a.toml", "--kill", "swapd", "--every", "250ms", "--for", "1.5s"]).args
    assert (args.kill, args.every_ns, args.for_ns) == ("swapd", 250_000_000, 1_500_000_000)


def test_record_leaves_the_command_alone() -> None:
    args = cli.parse(["record", "-o", "x.trace", "--", "ls", "-o", "--", "-h"]).args
    assert args.output == Path("x.trace")
    assert args.rest == ["ls", "-o", "--", "-h"]


def test_test_passes_everything_on() -> None:
    request = cli.parse(["test", "-k", "walk", "--help", "--", "x"])
    assert request.args.rest == ["-k", "walk", "--help", "--", "x"]
    assert request.command.needs == "test"


@pytest.mark.parametrize(
    "words",
    [
        "frobnicate",
        "run",
        "run a.toml b.toml",
        "run a.toml --mode none",
        "run a.toml --mod sync",
        "run a.toml --profile v4",
        "run a.toml --seconds 0",
        "run a.toml --seconds nan",
        "run a.toml --seconds inf",
        "run a.toml --seconds ten",
        "run a.toml --seed -1",
        "run a.toml --seed 9223372036854775808",
        "compare --modes sync,sync",
        "compare --modes sync,none",
        "compare --modes ,",
        "compare --repeat 0",
        "stress --vcpus 0",
        "stress --vcpus ²",
        "stress --vms 0",
        "stress --overcommit 0.9",
        "stress --overcommit nan",
        "stress --overcommit inf",
        "stress --overcommit many",
        "stress --every 1",
        "chaos a.toml --kill launcher",
        "chaos a.toml --down 0ms",
        "chaos a.toml --down 1",
        "chaos a.toml --modes sync,sync",
        "chaos a.toml --modes fast",
        "chaos a.toml --modes sync --repeat 0",
        "chaos a.toml --plot",
        "chaos a.toml --every 500",
        "chaos a.toml --every 0ms",
        "chaos a.toml --every 0.0001us",
        "chaos a.toml --for 1h",
        "trace",
        "topologies x",
    ],
)
def test_bad_usage_exits_with_2(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.parse(words.split())
    assert caught.value.code == 2
    assert "asyncpf" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", [command.name for command in cli.COMMANDS if command.rest is not cli.Rest.ALL]
)
def test_help_of_every_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.parse([name, "--help"])
    assert caught.value.code == 0
    assert f"asyncpf {name}" in capsys.readouterr().out


def test_user_error_is_a_message_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    def handler(_args: argparse.Namespace) -> int:
        raise UserError("no vCPUs", where="a.toml", key="vm.vcpus", found=0, allowed="1 to 1024")

    command = cli.Command("x", "x", cli.COMMANDS[0].add_arguments, handler)
    assert cli.run(cli.Request(command, argparse.Namespace())) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("asyncpf: error: ")
    for part in ("a.toml", "vm.vcpus", "no vCPUs", "0", "1 to 1024"):
        assert part in shown


def test_exit_code_of_the_handler_is_returned() -> None:
    command = cli.Command("x", "x", cli.COMMANDS[0].add_arguments, lambda _args: 1)
    assert cli.run(cli.Request(command, argparse.Namespace())) == 1


@pytest.mark.parametrize(
    ("rest", "expected"), [([], [*cli.WHOLE_SUITE]), (["-x", "tests/proto"], ["-x", "tests/proto"])]
)
def test_test_becomes_pytest(rest: list[str], expected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []

    class Replaced(Exception):
        """Stands for execv, which does not return."""

    def restart(command: list[str]) -> None:
        started.append([str(Path.cwd()), *command])
        raise Replaced

    monkeypatch.setattr(bootstrap, "restart", restart)
    monkeypatch.chdir("/")
    with pytest.raises(Replaced):
        cli.cmd_test(argparse.Namespace(rest=rest))
    assert started == [[str(bootstrap.APP_DIR), sys.executable, "-m", "pytest", *expected]]


@pytest.mark.parametrize(("stdout", "good"), [("/dev/null", True), ("/dev/full", False)])
def test_output_that_cannot_be_written_is_no_success(stdout: str, good: bool) -> None:
    """A command leaves without taking the interpreter apart; what it had to say must be out before."""
    with Path(stdout).open("w") as file:
        done = subprocess.run(
            [sys.executable, str(bootstrap.APP_DIR / "launch.py"), "topologies"],
            stdout=file,
            stderr=subprocess.PIPE,
            check=False,
            timeout=60,
        )
    assert (done.returncode == 0) is good


def test_test_without_tests_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "APP_DIR", tmp_path)
    with pytest.raises(UserError, match="not installed"):
        cli.cmd_test(argparse.Namespace(rest=[]))


@pytest.mark.parametrize(
    ("text", "expected_ns"),
    [
        ("500ms", 500_000_000),
        ("20s", 20_000_000_000),
        ("2m", 120_000_000_000),
        ("7us", 7_000),
        ("0.5ms", 500_000),
        ("0.001us", 1),
    ],
)
def test_durations(text: str, expected_ns: int) -> None:
    assert options.duration_ns(text) == expected_ns
