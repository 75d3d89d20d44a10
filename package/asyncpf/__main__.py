"""The entry point of the installed command, also as `python -m asyncpf`."""

import sys
from pathlib import Path


def main() -> int:
    """What `python launch.py` does in a checkout, without the bootstrap."""
    sys.path.insert(0, str(Path(__file__).resolve().parent / "_app"))
    import launch  # noqa: PLC0415 - on the path only now

    return launch.main(installed=True)


if __name__ == "__main__":
    sys.exit(main())
