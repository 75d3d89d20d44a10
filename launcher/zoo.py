"""The `zoo` command: every bug of the zoo is put in, and something must notice.

The animals live with the tests (tests/zoo): they are patches over production code and are not installed with it.
"""

from __future__ import annotations

import argparse
import importlib
import json
from typing import Any

from proto.errors import UserError

OK, FAILED = 0, 1


def cmd_zoo(args: argparse.Namespace) -> int:
    """Run all bugs; exit code 1 if one is not caught, or if the code without it is not clean."""
    try:
        catalogue: Any = importlib.import_module("tests.zoo.catalogue")
        core: Any = importlib.import_module("tests.zoo.core")
    except ModuleNotFoundError as error:
        raise UserError(
            "the bugs of the zoo come with the tests, which are not installed",
            where="zoo",
            allowed="a checkout of the project: python3 launch.py zoo",
        ) from error
    seen_clean: dict[str, list[str]] = {}
    rows = [core.try_out(bug, seen_clean).plain() for bug in catalogue.BUGS]
    as_in_kvm = [core.try_out(bug, seen_clean).plain() for bug in catalogue.AS_IN_KVM]
    if args.json:
        print(json.dumps({"bugs": rows, "as_in_kvm": as_in_kvm, "not_here": catalogue.NOT_HERE}, indent=2))
    else:
        _show(rows, as_in_kvm, catalogue.NOT_HERE)
    return OK if all(row["caught"] and row["clean"] for row in rows) else FAILED


def _show(rows: list[dict[str, Any]], as_in_kvm: list[dict[str, Any]], not_here: dict[str, str]) -> None:
    width = max(len(row["title"]) for row in rows)
    for row in rows:
        verdict = "caught" if row["caught"] else "MISSED"
        verdict += "" if row["clean"] else ", but the code without it is not clean"
        noticed = ", ".join(row["invariants"]) or (row["differences"] or [""])[0]
        print(f"{row['id']:7} {row['title']:{width}}  {verdict}: {noticed}")
        print(f"        {row['lived']}; {row['profile']}; by {'; '.join(row['by'])}")
    print("\nas KVM does to this day, and this host too: seen in the code as it is")
    for row in as_in_kvm:
        print(f"{row['id']:7} {row['title']}: {', '.join(row['must_break'])}")
    print("\nnot here")
    for ident, why in not_here.items():
        print(f"{ident:7} {why}")
    caught = sum(row["caught"] and row["clean"] for row in rows)
    print(f"\n{caught} of {len(rows)} bugs caught, the code without them clean")
