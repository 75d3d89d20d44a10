"""`keys NAME...`: key pairs for links that leave this machine.

Invariants: nothing is overwritten; what was made is listed on standard output, secrets never are.

Not handled here: what is in a key file (proto/curve.py).
"""

from __future__ import annotations

import argparse

from proto import curve


def cmd_keys(args: argparse.Namespace) -> int:
    """Make the pairs and say what to do with them."""
    made = curve.make_keys(args.out, args.names)
    for secret, public in made:
        print(f"{secret}  secret: stays on the machine that uses it (--key, or key in a topology)")
        print(f"{public}  public: for the other side (--allow, or server_key in a topology)")
    return 0
