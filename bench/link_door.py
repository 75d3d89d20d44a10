"""What a door costs on a link over loopback tcp: round trips and pages per second with none, a password (PLAIN) and keys (CURVE).

    python bench/link_door.py [--seconds S] [--rounds N]

A DEALER in a thread, a ROUTER that answers, as between a daemon and its host. Rows are measured in turn, several rounds over, and the
median of each is printed with its ratio to the first: on a shared machine the ratios hold, the absolute figures do not.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import zmq

from proto import curve, link
from proto.curve import KeyPair
from proto.door import Door, enter_with_password, guard_with_password

DOORS = ("none", "PLAIN", "CURVE")
PAGE = bytes(4096)
WINDOW = 16
"""Messages under way when pages are measured, each with one page."""
PASSWORD = link.tcp_password(b"bench")
SERVER, CLIENT = KeyPair(*zmq.curve_keypair()), KeyPair(*zmq.curve_keypair())


class Echo(threading.Thread):
    """Answers every message with itself, and whoever is at the door."""

    def __init__(self, door: str) -> None:
        super().__init__(daemon=True)
        self.context = link.new_context()
        self.socket = self.context.socket(zmq.ROUTER)
        self.door = Door(self.context, keys=[CLIENT.public], password=PASSWORD)
        if door == "PLAIN":
            guard_with_password(self.socket)
        elif door == "CURVE":
            curve.serve_with(self.socket, SERVER)
        self.port = self.socket.bind_to_random_port("tcp://127.0.0.1")

    def run(self) -> None:
        """Until it is told the end."""
        poller = zmq.Poller()
        for socket in (self.socket, self.door.socket):
            poller.register(socket, zmq.POLLIN)
        while True:
            events = dict(poller.poll())
            if self.door.socket in events:
                self.door.answer()
            while self.socket in events:
                try:
                    parts = self.socket.recv_multipart(zmq.NOBLOCK)
                except zmq.Again:
                    break
                if parts[1] == b"end":
                    self.context.destroy(linger=0)
                    return
                self.socket.send_multipart(parts)


def measure(door: str, seconds: float) -> tuple[float, float]:
    """(round trips per second of small messages, pages per second each way)."""
    echo = Echo(door)
    echo.start()
    context = link.new_context()
    socket = context.socket(zmq.DEALER)
    if door == "PLAIN":
        enter_with_password(socket, PASSWORD)
    elif door == "CURVE":
        curve.connect_with(socket, CLIENT, SERVER.public)
    socket.connect(f"tcp://127.0.0.1:{echo.port}")
    try:
        return rate(socket, [b"x" * 40], 1, seconds), rate(socket, [b"x" * 40, PAGE], WINDOW, seconds)
    finally:
        socket.send(b"end")
        echo.join()
        context.destroy(linger=0)


def rate(socket: zmq.Socket[bytes], message: list[bytes], window: int, seconds: float) -> float:
    """Messages that came back per second, so many under way."""
    for _ in range(window):
        socket.send_multipart(message)
    for _ in range(100):
        socket.recv_multipart()
        socket.send_multipart(message)
    begin, count = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        socket.recv_multipart()
        socket.send_multipart(message)
        count += 1
    elapsed = time.perf_counter() - begin
    for _ in range(window):
        socket.recv_multipart()
    return count / elapsed


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seconds", type=float, default=0.5, metavar="S", help="for each figure and round (0.5)"
    )
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="rounds (7)")
    args = parser.parse_args()
    found: dict[str, list[tuple[float, float]]] = {door: [] for door in DOORS}
    for _ in range(args.rounds):
        for door in DOORS:
            found[door].append(measure(door, args.seconds))
    print(f"{'door':6} {'round trips/s':>14} {'ratio':>6} {'pages/s':>10} {'ratio':>6}")
    first = [statistics.median(column) for column in zip(*found[DOORS[0]], strict=True)]
    for door in DOORS:
        trips, pages = (statistics.median(column) for column in zip(*found[door], strict=True))
        print(f"{door:6} {trips:14,.0f} {trips / first[0]:6.2f} {pages:10,.0f} {pages / first[1]:6.2f}")


if __name__ == "__main__":
    main()
