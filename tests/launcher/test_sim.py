"""The command `sim`: what it prints, what it keeps, and what it does about a failing seed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from launcher import cli
from proto.profile import PROFILES
from sim.draw import draw
from sim.plan import load


def sim(*words: str) -> int:
    return cli.main(["sim", *words])


def test_one_seed_shows_what_it_drew_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert sim("--seed", "7", "--profile", "v3", "--faults", "kill,drop") == 0
    first, last = capsys.readouterr().out.splitlines()[:2]
    assert first.startswith("seed=7 profile=v3 mode=")
    assert last.startswith("1 seeds, 0 failed; ")


def test_a_range_keeps_each_seed_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sim("--seeds", "3..5", "--json", "--out", str(tmp_path)) == 0
    assert sorted(path.parent.name for path in tmp_path.glob("*/events.jsonl")) == ["3", "4", "5"]
    event = json.loads((tmp_path / "3" / "events.jsonl").read_text().splitlines()[0])
    assert {"lamport", "t_ns", "proc", "vm", "vcpu", "kind"} <= set(event)
    totals = json.loads(capsys.readouterr().out)
    assert (totals["seeds"], totals["failed"], totals["passed"]) == (3, [], True)
    assert totals["lifecycles"] > 0


def test_a_kept_plan_is_the_run_again(tmp_path: Path) -> None:
    assert sim("--seed", "9", "--out", str(tmp_path / "a")) == 0
    assert sim("--plan", str(tmp_path / "a" / "plan.toml"), "--out", str(tmp_path / "b")) == 0
    first, second = ((tmp_path / folder / "events.jsonl").read_bytes() for folder in ("a", "b"))
    assert first == second


def test_a_failing_seed_says_how_to_repeat_it_and_leaves_a_small_plan(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(PROFILES, "v7", replace(PROFILES["v7"], ready_needs_announced=False))
    assert sim("--seeds", "40..60", "--profile", "v7", "--json", "--out", str(tmp_path)) == 1
    captured = capsys.readouterr()
    failed = json.loads(captured.out)["failed"]
    assert failed
    assert f"again: python3 launch.py sim --seed {failed[0]} --profile v7" in captured.err
    assert sim("--seed", str(failed[0]), "--profile", "v7", "--out", str(tmp_path / "again")) == 1, (
        "it fails again"
    )
    small = tmp_path / f"seed-{failed[0]}.toml"
    assert f"shrunk: python3 launch.py sim --plan {small}" in captured.err
    assert load(small).ops < draw(failed[0], "v7").ops
    assert sim("--plan", str(small), "--out", str(tmp_path / "small")) == 1
    assert "I22" in small.read_text().splitlines()[0]


def test_minutes_run_seed_after_seed(capsys: pytest.CaptureFixture[str]) -> None:
    assert sim("--minutes", "0.01", "--seed", "40", "--json") == 0
    assert json.loads(capsys.readouterr().out)["seeds"] >= 1


def test_the_machine_of_a_topology(capsys: pytest.CaptureFixture[str]) -> None:
    assert sim("--topology", "quickstart", "--seconds", "0.01", "--faults", "none") == 0
    captured = capsys.readouterr()
    assert "vcpus=4 tasks=2" in captured.out
    assert "left out" not in captured.err


def test_what_a_topology_schedules_is_left_out_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "small.toml"
    file.write_text(
        "[run]\nseconds = 0.01\n[host]\nallowance_mib = 4\n"
        '[[fault]]\ndo = "kill"\nafter = 0.005\n'
        '[[event]]\ndo = "offline"\nat = 0.005\nvcpu = 1\n'
        "[[vm]]\nvcpus = 2\nmemory_mib = 8\n[[vm.task]]\nmemory_kib = 1024\n"
    )
    assert sim("--topology", str(file), "--faults", "none") == 0
    said = capsys.readouterr().err
    assert said.startswith(
        f"{file}: 1 [[fault]] and 1 [[event]] tables are for real processes and left out here"
    )


@pytest.mark.parametrize(
    "words",
    [
        ["--seeds", "5..3"],
        ["--seeds", "7"],
        ["--seeds", "a..b"],
        ["--profile", "v38"],
        ["--faults", "kill,kill"],
        ["--faults", "flood"],
        ["--seeds", "1..2", "--minutes", "1"],
    ],
)
def test_bad_arguments(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        sim(*words)
    assert caught.value.code == 2
    assert "allowed" in capsys.readouterr().err or words[0] == "--profile"


def test_a_folder_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert sim("--seed", "1", "--out", str(tmp_path / "file")) == 2
    assert "cannot be written" in capsys.readouterr().err
