"""The command `sim`: what it prints, what it keeps, and what it does about a failing seed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from launcher import cli
from proto.profile import PROFILES


def sim(*words: str) -> int:
    return cli.main(["sim", *words])


def test_one_seed_shows_what_it_drew_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert sim("--seed", "7", "--profile", "v3") == 0
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith("seed=7 profile=v3 vcpus=")
    assert last.startswith("1 seeds, 0 failed; ")


def test_the_same_seed_writes_the_same_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in ("a", "b"):
        assert sim("--seed", "9", "--out", str(tmp_path / folder)) == 0
    first, second = ((tmp_path / folder / "events.jsonl").read_bytes() for folder in ("a", "b"))
    assert first == second
    assert {"us", "src", "ev", "vcpu"} <= set(json.loads(first.splitlines()[0]))
    assert capsys.readouterr().err == ""


def test_a_range_keeps_each_seed_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sim("--seeds", "3..5", "--json", "--out", str(tmp_path)) == 0
    assert sorted(path.parent.name for path in tmp_path.glob("*/events.jsonl")) == ["3", "4", "5"]
    totals = json.loads(capsys.readouterr().out)
    assert (totals["seeds"], totals["failed"], totals["passed"]) == (3, [], True)


def test_a_failing_seed_says_how_to_repeat_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(PROFILES, "v7", replace(PROFILES["v7"], ready_needs_announced=False))
    assert sim("--seeds", "0..60", "--profile", "v7", "--json") == 1
    captured = capsys.readouterr()
    failed = json.loads(captured.out)["failed"]
    assert failed
    assert f"again: python3 launch.py sim --seed {failed[0]} --profile v7" in captured.err
    assert sim("--seed", str(failed[0]), "--profile", "v7") == 1, "the printed command fails again"


@pytest.mark.parametrize(
    "words", [["--seeds", "5..3"], ["--seeds", "7"], ["--seeds", "a..b"], ["--profile", "v38"]]
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
