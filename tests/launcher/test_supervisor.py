"""Whole runs with fake roles: how they end, what is said about it, and in which order daemons are replaced."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest

from launcher.execute import RunResult
from proto.errors import UserError
from tests.launcher.drive import run_fake, with_roles


def _events(out: Path) -> list[str]:
    """What the host heard, without the times."""
    return [line.partition(" ")[2] for line in (out / "host-heard.txt").read_text().splitlines()]


def test_a_normal_run_leaves_a_complete_directory(tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = run_fake("plain", 0.3, options=with_roles(out))
    assert result.summary["ended"] == "finished", result
    assert result.details == []
    assert result.run_dir == out
    assert result.summary["work"]["total"] == 0, (
        "the topology has bm tasks, whose counters the fakes do not touch"
    )
    assert result.summary["integrity"]["reads_checked"] > 0
    assert 0.3 <= result.summary["seconds"] < 10
    assert result.summary["started_in_s"] is not None
    assert json.loads((out / "summary.json").read_text()) == result.summary
    run = json.loads((out / "run.json").read_text())
    assert run["ended"] == "finished"
    assert run["swap_files"][0]["filesystem"]
    assert stat.S_IMODE(out.stat().st_mode) == 0o700
    assert {path.name for path in out.iterdir()} == {
        "logs",
        "events",
        "run.json",
        "summary.json",
        "host-heard.txt",
    }, "no socket is left"
    assert {path.name for path in (out / "logs").iterdir()} == {
        "zygote-0.log",
        "host-0.log",
        "swapd-0.log",
        "vcpu-0.log",
        "vcpu-1.log",
    }
    assert "1 messages that break the contract" in result.summary["warnings"][0], (
        "what the fake host sends first"
    )
    assert _events(out)[-1].startswith("Bye(")


def test_a_long_run_directory_gets_its_socket_elsewhere(tmp_path: Path) -> None:
    out = tmp_path / ("x" * 100)
    assert run_fake("plain", 0.05, options=with_roles(out)).summary["ended"] == "finished"


@pytest.mark.parametrize(
    ("script", "ended", "said"),
    [
        ("vcpu-raises", "failed:vcpu-1 exit code 70", "RuntimeError: the story of vCPU 1"),
        ("vcpu-leaves", "failed:vcpu-0 exit code 0", ""),
        ("refuses", "failed:the host has a reason", ""),
    ],
)
def test_a_failed_run_says_why(script: str, ended: str, said: str) -> None:
    result = run_fake(script, 20.0)
    assert (result.summary["ended"], result.run_dir) == (ended, None)
    (story,) = result.stories
    assert said in "\n".join(story.log)
    assert f"failed:{story.name} {story.how}" == ended or not story.how


def test_a_daemon_that_cannot_start_is_given_up() -> None:
    result = run_fake("swapd-crashes", 20.0)
    assert result.summary["ended"].startswith(
        "failed:swapd-0 died 5 times in a row within 200 ms of its start"
    )
    assert result.summary["ended"].endswith("at last killed by SIGABRT")
    # On a busy machine a start may take longer than that, and then counts as one that worked.
    assert result.summary["restarts"] >= 4


def test_daemons_that_hang_are_replaced_in_order(tmp_path: Path) -> None:
    result = run_fake("hang", 2.0, options=with_roles(tmp_path / "run"))
    assert result.summary["ended"] == "finished"
    assert result.summary["restarts"] == 2
    daemon = [
        line.replace(", pid=", " pid=").split(" pid=")[0]
        for line in _events(tmp_path / "run")
        if "Daemon" in line or "role=3" in line
    ]
    assert daemon == [
        "Hello(role=3, number=0, epoch=0",
        "DaemonDown(daemon=0, epoch=0)",
        "DaemonFenced(daemon=0, epoch=0)",
        "Hello(role=3, number=0, epoch=1",
        "DaemonDown(daemon=0, epoch=1)",
        "DaemonFenced(daemon=0, epoch=1)",
        "Hello(role=3, number=0, epoch=2",
    ]


def _phases(script: str, setup_s: float, drain_s: float) -> RunResult:
    return run_fake(script, 0.1, options=with_roles(setup_s=setup_s, drain_s=drain_s))


def test_a_run_that_never_starts_or_ends_is_ended_with_the_state_of_each_vcpu() -> None:
    never_starts = _phases("never-starts", 4.0, 30.0)
    assert never_starts.summary["ended"] == "failed:timeout while filling memory"
    assert never_starts.summary["seconds"] == 0.0
    never_ends = _phases("never-ends", 30.0, 0.3)
    assert never_ends.summary["ended"] == "failed:timeout while running"
    for result in (never_starts, never_ends):
        assert [line.split(":")[0] for line in result.details] == ["vcpu-0", "vcpu-1"]
        assert "outside, idle, 1 exits" in result.details[0]


def test_chaos_kills_daemons_and_the_summary_tells_about_the_outages(tmp_path: Path) -> None:
    faults = [("--kill", {"do": "kill", "every_ms": 200.0, "until": 0.9})]
    result = run_fake("plain", 1.2, options=with_roles(tmp_path / "run"), faults=faults)
    summary = result.summary
    assert summary["ended"] == "finished", result
    assert 1 <= summary["chaos"]["kills"] <= 4
    assert summary["restarts"] == summary["chaos"]["kills"]
    assert summary["outage"]["count"] >= 1
    assert summary["outage"]["total_ms"] > 0
    assert summary["outage"]["work_per_100ms_up"] > 0
    assert {path.name for path in (tmp_path / "run" / "logs").glob("swapd*")} == {"swapd-0.log"}


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        (("swapd.size_mib=2000000",), "swapd[0].directory"),
        (("vm.memory_mib=900000", "host.allowance_mib=800000", "swapd.size_mib=16"), ""),
    ],
)
def test_what_the_machine_cannot_provide_is_refused_without_leftovers(
    changes: tuple[str, ...], key: str, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with pytest.raises(UserError) as caught:
        run_fake("plain", 1.0, changes, with_roles(out))
    assert caught.value.key == key
    assert caught.value.allowed
    assert not out.exists()


def test_too_few_descriptors_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    monkeypatch.setattr("resource.getrlimit", lambda _: (64, 128))
    with pytest.raises(UserError, match="too few file descriptors") as caught:
        run_fake("plain", 1.0, options=with_roles(out))
    assert "ulimit" in caught.value.where
    assert not out.exists()


def test_a_run_directory_with_something_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        run_fake("plain", 1.0, options=with_roles(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_swap_on_a_file_system_in_memory_is_refused_unless_asked_for() -> None:
    shm = ("swapd.directory=/dev/shm",)
    with pytest.raises(UserError, match="which is memory") as caught:
        run_fake("plain", 0.1, shm)
    assert "allow_tmpfs" in caught.value.allowed
    result: Any = run_fake("plain", 0.05, (*shm, "swapd.allow_tmpfs=true"))
    assert result.summary["ended"] == "finished"
