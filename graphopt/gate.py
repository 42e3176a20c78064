"""The last gate: what is returned is not slower than the input, at any number of threads and any shapes asked for.

A candidate passes where the upper end of the 95 % interval of its time, as a part of the input's, is at most 1.03 under
every condition.  Where the best selection does not, the one without what was slow there is tried, then the model
without any optional pass; else the very input is returned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from graphopt import environment
from graphopt.decisions import Outcome, Selection
from graphopt.judge import Candidate, Comparison, Judge
from graphopt.model import Model
from graphopt.pipeline import Pipeline, Result
from graphopt.profit import Family, cleanup_only
from graphopt.ratio import Ratio
from graphopt.report import Report

SLOWDOWN = 1.03
"""The upper end of the interval may reach this."""

LOOKS = (1.5, 4.0, 10.0)
"""Seconds of each look under each condition; the next is taken while the one before left it open, and there is time for
it, the second in any case."""


@dataclass
class Gate:
    """Tries candidates until one passes.

    Attributes:
        judge: compares.
        original: the input.
        pipeline: what selections are of.
        run: runs a selection, its result verified.
        tried: the comparisons made: what was tried, and how long it took over the input.
    """

    judge: Judge
    original: Model
    pipeline: Pipeline
    run: Callable[[Selection], Result]
    tried: list[tuple[str, Comparison]] = field(default_factory=list)

    def passed(self, best: tuple[Selection, Result], families: Sequence[Family]) -> tuple[Outcome, Selection, Result]:
        """Return the first candidate that passes; the input if none does."""
        if unchanged(best[1].report):
            nothing = "nothing that was found to change pays" if families else "no pass found anything to change"
            return "input kept", best[0], kept(self.original, best[1].report, nothing)
        before = self.judge.candidate(self.original)
        for outcome, selection, result in self._ladder(best, families):
            candidate = self.judge.candidate(result.model)
            comparison = self._compare(before, candidate, outcome)
            candidate.forget()
            self.tried.append((outcome, comparison))
            if passes(comparison):
                if len(self.tried) > 1:
                    left_out = sorted(selection.off - best[0].off)
                    result.report.reason = f"without {', '.join(left_out)}, since with all that pays {self._why()}"
                return outcome, selection, result
        return "input kept", best[0], kept(self.original, best[1].report, self._why())

    def _ladder(
        self, best: tuple[Selection, Result], families: Sequence[Family]
    ) -> Iterator[tuple[Outcome, Selection, Result]]:
        """Yield candidates, each only when the one before did not pass."""
        chosen, result = best
        plain = cleanup_only(self.pipeline)
        fired = {site[0] for site in result.sites}
        yield "optimized", chosen, result
        label = self.tried[-1][1].worst[0]
        slow = {f.name for f in families if f.name in fired and f.comparison.ratios.get(label, _EVEN).median > 1.0}
        if slow and slow != fired:
            selection = chosen.without(*slow)
            yield "optimized", selection, self.run(selection)
        if fired:
            result = self.run(plain)
            if not unchanged(result.report):
                yield "canonicalized", plain, result

    def _compare(self, before: Candidate, candidate: Candidate, outcome: Outcome) -> Comparison:
        what = "the result" if outcome == "optimized" else "the model without optional passes"
        what = f"{what} against the input"
        return self.judge.compare(before, candidate, what, LOOKS, _decided, 0.95, least=2, settled=_passes)

    def _why(self) -> str:
        """Return why what was tried first did not pass."""
        label, ratio = self.tried[0][1].worst
        slower = "the result was slower" if ratio.slower else "the result could not be shown to be no slower"
        load, cores = environment.load_average(), environment.usable_cores()
        busy = "; the machine was busy" if not ratio.slower and load and cores and load[0] > cores else ""
        return (
            f"{slower}: {ratio.median:.3f} of the input's time ({ratio.low:.3f} to {ratio.high:.3f}) with {label}{busy}"
        )


_EVEN = Ratio(1.0, 1.0, 1.0)


def passes(comparison: Comparison) -> bool:
    """Tell whether a candidate is not slower than the input, as far as that can be measured."""
    return comparison.same or all(_passes(ratio) for ratio in comparison.ratios.values())


def _passes(ratio: Ratio) -> bool:
    return ratio.high <= SLOWDOWN


def _decided(comparison: Comparison) -> bool:
    return passes(comparison) or any(r.slower and r.high > SLOWDOWN for r in comparison.ratios.values())


def unchanged(report: Report) -> bool:
    """Tell whether a run changed nothing."""
    return report.after == report.before and not any(record.status == "changed" for record in report.passes)


def kept(original: Model, report: Report, reason: str) -> Result:
    """Return the input as the result, for a reason."""
    report.decision, report.reason = "input kept", reason
    if report.opset_after != report.opset_before:
        report.reason += f"; so it stays at opset {report.opset_before} (measure=False, --no-measure, upgrades it)"
    report.after, report.opset_after = report.before, report.opset_before
    return Result(original.copy(), report)
