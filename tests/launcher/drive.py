"""A launcher with fake roles as a process of its own: ``python -m tests.launcher.drive SCRIPT SECONDS [KEY=VALUE...]``.

Prints the summary as JSON on standard output; progress, with a line `running` when the barrier has opened, goes to standard error.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launcher.execute import RunOptions, RunResult, execute
from launcher.lifecycle import Bounds
from launcher.progress import Progress
from launcher.signals import Signals
from proto.topology import load

ROOT = Path(__file__).resolve().parents[2]
ROLES = {
    "host": "tests.launcher.fake_roles:host_main",
    "vcpu": "tests.launcher.fake_roles:vcpu_main",
    "swapd": "tests.launcher.fake_roles:swapd_main",
}
SMALL = ("host.allowance_mib=4", "vm.vcpus=2", "vm.memory_mib=8", "vm.0.task.0.memory_kib=1024")


def run_fake(
    script: str,
    seconds: float,
    changes: tuple[str, ...] = (),
    options: RunOptions | None = None,
    faults: Sequence[tuple[str, dict[str, Any]]] = (),
) -> RunResult:
    """Run a small topology with fake roles; `script` is what goes wrong (tests/launcher/fake_roles.py)."""
    topology = load(
        ROOT / "topologies" / "quickstart.toml",
        (*SMALL, "vm.0.task.1.memory_kib=512", f"run.name={script}", *changes),
        seconds=seconds,
        faults=faults,
    )
    options = options or RunOptions(roles=ROLES)
    with Signals() as signals:
        return execute(topology, options, signals, Progress(sys.stderr))


def with_roles(out: Path | None = None, *, setup_s: float = 30.0, drain_s: float = 30.0) -> RunOptions:
    """Options of a run with fake roles and shorter bounds."""
    bounds = Bounds(setup_ns=int(setup_s * 1e9), drain_ns=int(drain_s * 1e9))
    return RunOptions(out=out, roles=ROLES, bounds=bounds)


if __name__ == "__main__":
    result = run_fake(sys.argv[1], float(sys.argv[2]), tuple(sys.argv[3:]))
    print(json.dumps(result.summary))
