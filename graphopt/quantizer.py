"""`quantize`: the fastest (or smallest) model that keeps the accuracy asked for, or the lossless one and the reason.

    lossless engine → ranges on samples → what each layer costs and harms → which layers → codes, rounding, biases
    → what ORT made of it → accuracy on samples that chose nothing → time against the lossless model

Everything that is kept was run: a layer that ORT leaves in float is taken back, a result that misses its bound is
repaired by leaving layers in float, and one that is not faster than the lossless model is not returned.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from graphopt import spec
from graphopt.analysis.cost import costs
from graphopt.data import Spec
from graphopt.decisions import Decisions
from graphopt.edit import order_constants
from graphopt.errors import DataError, GateMissedError, SpecError
from graphopt.judge import Comparison, Progress
from graphopt.layer_choice import LayerChoice, Recipe, unable, unable_reason
from graphopt.lossy import BUDGET, LOSSLESS_SHARE, Finished, Given, LossyRequest, LossyTask, faster, in_words
from graphopt.lossy_report import Tried
from graphopt.model import Model, Source
from graphopt.named_forms import BLOCKS, HALF, WEIGHT_ONLY, NamedForm
from graphopt.optimizer import Shapes, default_pipeline, thread_counts
from graphopt.pipeline import Pipeline, Result
from graphopt.quality import Bound, Quality
from graphopt.quantization_report import LayerRow, QuantizationReport
from graphopt.runtime import available_providers
from graphopt.samples import Feeds
from graphopt.saturation import saturates

Precision: TypeAlias = Literal["int8", "fp16"]
Objective: TypeAlias = Literal["latency", "size"]
Isa: TypeAlias = Literal["vnni", "avx512", "avx2"]

RECIPES = (
    Recipe(
        "dynamic int8", "quantize-dynamic", frozenset({"MatMul", "Gemm"}),
        prepare=spec.parse("lower-activations, smooth-quant"), ranges=False,
    ),
    Recipe(
        "static int8", "quantize-static", frozenset({"Conv", "MatMul", "Gemm"}), {"ranges": "mse"},
        prepare=spec.parse("widen-channels{multiple=16}"),
        refine=spec.parse("round-weights, correct-bias"), fuse=spec.parse("fuse-into-codes"),
    ),
)  # fmt: skip
"""Forms with integer arithmetic; each is tried where its layers do at least `LEAST_SHARE` of the work."""

LEAST_SHARE = 0.2


@dataclass(frozen=True, kw_only=True)
class Request(LossyRequest):
    """What is asked of `quantize`, checked.

    Attributes are the arguments of `quantize`.
    """

    precision: Precision = "int8"
    weight_only: str | None = None
    block: int | None = None
    objective: Objective = "latency"
    isa: Isa = "vnni"

    @property
    def asks_for_a_form(self) -> bool:
        """Whether another form than the fastest is asked for."""
        return self.weight_only is not None or self.precision != "int8" or self.objective != "latency"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, kinds in (("precision", Precision), ("objective", Objective), ("isa", Isa)):
            if getattr(self, name) not in get_args(kinds):
                raise SpecError(f"{name} is one of {', '.join(get_args(kinds))}, not {getattr(self, name)!r}")
        if self.weight_only is not None and self.weight_only not in WEIGHT_ONLY:
            raise SpecError(
                f"weight-only is one of {', '.join(WEIGHT_ONLY)}, not {self.weight_only!r}", at="--weight-only"
            )
        if self.objective == "size" and (self.weight_only is not None or self.precision != "int8"):
            raise SpecError(
                "the smallest file is looked for among all forms", hint="leave out the form, or --objective"
            )
        if self.isa != "vnni" and self.asks_for_a_form:
            raise SpecError(
                f"{self.isa} matters to products of 8 bits only", at="--isa", hint="leave it or the form out"
            )
        if self.block is not None and self.block not in BLOCKS:
            raise SpecError(f"a block is one of {', '.join(map(str, BLOCKS))}, not {self.block}", at="--block")
        if self.block is not None and self.weight_only is None:
            raise SpecError("a block is of weight-only forms", at="--block", hint="--weight-only int4 --block 32")
        if self.weight_only is not None and self.precision != "int8":
            raise SpecError("weight-only and another precision exclude each other", hint="leave out one of them")


@dataclass
class Candidate:
    """A model that keeps the bound, before it is timed."""

    form: str
    model: Model
    pipeline: Pipeline
    quality: Quality | None
    rows: list[LayerRow]
    tried: Tried


def quantize(
    model: Source,
    *,
    data: Spec = None,
    bound: Bound | None = None,
    precision: Precision = "int8",
    weight_only: str | None = None,
    block: int | None = None,
    objective: Objective = "latency",
    isa: Isa = "vnni",
    provider: str = "cpu",
    threads: int | Sequence[int] | None = 1,
    contrib: bool = False,
    shapes: Shapes | None = None,
    batch: int = 1,
    budget: float = BUDGET,
    seed: int = 0,
    decisions: Decisions | str | Path | None = None,
    progress: Progress | None = None,
) -> Quantized:
    """Return the fastest model that keeps the bound; the lossless one where none is faster.

    Args:
        model: a path, `Model` or `ModelProto`; left untouched.
        data: representative samples as in `load_samples`; half of them calibrate and choose, the others judge.
        bound: what it may cost; `Bound()` asks for what suits the outputs.
        precision: `int8`, or `fp16` for providers that gain by it.
        weight_only: `int8`, `int4`, `nf4` or `codebook`: weights only, arithmetic stays float.  Needs no samples.
        block: weights that share a scale in weight-only forms; 0 is a scale per channel.
        objective: `latency`, or `size`: the smallest file that keeps the bound, which may be slower.
        isa: what the machine has that will run it: without VNNI, sums of two 8-bit products may saturate, and weights
            that do so on the samples get 7 bits.
        provider: where the result will run.
        threads: ORT's intra-op threads to time with; several are all timed.
        contrib: whether operators of ORT's own domains may be used.
        shapes: shapes of inputs by name, for random feeds where there are no samples.
        batch: how many rows of `.npz` samples make a feed.
        budget: seconds that timing may take, about.
        seed: for everything random.
        decisions: of an earlier run (a file, or `Decisions`): do the same again, without measuring.
        progress: takes short sentences about what is going on.

    Raises:
        GraphoptError: the model, samples or bound are not usable, or options contradict each other.
        GateMissedError: a form that was asked for by name misses the bound; nothing is returned.
    """
    started = time.perf_counter()
    request = Request(
        bound=bound or Bound(), precision=precision, weight_only=weight_only, block=block, objective=objective,
        provider=provider, contrib=contrib, budget=budget, seed=seed, threads=thread_counts(threads), isa=isa,
    )  # fmt: skip
    given = Given.load(model, data, batch=batch, seed=seed, shapes=shapes)
    if decisions is not None and request.asks_for_a_form:
        raise SpecError("decisions say which form it is", at="--decisions", hint="leave out the form, or --decisions")
    task = _Task(given, request, progress)
    result = task.replayed(decisions) if decisions is not None else task.run()
    return result.since(started)


class Quantized(Finished[QuantizationReport]):
    """A finished run: the model, and what was done to it."""


class _Task(LossyTask):
    """One model, and how candidates are made, judged and timed."""

    def __init__(self, given: Given, request: Request, progress: Progress | None) -> None:
        super().__init__(given, request, progress, judged_on=_runs_on(request))
        self.request = request
        self.tried: list[Tried] = []
        self.rows: list[LayerRow] = []
        self.notes: list[str] = []
        self.outcomes: list[str] = []

    def run(self) -> Quantized:
        """Return the best result."""
        if self.request.weight_only is not None:
            sampled = self.calibrating is not None
            return self._named(NamedForm.of(self.request.weight_only, self.request.block, sampled=sampled))
        if self.request.precision == "fp16":
            return self._named(HALF)
        if self.request.objective == "size":
            return self._smallest()
        if self.calibrating is None:
            raise DataError(
                "int8 needs samples: ranges are measured on them", at="--data",
                hint="give --data; --weight-only int8 and --precision fp16 need none",
            )  # fmt: skip
        return self._fastest()

    def _fastest(self) -> Quantized:
        self.progress("running the float model")
        self.check.prepare()  # what is wrong with samples or metric shows before minutes of timing
        lossless, lowering, canonical = self.lossless(), self.lowering(), self.canonical()
        candidates: list[Candidate] = []
        for recipe in RECIPES:
            beat = min((c.tried.predicted or math.inf for c in candidates), default=math.inf)
            found = self._chosen(canonical, recipe, lowering, beat)
            candidates += [] if found is None else [found]
        best, timing = self._timed(candidates)
        if best is None:
            return self._kept(lossless, canonical, candidates)
        return self._finished(best, timing)

    def _chosen(
        self, canonical: Model, recipe: Recipe, lowering: tuple[spec.Step, ...], beat: float
    ) -> Candidate | None:
        """Return the best model of one form, None where no choice of layers keeps the bound."""
        assert self.calibrating is not None
        if work_share(canonical, recipe, self.given.feeds.first()) < LEAST_SHARE:
            return None
        if saturates(self.request.isa):
            recipe = recipe.safe(self.request.isa)
        budget = (1 - LOSSLESS_SHARE) * 2 / 3 * self.request.budget / len(RECIPES)
        choice = LayerChoice(
            canonical, self.calibrating, recipe, lowering, self.settings, self._judged,
            budget=budget, progress=self.progress,
        )  # fmt: skip
        found = choice.best(beat)
        self.tried += choice.tried
        self.rows = choice.rows or self.rows
        self.notes += choice.notes
        if found is None:
            self.outcomes.append(f"{recipe.form}: {choice.outcome}")
            return None
        tried = next(t for t in choice.tried if t.quality is found.quality)
        pipeline = Pipeline((*self.prefix(), *found.steps))
        return Candidate(recipe.form, found.model, pipeline, found.quality, choice.rows, tried)

    def _judged(self, model: Model) -> Quality:
        found = self.quality(model)
        assert found is not None
        return found

    def _timed(self, candidates: Sequence[Candidate]) -> tuple[Candidate | None, Comparison | None]:
        """Return the fastest candidate that is faster than the lossless model, and what its timing was."""
        fastest: tuple[Candidate, Comparison] | None = None
        last: Comparison | None = None
        found = self.compare([(one.form, one.model) for one in candidates]) if candidates else []
        for one, last in zip(candidates, found, strict=True):
            one.tried.comparison = last
            if not faster(last):
                one.tried.verdict = f"not faster than the lossless model: {in_words(last)}"
            elif fastest is None or last.overall.median < fastest[1].overall.median:
                fastest = one, last
        return (None, last) if fastest is None else fastest

    def _kept(self, lossless: Result, canonical: Model, candidates: Sequence[Candidate]) -> Quantized:
        """Return the lossless model, and why no other."""
        rows = self.rows or unable(canonical, self.request.provider)
        timed = [f"{one.form}: {one.tried.verdict}" for one in candidates]
        reason = "; ".join([*timed, *self.outcomes]) or unable_reason(rows)
        rows = [
            row if row.precision == "float" and row.why else replace(row, precision="float", why=reason) for row in rows
        ]
        report = self._report(lossless.model, rows, decision="lossless", reason=reason, form="float")
        report.pipeline = lossless.report.pipeline
        report.quality = self.quality(lossless.model)
        report.decisions = lossless.report.decisions
        return Quantized(lossless.model, report)

    def _finished(self, best: Candidate, timing: Comparison | None) -> Quantized:
        best.tried.verdict = best.tried.verdict or "keeps the bound"
        order_constants(best.model.graph)  # so that a replay writes the same bytes
        report = self._report(best.model, best.rows, form=best.form)
        report.pipeline, report.quality, report.timing = str(best.pipeline), best.quality, timing
        report.decisions = self.decisions(best.pipeline).to_dict()
        return Quantized(best.model, report)

    def _report(self, model: Model, rows: Sequence[LayerRow], **fields: Any) -> QuantizationReport:
        return self.report_of(
            QuantizationReport, model, layers=list(rows), tried=self.tried, notes=list(self.notes), **fields,
        )  # fmt: skip

    def _named(self, form: NamedForm) -> Quantized:
        """Return what a form that was asked for by name makes of the canonical model.

        Raises:
            GateMissedError: it misses the bound.
        """
        pipeline = Pipeline((*default_pipeline(form.opset, "canonical").steps, *form.steps))
        self.progress(form.name)
        made = pipeline.run(self.original, samples=self.calibrating, settings=self.settings)
        record = next(r for r in made.report.passes if r.name == form.steps[0].name)
        rows = [LayerRow(miss["where"], "", "float", miss["why"]) for miss in record.blocked]
        if record.status != "changed":
            why = "; ".join(sorted({row.why for row in rows})[:3]) or "nothing in it takes this form"
            return Quantized(made.model, self._report(made.model, rows, decision="lossless", reason=why, form="float"))
        quality = self.quality(made.model)
        tried = Tried(form.name, record.changes, None, quality)
        self.tried.append(tried)
        if quality is not None and not quality.ok:
            tried.verdict = "; ".join(quality.failures)
            raise GateMissedError(
                f"{form.name} misses the bound: {tried.verdict}",
                hint="loosen it (--min-sqnr, --min-agreement, --max-drop), or ask for another form",
            )
        result = self._finished(Candidate(form.name, made.model, pipeline, quality, rows, tried), None)
        result.report.changes = record.changes
        result.report.notes += record.notes
        if quality is None:
            result.report.notes.append("what it costs in accuracy was not judged: there are no samples (--data)")
        if quality is not None and _runs_on(self.request) != self.request.provider:
            missing = f"{self.request.provider} is not in the installed ONNX Runtime"
            result.report.notes.append(f"judged on {_runs_on(self.request)}: {missing}")
        return result

    def _smallest(self) -> Quantized:
        """Return the smallest file among the forms that store weights in fewer bits and keep the bound."""
        if self.judging is None:
            raise DataError(
                "the smallest file that keeps the bound is judged on samples, and there are none", at="--data",
                hint="give --data, or name a form: --weight-only int8",
            )  # fmt: skip
        found = []
        for name in (*WEIGHT_ONLY, None):
            form = NamedForm.of(name, self.request.block, sampled=True)
            with contextlib.suppress(GateMissedError):  # stands among what was tried
                found.append(self._named(form.smaller()))
        found = [result for result in found if result.report.decision == "quantized"]
        if not found:
            reason = "no form keeps the bound: " + "; ".join(f"{t.form}: {t.verdict}" for t in self.tried)
            report = self._report(self.original, [], decision="lossless", reason=reason, form="float")
            return Quantized(self.original.copy(), report)
        best = min(found, key=lambda result: result.report.bytes_after)
        best.report.tried = self.tried
        best.report.notes.append("the smallest file was asked for; it may be slower than the float model")
        return best

    def replayed(self, decisions: Decisions | str | Path) -> Quantized:
        """Return what was decided before."""
        model, found, reason = self.replay(decisions)
        report = self._report(model, [], reason=reason)
        report.pipeline, report.quality = found.pipeline, self.quality(model)
        report.decisions = found.to_dict()
        return Quantized(model, report)


def work_share(model: Model, recipe: Recipe, feed: Feeds) -> float:
    """Return the part of the known MACs of Conv, MatMul and Gemm that a recipe's operators do."""
    found = costs(model, inputs={name: np.shape(value) for name, value in feed.items()})
    macs = {node.op: 0 for node in model.graph.nodes}
    for node in model.graph.nodes:
        macs[node.op] += found.of(node).macs or 1
    layers = sum(macs.get(op, 0) for op in {op for each in RECIPES for op in each.ops})
    return sum(macs.get(op, 0) for op in recipe.ops) / layers if layers else 0.0


def _runs_on(request: Request) -> str:
    """Return the provider that results are judged on: this machine may not have the one that they are for."""
    if request.precision == "int8" and request.weight_only is None:
        return request.provider
    return request.provider if request.provider in available_providers() else "cpu"
