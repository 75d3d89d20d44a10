"""Key files and addresses."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from zmq.utils import z85

from proto import curve
from proto.curve import Endpoint
from proto.errors import UserError


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# -- files


def test_a_pair_is_private_and_can_be_read_again(tmp_path: Path) -> None:
    ((secret, public), _) = curve.make_keys(tmp_path / "keys", ["daemon", "host"])
    assert (secret.name, public.name) == ("daemon.key", "daemon.pub")
    assert mode_of(secret.parent) == 0o700
    assert mode_of(secret) == 0o600
    pair = curve.read_pair(secret, "--key")
    assert curve.read_public(public, "--allow") == curve.read_public(secret, "--allow") == pair.public
    assert pair.secret not in public.read_bytes()
    assert pair.secret.decode() not in repr(pair)


def test_nothing_is_overwritten_and_then_nothing_is_made(tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    curve.make_keys(folder, ["b"])
    before = (folder / "b.key").read_bytes()
    with pytest.raises(UserError, match="not overwritten"):
        curve.make_keys(folder, ["a", "b"])
    assert (folder / "b.key").read_bytes() == before
    assert not (folder / "a.key").exists()


@pytest.mark.parametrize("names", [["../x"], [""], ["-x"], ["a/b"], ["a", "a"], ["x" * 65], [".x"]])
def test_names_that_are_refused(tmp_path: Path, names: list[str]) -> None:
    with pytest.raises(UserError, match="name"):
        curve.make_keys(tmp_path / "keys", names)
    assert not (tmp_path / "keys").exists()


def test_a_folder_that_others_may_look_into_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    folder.mkdir(mode=0o755)
    with pytest.raises(UserError, match="chmod 700"):
        curve.make_keys(folder, ["a"])
    assert list(folder.iterdir()) == []


def test_a_secret_that_others_may_read_is_refused(tmp_path: Path) -> None:
    ((secret, _),) = curve.make_keys(tmp_path / "keys", ["a"])
    secret.chmod(0o644)
    with pytest.raises(UserError, match="others may read"):
        curve.read_pair(secret, "--key")


def test_halves_of_two_pairs_are_refused(tmp_path: Path) -> None:
    (a, _), (b, _) = curve.make_keys(tmp_path / "keys", ["a", "b"])
    pair = curve.read_pair(b, "--key")
    lines = a.read_text().splitlines()
    lines[-1] = f'secret = "{pair.secret.decode()}"'
    a.write_text("\n".join(lines))
    with pytest.raises(UserError, match="belong together"):
        curve.read_pair(a, "--key")


GOOD = z85.encode(bytes(range(32))).decode()
"""Always the same: the names of the tests below contain it."""


@pytest.mark.parametrize(
    "text",
    [
        "",
        "public = 5",
        'public = "short"',
        f'public = "{GOOD}x"',
        f'public = "{"~" * 40}"',
        f'public = "{"#" * 40}"',
        f'public = "{"é" * 40}"',
        f'secret = "{GOOD}"',
        f'public = "{GOOD}"\nother = 1',
        "public = [" * 3000,
        "\0",
        "x" * 5000,
    ],
)
def test_files_that_are_no_keys(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.pub"
    path.write_text(text)
    with pytest.raises(UserError, match="no key file"):
        curve.read_public(path, "--allow")


@given(data=st.binary(max_size=200))
def test_no_bytes_break_the_reader(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.pub"
    path.write_bytes(data)
    with pytest.raises(UserError):
        curve.read_public(path, "--allow")


def test_a_public_key_is_no_pair_and_a_missing_file_none(tmp_path: Path) -> None:
    ((_, public),) = curve.make_keys(tmp_path / "keys", ["a"])
    with pytest.raises(UserError, match="public key only"):
        curve.read_pair(public, "--key")
    with pytest.raises(UserError, match="cannot be read"):
        curve.read_pair(tmp_path / "none.key", "--key")


# -- addresses


@pytest.mark.parametrize(
    ("text", "endpoint", "loopback"),
    [
        ("tcp://127.0.0.1:5555", Endpoint("127.0.0.1", 5555), True),
        ("tcp://127.9.9.9:0", Endpoint("127.9.9.9", 0), True),
        ("tcp://localhost:1", Endpoint("localhost", 1), True),
        ("tcp://[::1]:1", Endpoint("::1", 1), True),
        ("tcp://*:1", Endpoint("0.0.0.0", 1), False),
        ("tcp://0.0.0.0:1", Endpoint("0.0.0.0", 1), False),
        ("tcp://10.0.0.1:1", Endpoint("10.0.0.1", 1), False),
        ("tcp://[2001:db8::1]:1", Endpoint("2001:db8::1", 1), False),
        ("tcp://localhost.example:1", Endpoint("localhost.example", 1), False),
        ("tcp://127.0.0.1.example:1", Endpoint("127.0.0.1.example", 1), False),
    ],
)
def test_addresses(text: str, endpoint: Endpoint, loopback: bool) -> None:
    found = curve.parse_endpoint(text)
    assert found == endpoint
    assert found.is_loopback is loopback
    assert curve.parse_endpoint(str(found)) == endpoint


@pytest.mark.parametrize(
    "text",
    ["", "127.0.0.1:5", "tcp://:5", "tcp://a", "tcp://a:70000", "tcp://a:-1", "tcp://a:5/x", "ipc://x:1", "tcp://[x]:1", "tcp://a:b",
     "tcp://[:::]:1", "tcp://::1:5"],
)  # fmt: skip
def test_what_is_no_address(text: str) -> None:
    assert curve.parse_endpoint(text) is None
