"""One heap for all threads of the launcher."""

from __future__ import annotations

import subprocess
import sys

from launcher.zygote_link import APP_DIR

BOUND_S = 60
SCRIPT = """
import ctypes, re, sys, threading
from launcher.allocator import keep_memory_small

def size_mib():
    return int(re.search(r"VmSize:\\\\s+(\\\\d+) kB", open("/proc/self/status").read())[1]) >> 10

if sys.argv[1] == "one heap":
    assert keep_memory_small()
before = size_mib()
thread = threading.Thread(target=lambda: ctypes.CDLL(None).malloc(1000))
thread.start()
thread.join()
print(size_mib() - before)
"""


def reserved(how: str) -> int:
    """MiB of addresses that a process takes when its second thread allocates for the first time."""
    words = [sys.executable, "-c", SCRIPT.replace("\\\\", "\\"), how]
    done = subprocess.run(words, check=False, cwd=APP_DIR, capture_output=True, text=True, timeout=BOUND_S)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_a_second_thread_has_no_heap_of_its_own() -> None:
    assert reserved("one heap") < 32
    assert reserved("as usual") >= 64, "this C library does so by itself: launcher/allocator.py is not needed"
