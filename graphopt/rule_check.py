"""Tries a rule on the cases of its own pattern: does it fire, stay silent where it must, and keep the outputs?

from graphopt.rule_check import check_rule
print(check_rule(HardSwish))
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import onnx

from graphopt.base import Context
from graphopt.edit import Edit
from graphopt.errors import GraphoptError
from graphopt.model import Model, load
from graphopt.order import sort_nodes
from graphopt.rewrite import Rewriter, Rule
from graphopt.rule_cases import Case, cases
from graphopt.runtime import evaluate

Array = np.ndarray[Any, Any]

TOLERANCES: Mapping[str, float] = {"float16": 4e-3, "bfloat16": 3e-2, "float32": 1e-5, "float64": 1e-7}
"""Largest error relative to the largest output: some roundings of each type; attributes are float32 in any case."""

_DRAWS = 40
"""Draws for each case that is asked for, at most."""


@dataclass
class RuleReport:
    """What trying a rule gave.

    Attributes:
        rule: its name.
        fired: cases in which it fired, and the outputs stayed.
        silent: near misses in which it stayed silent.
        refused: cases that a guard or check of the rule refused, by reason's count.
        problems: what went wrong, one sentence each.
        reasons: why it was refused, counted.
    """

    rule: str
    fired: int = 0
    silent: int = 0
    refused: int = 0
    problems: list[str] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        lines = [
            f"{self.rule}: fired in {self.fired} cases, silent in {self.silent} near misses, refused {self.refused}"
        ]
        return "\n".join(lines + [f"  {p}" for p in self.problems[:5]])


def check_rule(rule: type[Rule], *, seed: int = 0, wanted: int = 20, until_problem: bool = False) -> RuleReport:
    """Try a rule until it fired in `wanted` cases and stayed silent in half as many near misses.

    What `worth` says is left aside: it is about profit.

    Args:
        rule: the rule.
        seed: for the cases.
        wanted: cases in which it must fire.
        until_problem: stop at the first problem.
    """
    tried: type[Rule] = type(rule.__name__, (rule,), {"__doc__": rule.__doc__, "worth": None})
    report = RuleReport(rule.__name__)
    for case in cases(tried, seed, wanted * _DRAWS):
        if report.fired >= wanted and (report.silent >= wanted // 2 or rule.shared):
            break
        _try(tried, case, report)
        if report.problems and until_problem:
            break
    if report.fired < wanted and not report.problems:
        often = "; ".join(f"{why} ({count} times)" for why, count in report.reasons.most_common(2))
        report.problems.append(
            f"it fired in {report.fired} of its own cases only; " + (often or "declare shapes or examples")
        )
    return report


def _try(rule: type[Rule], case: Case, report: RuleReport) -> None:
    before = _outputs(case.model, case.feeds)
    if before is None or not all(_sound(v) for v in before.values()):
        return
    model = load(case.model)
    try:
        fired, reasons = apply_rule(model, rule)
    except Exception as error:  # noqa: BLE001  (a rule may be anybody's code, and this is where it is tried)
        report.problems.append(f"{case.what}: it raised {type(error).__name__}: {error}")
        return
    if not fired:
        report.silent += case.expect != "fires"
        if case.expect == "fires":
            report.refused += bool(reasons)
            report.reasons.update(reasons)
        return
    if case.expect == "silent" and not _may_fire(rule, case):
        report.problems.append(f"it fired although {case.what}")
        return
    report.fired += case.expect == "fires" or _may_fire(rule, case)
    problem = _compare(model, case, before, widens=rule.widens)
    if problem is not None and case.expect == "equal":
        report.problems.append(f"it fired although {case.what}: {problem}")
    elif problem is not None:
        report.problems.append(f"{case.what}: {problem}")


def _may_fire(rule: type[Rule], case: Case) -> bool:
    return rule.shared and case.what.startswith("inner value")


def apply_rule(model: Model, rule: type[Rule]) -> tuple[int, list[str]]:
    """Apply a rule wherever it matches; return how often it fired, and why it did not elsewhere."""
    context = Context(model, evaluate)
    fired, reasons = 0, list[str]()
    for graph in list(model.graphs()):
        with Edit(graph) as edit:
            for change in Rewriter(edit, context, (rule,)).changes():
                if change.apply is None:
                    reasons.append(change.why)
                else:
                    change.apply()
                    fired += 1
    for graph in model.graphs():
        sort_nodes(graph)
    return fired, reasons


def _outputs(model: onnx.ModelProto, feeds: Mapping[str, Array]) -> dict[str, Any] | None:
    try:
        return evaluate(model, feeds, None)
    except GraphoptError:
        return None


def _sound(values: Any) -> bool:
    """Tell whether some of an output can be compared, and nothing has overflowed (where is a matter of roundings)."""
    array = np.asarray(values)
    return array.dtype.kind != "f" or bool(np.isfinite(array).any() and not np.isinf(array).any())


def _compare(model: Model, case: Case, before: Mapping[str, Any], *, widens: bool) -> str | None:
    """Return what is wrong with a rewritten model."""
    proto = model.proto
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        return f"the result is not valid: {error}"
    after = _outputs(proto, case.feeds)
    if after is None:
        return "ORT does not run the result"
    size = max((float(np.abs(v).max(initial=0.0)) for v in case.feeds.values() if v.dtype.kind == "f"), default=0.0)
    for name, wanted in before.items():
        reason = _differs(np.asarray(wanted), np.asarray(after[name]), size, widens=widens)
        if reason is not None:
            return f"output '{name}' {reason}"
    return None


def _differs(wanted: Array, found: Array, size: float, *, widens: bool) -> str | None:
    """Return how outputs differ by more than roundings of theirs, or some of what was fed (where terms cancel)."""
    if wanted.shape != found.shape or wanted.dtype != found.dtype:
        return f"is {found.dtype}{list(found.shape)}, not {wanted.dtype}{list(wanted.shape)}"
    if wanted.dtype.name not in TOLERANCES:
        return None if (wanted == found).all() else "differs"
    defined = ~np.isnan(wanted)
    if not widens and not (np.isnan(found) | defined).all():
        return "is a number where the original is NaN; if that is meant, say `widens = True`"
    left, right = wanted.astype(np.float64)[defined], found.astype(np.float64)[defined]
    scale = float(np.abs(left).max(initial=0.0))
    error = float(np.abs(left - right).max(initial=0.0))
    allowed = max(TOLERANCES[wanted.dtype.name] * scale, 4 * float(ml_dtypes.finfo(wanted.dtype).eps) * size)
    if np.isfinite(right).all() and error <= allowed:
        return None
    return f"({wanted.dtype}) differs by {error:.3g}, {allowed:.3g} are allowed"
