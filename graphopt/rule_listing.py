"""The rules of all passes as rows: what `graphopt passes --rules` shows, from the rules' own docstrings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from graphopt.base import Pass
from graphopt.errors import SpecError
from graphopt.rewrite import Rule, RulePass
from graphopt.rule_check import check_rule


def rows(passes: Mapping[str, type[Pass]], *, check: bool, seed: int) -> list[dict[str, Any]]:
    """Return one row per rule.

    Args:
        passes: by name; those that are made of rules are listed.
        check: try each rule on cases of its own pattern, too (a second or so for each).
        seed: for the cases.

    Raises:
        SpecError: none of them is made of rules.
    """
    families = [(name, cls) for name, cls in passes.items() if issubclass(cls, RulePass)]
    if not families:
        raise SpecError(f"{', '.join(passes)}: not made of rules", hint="graphopt passes --rules lists those that are")
    return [_row(name, rule, check=check, seed=seed) for name, cls in families for rule in cls.rules]


def _row(name: str, rule: type[Rule], *, check: bool, seed: int) -> dict[str, Any]:
    algebra, _, more = (rule.__doc__ or "").strip().partition("\n")
    row: dict[str, Any] = {
        "pass": name,
        "rule": rule.__name__,
        "algebra": algebra,
        "more": " ".join(more.split()),
        "opsets": [rule.min_opset, rule.max_opset],
        "types": sorted(rule.types) if rule.types is not None else None,
    }
    if check:
        report = check_rule(rule, seed=seed)
        row.update({"fired": report.fired, "silent": report.silent, "problems": report.problems})
    return row


def table(found: list[dict[str, Any]]) -> Table:
    """Return rows as a table for people."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    checked = any("fired" in row for row in found)
    for title in ("rule", "pass", "algebra", *(("fired", "silent", "problems") if checked else ())):
        made.add_column(title, overflow="fold")
    for row in found:
        cells = [row["rule"], row["pass"], row["algebra"]]
        if checked:
            cells += [str(row["fired"]), str(row["silent"]), "; ".join(row["problems"][:2]) or "none"]
        made.add_row(*cells)
    return made
