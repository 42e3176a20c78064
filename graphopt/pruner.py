"""`prune`: fewer channels, heads and blocks, the rest fitted again to what the model computed before.

    canonical form → coupled groups → which units go → the cut, proved → least squares on samples → lowering
    → accuracy on samples that chose nothing → time against the lossless model

How much is cut is asked for (a ratio, MACs, parameters, measured latency), or is the most that a bound on the accuracy
allows, found by bisection.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from graphopt import spec
from graphopt.analysis.channels import Channels, find_groups
from graphopt.analysis.channels import Group as ChannelGroup
from graphopt.analysis.shapes import Shapes as TensorShapes
from graphopt.base import Change
from graphopt.channel_costs import MacsModel
from graphopt.data import Spec
from graphopt.decisions import Decisions
from graphopt.edit import order_constants
from graphopt.errors import DataError, GateMissedError, SpecError, did_you_mean
from graphopt.gradients import read_gradients
from graphopt.judge import Comparison, Progress
from graphopt.lossy import BUDGET, Finished, Given, LossyTask, check_floats, faster, in_words
from graphopt.lossy_report import Tried
from graphopt.model import Model, Source
from graphopt.names import matches
from graphopt.optimizer import Shapes, thread_counts
from graphopt.pipeline import Pipeline, Result, context_of
from graphopt.prune_latency import LatencySearch, Subject
from graphopt.prune_request import BY_GRADIENTS, MOST, WITHOUT_AGGREGATE, PruneRequest, Recipe
from graphopt.pruning_report import GroupRow, PruningReport
from graphopt.quality import Bound, Quality
from graphopt.report import PassRecord
from graphopt.runtime import evaluate
from graphopt.tensors import is_float
from graphopt.unseen_classes import unseen

LOUD = 10.0
"""Signal to noise, dB, below which a report says how little is left."""

SAME_WEIGHTS = spec.parse("repeat(simplify-shapes, fold-constants, eliminate-identity, eliminate-dead)")
"""Passes that make a graph simpler and leave its weights as they are."""

CLOSE = 0.02
"""Bisection ends when what is known to keep the bound and what is known to miss it lie so near each other."""


class Pruned(Finished[PruningReport]):
    """A finished run: the model, and what was done to it."""


@dataclass
class Cut:
    """A model that was built.

    Attributes:
        model: lowered.
        steps: the passes that made it from the canonical model.
        rows: what became of each group.
        notes: of the passes.
        changed: whether anything was cut.
        quality: None where there is nothing to judge on.
    """

    model: Model
    steps: tuple[spec.Step, ...]
    rows: list[GroupRow]
    blocks: list[str]
    notes: list[str]
    changed: bool
    quality: Quality | None = None


def prune(
    model: Source,
    *,
    data: Spec = None,
    bound: Bound | None = None,
    shapes: Shapes | None = None,
    batch: int = 1,
    threads: int | Sequence[int] | None = 1,
    provider: str = "cpu",
    contrib: bool = False,
    budget: float = BUDGET,
    seed: int = 0,
    decisions: Decisions | str | Path | None = None,
    progress: Progress | None = None,
    **asked: Any,
) -> Pruned:
    """Return a smaller model.

    Args:
        model: a path, `Model` or `ModelProto`; left untouched.
        data: representative samples as in `load_samples`; half of them choose and fit, the others judge.
        bound: what it may cost; without a target the most is cut that keeps it (`Bound()`: what suits the outputs).
        shapes: shapes of inputs by name, for random feeds where there are no samples.
        batch: how many rows of `.npz` samples make a feed.
        threads: ORT's intra-op threads to time with; several are all timed.
        provider: where the result will run.
        contrib: whether operators of ORT's own domains may be used.
        budget: seconds that timing may take, about.
        seed: for everything random.
        decisions: of an earlier run (a file, or `Decisions`): do the same again, without measuring.
        progress: takes short sentences about what is going on.
        asked: how much is cut, and how: the attributes of `PruneRequest`.

    Raises:
        GraphoptError: the model, samples or options are not usable, or options contradict each other.
        GateMissedError: a target or bound cannot be reached; the message says what can.
    """
    started = time.perf_counter()
    known = {field.name for field in fields(PruneRequest)}
    for name in asked:
        if name not in known:
            raise SpecError(f"prune has no option '{name}'", hint=did_you_mean(name, known))
    request = PruneRequest(
        bound=bound or Bound(), provider=provider, contrib=contrib, budget=budget, seed=seed,
        threads=thread_counts(threads), **asked,
    )  # fmt: skip
    if request.goal != "bound" and not request.bound.named:
        request = replace(request, bound=Bound(defaults=False))  # so much is cut as was asked for, whatever it costs
    if decisions is not None and (request.goal != "bound" or request.criterion is not None):
        raise SpecError("decisions say how much is cut", at="--decisions", hint="leave out the amount, or --decisions")
    given = Given.load(model, data, batch=batch, seed=seed, shapes=shapes)
    task = _Task(given, request, progress)
    result = task.replayed(decisions) if decisions is not None else task.run()
    return result.since(started)


def explain(model: Source, *, normalization: bool = False, seed: int = 0) -> PruningReport:
    """Return the groups of coupled channels of a model's canonical form, and why what is frozen is frozen.

    Raises:
        GraphoptError: the model is not usable.
    """
    given = Given.load(model, None, batch=1, seed=seed, shapes=None)
    request = PruneRequest(bound=Bound(), seed=seed, normalization=normalization)
    return _Task(given, request, None).explained()


class _Task(LossyTask):
    """One model, and how it is cut, judged and timed."""

    def __init__(self, given: Given, request: PruneRequest, progress: Progress | None) -> None:
        super().__init__(given, request, progress)
        self.request = request
        self.recipe = Recipe(request, self.calibrating is not None)
        if request.gradients is not None:
            gradients = read_gradients(request.gradients, self.original)
            self.settings = replace(self.settings, gradients=gradients)
        self.tried: list[Tried] = []
        self.spared: dict[str, str] = {}
        self._base: Model | None = None
        self._groups: Channels | None = None
        self._costs: MacsModel | None = None

    @property
    def base(self) -> Model:
        """The canonical model, made once: what is cut."""
        if self._base is None:
            self._base = self.run_passes(self._before(), self.original, self.given.feeds).model
        return self._base

    @property
    def groups(self) -> Channels:
        """Its groups of coupled channels."""
        if self._groups is None:
            self._groups = self._groups_of(self.base)
        return self._groups

    @property
    def costs(self) -> MacsModel:
        """MACs of any number of units of each group, computed once."""
        if self._costs is None:
            self._costs = MacsModel.of(self.base, self.groups.prunable(), self.given.feeds)
        return self._costs

    def _groups_of(self, model: Model) -> Channels:
        return find_groups(model, TensorShapes(model), evaluate, normalization=self.request.normalization)

    def run(self) -> Pruned:
        """Return what was asked for."""
        self._check_asked()
        check_floats(self.original, "prune")
        if self.judging is not None:
            self.progress("running the float model")
            self.check.prepare()  # what is wrong with samples or metric shows before minutes of work
        if not self.groups.prunable() and not self.request.drop_blocks:
            return self._nothing()
        names = [group.name for group in self.groups.groups]
        if not any(matches(name, self.request.only, self.request.skip) for name in names):
            raise SpecError(
                "no channel group has such a name", at="--only, --skip",
                hint=did_you_mean((*self.request.only, "")[0], names) or "--explain lists them",
            )  # fmt: skip
        self._spare()
        if self.request.goal == "bound":
            return self._largest()
        if self.request.goal == "latency":
            return self._to_latency()
        return self._asked()

    def _spare(self) -> None:
        """Leave groups as they are that samples cannot judge, unless groups were named."""
        if self.calibrating is None or self.request.only:
            return
        self.spared = unseen(self.base, self.groups, self.calibrating)
        self.request = replace(self.request, skip=(*self.request.skip, *self.spared))
        self.recipe = Recipe(self.request, sampled=True)

    def _check_asked(self) -> None:
        request, sampled = self.request, self.calibrating is not None
        if request.goal == "bound" and self.judging is None:
            raise DataError(
                "how much to cut was not said, and there are no samples to find out on", at="--data",
                hint="--ratio 0.3, --target-macs 0.7 or --target-latency 0.8 say how much; or give --data",
            )  # fmt: skip
        if request.reconstruct in ("least-squares", "bias") and not sampled:
            raise DataError(
                "what remains is fitted on samples, and there are none", at="--data",
                hint="give --data, or --reconstruct none",
            )  # fmt: skip
        if request.aggregate is not None and self.recipe.criterion in WITHOUT_AGGREGATE:
            raise SpecError(
                f"{self.recipe.criterion} scores channels as a whole, not layer by layer", at="--aggregate",
                hint="leave it out, or --criterion l2",
            )  # fmt: skip
        if request.gradients is None and request.criterion in BY_GRADIENTS:
            raise SpecError(
                f"the criterion {request.criterion} needs gradients", at="--criterion", hint="--gradients FILE"
            )

    def _asked(self) -> Pruned:
        """Return the model with the part cut that was asked for.

        Raises:
            GateMissedError: it misses the bound, or the part cannot be cut.
        """
        of = "channels" if self.request.goal == "ratio" else self.request.goal
        self.progress("cutting")
        found = self.built(self.recipe.cut(self.request.removed, of))
        if not found.changed:
            return self._nothing(notes=found.notes)
        self._judge(found, f"{self.request.removed:.0%} of {of}")
        self._gate(found)
        return self._finished(found, self._timing(found))

    def _to_latency(self) -> Pruned:
        """Return a model whose measured time is what was asked for.

        Raises:
            GateMissedError: that cannot be reached, or what reaches it misses the bound.
        """
        kept = 1.0 - self.request.removed
        cuts: list[Cut] = []

        def build(counts: Mapping[str, int], accept: Callable[[Comparison], bool]) -> Comparison:
            self.progress(f"cutting to {kept:g} of the lossless model's time ({len(cuts) + 1})")
            found = self.built(self.recipe.counts(counts))
            timing = self.compare([("the pruned model", found.model)], accept)[0]
            self._judge(found, f"{kept:g} of the time", timing)
            cuts.append(found)
            return timing

        timing = LatencySearch(self._subject(), kept).run(build)
        self._gate(cuts[-1])
        return self._finished(cuts[-1], timing)

    def _subject(self) -> Subject:
        samples = self.given.feeds if self.calibrating is None else self.calibrating
        return Subject(
            self.base, self._chosen(), context_of(self.base, self.calibrating, self.settings), samples, self.finish(),
            self.settings, self.request, self.recipe, self.progress,
        )  # fmt: skip

    def _chosen(self) -> list[ChannelGroup]:
        """Return the groups that may be cut, of those that were named."""
        request = self.request
        return [g for g in self.groups.prunable() if matches(g.name, request.only, request.skip)]

    def _largest(self) -> Pruned:
        """Return the smallest model that keeps the bound, found by bisection on the part of the MACs that goes."""
        low, high, best = 0.0, MOST, None
        share = MOST / 2
        while high - low > CLOSE:
            self.progress(f"cutting {share:.0%} of the MACs")
            try:
                found = self.built(self.recipe.cut(share, "macs"))
            except GateMissedError:  # so much cannot be cut
                high, share = share, (low + share) / 2
                continue
            self._judge(found, f"{share:.0%} of macs")
            good = found.quality is not None and found.quality.ok
            if good:
                low, best = share, found if found.changed else best
            else:
                high = share
            share = (low + high) / 2
        if best is None:
            return self._nothing("no cut keeps the bound: " + self.tried[-1].verdict if self.tried else "")
        timing = self._timing(best)
        if timing is not None and not faster(timing):
            return self._nothing(f"the largest cut that keeps the bound is not faster: {in_words(timing)}")
        return self._finished(best, timing)

    def built(self, steps: Sequence[spec.Step]) -> Cut:
        """Return what passes and the lowering ones behind them make of the canonical model."""
        blocks: list[str] = []

        def watch(record: PassRecord, change: Change) -> None:
            if record.name == "drop-blocks" and not change.blocked:
                blocks.append(change.where)

        made = self.run_passes(steps, self.base, self.calibrating, replace(self.settings, watch=watch))
        rows = self._rows(made)
        finish = self.finish()
        lowered = self.run_passes(finish, made.model, self.given.feeds, own=True)
        changed = any(row.after < row.before for row in rows) or bool(blocks)
        if len(blocks) < self.request.drop_blocks:
            raise GateMissedError(
                f"{self.request.drop_blocks} blocks cannot be dropped", at="--drop-blocks",
                hint=f"{len(blocks)} can; graphopt run -p drop-blocks says why others cannot",
            )  # fmt: skip
        first = {record.name: record for record in reversed(made.report.passes)}  # later steps find what it cut
        notes = [note for record in first.values() for note in record.notes]
        return Cut(lowered.model, (*steps, *finish), rows, blocks, notes, changed)

    def _before(self) -> tuple[spec.Step, ...]:
        """Return what stands before the cut: gradients know the weights of the original only."""
        return self.prefix() if self.request.gradients is None else SAME_WEIGHTS

    def finish(self) -> tuple[spec.Step, ...]:
        """Return what stands behind the cut."""
        dead = spec.PassStep("eliminate-dead")
        return (
            dead,
            *(() if self.request.gradients is None else self.prefix()),
            *self.lowering(),
            spec.PassStep("eliminate-common"),
            dead,
        )

    def _rows(self, made: Result) -> list[GroupRow]:
        after = {group.name: group.size for group in self._groups_of(made.model).groups}
        blocked = {
            miss["where"]: miss["why"]
            for record in made.report.passes if record.name == "prune-channels" for miss in record.blocked
        }  # fmt: skip
        rows = []
        for group in self.groups.groups:
            left = after.get(group.name, group.size if group.frozen else 0)
            kept = blocked.get(group.name, "") or self.spared.get(group.name, "")
            why = group.frozen or (kept if left == group.size else "")
            rows.append(self._row(group, left, why))
        return rows

    def _row(self, group: ChannelGroup, left: int, why: str) -> GroupRow:
        whole = self.costs.macs()
        share = 1.0 - self.costs.macs({group.name: 0}) / whole if whole and group.name in self.costs.sizes else None
        return GroupRow(group.name, group.kind, group.size, left, _weights(group), share, why)

    def _uncut(self) -> list[GroupRow]:
        return [self._row(group, group.size, group.frozen) for group in self.groups.groups]

    def _judge(self, found: Cut, what: str, timing: Comparison | None = None) -> None:
        found.quality = self.quality(found.model)
        verdict = "not judged"
        if found.quality is not None:
            verdict = "keeps the bound" if found.quality.ok else "; ".join(found.quality.failures)
        cut = sum(row.after < row.before for row in found.rows)
        self.tried.append(Tried(what, cut, None, found.quality, timing, verdict))

    def _gate(self, found: Cut) -> None:
        """Refuse what misses the bound."""
        if found.quality is not None and not found.quality.ok:
            raise GateMissedError(
                "so much cannot be cut within the bound: " + "; ".join(found.quality.failures),
                hint="leave out the target: then the most is cut that keeps the bound",
            )

    def _timing(self, found: Cut) -> Comparison | None:
        return self.compare([("the pruned model", found.model)])[0] if self.request.measure else None

    def _finished(self, found: Cut, timing: Comparison | None) -> Pruned:
        order_constants(found.model.graph)  # so that a replay writes the same bytes
        pipeline = Pipeline((*self._before(), *found.steps))
        report = self._report(found.model, found.rows)
        report.blocks, report.notes = found.blocks, list(dict.fromkeys(found.notes))
        report.pipeline, report.quality, report.timing = str(pipeline), found.quality, timing
        report.decisions = self.decisions(pipeline).to_dict()
        if timing is not None and not faster(timing):
            report.notes.append(f"not faster than the lossless model: {in_words(timing)}")
        if found.quality is None:
            report.notes.append(
                "nothing was fitted and nothing judged, for there are no samples (--data): expect no accuracy of it "
                "before it is trained"
            )
        elif found.quality.score < LOUD:
            report.notes.append(
                f"the error lies only {found.quality.score:.1f} dB below the outputs: cut less, give more samples, or "
                "train the result"
            )
        return Pruned(found.model, report)

    def _nothing(self, reason: str = "", notes: Sequence[str] = ()) -> Pruned:
        """Return the lossless model, and why nothing was cut."""
        lossless = self.lossless()
        whys = dict.fromkeys(group.frozen for group in self.groups.groups if group.frozen)
        said = "; ".join(list(whys)[:3]) or "no weight has an axis that could be cut"
        if self.groups.prunable():
            said = "; ".join(notes) or "what may be cut is as narrow as was asked for"
        report = self._report(lossless.model, self._uncut())
        report.decision, report.reason = "lossless", reason or f"nothing can be cut: {said}"
        report.pipeline, report.decisions = lossless.report.pipeline, lossless.report.decisions
        report.quality = self.quality(lossless.model)
        return Pruned(lossless.model, report)

    def explained(self) -> PruningReport:
        """Return the groups, nothing cut."""
        report = self._report(self.base, self._uncut())
        report.decision = "explained"
        return report

    def _report(self, model: Model, rows: Sequence[GroupRow]) -> PruningReport:
        request, (covered, parameters) = self.request, self.groups.coverage()
        return self.report_of(
            PruningReport, model, tried=self.tried, goal=request.goal,
            removed=None if request.goal == "bound" else request.removed,
            criterion=self.recipe.criterion, scope=self.recipe.scope, reconstruct=self.recipe.method,
            groups=list(rows), macs_before=self.macs(self.base), macs_after=self.macs(model),
            parameters_before=_parameters(self.base), parameters_after=_parameters(model),
            covered=covered / parameters if parameters else 0.0,
            frozen=[
                {"where": axis.where, "axis": axis.axis, "size": axis.size, "why": axis.why}
                for axis in self.groups.frozen_axes
            ],
        )  # fmt: skip

    def replayed(self, decisions: Decisions | str | Path) -> Pruned:
        """Return what was decided before."""
        model, found, reason = self.replay(decisions)
        report = self._report(model, [])
        report.reason, report.pipeline, report.quality = reason, found.pipeline, self.quality(model)
        report.decisions = found.to_dict()
        return Pruned(model, report)


def _weights(group: Any) -> int:
    return len({id(site.tensor) for site in group.sites if site.role in ("makes", "reads")})


def _parameters(model: Model) -> int:
    return sum(int(np.prod(constant.shape)) for constant in model.constants() if is_float(constant.dtype))
