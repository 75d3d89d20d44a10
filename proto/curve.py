"""CURVE: key files, and which addresses need keys.

Purpose: a link that leaves this machine is encrypted, and both of its ends know the other's public key. A key pair is two small TOML
files: NAME.key (public and secret, stays where it is) and NAME.pub (public, for the other side). Whether a client may come in says
proto/door.py.

Invariants: a secret key is never shown; a secret key that others may read is refused; without a key and a list of clients nothing
listens on, and nothing connects to, an address beyond loopback.

Not handled here: who may listen on what (launcher/swapd_alone.py), DNS: a name other than localhost counts as beyond loopback.
"""

from __future__ import annotations

import ipaddress
import os
import re
import struct
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

import zmq
from zmq.utils import z85

from proto import door
from proto.errors import UserError

PAIR_SUFFIX: Final = ".key"
PUBLIC_SUFFIX: Final = ".pub"
KEY_FILE_BYTES_MAX: Final = 4096
KEY_CHARS: Final = 40
"""32 bytes in Z85."""
PORT_MAX: Final = 65_535
MADE_BY: Final = "made by `launch.py keys NAME`"
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_ENDPOINT: Final = re.compile(r"tcp://(\[[0-9A-Fa-f:.]+\]|[^\[\]:/*]+|\*):([0-9]{1,5})")

Socket = zmq.Socket[bytes]
Context = zmq.Context[zmq.Socket[bytes]]


class KeyPair(NamedTuple):
    """Both halves in Z85, 40 bytes each. `repr` does not show the secret one."""

    public: bytes
    secret: bytes

    def __repr__(self) -> str:
        """Only what may be seen."""
        return f"KeyPair(public={self.public!r})"


class Endpoint(NamedTuple):
    """tcp://host:port; host without the brackets of an IPv6 address."""

    host: str
    port: int

    def __str__(self) -> str:
        """As ZeroMQ takes it."""
        return f"tcp://[{self.host}]:{self.port}" if ":" in self.host else f"tcp://{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can be at the other end. A name is not looked up."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def parse_endpoint(text: str) -> Endpoint | None:
    """The parts of ``tcp://HOST:PORT``; None if it is none. ``*`` means every address."""
    match = _ENDPOINT.fullmatch(text)
    if match is None or int(match[2]) > PORT_MAX:
        return None
    host = match[1].strip("[]")
    if ":" in host:
        try:
            ipaddress.IPv6Address(host)
        except ValueError:
            return None
    return Endpoint("0.0.0.0" if host == "*" else host, int(match[2]))  # noqa: S104 - asked for, and needs keys


# -- files -----------------------------------------------------------------------------------------------------------------


def make_keys(folder: Path, names: Sequence[str]) -> list[tuple[Path, Path]]:
    """A pair of files for each name, (secret, public). UserError, and nothing is made, when one cannot be or is there already."""
    for name in names:
        if _NAME.fullmatch(name) is None:
            raise UserError(
                "not a name for a key",
                where="keys",
                found=name,
                allowed="letters, digits, . _ - (at most 64)",
            )
    if len(set(names)) != len(names):
        raise UserError("a name twice", where="keys", found=" ".join(names), allowed="different names")
    _private_folder(folder)
    paths = [(folder / (name + PAIR_SUFFIX), folder / (name + PUBLIC_SUFFIX)) for name in names]
    for path in (path for pair in paths for path in pair):
        if path.exists() or path.is_symlink():
            raise UserError(
                "the key is there already and is not overwritten",
                where="keys",
                found=str(path),
                allowed="another name, another --out, or remove the file first",
            )
    for (secret_path, public_path), name in zip(paths, names, strict=True):
        public, secret = (half.decode() for half in zmq.curve_keypair())
        _write(
            secret_path,
            f'# CURVE key pair of {name}. Secret: it stays on this machine.\npublic = "{public}"\nsecret = "{secret}"\n',
        )
        _write(public_path, f'# CURVE public key of {name}, for the other side.\npublic = "{public}"\n')
    return paths


def _private_folder(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        mode = folder.stat().st_mode & 0o777
    except OSError as error:
        raise UserError(
            f"the folder cannot be made: {error.strerror}",
            where="--out",
            found=str(folder),
            allowed="a new folder, or one of yours with mode 0700",
        ) from error
    if mode & 0o077:
        raise UserError(
            f"others may look into the folder (mode {mode:04o})",
            where="--out",
            found=str(folder),
            allowed=f"a new folder, or one with mode 0700 (chmod 700 {folder})",
        )


def _write(path: Path, text: str) -> None:
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise UserError(
            f"the key cannot be written: {error.strerror}",
            where="keys",
            found=str(path),
            allowed="a new file in a folder that can be written",
        ) from error
    with os.fdopen(fd, "w") as file:
        file.write(text)


def read_pair(path: Path, where: str) -> KeyPair:
    """The key pair of NAME.key. `where`: the option or key that named the file. Raises UserError."""
    keys = _read(path, where, f"a {PAIR_SUFFIX} file, {MADE_BY}")
    if "secret" not in keys:
        raise UserError(
            "this is a public key only",
            where=where,
            found=str(path),
            allowed=f"the {PAIR_SUFFIX} file of the pair",
        )
    mode = path.stat().st_mode & 0o777
    if mode & 0o077:
        raise UserError(
            f"others may read the secret key (mode {mode:04o})",
            where=where,
            found=str(path),
            allowed=f"mode 0600 (chmod 600 {path}); better a new key, since this one may have been seen",
        )
    pair = KeyPair(keys["public"], keys["secret"])
    if zmq.curve_public(pair.secret) != pair.public:
        raise UserError(
            "the halves do not belong together", where=where, found=str(path), allowed=f"a file {MADE_BY}"
        )
    return pair


def read_public(path: Path, where: str) -> bytes:
    """The public key in NAME.pub, or of NAME.key. Raises UserError."""
    return _read(path, where, f"a {PUBLIC_SUFFIX} file, {MADE_BY}")["public"]


def _read(path: Path, where: str, allowed: str) -> dict[str, bytes]:
    try:
        with path.open("rb") as file:
            data = file.read(KEY_FILE_BYTES_MAX + 1)
        found = tomllib.loads(data.decode()) if len(data) <= KEY_FILE_BYTES_MAX else {}
    except OSError as error:
        raise UserError(
            f"the key cannot be read: {error.strerror}", where=where, found=str(path), allowed=allowed
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError("this is no key file", where=where, found=str(path), allowed=allowed) from error
    keys = {name: _key_of(found[name]) for name in ("public", "secret") if name in found}
    if "public" not in keys or None in keys.values() or not set(found) <= set(keys):
        raise UserError("this is no key file", where=where, found=str(path), allowed=allowed)
    return {name: key for name, key in keys.items() if key is not None}


def _key_of(value: object) -> bytes | None:
    """The 40 characters, if they are a key."""
    if not isinstance(value, str) or len(value) != KEY_CHARS or not value.isascii():
        return None
    try:
        z85.decode(value.encode())
    except (KeyError, ValueError, struct.error):
        return None
    return value.encode()


# -- sockets ---------------------------------------------------------------------------------------------------------------


def serve_with(socket: Socket, pair: KeyPair) -> None:
    """Before bind: only clients with CURVE, which a `proto.door.Door` then looks at."""
    socket.setsockopt(zmq.CURVE_SERVER, 1)
    socket.setsockopt(zmq.CURVE_SECRETKEY, pair.secret)
    socket.setsockopt(zmq.CURVE_PUBLICKEY, pair.public)
    socket.setsockopt(zmq.ZAP_DOMAIN, door.DOMAIN)


def connect_with(socket: Socket, pair: KeyPair, server: bytes) -> None:
    """Before connect: prove our key to the server that has this one."""
    socket.setsockopt(zmq.CURVE_SERVERKEY, server)
    socket.setsockopt(zmq.CURVE_SECRETKEY, pair.secret)
    socket.setsockopt(zmq.CURVE_PUBLICKEY, pair.public)
