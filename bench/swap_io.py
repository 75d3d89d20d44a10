"""Operations per second of the swap daemon's engines on random 4 KiB reads and writes, against fio where it
is installed.

    python bench/swap_io.py [--directory DIR] [--seconds S] [--mib SIZE] [--rounds N] [--writes PERCENT]

Rows are measured in turn, several rounds over, and the median of each is printed: on a shared machine the
ratios hold, the absolute figures do not. A row takes ``seconds`` per round. Nothing is left behind: the file
has no name.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from swapd import engine as swap_engine
from swapd import swapfile
from swapd.engine import open_engine
from swapd.swapfile import SwapFile
from swapd.syscall import BLOCK_BYTES
from swapd.uring import UringUnavailable

ROWS = (("uring", 8), ("uring", 32), ("uring", 64), ("pread", 8), ("pread", 32), ("pread", 64))


class Sample(NamedTuple):
    """One measurement: operations per second, median and 99th percentile latency, CPU time over wall time."""

    iops: float
    p50_us: float
    p99_us: float
    cpu: float


def measure(kind: str, depth: int, file: SwapFile, seconds: float, writes: float) -> Sample:
    """Keep ``depth`` operations in flight for ``seconds``; every completion is checked and replaced."""
    memory = np.frombuffer(mmap.mmap(-1, depth * BLOCK_BYTES), dtype=np.uint8)
    rng = np.random.default_rng(depth)
    slots = rng.integers(0, file.slots, 1 << 16, dtype=np.uint64)
    kinds = (rng.random(1 << 16) < writes).astype(np.uint64)
    started_ns = np.zeros(depth, dtype=np.int64)
    latencies: list[np.ndarray] = []
    issued = 0
    with open_engine(kind, file.fd, memory, depth) as engine:
        frames = np.arange(depth, dtype=np.uint64)
        cpu_begin, begin_ns = time.process_time_ns(), time.monotonic_ns()
        end_ns = begin_ns + int(seconds * 1e9)
        while len(frames) or engine.in_flight:
            now_ns = time.monotonic_ns()
            if len(frames) and now_ns < end_ns:
                at = (issued + np.arange(len(frames))) & 0xFFFF
                issued += len(frames)
                started_ns[frames] = now_ns
                engine.submit(np.stack([frames, kinds[at], slots[at], frames], axis=1))
            elif engine.in_flight == 0:
                break
            if not engine.wait(10_000_000_000):
                raise TimeoutError(f"{kind} qd {depth}: nothing completed for 10 s")
            results = engine.reap()
            if (results["res"] != BLOCK_BYTES).any():
                raise OSError(f"{kind} qd {depth}: results {np.unique(results['res'])}")
            frames = results["tag"]
            latencies.append(time.monotonic_ns() - started_ns[frames])
        wall_ns, cpu_ns = time.monotonic_ns() - begin_ns, time.process_time_ns() - cpu_begin
    spread = np.percentile(np.concatenate(latencies), [50, 99]) / 1e3
    return Sample(issued / wall_ns * 1e9, float(spread[0]), float(spread[1]), cpu_ns / wall_ns)


def measure_fio(file: SwapFile, seconds: float, writes: float) -> Sample:
    """The yardstick: fio with io_uring, 64 in flight, on the same file."""
    command = [
        *("fio", "--name=swap", f"--filename=/proc/{os.getpid()}/fd/{file.fd}", "--allow_file_create=0"),
        *(
            "--ioengine=io_uring",
            "--iodepth=64",
            "--bs=4k",
            f"--size={file.size_bytes}",
            f"--direct={int(file.direct)}",
        ),
        *("--rw=randrw", f"--rwmixwrite={round(100 * writes)}", "--norandommap", "--randrepeat=0"),
        *("--time_based", f"--runtime={seconds}s", "--output-format=json"),
    ]
    done = subprocess.run(command, check=True, capture_output=True, timeout=seconds + 30)
    job = json.loads(done.stdout)["jobs"][0]
    share = job["read"]["clat_ns"]["percentile"] if writes < 1 else job["write"]["clat_ns"]["percentile"]
    return Sample(
        job["read"]["iops"] + job["write"]["iops"],
        share["50.000000"] / 1e3,
        share["99.000000"] / 1e3,
        (job["usr_cpu"] + job["sys_cpu"]) / 100,
    )


def prepared(directory: Path, mib: int) -> SwapFile:
    """A swap file with every block written once: reading a block that never was costs the device nothing."""
    file = swapfile.create(directory, mib * 256)
    chunk = mmap.mmap(-1, 1 << 20)
    chunk[:] = os.urandom(1 << 20)
    for number in range(mib):
        os.pwritev(file.fd, [chunk], number << 20)
    os.fsync(file.fd)
    return file


def collect(file: SwapFile, rounds: int, seconds: float, writes: float) -> dict[str, list[Sample]]:
    """All rows in turn, ``rounds`` times; rows that cannot be measured here are named and left out."""
    samples: dict[str, list[Sample]] = {}
    with_fio = shutil.which("fio") is not None
    if not with_fio:
        print("fio is not installed: ratios are against the row uring qd 64")
    for _ in range(rounds):
        if with_fio:
            samples.setdefault("fio io_uring qd 64", []).append(measure_fio(file, seconds, writes))
        for kind, depth in ROWS:
            try:
                sample = measure(kind, depth, file, seconds, writes)
            except UringUnavailable as refused:
                print(f"{kind} qd {depth}: skipped, {refused}")
                continue
            samples.setdefault(f"{kind} qd {depth}", []).append(sample)
    return samples


def main() -> None:
    """Parse the arguments, measure, print one table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--directory", type=Path, default=Path(), help="where the swap file is made (default: here)"
    )
    parser.add_argument(
        "--seconds", type=float, default=1.0, help="per row and round (default 1, at most 10)"
    )
    parser.add_argument("--mib", type=int, default=256, help="size of the swap file (default 256)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds over all rows (default 3)")
    parser.add_argument("--writes", type=float, default=0.0, help="percentage of writes (default 0)")
    args = parser.parse_args()
    if not 0 < args.seconds <= 10 or args.rounds < 1 or args.mib < 1 or not 0 <= args.writes <= 100:
        parser.error("allowed: seconds above 0 and at most 10, rounds and mib from 1, writes 0..100")
    swap_engine.warm()
    file = prepared(args.directory, args.mib)
    print(
        f"{file.fs_type}, O_DIRECT {'on' if file.direct else 'off'}, {args.mib} MiB, {args.writes:g} % writes"
    )
    samples = collect(file, args.rounds, args.seconds, args.writes / 100)
    file.close()
    medians = {row: statistics.median(s.iops for s in taken) for row, taken in samples.items()}
    base = medians.get("fio io_uring qd 64") or medians.get("uring qd 64") or max(medians.values())
    print(f"{'row':<20} {'ops/s':>9} {'ratio':>6} {'p50 us':>8} {'p99 us':>8} {'CPU %':>6}   spread of ops/s")
    for row, taken in samples.items():
        p50, p99, cpu = (statistics.median(column) for column in list(zip(*taken, strict=True))[1:])
        low, high = min(s.iops for s in taken), max(s.iops for s in taken)
        print(
            f"{row:<20} {medians[row]:>9.0f} {medians[row] / base:>6.2f} {p50:>8.0f} {p99:>8.0f} "
            f"{100 * cpu:>6.0f}   {low:.0f}..{high:.0f}"
        )


if __name__ == "__main__":
    main()
