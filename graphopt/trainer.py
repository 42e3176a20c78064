"""`distill` and `finetune`: weights trained in torch, judged in ONNX Runtime before and after.

    the model as a torch module → samples: some train, some choose the best weights, some judge → the training loop
    → weights written back into the same graph → quality, size and time beside the reference

The reference is the teacher where there is one, else the model as it came.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, Unpack

import numpy as np

from graphopt.analysis.cost import Sizes, costs
from graphopt.analysis.shapes import Shapes
from graphopt.data import Spec
from graphopt.errors import DataError, GateMissedError, ModelError, SpecError
from graphopt.judge import Condition, judging, shared
from graphopt.lossy import Finished
from graphopt.metric import Metric
from graphopt.model import Model, Source, load
from graphopt.ops import DEQUANTIZE, QUANTIZE, is_standard
from graphopt.optimizer import thread_counts
from graphopt.pipeline import size_of
from graphopt.profile import observe
from graphopt.quality import Bound, QualityCheck
from graphopt.samples import Feeds, Samples
from graphopt.timing import prepare
from graphopt.training import HALF, DistillSettings, TrainSettings
from graphopt.training_report import Stage, TrainingReport

if TYPE_CHECKING:
    from graphopt.bridge.batches import TrainingData
    from graphopt.bridge.history import History
    from graphopt.bridge.parts import Progress
    from graphopt.bridge.recover import Recovered

LOOKS = (2.0, 5.0, 10.0)
"""Seconds of each look at the time, under each condition."""


class Options(TypedDict, total=False):
    """What `distill` and `finetune` take beside the settings of the training; all of it by name, as in `Request`."""

    bound: Bound
    select: Metric | None
    held_out: float
    standardize: bool
    start_from_teacher: bool
    checkpoint: str | Path | None
    resume: bool
    measure: bool
    threads: int | Sequence[int] | None
    budget: float
    seed: int
    progress: Progress | None


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked of training, beside its settings.

    Attributes:
        bound: what is asked of the result beside the reference, on samples that did not train; by default nothing.
        select: metric that chooses the best weights (`file.py:function` as in `Bound.metric`, of other items); None:
            the loss on held-out samples does.
        held_out: part of the samples that does not train: half of it chooses, half of it judges.
        standardize: write mean and variance of the samples into the graph first, per channel or feature.
        start_from_teacher: take the teacher's weights first, where names fit: of the channels that are left.
        checkpoint: folder that the state is saved in, each time that the model was looked at.
        resume: go on from there.
        measure: time the result beside the reference.
        threads: ORT's intra-op threads to time with.
        budget: seconds that timing may take, about.
        seed: for everything random.
        progress: is told of every step.
    """

    bound: Bound = field(default_factory=lambda: Bound(defaults=False))
    select: Metric | None = None
    held_out: float = 0.2
    standardize: bool = False
    start_from_teacher: bool = False
    checkpoint: str | Path | None = None
    resume: bool = False
    measure: bool = True
    threads: int | Sequence[int] | None = 1
    budget: float = 20.0
    seed: int = 0
    progress: Progress | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.held_out < 1.0:
            raise SpecError(
                f"a part of the samples is held out, not {self.held_out:g}", at="held_out", hint="between 0 and 1: 0.2"
            )
        if self.resume and self.checkpoint is None:
            raise SpecError(
                "there is no checkpoint to resume from", at="resume",
                hint="say in which folder it is: --checkpoint FOLDER",
            )  # fmt: skip


@dataclass
class Trained(Finished[TrainingReport]):
    """A finished run.

    Attributes:
        model: with trained weights.
        report: what was done; judged and timed by the leading process only.
        history: the course of the training.
        leads: whether this process leads, where there are several: it is the one to write files.
    """

    history: History
    leads: bool = True


def distill(
    model: Source, *, teacher: Source, data: Spec, settings: DistillSettings | None = None, **options: Unpack[Options]
) -> Trained:
    """Return a model with weights trained to give what a teacher gives.

    Args:
        model: the student: a pruned, sparse, factorized or quantized form of the teacher, or another graph with its
            inputs and outputs.
        teacher: what it learns from.
        data: samples as in `load_samples`; pairs of feeds and labels where `settings.alpha` is below 1.
        settings: of the training.
        **options: as in `Request`.

    Raises:
        GraphoptError: something given is not usable, or the bound is missed.
    """
    return train(load(model), load(teacher), data, settings or DistillSettings(), Request(**options))


def finetune(
    model: Source,
    *,
    train_on: Spec,
    teacher: Source | None = None,
    settings: TrainSettings | None = None,
    qat: bool = False,
    **options: Unpack[Options],
) -> Trained:
    """Return a model with weights trained on labels.

    Args:
        model: what is trained; its graph stays as it is.
        train_on: pairs of feeds and labels, as in `load_samples`; feeds alone do where a teacher is all that teaches.
        teacher: what it learns from, too: then the settings are those of `distill`, where labels count as far as
            `alpha` is below 1 (one half, where no settings are given).
        settings: of the training.
        qat: the model is quantized, and stays so: codes are trained through the floats that they stand for.
        **options: as in `Request`.

    Raises:
        GraphoptError: something given is not usable, or the bound is missed.
    """
    given = load(model)
    check_quantized(given, qat)
    taught = None if teacher is None else load(teacher)
    default = TrainSettings() if taught is None else DistillSettings(alpha=HALF)
    return train(given, taught, train_on, settings or default, Request(**options))


def check_quantized(model: Model, qat: bool) -> None:
    """Refuse quantized models without, and float ones with `qat`.

    Raises:
        ModelError: says which it is.
    """
    node = next((node for node in model.nodes() if is_standard(node, *QUANTIZE, *DEQUANTIZE)), None)
    if node is not None and not qat:
        where = f"node '{node.name or node.outputs[0].name}'"
        raise ModelError("the model is quantized", at=where, hint="--qat trains it as it is, with its codes")
    if node is None and qat:
        raise ModelError("the model is not quantized", at=str(model.path or "<memory>"), hint="graphopt quantize first")


def train(model: Model, teacher: Model | None, data: Spec, settings: TrainSettings, request: Request) -> Trained:
    """Return a trained model, judged and timed beside its teacher, or else beside itself as it came.

    Raises:
        GraphoptError: something given is not usable, or the bound is missed.
    """
    if teacher is None and isinstance(settings, DistillSettings):
        raise SpecError("these settings are of learning from a teacher, and there is none", at="settings",
                        hint="TrainSettings(...), or name the teacher")  # fmt: skip
    from graphopt.bridge.batches import load_training_data  # noqa: PLC0415  (torch is an extra)
    from graphopt.bridge.parallel import leads  # noqa: PLC0415
    from graphopt.bridge.recover import recover  # noqa: PLC0415

    started = time.perf_counter()
    labelled = not isinstance(settings, DistillSettings) or teacher is None or settings.alpha < 1.0
    samples = load_training_data(data, model, settings, seed=request.seed, labelled=labelled)
    run = _Run(model, teacher, samples, settings, request, judges=leads())
    before = run.stage("before", model)
    start, notes = _started(model, teacher, run.training, request)
    done = recover(
        start, teacher, run.training, settings, selecting=run.selecting, metric=request.select,
        seed=request.seed, checkpoint=None if request.checkpoint is None else Path(request.checkpoint),
        resume=request.resume, progress=request.progress,
    )  # fmt: skip
    first, last = done.losses
    if done.history.failed and not done.history.best_step and first is not None and not math.isfinite(first):
        raise DataError(f"training failed: {done.history.stopped}", at=samples.description)
    after = run.stage("after", done.model)
    run.gate(after)
    stages = [before, after] if teacher is None else [run.stage("teacher", teacher), before, after]
    before.loss, after.loss = first, last
    if run.selecting is not None and not done.history.best_step:
        notes.append("no weights were better than those that it came with, which it keeps: try another rate")
    if request.measure and leads():
        run.time(stages, [*([] if teacher is None else [teacher]), model, done.model])
    report = run.report(stages, done, notes)
    return Trained(done.model, report, done.history, leads()).since(started)


def _started(model: Model, teacher: Model | None, data: TrainingData, request: Request) -> tuple[Model, list[str]]:
    """Return what training starts from, and what was done to it."""
    from graphopt.bridge.standardize import standardize  # noqa: PLC0415  (torch is an extra)
    from graphopt.bridge.start_from import start_from  # noqa: PLC0415

    notes = []
    if request.start_from_teacher:
        if teacher is None:
            raise SpecError("there is no teacher to start from", at="start_from_teacher", hint="name the teacher")
        model = model.copy()
        notes.append(f"{len(start_from(model, teacher))} weights were the teacher's at first")
    if request.standardize:
        model = standardize(model, data)
        notes.append("the inputs are standardised in the graph; `graphopt optimize` folds that into what follows")
    return model, notes


class _Run:
    """The samples of one run, by what they do, and how its stages are judged."""

    def __init__(
        self, model: Model, teacher: Model | None, data: TrainingData, settings: TrainSettings, request: Request, *,
        judges: bool,
    ) -> None:  # fmt: skip
        self.model, self.settings, self.request, self.data = model, settings, request, data
        self.training, self.selecting, self.judging = data.parted(request.held_out / 2, judges=True, seed=request.seed)
        alike = teacher is not None and {o.name for o in teacher.outputs} == {o.name for o in model.outputs}
        self.reference = teacher if teacher is not None and alike else model
        self.notes: list[str] = []
        if self.training is data and request.held_out:
            self.notes.append(f"{data.rows} samples are too few to hold any out: nothing chose among the weights")
        if teacher is not None and not alike:
            self.notes.append("the teacher's outputs have other names: results are not compared with them")
        self.feeds = Samples(self._feeds, f"{self.judging.rows} held-out samples" if self.judging else "the samples")
        bound = request.bound
        if self.judging is None and bound.names_numbers:
            raise DataError(
                "a bound on outputs is judged on held-out samples, and there are none", at=data.description,
                hint="give more samples, or hold out more of them",
            )  # fmt: skip
        self.check: QualityCheck | None = None
        if judges and (bound.metric is not None or (self.judging is not None and alike)):
            self.check = QualityCheck(self.reference, self.feeds, bound, request.seed, limit=1 << 30)

    def _feeds(self) -> Iterator[Feeds]:
        yield from (self.judging or self.data).in_order(min(self.settings.batch, 8))

    def stage(self, name: str, model: Model) -> Stage:
        """Return one model's quality, size and work."""
        row = next(self.data.in_order(1))
        sizes = Sizes(Shapes(model, {name: np.shape(value) for name, value in row.items()}), observe(model, row))
        found = costs(model, sizes)
        quality = None if self.check is None else self.check.of(model)
        return Stage(name, model.emitted_bytes(), None if found.unknown else found.macs, quality)

    def gate(self, stage: Stage) -> None:
        """Refuse a result that misses the bound.

        Raises:
            GateMissedError: says by how much; nothing is written.
        """
        if stage.quality is not None and not stage.quality.ok:
            raise GateMissedError(
                "the trained model misses the bound: " + "; ".join(stage.quality.failures),
                hint="train longer, on more samples, or ask for less",
            )

    def time(self, stages: Sequence[Stage], models: Sequence[Model]) -> None:
        """Enter each stage's time over that of the first one."""
        request = self.request
        conditions = Condition.all(thread_counts(request.threads), {"": prepare(models[0], self.feeds, request.seed)})
        with judging(conditions, provider="cpu", seed=request.seed, progress=lambda _: None) as judge:
            judge.deadline = time.monotonic() + request.budget
            first, *others = [judge.candidate(model) for model in models]
            confidence = shared(len(others), len(LOOKS))
            for index, (stage, other) in enumerate(zip(stages[1:], others, strict=True)):
                like = next((k for k in range(index) if others[k].same_as(other)), None)  # only its weights differ
                if like is not None:
                    stage.timing = stages[1 + like].timing
                    continue
                stage.timing = judge.compare(
                    first, other, stage.name, LOOKS, lambda c: c.overall.high < 1.0 or c.overall.low > 1.0, confidence
                )

    def report(self, stages: list[Stage], done: Recovered, notes: Sequence[str]) -> TrainingReport:
        """Return what was done."""
        rows = {"train": self.training, "choose": self.selecting, "judge": self.judging}
        after = stages[-1]
        return TrainingReport(
            model=str(self.model.path or "<memory>"), seed=self.request.seed, bound=self.request.bound.to_dict(),
            before=size_of(self.model), after=size_of(done.model), reason=done.history.stopped,
            decision="distilled" if len(stages) == 3 else "trained", quality=after.quality, timing=after.timing,
            bytes_before=stages[-2].bytes, bytes_after=after.bytes,
            notes=[*self.data.notes, *self.notes, *notes, *done.notes],
            samples={"training": self.data.description}, stages=stages, settings=asdict(self.settings),
            history=done.history.to_dict(), trained=done.tensors, parameters=done.parameters,
            rows={name: part.rows for name, part in rows.items() if part is not None},
        )  # fmt: skip
