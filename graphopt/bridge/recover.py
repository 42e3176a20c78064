"""One training run put together: module, data, what is to be learned, what chooses the best weights, the loop."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from graphopt.bridge.batches import TrainingData, load_training_data
from graphopt.bridge.graph import TrainableGraph
from graphopt.bridge.history import History
from graphopt.bridge.loop import train
from graphopt.bridge.objective import Objective, distill_objective, task_objective
from graphopt.bridge.parts import Judge, Progress
from graphopt.bridge.teacher import Teacher
from graphopt.data import Spec, call_user
from graphopt.errors import SpecError
from graphopt.metric import Metric, metric_of
from graphopt.model import Model
from graphopt.runtime import Session
from graphopt.training import DistillSettings, TrainSettings

HELD_OUT = 0.1
"""Part of the samples that chooses the best weights, where nothing else does."""

MEASURED, MEASURED_BATCH = 8, 32
"""Batches that losses are scaled by, and their rows."""


@dataclass
class Recovered:
    """What came of it.

    Attributes:
        model: a copy of the one that was given, with trained weights.
        history: the course of the training.
        tensors, parameters: what was trained: tensors, and elements of them.
        losses: before and after, on the samples that chose; None without.
        notes: what the data and the objective have to say.
    """

    model: Model
    history: History
    tensors: int
    parameters: int
    losses: tuple[float | None, float | None] = (None, None)
    notes: list[str] = field(default_factory=list)


def recover(
    model: Model, teacher: Model | None, data: TrainingData, settings: TrainSettings, *,
    selecting: TrainingData | None = None, metric: Metric | None = None, seed: int = 0, checkpoint: Path | None = None,
    resume: bool = False, progress: Progress | None = None,
) -> Recovered:  # fmt: skip
    """Return a model with trained weights.

    Args:
        model: what is trained; it stays as it is.
        teacher: what it learns from, too; the settings are then those of distillation.
        data: what trains.
        settings: how.
        selecting: what chooses the best weights by the loss, in ORT on the model written back; None: nothing does.
        metric: chooses in its place: `predict -> number or scores`, higher is better.
        seed: for everything random.
        checkpoint: folder for the state.
        resume: go on from there.
        progress: is told of every step.

    Raises:
        GraphoptError: the model cannot be trained, the data do not fit, or the loss is no number before any weights
            were good.
    """
    objective = _objective(model, teacher, settings)
    bridge = TrainableGraph(
        model, taps=objective.taps, only=settings.only, freeze=settings.freeze, learn_scales=settings.learn_scales,
        batch_norm=settings.batch_norm,
    )  # fmt: skip
    objective.measure(_seen(model, objective, data))
    loss = None if selecting is None else HeldOutLoss(objective, selecting, settings.batch)
    judge = loss if metric is None else _by_metric(metric)
    history = train(
        bridge, data, objective, settings, judge=judge, teacher=teacher, seed=seed, checkpoint=checkpoint,
        resume=resume, progress=progress,
    )  # fmt: skip
    trained = bridge.write_back()
    before, after = (None if loss is None else -loss(one) for one in (model, trained))
    count = sum(int(np.prod(p.shape)) for p in bridge.parameters.values())
    notes = [*_course(history, resume=resume), *objective.notes, *bridge.quantized.notes, *_left(bridge)]
    return Recovered(trained, history, len(bridge.parameters), count, (before, after), notes)


def _course(history: History, *, resume: bool) -> list[str]:
    """Return what is worth a note about how training went."""
    notes = []
    if resume:
        notes.append(
            f"went on after {history.resumed} updates" if history.resumed
            else "there was no checkpoint yet: training began anew"
        )  # fmt: skip
    if history.trials:
        tried = ", ".join(f"{trial.rate:g}" for trial in history.trials if trial.rate)
        notes.append(f"rate {history.rate:g}, found by short trainings at {tried}")
        if history.steps and not history.best_step and not any(row.judged is not None for row in history.rows):
            notes.append("the loss was larger than before on the samples that judged rates: no weight was changed")
    return notes


def _left(bridge: TrainableGraph) -> list[str]:
    """Return which codes and scales are not trained, one line for each reason."""
    reasons: dict[str, list[str]] = {}
    for name, why in bridge.quantized.untrained.items():
        reasons.setdefault(why, []).append(name)
    return [
        f"not trained: '{names[0]}'" + (f" and {len(names) - 1} more" if len(names) > 1 else "") + f": {why}"
        for why, names in reasons.items()
    ]


def distill(
    student: Model, teacher: Model, data: Spec | TrainingData, settings: DistillSettings, *, seed: int = 0,
    held_out: float = HELD_OUT, progress: Progress | None = None,
) -> Recovered:  # fmt: skip
    """Return a model trained to give what a teacher gives; arguments as in `recover`."""
    given = _loaded(data, student, settings, seed, labelled=settings.alpha < 1.0)
    training, selecting, _ = given.parted(held_out, judges=False, seed=seed)
    return recover(student, teacher, training, settings, selecting=selecting, seed=seed, progress=progress)


def finetune(
    model: Model, data: Spec | TrainingData, settings: TrainSettings, *, seed: int = 0, held_out: float = HELD_OUT,
    progress: Progress | None = None,
) -> Recovered:  # fmt: skip
    """Return a model trained on labels; arguments as in `recover`."""
    given = _loaded(data, model, settings, seed, labelled=True)
    training, selecting, _ = given.parted(held_out, judges=False, seed=seed)
    return recover(model, None, training, settings, selecting=selecting, seed=seed, progress=progress)


class HeldOutLoss:
    """The loss on samples that do not train, of a model in ORT: what chooses the best weights, negative."""

    def __init__(self, objective: Objective, data: TrainingData, batch: int) -> None:
        self.objective, self.data, self.batch = objective, data, batch

    def __call__(self, model: Model) -> float:
        """Return minus the mean loss."""
        runner = _runner(model, self.objective)
        total = rows = 0.0
        for batch in self.data.epoch(0, seed=0, batch=self.batch):
            with torch.no_grad():
                found = self.objective(runner(batch), batch)
            total += float(found["loss"]) * len(batch.index)
            rows += len(batch.index)
        return -total / rows


def _seen(model: Model, objective: Objective, data: TrainingData) -> Iterator[tuple[dict[str, Any], Any]]:
    """Yield some batches, the same in all processes, and what a model makes of them in ORT."""
    runner = _runner(model, objective)
    for batch in itertools.islice(data.epoch(0, seed=0, batch=MEASURED_BATCH), MEASURED):
        yield runner(batch), batch


def _runner(model: Model, objective: Objective) -> Teacher:
    """Return what computes outputs and taps of a model in ORT."""
    names = [output.name for output in model.outputs]
    return Teacher(model, [*names, *(tap for tap in objective.taps if tap not in names)], cache=False)


def _objective(model: Model, teacher: Model | None, settings: TrainSettings) -> Objective:
    if teacher is None:
        return task_objective(model, settings)
    if not isinstance(settings, DistillSettings):
        raise SpecError("learning from a teacher has settings of its own", at="settings", hint="DistillSettings(...)")
    asked = Teacher(teacher, cache=not settings.augment, threads=torch.get_num_threads())
    return distill_objective(model, asked, settings)


def _loaded(
    data: Spec | TrainingData, model: Model, settings: TrainSettings, seed: int, *, labelled: bool
) -> TrainingData:
    if isinstance(data, TrainingData):
        return data
    return load_training_data(data, model, settings, seed=seed, labelled=labelled)


def _by_metric(metric: Metric) -> Judge:
    function, name = metric_of(metric)
    assert function is not None

    def judge(model: Model) -> float:
        return float(np.mean(call_user(function, name, Session(model, threads=1).run)))

    return judge
