"""Compiles the rules, or loads what an earlier process compiled."""

from __future__ import annotations

import numpy as np

from proto.trace import EVENT, Kind
from report.check.checker import Checker
from report.resumes import ResumeWatch


def warm_check() -> None:
    """Check one event of each kind: that is every compiled function, with the types that every check uses."""
    events = np.zeros(len(Kind), EVENT)
    events["kind"] = list(Kind)
    events["lamport"] = events["seq"] = np.arange(1, len(events) + 1)
    # The look at the end comes last: with it the cache is taken for complete (launcher/kernel_cache.py).
    ResumeWatch().feed(events)
    checker = Checker("mainline")
    checker.feed(events)
    checker.finish("")
