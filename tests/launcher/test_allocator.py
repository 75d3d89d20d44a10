"""Memory that is freed goes back to the system."""

from __future__ import annotations

import subprocess
import sys

from launcher.zygote_link import APP_DIR

BOUND_S = 60
SCRIPT = """
import os, sys
import numpy as np
from launcher.allocator import keep_memory_small
from launcher.usage import use_of

if sys.argv[1] == "fixed":
    assert keep_memory_small()
for _ in range(3):
    np.ones(16 << 17)  # 16 MiB: after it was freed, the usual threshold is as high
before = use_of(os.getpid()).mib
blocks = [np.ones(1 << 17) for _ in range(32)]  # 1 MiB each
last = np.ones(1 << 12)  # small, and above them in the heap
blocks.clear()
print(use_of(os.getpid()).mib - before)
"""


def kept(how: str) -> float:
    """MiB that a process keeps of 32 that it has freed."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, how], check=False, cwd=APP_DIR, capture_output=True, text=True, timeout=BOUND_S
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


def test_large_blocks_go_back_to_the_system() -> None:
    assert kept("fixed") < 4
    assert kept("usual") > 16, "this C library does so by itself: launcher/allocator.py is not needed"
