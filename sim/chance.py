"""What is left to chance in a simulated run, from one generator per plan: delays, lengths of stays, which steps to rest at."""

from __future__ import annotations

import random
from collections import Counter
from typing import Final

from sim.plan import US, SimPlan

PARK_NS: Final = (1, 500, 3_000, 20_000, 100_000)
"""Below, at and above what an exit, an entry and a handler take, up to the service time of a page."""
BUDGET_OPS: Final = (1, 3, 10, 40, 200)
LOCAL_NS: Final = (200, 1_000, 3_000)
"""An exit, an entry, a kick on one machine."""
LAG_PERCENT: Final = 80


class Chance:
    """``calm``: from then on nothing rests and nothing lags; everything must drain."""

    __slots__ = ("_link_ns", "_park", "_random", "calm", "rested", "rng")

    def __init__(self, plan: SimPlan) -> None:
        self.rng = random.Random(f"schedule {plan.seed}")
        self._random = self.rng.random
        self._park = plan.park_percent / 100
        self._link_ns = plan.link_us * US
        self.calm = False
        self.rested: Counter[str] = Counter()
        """How often a path rested at which step."""

    def park_ns(self, step: str) -> int:
        """How long a path rests at a step, 0 = it goes on."""
        if self.calm or not self._park or self._random() >= self._park:
            return 0
        self.rested[step] += 1
        return PARK_NS[int(self._random() * len(PARK_NS))]

    def budget(self) -> int:
        """Operations of one stay in guest mode."""
        return BUDGET_OPS[int(self._random() * len(BUDGET_OPS))]

    def local_ns(self) -> int:
        """Delay of something that stays on the machine."""
        return LOCAL_NS[int(self._random() * len(LOCAL_NS))]

    def link_ns(self) -> int:
        """Delay of a message between host and daemon."""
        return LOCAL_NS[0] + int(self._random() * self._link_ns)

    def between(self, low: int, high: int) -> int:
        """Anything from low to high, both included."""
        return low + int(self._random() * (high - low + 1))

    def lags(self) -> bool:
        """Whether a vCPU in guest mode has not looked at the flush generation yet."""
        return not self.calm and self._random() * 100 < LAG_PERCENT

    def one_in(self, n: int) -> bool:
        """True once in ``n`` times."""
        return self._random() * n < 1
