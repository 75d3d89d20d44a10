"""The full sweep, `python -m tests.sweep [--calls N] [--only TEXT]`: fails call 1, 2, ... N of every site that the conversation reaches,
with every error that the call can have, and prints what came of it.
"""

from __future__ import annotations

import argparse
import socket
import sys
import tempfile
import time
from pathlib import Path

from launcher import kernel_cache

kernel_cache.prepare(Path(__file__).resolve().parents[2], installed=False)

from proto import curve  # noqa: E402 - numba reads the place of its cache once, when it is imported
from tests.sweep.judge import Court, Limits, Result  # noqa: E402
from tests.sweep.sites import Sweep  # noqa: E402
from tests.sweep.times import short_times, warm  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sweep", description=__doc__)
    parser.add_argument(
        "--calls", type=int, default=1000, metavar="N", help="fail no call behind the n-th of a site (1000)"
    )
    parser.add_argument(
        "--faults", type=int, default=99, metavar="N", help="at most so many kinds of error for each site"
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="sites whose description contains this")
    parser.add_argument(
        "--minutes", type=float, default=1e9, help="begin no further site after so many minutes"
    )
    args = parser.parse_args()
    result = Result()
    warm()
    begin_s = time.monotonic()
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name, short_times(), Sweep() as sweep:
        folder = Path(name)
        curve.make_keys(folder / "keys", ["daemon", "host"])
        court = Court(sweep, folder, folder / "keys", free_port())
        saved = court.save()
        live, restored = court.reached(None), court.reached(saved)
        print(
            f"{len(sweep.faults)} sites; a run from the boot calls {len(live)}, one from an image {len(restored)}"
        )
        for site in sorted(live.keys() | restored.keys()):
            if args.only not in str(site) or time.monotonic() - begin_s > 60 * args.minutes:
                continue
            before = len(result.findings)
            court.sweep_site(site, result, Limits(args.faults, args.calls), None if site in live else saved)
            print(
                f"{time.monotonic() - begin_s:7.1f} s  {result.fired:6} injections  {site} ({live.get(site, 0)} calls)",
                flush=True,
            )
            for finding in result.findings[before:]:
                print(f"    FOUND {finding.shot}: {finding.what}", flush=True)
    print(
        f"sites {len(result.sites)}, runs {result.runs}, injections {result.fired}, deepest call {result.deepest}"
    )
    print("outcomes", dict(sorted(result.outcomes.items())))
    print("findings", len(result.findings))
    return 1 if result.findings else 0


def free_port() -> int:
    """A port of loopback that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


if __name__ == "__main__":
    sys.exit(main())
