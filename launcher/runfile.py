"""run.json: what was run, on what, and how it ended.

Purpose: whoever finds a run directory later can tell what its figures mean. Written when the run begins (``ended`` null: a run that
never wrote its end) and again when it is over.

Not handled here: the figures (report/summary.py).
"""

from __future__ import annotations

import datetime as dt
import json
import os
import platform
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from proto.run import SwapFileInfo
from proto.topology import Topology

PACKAGES: Final = ("numpy", "numba", "llvmlite", "pyzmq", "msgpack", "xxhash", "setproctitle")
FORMAT: Final = 1


def usable_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0))


def describe(
    run_id: str, topology: Topology, swap_files: Sequence[SwapFileInfo], huge_frames: bool
) -> dict[str, Any]:
    """The contents of run.json at the start. Wall time is read here and nowhere else."""
    return {
        "format": FORMAT,
        "run_id": run_id,
        "started_at": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "topology": topology.to_dict(),
        "seed": topology.run.seed,
        "swap_files": [
            {"slots": f.slots, "filesystem": f.filesystem, "direct": f.direct, "engine": f.engine}
            for f in swap_files
        ],
        "huge_frames": huge_frames,
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "machine": {
            "kernel": platform.release(),
            "architecture": platform.machine(),
            "processor": _processor(),
            "usable_cores": usable_cores(),
            "memory_mib": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20,
        },
        "ended": None,
        "details": [],
        "warnings": [],
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file so that a reader sees the old or the new one, never a part."""
    temporary = path.with_name(path.name + ".new")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "w") as file:
        file.write(json.dumps(content, indent=2) + "\n")
    temporary.replace(path)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return ""
