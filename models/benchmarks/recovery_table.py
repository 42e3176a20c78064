"""Results of recovery by training -> a section of Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graphopt.models.benchmarks.recovery_cases import Case

INTRODUCTION = """\
## Channels cut, then distilled without labels

Made by

    python -m graphopt.models.benchmarks.recovery --cache FOLDER --output docs/training-figures.md

Lines that train are rendered as those that test, from other seeds and other texts; none of them has a label.  The best
weights are chosen on the selection split, in ONNX Runtime; quality is that of test items, which neither trained nor
chose.  *Points* are hundredths against the original, with the paired 95 % interval (bootstrap over items).  Time:
processor time of one thread over that of the model that `optimize` makes without loss, paired, with the 95 % interval.
Seconds: processor time of the whole command, choosing included (wall time in brackets, on a machine that others used,
too); lines are rendered once and kept on disk.

"""


@dataclass(frozen=True)
class Stage:
    """One model as it came out.

    Attributes:
        metrics: name -> `Evaluation.to_dict`, beside the original.
        macs: of the feed that is timed.
        bytes: of the file.
        made: how it was: `wall` and `processor` seconds, rows that trained.
        latency: ratio to the lossless model as in `Ratio.to_dict`.
    """

    metrics: Mapping[str, Mapping[str, Any]]
    macs: int
    bytes: int
    made: Mapping[str, Any]
    latency: Mapping[str, Any]


@dataclass(frozen=True)
class Result:
    """All stages of a case."""

    case: Case
    stages: Mapping[str, Stage]


def document(results: Sequence[Result], where: str) -> str:
    """Return the section."""
    return INTRODUCTION + f"{where}.\n\n" + "".join(map(_case, results))


def _case(result: Result) -> str:
    metrics = list(result.case.metrics)
    head = ["", *(f"{name} | points" for name in metrics), "MACs", "size", "time", "s"]
    original = result.stages["original"]
    rows = [
        [
            stage, *(_quality(found.metrics[name], stage) for name in metrics), f"{found.macs / original.macs:.3f}",
            f"{found.bytes / original.bytes:.3f}", _ratio(found.latency), _seconds(found.made),
        ]
        for stage, found in result.stages.items()
    ]  # fmt: skip
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    columns = len(head) + len(metrics)
    shown = "\n".join(f"    {command}" for command in result.case.commands.values())
    table = "\n".join([lines[0], "|" + "---|" * columns, *lines[1:]])
    return f"### {result.case.title}\n\n{shown}\n\n{table}\n\n{_met(result)}\n\n"


def _quality(found: Mapping[str, Any], stage: str) -> str:
    value = f"{100 * found['candidate']:.2f} % of {found['items']}"
    if stage == "original":
        return f"{value} | –"
    drop, low, high = (round(-100 * x, 2) + 0.0 for x in (found["drop"], *reversed(found["interval"])))  # no -0
    return f"{value} | {drop:+.2f} ({low:+.2f} to {high:+.2f})"


def _ratio(found: Mapping[str, Any]) -> str:
    if not found:
        return "–"
    low, high = found["interval"]
    return f"{found['ratio']:.3f} ({low:.3f} to {high:.3f})"


def _seconds(made: Mapping[str, Any]) -> str:
    return f"{made['processor']:.0f} ({made['wall']:.0f})" if made else "–"


def _met(result: Result) -> str:
    """Say what was to be reached, and whether it was."""
    case, trained = result.case, result.stages[result.case.stages[-1]]
    drops = [found["drop"] for found in trained.metrics.values()]
    said = [_one(f"at most {100 * case.aim:g} points lost", max(drops) <= case.aim + 1e-12)]
    if case.latency is not None and trained.latency:
        said.append(_one(f"time at most {case.latency:g}", trained.latency["ratio"] <= case.latency))
    if case.minutes is not None:
        took = sum(stage.made["processor"] for stage in result.stages.values() if stage.made.get("rows"))
        within = took <= 2 * 60 * case.minutes
        said.append(_one(f"training within {case.minutes:g} minutes of 2 cores", within))
    rows = ", ".join(str(stage.made["rows"]["train"]) for stage in result.stages.values() if stage.made.get("rows"))
    return f"Aims: {'; '.join(said)}. Rows that trained: {rows}."


def _one(aim: str, met: bool) -> str:
    return f"{aim}: {'met' if met else 'missed'}"
