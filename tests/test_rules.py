"""Every rule of every registered pass, tried on cases of its own pattern (see graphopt/rule_check.py)."""

from __future__ import annotations

import pytest

from graphopt import registry
from graphopt.rewrite import Rule, RulePass
from graphopt.rule_check import check_rule

RULES = [
    rule
    for _, cls in sorted(registry.all_passes().items())
    if issubclass(cls, RulePass) and cls.__module__.startswith("graphopt.passes")
    for rule in cls.rules
]
NAMES = [rule.__name__ for rule in RULES]
CHECKED = [rule for rule in RULES if rule.check is not None]


def test_names_are_unique() -> None:
    assert len(set(NAMES)) == len(NAMES)


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_a_rule_holds_on_its_own_pattern(rule: type[Rule]) -> None:
    report = check_rule(rule)
    assert not report.problems, str(report)
    assert report.fired >= 20


@pytest.mark.parametrize("rule", CHECKED, ids=[rule.__name__ for rule in CHECKED])
def test_a_check_is_needed(rule: type[Rule]) -> None:
    """Without `where`, too, which only keeps near misses out of reports."""
    bare = {"__doc__": rule.__doc__, "check": None, "where": None}
    unchecked: type[Rule] = type(rule.__name__, (rule,), bare)
    report = check_rule(unchecked, wanted=200, until_problem=True)
    found = [p for p in report.problems if "of its own cases only" not in p]
    assert found, f"{rule.__name__}: its check refuses nothing"


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_a_rule_says_its_algebra(rule: type[Rule]) -> None:
    assert "->" in rule.summary()
