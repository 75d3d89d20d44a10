"""A small run of the real emulator that ends by its work: its topology, and the command line that runs one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[1]
RUN_BOUND_S: Final = 240.0
"""The first run on a machine compiles every kernel."""


def topology(stamp_ops: int | None, syscall_ops: int | None) -> str:
    """TOML text: user-mode and kernel-mode faults, four times the memory that the host gives. None: a task without an end of its own."""
    return f"""
[run]
seconds = 60.0
[host]
allowance_mib = 3
zero_pages = false
[[vm]]
vcpus = 2
memory_mib = 32
rate_ops_per_s = 200_000
[[vm.task]]
workload = "stamp"
memory_kib = 3072
{_ops(stamp_ops)}
[[vm.task]]
workload = "syscalls"
count = 2
memory_kib = 3072
{_ops(syscall_ops)}
"""


def _ops(count: int | None) -> str:
    return f"ops = {count}" if count is not None else ""


def launch(*words: str) -> subprocess.CompletedProcess[str]:
    """Run `launch.py` to its end."""
    command = [sys.executable, str(ROOT / "launch.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=RUN_BOUND_S, check=False)
