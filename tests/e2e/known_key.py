"""launch.py with a run's secret that a test knows: its peers can then be those that only a process of the run could be."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]
KEY: Final = bytes(range(32))

if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from proto import link

    link.new_key = lambda: KEY
    sys.argv[0] = str(ROOT / "launch.py")
    runpy.run_path(sys.argv[0], run_name="__main__")
