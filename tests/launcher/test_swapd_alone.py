"""What the command `swapd` refuses before it listens."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from launcher import cli
from proto import curve


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--listen", "tcp://*:0"], "--key and --allow is missing"),
        (["--listen", "tcp://0.0.0.0:0", "--key", "keys/a.key"], "--allow is missing"),
        (["--listen", "tcp://10.0.0.1:0", "--allow", "keys/a.pub"], "--key is missing"),
        (["--listen", "tcp://some.example:0"], "beyond loopback"),
        (["--listen", "tcp://127.0.0.1:0", "--key", "keys/a.key"], "go together"),
        (["--listen", "tcp://127.0.0.1:0", "--allow", "keys/a.pub"], "go together"),
        (["--listen", "127.0.0.1:0"], "no address to listen on"),
        (
            ["--listen", "tcp://127.0.0.1:0", "--key", "keys/a.pub", "--allow", "keys/a.pub"],
            "public key only",
        ),
        (["--listen", "tcp://127.0.0.1:0", "--key", "keys/a.key", "--allow", "t"], "no key file"),
        (["--listen", "tcp://127.0.0.1:0", "--set", "transport=tcp"], "no such key here"),
        (["--listen", "tcp://127.0.0.1:0", "--set", "engine=none"], "swapd[0].engine"),
        (["--listen", "tcp://127.0.0.1:0", "--model", "none-such"], "model"),
        (["--listen", "tcp://192.0.2.1:0", "--key", "keys/a.key", "--allow", "keys/a.pub"], "cannot listen"),
        (["--listen", "tcp://127.0.0.1:0", "--file", "t"], "no swap file of ours"),
    ],
)
def test_what_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    curve.make_keys(tmp_path / "keys", ["a"])
    (tmp_path / "t").write_text("not ours")
    # The last --file counts.
    assert cli.main(["swapd", "--file", "swap", "--size", "1", *words]) == cli.EXIT_USAGE
    shown = capsys.readouterr().err
    assert says in shown
    assert "allowed:" in shown
    assert not (tmp_path / "swap").exists()
    assert (tmp_path / "t").read_text() == "not ours"


def test_a_port_in_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code = cli.main(["swapd", "--file", str(tmp_path / "swap"), "--listen", f"tcp://127.0.0.1:{port}"])
    assert code == cli.EXIT_USAGE
    assert "cannot listen there" in capsys.readouterr().err
