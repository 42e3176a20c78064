"""What lossy commands share: samples that choose or judge, the lossless model, a candidate's accuracy and time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Self, TypeAlias, TypeVar

import numpy as np

from graphopt import environment, registry, spec
from graphopt.analysis.cost import costs
from graphopt.base import Target
from graphopt.data import Spec, load_samples
from graphopt.decisions import Decisions, Selection, checked, read_decisions
from graphopt.edit import order_constants
from graphopt.errors import DataError, GraphoptError, InternalError, ModelError, SpecError
from graphopt.judge import Comparison, Condition, Progress, judging, shared
from graphopt.kernels import is_integer
from graphopt.lossy_report import LossyReport
from graphopt.model import Model, Source, load
from graphopt.ops import DEQUANTIZE, QUANTIZE, is_standard
from graphopt.optimizer import DEFAULT_OPSET, Shapes, default_pipeline, optimize
from graphopt.pipeline import Pipeline, Result, Settings, StopPipelineError, size_of
from graphopt.quality import Bound, Quality, QualityCheck, split
from graphopt.runtime import PROVIDERS
from graphopt.samples import Samples
from graphopt.timing import prepare

BUDGET = 60.0
"""Seconds that timing may take."""

LOOKS = (2.0, 5.0, 10.0)
"""Seconds of each look at a candidate beside the lossless model, under each condition."""

LOSSLESS_SHARE = 0.35
"""Part of the budget for the lossless model; a third of the rest goes to the last gate."""

R = TypeVar("R", bound=LossyReport)
GivenDecisions: TypeAlias = "Decisions | str | Path"


@dataclass(frozen=True, kw_only=True)
class LossyRequest:
    """What every lossy command is asked.

    Attributes:
        bound: what the result may cost.
        provider: where it will run.
        contrib: whether operators of ORT's own domains may be used.
        budget: seconds that timing may take, about.
        seed: for everything random.
        threads: ORT's intra-op threads to time with.
        measure: whether anything is timed; without, static defaults decide what of the lowering is used.
    """

    bound: Bound
    provider: str = "cpu"
    contrib: bool = False
    budget: float = BUDGET
    seed: int = 0
    threads: tuple[int, ...] = (1,)
    measure: bool = True

    def __post_init__(self) -> None:
        if self.provider not in PROVIDERS:
            raise SpecError(
                f"unknown provider '{self.provider}'", at="--provider", hint=f"known: {', '.join(PROVIDERS)}"
            )


@dataclass
class Finished(Generic[R]):
    """A finished run: the model, and what was done to it."""

    model: Model
    report: R

    def save(self, path: str | Path) -> None:
        """Write the model atomically, sparse weights in sparse form where that is smaller.

        Raises:
            ModelError: it cannot be written; what was there is unchanged.
        """
        self.model.save(path)

    def since(self, started: float) -> Self:
        """Enter into the report where it ran, and the seconds since `started` (of `time.perf_counter`)."""
        self.report.environment = environment.describe()
        self.report.seconds = time.perf_counter() - started
        return self


@dataclass(frozen=True)
class Given:
    """The model and the feeds that a command was given.

    Attributes:
        original: the model, as it came.
        samples: what the user gave; None without.
        feeds: `samples`, or random ones in their place: for timing and for the lossless model's own checks.
    """

    original: Model
    samples: Samples | None
    feeds: Samples

    @classmethod
    def load(cls, model: Source, data: Spec, *, batch: int, seed: int, shapes: Shapes | None) -> Given:
        """Return them.

        Raises:
            GraphoptError: the model or samples are not usable, or there are shapes beside samples.
        """
        if shapes is not None and data is not None:
            raise SpecError(
                "shapes are for random feeds; these samples have their own", hint="leave out --shape or --data"
            )
        original = load(model)
        samples = None if data is None else load_samples(data, original, batch=batch, seed=seed)
        feeds = samples if samples is not None else load_samples(None, original, seed=seed, shapes=shapes)
        return cls(original, samples, feeds)


class LossyTask:
    """One model, and how candidates are judged and timed.

    Args:
        given: the model and its feeds.
        request: what is asked.
        progress: takes short sentences.
        judged_on: the provider that results are judged on, where it is not the one they are for.

    Attributes:
        settings: how pipelines run; nothing is verified, for the result is judged.
        calibrating: samples that choose; None without samples.
        judging: samples that judge; None where there is nothing to judge on.

    Raises:
        DataError: the bound is on outputs, and there are no samples.
    """

    def __init__(
        self, given: Given, request: LossyRequest, progress: Progress | None = None, judged_on: str | None = None
    ) -> None:
        self.given, self.original, self.common = given, given.original, request
        self.progress = progress or (lambda _: None)
        self.target = Target(request.provider, request.threads[0], request.contrib)
        self.settings = Settings(verify="off", on_failure="stop", seed=request.seed, target=self.target)
        samples, bound = given.samples, request.bound
        self.calibrating = None if samples is None else split(samples, "calibration", seed=request.seed)
        self.judging = None if samples is None else split(samples, "judging", seed=request.seed)
        if samples is None and bound.names_numbers:
            raise DataError(
                "a bound on outputs is judged on samples, and there are none", at="--data", hint="give --data"
            )
        if samples is None and bound.metric is not None:
            self.judging = given.feeds  # the metric has data of its own
        self._judged_on = judged_on or request.provider
        self._check: QualityCheck | None = None
        self._lossless: Result | None = None

    def quality(self, model: Model) -> Quality | None:
        """Return how good a model is, None where there is nothing to judge on."""
        return None if self.judging is None else self.check.of(model)

    @property
    def check(self) -> QualityCheck:
        """What candidates are judged by: the original on the judging samples."""
        assert self.judging is not None
        if self._check is None:
            request = self.common
            self._check = QualityCheck(
                self.original, self.judging, request.bound, request.seed, provider=self._judged_on
            )
        return self._check

    def prefix(self) -> tuple[spec.Step, ...]:
        """Return the canonical stage of the lossless engine."""
        return default_pipeline(DEFAULT_OPSET, "canonical").steps

    def run_passes(
        self,
        steps: Sequence[spec.Step],
        model: Model,
        samples: Samples | None,
        settings: Settings | None = None,
        *,
        own: bool = False,
    ) -> Result:
        """Return what passes make of a model; what stops one of them is raised as it is.

        Raises:
            GraphoptError: as the pass says.
        """
        try:
            return Pipeline(steps).run(model, samples=samples, settings=settings or self.settings, own=own)
        except StopPipelineError as stop:
            cause = stop.__cause__
            if isinstance(cause, GraphoptError):
                raise cause from None
            raise InternalError(str(stop.what)) from cause

    def canonical(self) -> Model:
        """Return what lossy passes start from."""
        return Pipeline(self.prefix()).run(self.original, samples=self.given.feeds, settings=self.settings).model

    def lossless(self) -> Result:
        """Return the lossless model, made once: with the lowering passes that pay, if that may be measured."""
        if self._lossless is None:
            self.progress("making the lossless model")
            request = self.common
            self._lossless = optimize(
                self.original, data=self.given.feeds, threads=request.threads, provider=request.provider,
                contrib=request.contrib, seed=request.seed, budget=LOSSLESS_SHARE * request.budget,
                measure=request.measure, verify="end" if request.measure else "off", progress=self.progress,
            )  # fmt: skip
            order_constants(self._lossless.model.graph)  # so that a replay writes the same bytes
        return self._lossless

    def lowering(self) -> tuple[spec.Step, ...]:
        """Return the lowering passes that paid for the lossless model."""
        decided = (self.lossless().report.decisions or {}).get("pipeline") or ""
        steps = spec.parse(decided) if decided else default_pipeline().steps
        passes = [step for step in steps if isinstance(step, spec.PassStep)]
        return tuple(step for step in passes if registry.get(step.name).stage == "lowering")

    def compare(
        self, candidates: Sequence[tuple[str, Model]], enough: Callable[[Comparison], bool] | None = None
    ) -> list[Comparison]:
        """Return the time of each (name, candidate) over the lossless model's, in a third of what timing may take.

        Args:
            candidates: by name.
            enough: tells whether a look is; by default that is clear which one is faster.
        """
        request = self.common
        conditions = Condition.all(request.threads, {"": prepare(self.original, self.given.feeds, request.seed)})
        found = []
        with judging(conditions, provider=request.provider, seed=request.seed, progress=self.progress) as judge:
            judge.deadline = time.monotonic() + (1 - LOSSLESS_SHARE) / 3 * request.budget
            base = judge.candidate(self.lossless().model)
            for name, model in candidates:
                other = judge.candidate(model)
                confidence = shared(len(candidates), len(LOOKS))
                found.append(judge.compare(base, other, name, LOOKS, enough or _decided, confidence))
                other.forget()
        return found

    def macs(self, model: Model) -> int | None:
        """Return the multiplications that a model takes for the first feed; None where not all are known."""
        feed = self.given.feeds.first()
        return costs(model, inputs={name: np.shape(value) for name, value in feed.items()}).macs

    def report_of(self, kind: type[R], model: Model, **fields: Any) -> R:
        """Return a report with what all have: names, sizes, samples; `fields` are the rest, or say it otherwise."""
        common = {
            "model": str(self.original.path or "<memory>"),
            "seed": self.common.seed,
            "bound": self.common.bound.to_dict(),
            "before": size_of(self.original),
            "after": size_of(model),
            "bytes_before": self.original.emitted_bytes(),
            "bytes_after": model.emitted_bytes(),
            "samples": {
                "calibration": "" if self.calibrating is None else self.calibrating.description,
                "judging": "" if self.judging is None else self.judging.description,
            },
        }
        return kind(**{**common, **fields})

    def decisions(self, pipeline: Pipeline) -> Decisions:
        """Return what a replay needs to make the result of a pipeline again."""
        return Decisions.of(self.original, pipeline, Selection(), self.settings, "optimized")

    def replay(self, decisions: GivenDecisions) -> tuple[Model, Decisions, str]:
        """Return what was decided before: the model, the decisions, and where they came from in words.

        Raises:
            SpecError: they are not of this model.
        """
        path = None if isinstance(decisions, Decisions) else decisions
        found = decisions if isinstance(decisions, Decisions) else read_decisions(decisions)
        checked(found, self.original, path)
        settings = found.settings(self.settings)
        model = self.original.copy()
        if found.pipeline:
            pipeline = Pipeline(found.pipeline)
            model = pipeline.run(self.original, samples=self.calibrating, settings=settings).model
            order_constants(model.graph)
        return model, found, f"as decided before{f' in {path}' if path else ''}"


def check_floats(model: Model, verb: str) -> None:
    """Refuse a quantized model: weights in codes cannot be fitted.

    Raises:
        ModelError: it holds codes.
    """
    for node in model.nodes():
        if is_standard(node, *QUANTIZE, *DEQUANTIZE) or is_integer(node.op):
            raise ModelError(
                "the model is quantized already", at=f"node '{node.name or node.outputs[0].name}'",
                hint=f"{verb} the float model, then quantize the result",
            )  # fmt: skip


def faster(comparison: Comparison) -> bool:
    """Tell whether a candidate is faster beyond doubt, and slower under no condition as far as is seen."""
    if comparison.same or not comparison.ratios:
        return False
    return comparison.overall.high < 1.0 and all(r.median <= 1.0 for r in comparison.ratios.values())


def _decided(comparison: Comparison) -> bool:
    return comparison.overall.high < 1.0 or comparison.overall.low > 1.0


def in_words(comparison: Comparison) -> str:
    """Return how a candidate's time compares under the condition that suits it least."""
    if not comparison.ratios:
        return comparison.note or "ORT makes the same graph of both"
    label, ratio = comparison.worst
    return f"{ratio.median:.3f} of its time ({ratio.low:.3f} to {ratio.high:.3f}) with {label}"
