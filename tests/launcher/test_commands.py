"""What the commands make of their arguments, and which exit code a run gets."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from launcher import commands
from launcher.blame import Story
from launcher.commands import find_topology, rotation, with_stamp
from launcher.execute import RunOptions, RunResult
from launcher.zygote_link import APP_DIR
from proto.errors import UserError
from proto.topology import Topology, load
from tests.report.test_summary import full_summary


def test_every_mode_goes_first_in_turn() -> None:
    assert rotation(("a", "b", "c"), 3) == [
        *((0, mode) for mode in "abc"),
        *((1, mode) for mode in "bca"),
        *((2, mode) for mode in "cab"),
    ]


def test_a_stamp_task_is_added_only_where_there_is_none() -> None:
    plain = Topology.from_dict({"vm": [{"task": [{"workload": "zipf"}]}]})
    assert [task.workload for task in with_stamp(plain).vm[0].task] == ["zipf", "stamp"]
    assert with_stamp(with_stamp(plain)) == with_stamp(plain)


def test_a_stamp_task_that_does_not_fit_is_refused() -> None:
    full = Topology.from_dict({"vm": [{"memory_mib": 65, "task": [{"memory_kib": 64 * 1024 - 512}]}]})
    with pytest.raises(UserError, match="MiB, the guest has less"):
        with_stamp(full)


def test_topologies_are_found_by_path_and_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ready_made = APP_DIR / "topologies" / "quickstart.toml"
    monkeypatch.chdir(tmp_path)
    for name in ("quickstart", "quickstart.toml", "topologies/quickstart.toml", str(ready_made)):
        assert find_topology(name) == ready_made
    Path("quickstart.toml").touch()
    assert find_topology("quickstart.toml") == Path("quickstart.toml"), "the user's own file comes first"
    with pytest.raises(UserError, match="no such file"):
        load(find_topology("nowhere"))


def test_topologies_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.cmd_topologies(argparse.Namespace()) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == sorted(
        path.stem for path in (APP_DIR / "topologies").glob("*.toml")
    )
    assert all(len(line.split()) > 3 for line in lines)


STORY = Story("vcpu-1", 12, "killed by SIGKILL", ["an event"], "", ["a log line"])


class _Runs:
    """Stands for `execute`: gives summaries without running anything, and notes what was asked for."""

    def __init__(self, **changes: Any) -> None:
        self.changes = changes
        self.asked: list[tuple[str, float, Path | None]] = []
        self.topologies: list[Topology] = []
        self.options: list[RunOptions] = []

    def __call__(self, topology: Topology, options: RunOptions, *_: Any) -> RunResult:
        self.topologies.append(topology)
        self.asked.append((topology.run.mode, topology.run.seconds, options.out))
        self.options.append(options)
        summary = full_summary()
        summary["mode"] = topology.run.mode
        for table, values in self.changes.items():
            if isinstance(values, dict):
                summary[table] |= values
            else:
                summary[table] = values
        return RunResult(summary, ["a detail"], [STORY], options.out)


def _args(**more: Any) -> argparse.Namespace:
    given: dict[str, Any] = {"topology": "quickstart", "changes": [], "out": None, "json": True}
    given |= {"profile": None, "seconds": None, "seed": None, "log_inputs": False}
    given |= {"restart_at_ns": [], "save_at_ns": 0, "image": None, "restore": None}
    given |= {"modes": (), "plot": None, "away_ns": 0, "repeat": None}
    given |= {"kill": None, "every_ns": None, "for_ns": None, "faults": [], "random": 0}
    return argparse.Namespace(**(given | more))


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({}, 0),
        ({"ended": "interrupted"}, 1),
        ({"ended": "failed:host-0 exit code 1"}, 1),
        ({"integrity": {"errors": 1}}, 1),
        ({"tasks": {"killed": 1}}, 1),
        ({"check": {"violations": {"I9": 1}, "examples": {"I9": ["the rule"]}}}, 1),
    ],
)
def test_the_exit_code_of_a_run_is_its_verdict(
    changes: dict[str, Any], code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(commands, "execute", _Runs(**changes))
    monkeypatch.setattr(commands, "_title", lambda: None)
    assert commands.cmd_run(_args(mode="sync")) == code
    shown = capsys.readouterr()
    assert json.loads(shown.out)["mode"] == "sync"
    assert ("asyncpf: failed: " in shown.err) is (code == 1)
    for text in ("vcpu-1 (process 12): killed by SIGKILL", "an event", "a log line"):
        assert (text in shown.err) is (code == 1)


def test_chaos_under_modes_takes_turns_and_tells_what_failed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(commands, "_title", lambda: None)
    runs = _Runs(integrity={"reads_checked": 0})
    monkeypatch.setattr(commands, "execute", runs)
    args = _args(
        modes=("sync", "interrupt"), repeat=2, every_ns=10**9, for_ns=3 * 10**9, away_ns=10**8, out=tmp_path
    )
    assert commands.cmd_chaos(args) == 1
    asked = [(mode, out.name if out else "") for mode, _, out in runs.asked]
    assert asked == [
        ("sync", "sync-1"),
        ("interrupt", "interrupt-1"),
        ("interrupt", "interrupt-2"),
        ("sync", "sync-2"),
    ]
    assert {options.away_ns for options in runs.options} == {10**8}
    assert {topology.fault[0].every_ms for topology in runs.topologies} == {1000.0}
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((tmp_path / "compare.json").read_text())
    assert len(report["failures"]) == 4
    assert report["outage"]["modes"]["sync"]["runs"] == 2
    args.json, args.out = False, None
    commands.cmd_chaos(args)
    assert capsys.readouterr().out == "no outage was measured\n", "the made-up runs have no rows"


@pytest.mark.parametrize(
    ("more", "word"),
    [
        ({"away_ns": 10**9}, "--down"),
        ({"plot": Path("figure.png")}, "--plot"),
        ({"modes": ("sync", "exception"), "profile": "mainline"}, "mode"),
        ({"modes": ("sync",), "log_inputs": True}, "--log-inputs"),
        ({"repeat": 3}, "--repeat"),
    ],
)
def test_chaos_refuses_before_the_first_run(
    more: dict[str, Any], word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = _Runs()
    monkeypatch.setattr(commands, "execute", runs)
    with pytest.raises(UserError, match=word):
        commands.cmd_chaos(_args(every_ns=10**9, for_ns=3 * 10**9, **more))
    assert runs.asked == []


def test_chaos_and_stress_must_have_checked_something(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "_title", lambda: None)
    chaos: dict[str, Any] = {"kill": "swapd", "faults": [], "random": 0}
    for reads, code in ((0, 1), (5, 0)):
        runs = _Runs(integrity={"reads_checked": reads})
        monkeypatch.setattr(commands, "execute", runs)
        assert commands.cmd_chaos(_args(**chaos, every_ns=10**8, for_ns=3 * 10**9)) == code
        assert runs.asked[0][1] == 3.0, "the run lasts as long as the chaos"
        with_another = _args(every_ns=10**8, for_ns=3 * 10**9, faults=["drop nth=3"])
        assert commands.cmd_chaos(with_another) == code
        assert [(fault.do, fault.every_ms, fault.nth) for fault in runs.topologies[-1].fault] == [
            ("kill", 100.0, 0),
            ("drop", 0.0, 3),
        ]
        stress = {"vcpus": 3, "vms": 2, "overcommit": 2.5, "every_ns": 10**8}
        assert commands.cmd_stress(_args(**stress, chaos=True, seconds=4.0)) == code
        (fault,) = runs.topologies[-1].fault
        assert (fault.do, fault.on, fault.every_ms) == ("kill", "swapd", 100.0)
        assert runs.asked[-1][1] == 4.0
        assert commands.cmd_stress(_args(**{**stress, "every_ns": None}, chaos=True, seconds=4.0)) == code
        assert runs.topologies[-1].fault[0].every_ms == 1000.0
        with pytest.raises(UserError, match="--every"):
            commands.cmd_stress(_args(**stress, chaos=False))
        assert commands.cmd_stress(_args(**{**stress, "every_ns": None}, chaos=False)) == code
        assert not runs.topologies[-1].fault


@pytest.mark.parametrize(
    ("changes", "seconds"), [([], 20.0), (["run.seconds=60"], 60.0), (["vm.vcpus=2"], 20.0)]
)
@pytest.mark.parametrize("random", [0, 3])
def test_a_chaos_lasts_20_s_unless_somebody_says_otherwise(
    changes: list[str], seconds: float, random: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "_title", lambda: None)
    runs = _Runs()
    monkeypatch.setattr(commands, "execute", runs)
    commands.cmd_chaos(_args(changes=changes, random=random))
    assert runs.topologies[0].run.seconds == seconds


def test_chaos_leaves_the_restarts_of_daemons_elsewhere_to_those_who_start_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "far.toml"
    file.write_text('[[swapd]]\n[[swapd]]\nconnect = "tcp://127.0.0.1:7000"\n')
    monkeypatch.setattr(commands, "_title", lambda: None)
    runs = _Runs()
    monkeypatch.setattr(commands, "execute", runs)
    commands.cmd_chaos(_args(topology=str(file), kill="swapd-0", every_ns=10**9))
    assert runs.topologies[0].fault[0].on == "swapd-0"
    with pytest.raises(UserError, match="runs elsewhere and is not this run's to damage"):
        commands.cmd_chaos(_args(topology=str(file)))


def test_compare_runs_every_mode_and_names_the_directories(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = _Runs(work={"total": 10})
    monkeypatch.setattr(commands, "execute", runs)
    monkeypatch.setattr(commands, "_title", lambda: None)
    out = tmp_path / "out"
    args = _args(modes=("sync", "interrupt"), repeat=2, out=out)
    assert commands.cmd_compare(args) == 0
    assert [(mode, folder and folder.name) for mode, _, folder in runs.asked] == [
        ("sync", "sync-1"),
        ("interrupt", "interrupt-1"),
        ("interrupt", "interrupt-2"),
        ("sync", "sync-2"),
    ]
    shown = json.loads(capsys.readouterr().out)
    assert [row["work_ratio"] for row in shown["rows"]] == [1.0, 1.0]
    assert json.loads((out / "compare.json").read_text()) == shown


def test_compare_refuses_an_impossible_mode_before_it_runs_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runs = _Runs()
    monkeypatch.setattr(commands, "execute", runs)
    with pytest.raises(UserError, match="do not go together"):
        commands.cmd_compare(_args(modes=("sync", "interrupt"), repeat=1, profile="v7"))
    assert runs.asked == []
