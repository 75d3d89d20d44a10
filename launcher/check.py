"""`check RUN_DIR|EVENTS...`: the invariants against events that exist already.

Exit code 0: nothing is violated; 1: something is; bad input raises `UserError`.
"""

from __future__ import annotations

import argparse
import json

from report.check.api import check_paths
from report.check.verdict import render

OK, FAILED = 0, 1


def cmd_check(args: argparse.Namespace) -> int:
    """Check run directories, event files of one run, recordings of kernels; one verdict each."""
    verdicts = []
    for verdict in check_paths(args.paths, args.profile):
        verdicts.append(verdict)
        if not args.json:
            print(render(verdict), end="", flush=True)
    if args.json:
        print(json.dumps([verdict.to_dict() for verdict in verdicts], indent=2))
    return OK if all(verdict.ok for verdict in verdicts) else FAILED
