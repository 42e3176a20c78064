"""Which operators the bridge computes and which it refuses, as the Markdown in docs/bridge.md.

$ python -m graphopt.bridge.coverage
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping

from graphopt.bridge.builder import MODULES
from graphopt.bridge.ops import TABLES
from graphopt.bridge.refusals import REFUSED
from graphopt.bridge.table import Table, merged


def computed() -> str:
    """Return a table of the operators that are computed, by the module that has them."""
    rows = ["| operators of | module | operators |", "|---|---|---|"]
    rows += [
        f"| {domain or 'ONNX'} | `{module.rpartition('.')[2]}` | {_named(domain, table)} |"
        for domain, module, table in TABLES
    ]
    own = ", ".join(sorted({*MODULES, "Constant"}))
    return "\n".join([*rows, f"| ONNX | `builder` | {own}; local functions of the model |"])


def refused() -> str:
    """Return a table of the operators that are refused on purpose."""
    by_reason: Mapping[tuple[str, str], list[str]] = defaultdict(list)
    for op, reason in REFUSED.items():
        by_reason[reason].append(op)
    rows = [f"| {', '.join(sorted(ops))} | {why} | {helps} |" for (why, helps), ops in by_reason.items()]
    return "\n".join(["| refused | why | what helps |", "|---|---|---|", *rows])


def _named(domain: str, table: Table) -> str:
    """Return operators by name, with the opsets from which on another function computes them."""
    found = merged([(domain, table)])
    return ", ".join(op + _versions(version.since for version in found[domain, op]) for _, op in sorted(found))


def _versions(since: Iterable[int]) -> str:
    later = list(since)[1:]
    return f" ({', '.join(map(str, later))})" if later else ""


if __name__ == "__main__":
    sys.stdout.write(f"{computed()}\n\n{refused()}\n")
