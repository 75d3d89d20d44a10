"""The command `keys`."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher import cli
from proto import curve


def test_keys_are_listed_and_secrets_are_not_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "keys"
    assert cli.main(["keys", "--out", str(folder), "daemon", "host"]) == cli.EXIT_OK
    shown = capsys.readouterr().out
    for name in ("daemon", "host"):
        pair = curve.read_pair(folder / f"{name}.key", "--key")
        assert str(folder / f"{name}.pub") in shown
        assert pair.secret.decode() not in shown


def test_a_second_time_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["keys", "--out", str(tmp_path / "keys"), "daemon"]
    assert cli.main(words) == cli.EXIT_OK
    assert cli.main(words) == cli.EXIT_USAGE
    assert "not overwritten" in capsys.readouterr().err
