"""How the C library keeps memory that the launcher has freed.

Why: the check of a run allocates arrays of all sizes for as long as the run lasts, in a thread. glibc gives each thread a heap of its own,
and raises its threshold for mappings with each large block that is freed (up to 32 MiB), so that such blocks come from those heaps,
too. What is freed in their middle stays. With one heap and a fixed threshold large blocks go back to the system at once. In 10 minutes of
`launch.py stress --vcpus 256 --vms 4 --chaos` the launcher grew by 17.4 MiB before and by 14.4 after, with twice the events (one run each).

Not handled here: other C libraries, which have no such knobs.
"""

from __future__ import annotations

import ctypes
from typing import Any, Final

M_MMAP_THRESHOLD: Final = -3
M_ARENA_MAX: Final = -8
"""mallopt(3)."""
THRESHOLD_BYTES: Final = 64 << 10
ARENAS: Final = 1
"""The threads of the launcher hardly ever allocate at the same time."""


def keep_memory_small() -> bool:
    """Fix the threshold and the number of heaps of this process; False where the C library knows nothing of it."""
    libc: Any = ctypes.CDLL(None)
    mallopt = getattr(libc, "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, THRESHOLD_BYTES)) and bool(mallopt(M_ARENA_MAX, ARENAS))
