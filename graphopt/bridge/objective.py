"""What training makes smaller: the loss of a task, and the difference from a teacher.

distillation   alpha T^2 KL(teacher at T || student at T) + (1 - alpha) task loss   (Hinton et al. 2015)
mse            mean (s - t)^2 / var(t), so that tensors of any scale weigh alike; var over samples, measured once
cosine         mean 1 - cos(s, t) over rows
taps           the same between inner tensors, through a trained 1x1 projection where widths differ (Romero et al. 2015)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own custom)

from graphopt.bridge.batch import Batch
from graphopt.bridge.feature_taps import TapTerm, feature_taps
from graphopt.bridge.losses import LOSSES, SMOOTHED, Case, class_axis, fitting
from graphopt.bridge.scores import Score, scores
from graphopt.bridge.teacher import Teacher, check_same_task
from graphopt.data import call_user, load_function
from graphopt.errors import DataError, ModelError, SpecError
from graphopt.model import Model
from graphopt.training import DistillSettings, TrainSettings

_CONSTANT = 1e-6
"""Part of its power below which a tensor's variance is rounding."""


class Objective:
    """A loss.

    Attributes:
        taps: tensors of the trained model that it needs beside the outputs.
        parameters: what is trained beside the model's weights (projections of taps); an optimizer gets these too, and
            a checkpoint keeps them.
    """

    taps: tuple[str, ...] = ()

    def __init__(self) -> None:
        self.parameters: list[torch.nn.Parameter] = []

    @property
    def notes(self) -> list[str]:
        """What there is to say afterwards."""
        return []

    def measure(self, seen: Iterable[tuple[dict[str, torch.Tensor], Batch]]) -> None:
        """Take from some batches what losses are parts of, so that a batch's loss is the mean of its rows'.

        Without it, each batch is measured by itself.

        Args:
            seen: outputs and taps of the model to be trained, and what they were computed of.
        """

    def __call__(self, outputs: dict[str, torch.Tensor], batch: Batch) -> dict[str, torch.Tensor]:
        """Return named terms, all scalars; `loss` is what is to become smaller.

        Args:
            outputs: outputs and taps of the trained model, by name.
            batch: what they were computed of.

        Raises:
            DataError: labels are missing, or do not fit the outputs.
        """
        raise DataError("no loss")


class TaskObjective(Objective):
    """Labels against outputs.

    One array of labels is for the first float output; others are told by name.
    """

    def __init__(self, model: Model, settings: TrainSettings) -> None:
        super().__init__()
        self._scores = scores(model)
        if not self._scores and ":" not in settings.loss:
            listed = ", ".join(str(spec) for spec in model.outputs)
            raise ModelError("no loss fits the outputs: none is of floats", at=listed,
                             hint="train the part of the model before its decisions")  # fmt: skip
        if settings.label_smoothing and settings.loss not in SMOOTHED:
            raise SpecError(f"label smoothing is for classes, not for the loss '{settings.loss}'", at="label_smoothing")
        self._loss, self._smoothing = settings.loss, settings.label_smoothing
        self._own = load_function(settings.loss) if ":" in settings.loss else None
        self.taps = () if self._own else tuple(dict.fromkeys(t for s in self._scores.values() for t in s.taps))

    def __call__(self, outputs: dict[str, torch.Tensor], batch: Batch) -> dict[str, torch.Tensor]:
        """Return the loss of the labels, under its name and as `loss`."""
        if batch.labels is None:
            raise DataError("the labels are missing", hint="give feeds with labels, or distill from a teacher")
        if self._own is not None:
            loss = self._user_loss(outputs, batch.labels)
            return {"task": loss, "loss": loss}
        labels = batch.labels if isinstance(batch.labels, dict) else {next(iter(self._scores)): batch.labels}
        terms: dict[str, list[torch.Tensor]] = {}
        for name, expected in labels.items():
            loss_name, value = self._one(name, expected, outputs)
            terms.setdefault(loss_name, []).append(value)
        found = {name: torch.stack(values).sum() for name, values in terms.items()}
        return {**found, "loss": torch.stack(list(found.values())).sum()}

    def _one(self, name: str, labels: torch.Tensor, outputs: Mapping[str, torch.Tensor]) -> tuple[str, torch.Tensor]:
        score = self._scores.get(name)
        if score is None:
            listed = ", ".join(self._scores)
            raise DataError(f"labels for output '{name}', which no loss fits", hint=f"outputs of floats: {listed}")
        output = outputs[name]
        values, axis = score.read(outputs, output.shape)
        case = Case(
            name,
            output if output.dtype == torch.float64 else output.float(),
            values,
            axis,
            score.maker,
            labels.to(output.device),
            self._smoothing,
        )
        chosen = fitting(case) if self._loss == "auto" else self._loss
        if self._smoothing and chosen not in SMOOTHED:
            raise SpecError(f"label smoothing is for classes, not for the loss '{chosen}'", at="label_smoothing")
        return chosen, LOSSES[chosen](case)

    def _user_loss(self, outputs: Mapping[str, torch.Tensor], labels: Any) -> torch.Tensor:
        loss = call_user(self._own or (lambda *_: None), self._loss, dict(outputs), labels)
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            kind = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
            raise DataError(f"the loss is {kind}, not one number", at=self._loss, hint="return a scalar tensor")
        return loss.reshape(())


class DistillObjective(Objective):
    """A student against its teacher, and the labels where `alpha` is below 1."""

    def __init__(self, student: Model, teacher: Teacher, settings: DistillSettings) -> None:
        super().__init__()
        check_same_task(student, teacher.model)
        self._teacher, self._settings = teacher, settings
        self._pairs = _paired_outputs(student, teacher.model)
        self._features = feature_taps(student, teacher.model, settings)
        self._task = TaskObjective(student, settings) if settings.alpha < 1 else None
        self._spreads: dict[str, Spread] = {}
        self._measuring = False
        if settings.alpha == 1 and (settings.label_smoothing or settings.loss != "auto"):
            what = "label_smoothing" if settings.label_smoothing else "loss"
            raise SpecError(f"{what.replace('_', ' ')} is of labels, which alpha = 1 leaves out", at=what)
        self.parameters = [p for term in self._features for p in term.parameters]
        mine = [t for own, _ in self._pairs for t in own.taps] if settings.alpha else []
        labels = self._task.taps if self._task else ()
        self.taps = tuple(dict.fromkeys([*mine, *labels, *(term.student for term in self._features)]))
        theirs = [t for _, other in self._pairs for t in (other.tensor, *other.taps)] if settings.alpha else []
        teacher.also([*theirs, *(term.teacher for term in self._features)])

    @property
    def notes(self) -> list[str]:
        """What the teacher has to say."""
        return self._teacher.notes

    def measure(self, seen: Iterable[tuple[dict[str, torch.Tensor], Batch]]) -> None:
        """Take the variances that squared differences are parts of."""
        kinds = {self._kind(own, other) for own, other in self._pairs} if self._settings.alpha else set()
        if "mse" not in kinds and not (self._features and self._settings.tap_loss == "mse"):
            return
        self._spreads, self._measuring = {}, True
        try:
            for outputs, batch in seen:
                with torch.no_grad():
                    self(outputs, batch)
        finally:
            self._measuring = False

    def __call__(self, outputs: dict[str, torch.Tensor], batch: Batch) -> dict[str, torch.Tensor]:
        """Return `distill`, `task` and `taps`, as far as there are any, and `loss`."""
        settings = self._settings
        terms: dict[str, torch.Tensor] = {}
        parts: list[torch.Tensor] = []
        targets = self._targets(outputs, batch)
        if settings.alpha:
            terms["distill"] = torch.stack([self._output(*pair, outputs, targets) for pair in self._pairs]).mean()
            parts.append(settings.alpha * terms["distill"])
        if self._task is not None:
            terms["task"] = self._task(outputs, batch)["loss"]
            parts.append((1 - settings.alpha) * terms["task"])
        if self._features:
            losses = [self._feature(term, outputs, targets) for term in self._features]
            terms["taps"] = torch.stack(losses).mean()
            parts.append(settings.tap_weight * terms["taps"])
        return {**terms, "loss": torch.stack(parts).sum()}

    def _targets(self, outputs: Mapping[str, torch.Tensor], batch: Batch) -> dict[str, torch.Tensor]:
        if not self._teacher.tensors:
            return {}
        if not batch.targets:
            batch.targets = self._teacher(batch)
        device = next(iter(outputs.values())).device
        return {name: value.to(device) for name, value in batch.targets.items()}

    def _output(
        self, own: Score, other: Score, outputs: Mapping[str, torch.Tensor], targets: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        shape = outputs[own.output].shape
        student, axis = own.read(outputs, shape)
        teacher, its_axis = other.read(targets, shape)
        _same_shape(student, teacher, own.output, other.output)
        along = class_axis(student.shape, axis if axis is not None else its_axis)
        kind = self._kind(own, other)
        if kind == "kl":
            return kl(student, teacher, along, other.maker or own.maker, self._settings.temperature)
        return self._squared(own.output, student, teacher) if kind == "mse" else cosine(student, teacher, along)

    def _kind(self, own: Score, other: Score) -> str:
        """Return the loss of an output: what is asked for, or what its name and maker say."""
        if self._settings.output_loss != "auto":
            return self._settings.output_loss
        named = any("logit" in score.output.lower() for score in (own, other))
        return "kl" if own.maker or other.maker or named else "mse"

    def _squared(self, name: str, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        teacher = teacher.to(student.dtype)
        if self._measuring:
            self._spreads.setdefault(name, Spread()).add(teacher)
        spread = self._spreads.get(name) or Spread().add(teacher)
        return (student - teacher).square().mean() / spread.scale

    def _feature(
        self, term: TapTerm, outputs: Mapping[str, torch.Tensor], targets: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        student, teacher = term.projected(outputs[term.student].float()), targets[term.teacher].float()
        _same_shape(student, teacher, term.student, term.teacher)
        if self._settings.tap_loss == "mse":
            return self._squared(f"{term.student}={term.teacher}", student, teacher)
        return cosine(student, teacher, class_axis(student.shape, term.axis))


def task_objective(model: Model, settings: TrainSettings) -> Objective:
    """Return the loss of a task's labels.

    Raises:
        ModelError: no output is of floats.
        SpecError: options that do not go together.
    """
    return TaskObjective(model, settings)


def distill_objective(student: Model, teacher: Teacher | Model, settings: DistillSettings) -> Objective:
    """Return the loss of a student against a teacher; the teacher is asked for the tensors that it takes.

    A model given as the teacher runs in ORT, and what it says is kept where nothing is augmented.

    Raises:
        ModelError: the two have other inputs or outputs.
        SpecError: a tap is in neither, or options do not go together.
    """
    if isinstance(teacher, Model):
        teacher = Teacher(teacher, cache=not settings.augment, threads=torch.get_num_threads())
    return DistillObjective(student, teacher, settings)


def kl(student: torch.Tensor, teacher: torch.Tensor, axis: int | None, maker: str, temperature: float) -> torch.Tensor:
    """Return T^2 KL(teacher || student) of scores at a temperature, mean over rows, steps, pixels or questions."""
    s, t = student / temperature, teacher.to(student.dtype) / temperature
    along = class_axis(s.shape, axis)
    if maker == "sigmoid":
        p = torch.sigmoid(t)
        entropy = F.binary_cross_entropy_with_logits(t, p)
        return temperature**2 * (F.binary_cross_entropy_with_logits(s, p) - entropy)
    if not maker and (s.dim() < 2 or s.shape[along] == 1):
        return kl(student, teacher, axis, "sigmoid", temperature)  # one score per row: a Sigmoid's
    each = F.kl_div(s.log_softmax(along), t.log_softmax(along), reduction="none", log_target=True)
    return temperature**2 * each.sum(along).mean()


class Spread:
    """The variance of a tensor over all that was added."""

    def __init__(self) -> None:
        self._count, self._sums = 0, torch.zeros(2, dtype=torch.float64)

    def add(self, values: torch.Tensor) -> Spread:
        """Take values in."""
        wide = values.detach().double().cpu()
        self._count += wide.numel()
        self._sums += torch.stack([wide.sum(), wide.square().sum()])
        return self

    @property
    def scale(self) -> float:
        """What squared differences are parts of: the variance, the power where nothing varies, 1 for zeros."""
        mean, power = (self._sums / max(self._count, 1)).tolist()
        variance = power - mean * mean
        return variance if variance > _CONSTANT * power else power or 1.0


def cosine(student: torch.Tensor, teacher: torch.Tensor, axis: int = -1) -> torch.Tensor:
    """Return the mean of 1 - cos of the rows along an axis."""
    return 1 - F.cosine_similarity(student, teacher.to(student.dtype), dim=axis, eps=1e-8).mean()


def _paired_outputs(student: Model, teacher: Model) -> list[tuple[Score, Score]]:
    own, other = scores(student), scores(teacher)
    if not own:
        raise ModelError("no loss fits the outputs: none is of floats", at=", ".join(map(str, student.outputs)))
    if set(own) <= set(other):
        return [(score, other[name]) for name, score in own.items()]
    if len(own) != len(other):
        raise ModelError(
            f"the teacher has other outputs: {', '.join(other) or 'none of floats'}", at=f"student: {', '.join(own)}",
            hint="outputs are paired by name, or in order where there are as many",
        )  # fmt: skip
    return list(zip(own.values(), other.values(), strict=True))


def _same_shape(student: torch.Tensor, teacher: torch.Tensor, own: str, other: str) -> None:
    if student.shape != teacher.shape:
        raise ModelError(
            f"student's '{own}' is {list(student.shape)}, teacher's '{other}' {list(teacher.shape)}",
            at=own, hint="teacher and student give tensors of one shape (the widths of taps may differ)",
        )  # fmt: skip
