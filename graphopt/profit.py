"""What pays: optional passes, their variants and single sites, each timed with against without.

    ratio = time of (the pipeline with it) / time of (the pipeline run again without it)

One family (one optional pass) after the other, each against what was chosen so far, so that families which only pay
together, or only alone, are seen as such.  An interval below 1 keeps it, one above 1 leaves it out; where the interval
holds 1, or nothing was measured, the model with fewer nodes stays, and what is on by default.  A family that is left
out as a whole is tried by halves of its sites.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from graphopt import registry, spec
from graphopt.base import Pass
from graphopt.decisions import Selection
from graphopt.errors import GateMissedError
from graphopt.judge import Candidate, Comparison, Judge, negligible, shared
from graphopt.pipeline import Pipeline, Result, Site
from graphopt.ratio import Ratio
from graphopt.report import NO_TIME

Verdict = Literal["kept", "left out", "partly kept"]

SHORTEST, LONGEST = 0.3, 3.0
"""Seconds of one look under one condition."""

PARTS = 6
"""Parts of a family's sites that are tried, at most."""


@dataclass
class Family:
    """What became of one optional pass.

    Attributes:
        name: of the pass.
        changes: how many it made, or would have made.
        verdict: whether it stays.
        reason: why, in words.
        comparison: time with it over time without it.
        options: of the variant chosen, where not the usual ones.
        variants: what else was measured: each against what was best until then.
        skipped: sites left out.
    """

    name: str
    changes: int
    verdict: Verdict = "kept"
    reason: str = ""
    comparison: Comparison = field(default_factory=Comparison)
    options: Mapping[str, Any] = field(default_factory=dict)
    variants: list[dict[str, Any]] = field(default_factory=list)
    skipped: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "name": self.name, "changes": self.changes, "verdict": self.verdict, "reason": self.reason,
            "options": dict(self.options), "skipped_sites": self.skipped, "variants": self.variants,
            **self.comparison.to_dict(),
        }  # fmt: skip


def optional_passes(pipeline: Pipeline) -> list[type[Pass]]:
    """Return the optional passes of a pipeline, each once, in order."""
    names = dict.fromkeys(step.name for step in spec.pass_steps(pipeline.steps))
    return [found for name in names if (found := registry.get(name)).optional]


def static_selection(pipeline: Pipeline) -> Selection:
    """Return what runs where nothing is timed."""
    return Selection(off=frozenset(p.name for p in optional_passes(pipeline) if not p.default_on))


def cleanup_only(pipeline: Pipeline) -> Selection:
    """Return the selection of no optional pass at all."""
    return Selection(off=frozenset(p.name for p in optional_passes(pipeline)))


@dataclass
class Search:
    """Finds what pays.

    Attributes:
        judge: compares; its deadline ends the search.
        pipeline: what to choose from.
        run: runs a selection of it.
        selection: what is chosen so far: at first what runs by default.
        result: what that makes.
    """

    judge: Judge
    pipeline: Pipeline
    run: Callable[[Selection], Result]
    selection: Selection
    result: Result
    families: list[Family] = field(default_factory=list)
    _current: Candidate | None = None
    _pending: int = 0
    _confidence: float = 0.95

    def best(self) -> Selection:
        """Return the selection that pays best; `families` then says what was found."""
        passes = [p for p in optional_passes(self.pipeline) if not p.default_on or self._sites(self.result, p.name)]
        if not passes:
            return self.selection
        passes.sort(key=lambda p: (p.default_on, p.stage != "lowering"))  # the most doubtful first: time may run out
        self._pending = sum(1 + len(self._variants(p)) for p in passes)
        self._confidence = shared(self._pending + PARTS)
        self._current = self.judge.candidate(self.result.model)
        for each in passes:
            self._family(each)
        self._current.forget()
        return self.selection

    @staticmethod
    def _sites(result: Result, name: str) -> list[Site]:
        return [site for site in result.sites if site[0] == name]

    def _variants(self, each: type[Pass]) -> list[Mapping[str, Any]]:
        """Return the variants that set no option which the pipeline itself sets."""
        given = {key for step in spec.pass_steps(self.pipeline.steps) if step.name == each.name for key in step.options}
        return [variant for variant in each.variants if not given & set(variant)]

    def _family(self, each: type[Pass]) -> None:
        """Decide about one pass, its variants, its sites."""
        name = each.name
        is_on = name not in self.selection.off
        family = Family(name, len(self._sites(self.result, name)), "kept" if is_on else "left out")
        other = self._alternative(self.selection.without(name) if is_on else self.selection.with_(name), family)
        self._pending -= 1
        if other is not None:
            _, candidate, result = other
            sites = self._sites(self.result if is_on else result, name)
            if not sites:  # a pass that is off by default, and finds nothing
                candidate.forget()
                return
            family.changes = len(sites)
            pair = (candidate, self.current) if is_on else (self.current, candidate)
            family.comparison = self._compare(*pair, name)
            family.verdict, family.reason = self._verdict(each, family.comparison.overall, family.comparison.same, pair)
            self._take_if(other, (family.verdict == "kept") != is_on)
            self._try_variants(each, family)
            if family.verdict == "left out" and len(sites) > 1 and not family.comparison.same:
                self._try_parts(family, sites)
        self.families.append(family)

    def _verdict(
        self, each: type[Pass], ratio: Ratio, same: bool, pair: tuple[Candidate, Candidate]
    ) -> tuple[Verdict, str]:
        """Return what an interval decides, and why."""
        nodes = pair[1].nodes - pair[0].nodes
        if ratio.faster:
            return "kept", "faster with it"
        if ratio.slower:
            return "left out", "slower with it"
        tie = "ONNX Runtime makes the same graph of both" if same else "no difference beyond doubt"
        if not each.default_on:
            return "left out", f"{tie}, and it runs only where it is faster"
        if nodes > 0:
            return "left out", f"{tie}, and {nodes} node{'s' * (nodes != 1)} more with it"
        return "kept", f"{tie}" + (f", and {-nodes} node{'s' * (nodes != -1)} fewer with it" if nodes else "")

    def _try_variants(self, each: type[Pass], family: Family) -> None:
        for variant in self._variants(each):
            self._pending -= 1
            other = self._alternative(self.selection.with_(each.name, variant), family)
            if other is None:
                return
            comparison = self._compare(self.current, other[1], f"{each.name} {_shown(variant)}")
            family.variants.append({"options": dict(variant), **comparison.to_dict()})
            better = comparison.overall.faster
            if better:
                family.verdict, family.options = "kept", variant
                family.reason = f"fastest with {_shown(variant)}"
                family.changes = len(self._sites(other[2], each.name))
            self._take_if(other, better)

    def _try_parts(self, family: Family, sites: Sequence[Site]) -> None:
        """Keep those halves, quarters … of the sites that pay, found by bisection."""
        kept: list[Site] = []
        queue = _halves(sites)
        for _ in range(PARTS):
            if not queue:
                break
            part = queue.pop(0)
            wanted = {*kept, *part}
            chosen = self.selection.with_(family.name, family.options).skipping(s for s in sites if s not in wanted)
            other = self._alternative(chosen, family)
            if other is None:
                break
            ratio = self._compare(self.current, other[1], f"{len(part)} sites of {family.name}").overall
            if ratio.faster:
                kept += part
            elif ratio.slower:
                queue += _halves(part)
            self._take_if(other, ratio.faster)
        if kept:
            family.verdict, family.skipped = "partly kept", len(sites) - len(kept)
            family.reason = f"{family.reason}; faster with it at {len(kept)} of {len(sites)} sites"

    @property
    def current(self) -> Candidate:
        """What is chosen so far."""
        assert self._current is not None
        return self._current

    def _alternative(self, selection: Selection, family: Family) -> tuple[Selection, Candidate, Result] | None:
        """Run another selection; None where no time is left for that."""
        looking = (SHORTEST + self.judge.overhead) * len(self.judge.conditions)
        if self.judge.left < looking + sum(r.seconds for r in self.result.report.passes):
            family.reason = family.reason or NO_TIME
            return None
        self.judge.progress(f"running without or with {family.name}")
        try:
            result = self.run(selection)
        except GateMissedError as error:  # outputs are checked, since a pass has failed before
            family.reason = family.reason or f"not measured: {error.what}"
            return None
        return selection, self.judge.candidate(result.model), result

    def _take_if(self, other: tuple[Selection, Candidate, Result], better: bool) -> None:
        """Go on from the alternative where it is better; drop the worse of the two."""
        selection, candidate, result = other
        if better:
            self.current.forget()
            self.selection, self._current, self.result = selection, candidate, result
        else:
            candidate.forget()

    def _compare(self, a: Candidate, b: Candidate, what: str) -> Comparison:
        share = self.judge.left / (max(1, self._pending + 1) * len(self.judge.conditions))
        return self.judge.compare(a, b, what, _looks(share, self.judge.overhead), _decided, self._confidence)


def _looks(share: float, overhead: float) -> list[float]:
    """Return the seconds of one look or two, in which a share of the time is used; each look has its overhead."""
    net = share - overhead
    if net < 2 * SHORTEST + overhead:
        return [min(LONGEST, max(SHORTEST, net))]
    return [min(LONGEST, net / 3), min(LONGEST, max(SHORTEST, net * 2 / 3 - overhead))]


def _decided(found: Comparison) -> bool:
    ratio = found.overall
    return ratio.faster or ratio.slower or negligible(ratio)


def _halves(sites: Sequence[Site]) -> list[list[Site]]:
    middle = math.ceil(len(sites) / 2)
    return [list(half) for half in (sites[:middle], sites[middle:]) if half and len(half) < len(sites)]


def _shown(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in options.items())
