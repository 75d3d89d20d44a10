"""The command `scenario`: verdicts, exit codes, JSON, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher import cli
from launcher.scenario import SCENARIOS

ONE = str(SCENARIOS / "one.toml")


def scenario(*words: str) -> int:
    return cli.main(["scenario", *words])


def test_a_passed_scenario(capsys: pytest.CaptureFixture[str]) -> None:
    assert scenario(ONE, "clr_no_ack") == 0
    out = capsys.readouterr().out
    assert "passed  one  (mainline, sim)" in out
    assert "tokens_ready         [0xffffffff, 0x1000, 0x2000]" in out
    assert "expected 3 or 4" in out
    assert "2 scenarios, 0 failed" in out


def test_a_difference_is_shown_with_the_events(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = tmp_path / "wrong.toml"
    wrong.write_text((SCENARIOS / "one.toml").read_text().replace("ready = 3", "ready = 4"))
    assert scenario(str(wrong)) == 1
    out = capsys.readouterr().out
    assert "FAILED  one" in out
    assert "difference: ready: 3, expected 4" in out
    assert "ASYNC_PF_NOT_PRESENT" in out


def test_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = tmp_path / "wrong.toml"
    wrong.write_text((SCENARIOS / "if0.toml").read_text().replace("sync = 2", "sync = 0"))
    assert scenario(ONE, str(wrong), "--json") == 1
    one, other = json.loads(capsys.readouterr().out)
    assert (one["name"], one["world"], one["passed"], one["differences"]) == ("one", "sim", True, [])
    assert one["observed"] == {
        "not_present": 2,
        "ready": 3,
        "sync": 0,
        "repeated": 0,
        "tokens_not_present": [0x1000, 0x2000],
        "tokens_ready": [0xFFFF_FFFF, 0x1000, 0x2000],
        "max_outstanding": 1,
    }
    assert {event["src"] for event in one["events"]} == {"guest", "host", "pages"}
    assert [event["us"] for event in one["events"]] == sorted(event["us"] for event in one["events"])
    assert (other["passed"], other["differences"]) == (False, ["sync: 2, expected 0"])


def test_a_story(capsys: pytest.CaptureFixture[str]) -> None:
    assert scenario("one", "--explain") == 0
    assert "(spec §3.3, I48)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere.toml"], "cannot be read"),
        ([ONE, "nowhere"], "cannot be read"),
        ([ONE, "nowhere", "--world", "real"], "cannot be read"),
    ],
)
def test_bad_usage(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert scenario(*words) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == "", "nothing runs before everything is read"


def test_bad_arguments() -> None:
    for words in ([], [ONE, "--world", "moon"]):
        with pytest.raises(SystemExit) as caught:
            scenario(*words)
        assert caught.value.code == 2
