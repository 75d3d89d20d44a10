"""Real runs are checked: a broken rule fails the run, rings are recycled while it is under way, the verdict is that of all events."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Final

import pytest

from launcher import commands, kernel_cache, online
from launcher.cli import main
from launcher.execute import ROLES, RunOptions, RunResult, execute
from launcher.online import RunCheck
from launcher.progress import Progress
from launcher.signals import Signals
from proto.topology import Topology, load
from proto.trace import Kind, TraceWriter, read_file
from report import judgement
from report.check.api import check_run
from report.check.online import OnlineCheck
from tests import small_run
from tests.launcher.drive import run_fake

RING_BYTES: Final = 3 << 19
BROKEN: Final = {**ROLES, "host": "tests.launcher.broken_roles:host_main"}
"""Tokens of the host skip numbers."""


def _topology(folder: Path, ops: int) -> Topology:
    path = folder / "small.toml"
    path.write_text(small_run.topology(ops, ops))
    return load(path, [])


def _run(topology: Topology, options: RunOptions) -> RunResult:
    with Signals() as signals:
        return execute(topology, options, signals, Progress(sys.stderr))


@pytest.mark.timeout(300)
def test_a_run_with_a_broken_rule_fails_and_says_which(tmp_path: Path) -> None:
    result = _run(_topology(tmp_path, 300), RunOptions(roles=BROKEN))
    assert result.run_dir is None, "checked before it was removed"
    check = result.summary["check"]
    assert list(check["violations"]) == ["I2"]
    (failure,) = judgement.failures(result.summary)
    assert failure.startswith("I2 is violated")
    assert "ASYNC_PF_NOT_PRESENT" in failure


@pytest.mark.timeout(300)
def test_a_ring_is_recycled_and_the_whole_run_is_judged(tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = _run(_topology(tmp_path, 12_000), RunOptions(out=out, trace_bytes=RING_BYTES))
    check = result.summary["check"]
    assert judgement.failures(result.summary) == []
    assert (check["violations"], check["notes"], check["liveness"]) == ({}, [], True)
    assert check["online_events"] > 0
    assert 0 < check["behind_max"] < check["events"], "the check kept up"
    assert 0 < check["ring_fullest_percent"] < 100
    host = read_file(out / "events" / "host.bin")
    assert host.begin > 0, "it was written more than once"
    assert host.path.stat().st_size <= RING_BYTES + 4096
    verdict = check_run(out)
    assert verdict.ok, [(one.number, one.examples) for one in verdict.violated]
    assert verdict.events < check["events"]
    assert any("recycled" in note for note in verdict.notes)


def test_a_run_whose_processes_record_nothing_says_so() -> None:
    check = run_fake("plain", 0.05).summary["check"]
    assert (check["events"], check["liveness"]) == (0, False)
    assert any("no process recorded anything" in note for note in check["notes"])


def test_what_goes_wrong_in_the_thread_is_raised_where_the_verdict_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: OnlineCheck) -> int:
        raise ZeroDivisionError

    monkeypatch.setattr(OnlineCheck, "turn", broken)
    monkeypatch.setattr(online, "TURN_S", 0.01)
    check = RunCheck(tmp_path, _topology(tmp_path, 1))
    check.start()
    check._thread.join(30)
    with pytest.raises(ZeroDivisionError):
        check.verdict("x", "finished")
    check.close()


def test_a_check_without_compiled_rules_waits_for_them_and_ends_when_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_cache, "has_checker", lambda: False)
    with TraceWriter(tmp_path / "host.bin", 0, 6400) as writer:
        writer.event(Kind.BARRIER)
    check = RunCheck(tmp_path, _topology(tmp_path, 1))
    check.start()
    table = check.verdict("x", "interrupted")
    assert (table["events"], table["online_events"]) == (1, 0)
    check.close()


def test_closing_a_check_that_was_never_started_is_harmless(tmp_path: Path) -> None:
    RunCheck(tmp_path, _topology(tmp_path, 1)).close()


@pytest.mark.timeout(300)
def test_the_command_fails_with_a_broken_rule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def with_broken_host(topology: Topology, options: RunOptions, *more: Any) -> RunResult:
        return execute(topology, RunOptions(out=options.out, roles=BROKEN), *more)

    monkeypatch.setattr(commands, "execute", with_broken_host)
    monkeypatch.setattr(commands, "_title", lambda: None)
    _topology(tmp_path, 200)
    words = ["run", str(tmp_path / "small.toml"), "--out", str(tmp_path / "out")]
    assert main(words) == 1
    shown = capsys.readouterr()
    assert "VIOLATED I2 (" in shown.out
    assert "asyncpf: failed: I2 is violated" in shown.err
