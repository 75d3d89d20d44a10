"""The commands that run nothing: help, list of topologies, figures of a trace; and the two that run more than one thing."""

from __future__ import annotations

import json

from launcher.cli import COMMANDS
from tests.e2e.runs import BM, ROOT, Caller, Runner


def test_help_names_every_command(runner: Runner) -> None:
    ended = runner.command("--help")
    assert ended.code == 0
    assert ended.stderr == "\n"
    for command in COMMANDS:
        assert command.name in ended.stdout
        assert command.help.split()[0] in ended.stdout


def test_the_ready_made_topologies_have_a_line_each(caller: Caller) -> None:
    ended = caller.command("topologies")
    assert ended.code == 0
    lines = dict(line.split(maxsplit=1) for line in ended.stdout.splitlines())
    assert {"quickstart", "seed-benchmark", "replay", "many-vcpus", "two-swapds", "replicas"} <= set(lines)
    assert set(lines) == {path.stem for path in (ROOT / "topologies").glob("*.toml")}


def test_figures_of_a_shipped_trace(caller: Caller) -> None:
    path = str(ROOT / "traces" / "sort.apft")
    shown, figures = caller.command("trace", path), caller.command("trace", path, "--json")
    assert (shown.code, figures.code) == (0, 0)
    values = json.loads(figures.stdout)
    assert values["accesses"] == values["reads"] + values["writes"] >= 1_000_000
    assert values["pages"] >= 1500
    for part in ("accesses", "footprint", "reads", "writes", "reuse", f"{values['accesses']:,}"):
        assert part in shown.stdout


def test_compare_shows_each_mode_and_a_ratio(runner: Runner) -> None:
    path = runner.file(BM)
    ended = runner.command("compare", str(path), "--modes", "sync,interrupt", "--seconds", "0.3", "--json")
    assert ended.code == 0, ended.stderr
    report = json.loads(ended.stdout)
    assert {mode: len(runs) for mode, runs in report["runs"].items()} == {"sync": 1, "interrupt": 1}
    assert report["failures"] == []
    assert report["rows"]
    assert all(run["integrity"]["errors"] == 0 for runs in report["runs"].values() for run in runs)


def test_a_run_without_json_is_for_people(runner: Runner) -> None:
    ended = runner.command("run", str(runner.file(BM)), "--seconds", "0.2")
    assert ended.code == 0, ended.stderr
    for part in ("ended", "finished", "faults", "integrity", "0 wrong"):
        assert part in ended.stdout
    assert ": running" in ended.stderr


def test_stress_of_two_guests_whose_daemon_is_killed_again_and_again(runner: Runner) -> None:
    words = (
        "--vcpus",
        "8",
        "--vms",
        "2",
        "--seconds",
        "2",
        "--overcommit",
        "3.5",
        "--chaos",
        "--every",
        "300ms",
    )
    ended = runner.command("stress", *words, "--json")
    assert ended.code == 0, ended.stderr
    summary = ended.summary
    assert (summary["vcpus"], summary["ended"]) == (8, "finished")
    assert summary["integrity"]["reads_checked"] > 0
    assert summary["integrity"]["errors"] == 0
    assert summary["tasks"]["done"] == 16, "a checked and a random task on each vCPU of both guests"
    assert summary["chaos"]["kills"] > 0
    assert summary["restarts"] >= summary["chaos"]["kills"]
    assert summary["check"]["violations"] == {}
    assert 0 <= summary["check"]["behind_end"] <= summary["check"]["behind_max"]
    growth = summary["growth"]
    assert (growth["judged"], growth["failures"]) == (False, [])
    assert growth["samples"] >= 2
    rows = {(row["of"], row["what"]): row for row in growth["series"]}
    assert len(rows) == 12
    for row in rows.values():
        assert row["start"] > 0, row
        assert row["end"] > 0, row
    assert rows["vCPUs, sum", "MiB"]["end"] > rows["vCPUs, largest", "MiB"]["end"]
