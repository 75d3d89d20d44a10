"""Daemons elsewhere in a topology: which keys go together."""

from __future__ import annotations

from pathlib import Path

import pytest

from proto import curve
from proto.errors import UserError
from proto.topology import Topology, load

AT = 'connect = "tcp://127.0.0.1:5555"\n'
FAR = 'connect = "tcp://10.0.0.1:5555"\n'


def read(folder: Path, *daemons: str) -> Topology:
    path = folder / "t.toml"
    path.write_text("".join(f"[[swapd]]\n{text}\n" for text in daemons))
    return load(path)


@pytest.fixture
def keys(tmp_path: Path) -> str:
    curve.make_keys(tmp_path / "keys", ["host", "daemon"])
    return 'key = "keys/host.key"\nserver_key = "keys/daemon.pub"\n'


def test_what_is_accepted(tmp_path: Path, keys: str) -> None:
    assert read(tmp_path, AT).swapd[0].give_up_seconds == 60
    assert (
        read(tmp_path, AT + keys, "size_mib = 5", FAR + keys + "size_mib = 7\ngive_up_seconds = 2")
        .swapd[2]
        .size_mib
        == 7
    )


def test_it_survives_the_way_to_the_processes(tmp_path: Path, keys: str) -> None:
    topology = read(tmp_path, FAR + keys)
    again = Topology.from_dict(topology.to_dict())
    assert again.swapd == topology.swapd
    assert again.resolve_path(again.swapd[0].key) == tmp_path / "keys" / "host.key"


@pytest.mark.parametrize(
    ("text", "blamed"),
    [
        ('connect = "127.0.0.1:5555"', "connect"),
        ('connect = "tcp://127.0.0.1:0"', "connect"),
        ('connect = "tcp://*:5"', "connect"),
        ('connect = "ipc:///tmp/x"', "connect"),
        ('key = "a"\nserver_key = "b"', "key"),
        (AT + 'key = "keys/host.key"', "server_key"),
        (AT + 'server_key = "keys/daemon.pub"', "key"),
        (FAR, "connect"),
        ('connect = "tcp://some.example:5555"', "connect"),
        (AT + 'engine = "pread"', "engine"),
        (AT + 'transport = "tcp"', "transport"),
        (AT + 'directory = "/"', "directory"),
        (AT + "restart_limit = 5", "restart_limit"),
        (AT + 'model = "ssd"', "model"),
        (AT + "give_up_seconds = 0", "give_up_seconds"),
        (AT + 'key = "none.key"\nserver_key = "keys/daemon.pub"', "key"),
        (AT + 'key = "keys/host.pub"\nserver_key = "keys/daemon.pub"', "key"),
        (AT + 'key = "keys/host.key"\nserver_key = "t.toml"', "server_key"),
    ],
)
@pytest.mark.usefixtures("keys")
def test_what_is_refused(tmp_path: Path, text: str, blamed: str) -> None:
    with pytest.raises(UserError) as refused:
        read(tmp_path, text)
    assert f"swapd[0].{blamed}" in str(refused.value)
    assert refused.value.allowed


def test_one_daemon_cannot_be_two(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be two"):
        read(tmp_path, AT, AT)
