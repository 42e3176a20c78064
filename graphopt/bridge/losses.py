"""Losses of labels against outputs, and which of them a kind of labels asks for.

    int labels, one per row or step           cross-entropy; binary where a Sigmoid made the output
    int labels, padded, another length        ctc
    float or one-hot labels like the output   cross-entropy behind a Softmax, binary behind a Sigmoid, else mse

Negative labels are padding and count for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F  # noqa: N812 (torch's own custom)

from graphopt.errors import DataError

BLANK = 0
"""Class of CTC that stands for nothing; in padded labels it ends a sequence, as a negative one does."""

_IGNORED = -100


@dataclass(frozen=True)
class Case:
    """One output with its labels.

    Attributes:
        name: of the output.
        output: what the model says.
        scores: what a Softmax or Sigmoid made it of, in the output's layout; the output where there is none.
        axis: of the classes, None where the graph does not tell.
        maker: `softmax`, `sigmoid` or ''.
        labels: int64 or float.
        smoothing: part of the probability that is spread evenly.
    """

    name: str
    output: torch.Tensor
    scores: torch.Tensor
    axis: int | None
    maker: str
    labels: torch.Tensor
    smoothing: float = 0.0

    def refuse(self, what: str, hint: str) -> DataError:
        """Return an error about these labels."""
        return DataError(what, at=f"labels for output '{self.name}' of shape {list(self.output.shape)}", hint=hint)


Loss: TypeAlias = Callable[[Case], torch.Tensor]


def fitting(case: Case) -> str:
    """Return the name of the loss that a case asks for, by shapes and types alone, so that all batches agree."""
    whole = not case.labels.is_floating_point()
    alike = _squeezed(case.labels.shape) == _squeezed(case.output.shape)
    if alike and case.maker == "sigmoid":
        return "binary-cross-entropy"
    if alike and not case.maker and "logit" in case.name.lower() and _one_each(case.output.shape):
        return "binary-cross-entropy"
    if alike and (case.maker == "softmax" or "logit" in case.name.lower()):
        return "cross-entropy"
    if alike:
        return "mse"
    if not whole:
        raise case.refuse(
            f"float labels of shape {list(case.labels.shape)} do not fit",
            "float labels have the output's shape; classes are whole numbers",
        )
    if _class_axis(case) is None and case.output.dim() == 3 and case.labels.dim() == 2:
        return "ctc"
    return "cross-entropy"


def cross_entropy(case: Case) -> torch.Tensor:
    """Return the mean over rows (or steps) of -log p(label); soft labels are probabilities of the output's shape."""
    axis = _check_classes(case)
    rows = case.scores.movedim(axis, -1).flatten(0, -2)
    if _is_soft(case):
        target = case.labels.reshape(case.scores.shape).movedim(axis, -1).flatten(0, -2).to(rows.dtype)
        return F.cross_entropy(rows, target, label_smoothing=case.smoothing)
    labels = case.labels.reshape(-1)
    total = F.cross_entropy(
        rows, torch.where(labels < 0, _IGNORED, labels), ignore_index=_IGNORED, reduction="sum",
        label_smoothing=case.smoothing,
    )  # fmt: skip
    return total / (labels >= 0).sum().clamp_min(1)


def binary_cross_entropy(case: Case) -> torch.Tensor:
    """Return the mean of -log p(label) of independent yes-no questions; labels are between 0 and 1."""
    _check_answers(case)
    labels = case.labels.reshape(case.output.shape).to(case.scores.dtype)
    known = labels >= 0
    target = labels.clamp_min(0) * (1 - case.smoothing) + case.smoothing / 2
    each = F.binary_cross_entropy_with_logits(case.scores, target, reduction="none")
    return (each * known).sum() / known.sum().clamp_min(1)


def mse(case: Case) -> torch.Tensor:
    """Return the mean squared difference."""
    return F.mse_loss(case.output, _alike(case).to(case.output.dtype))


def l1(case: Case) -> torch.Tensor:
    """Return the mean absolute difference."""
    return F.l1_loss(case.output, _alike(case).to(case.output.dtype))


def smooth_l1(case: Case) -> torch.Tensor:
    """Return the mean of half the square below a difference of 1, and of the difference less a half above it."""
    return F.smooth_l1_loss(case.output, _alike(case).to(case.output.dtype))


def ctc(case: Case) -> torch.Tensor:
    """Return the mean CTC loss per label (Graves et al. 2006) of sequences, class 0 being the blank.

    Outputs are (rows, steps, classes) or (steps, rows, classes), labels (rows, longest) padded with 0 or less.
    """
    values, lengths = _check_sequences(case)
    ended = torch.arange(case.labels.shape[1], device=lengths.device) >= lengths[:, None]
    target = torch.where(ended, 1, case.labels)
    steps, rows, _ = values.shape
    given = torch.full((rows,), steps, dtype=torch.long, device=lengths.device)
    return F.ctc_loss(values.log_softmax(-1), target, given, lengths, blank=BLANK, zero_infinity=True)


LOSSES: Mapping[str, Loss] = {
    "cross-entropy": cross_entropy,
    "binary-cross-entropy": binary_cross_entropy,
    "mse": mse,
    "l1": l1,
    "smooth-l1": smooth_l1,
    "ctc": ctc,
}

SMOOTHED = frozenset({"auto", "cross-entropy", "binary-cross-entropy"})
"""Losses that know label smoothing."""


def check(case: Case, loss: str) -> None:
    """Refuse labels that a loss cannot take, without computing it; the values of the outputs are not looked at.

    Raises:
        DataError: says what is wrong with them.
    """
    _CHECKS[loss](case)


def class_axis(shape: torch.Size, axis: int | None) -> int:
    """Return the axis of classes: the known one, else channels of images (rank 4), else the last."""
    return axis if axis is not None else 1 if len(shape) >= 4 else len(shape) - 1


def _one_each(shape: torch.Size) -> bool:
    """Tell whether an output is one number per row: a score that a Sigmoid would make a probability of."""
    return len(_squeezed(shape)) < 2


def _is_soft(case: Case) -> bool:
    return case.scores.dim() > 1 and _squeezed(case.labels.shape) == _squeezed(case.scores.shape)


def _class_axis(case: Case) -> int | None:
    """Return the axis without which the scores have the labels' shape; None where there is none."""
    wanted = _squeezed(case.labels.shape)
    shape = case.scores.shape
    likely = class_axis(shape, case.axis)
    order = [likely] if case.axis is not None else [likely, *(a for a in range(1, len(shape)) if a != likely)]
    fits = (a for a in order if 0 <= a < len(shape) and _squeezed(shape[:a] + shape[a + 1 :]) == wanted)
    return next(fits, None)


def _squeezed(shape: torch.Size) -> tuple[int, ...]:
    """Return a shape without axes of 1 behind the first."""
    return tuple(n for i, n in enumerate(shape) if i == 0 or n != 1)


def _alike(case: Case) -> torch.Tensor:
    """Return the labels in the output's shape."""
    if _squeezed(case.labels.shape) != _squeezed(case.output.shape):
        raise case.refuse(
            f"labels of shape {list(case.labels.shape)} do not fit", "this loss takes labels of the output's shape"
        )
    return case.labels.reshape(case.output.shape)


def _check_classes(case: Case) -> int:
    """Return the axis of the classes."""
    if _is_soft(case):
        axis = class_axis(case.scores.shape, case.axis)
        sums = case.labels.reshape(case.scores.shape).sum(axis, dtype=torch.float32)
        if bool((case.labels < 0).any()) or not torch.allclose(sums, torch.ones_like(sums), atol=1e-2):
            raise case.refuse("soft labels that do not sum to 1", "a row of soft labels holds a probability per class; "
                              "of questions that do not exclude each other: loss = binary-cross-entropy")  # fmt: skip
        return axis
    found = _class_axis(case)
    if found is None:
        cut = class_axis(case.scores.shape, case.axis)
        rows = [n for i, n in enumerate(case.scores.shape) if i != cut]
        raise case.refuse(
            f"labels of shape {list(case.labels.shape)} do not fit",
            f"one class per row, {rows}, or probabilities of the output's shape",
        )
    if case.labels.is_floating_point():
        raise case.refuse("the labels are floats", "classes are whole numbers from 0; for values: loss = mse")
    _check_range(case, case.scores.shape[found])
    return found


def _check_range(case: Case, classes: int) -> None:
    if not case.labels.numel():
        return
    largest, least = int(case.labels.max()), int(case.labels.min())
    if largest >= classes:
        raise case.refuse(f"label {largest} where there are {classes} classes", f"classes are 0 to {classes - 1}")
    if least < 0 and bool(((case.labels < 0) & (case.labels != -1) & (case.labels != _IGNORED)).any()):
        raise case.refuse(f"label {least}", f"classes are numbered from 0; -1 or {_IGNORED} says that there is none")


def _check_answers(case: Case) -> None:
    labels = _alike(case)
    if bool((labels > 1).any()):
        raise case.refuse(f"a label is {float(labels.max()):g}", "labels of yes-no questions are between 0 and 1")
    if bool(((labels < 0) & (labels != -1)).any()):
        raise case.refuse(f"a label is {float(labels.min()):g}", "labels of yes-no questions are between 0 and 1, or "
                          "-1 where the answer is not known")  # fmt: skip


def _check_sequences(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scores as (steps, rows, classes), and the lengths of the labels."""
    labels = case.labels
    if case.scores.dim() != 3 or labels.dim() != 2 or labels.is_floating_point():
        raise case.refuse(
            f"ctc of labels of shape {list(labels.shape)}",
            "outputs are (rows, steps, classes), labels whole numbers (rows, longest), padded with 0 or -1",
        )
    values = case.scores.movedim(2 if case.axis is None else case.axis, -1)
    if values.shape[0] == labels.shape[0]:
        values = values.transpose(0, 1)
    if values.shape[1] != labels.shape[0]:
        raise case.refuse(
            f"{labels.shape[0]} rows of labels for {values.shape[1]} of outputs", "one sequence of labels per row"
        )
    _check_range(case, values.shape[2])
    lengths = (torch.cumsum((labels <= BLANK).long(), dim=1) == 0).sum(dim=1)
    if lengths.numel() and int(lengths.max()) > values.shape[0]:
        raise case.refuse(
            f"{int(lengths.max())} labels in a row for {values.shape[0]} steps", "a step of the output gives one label"
        )
    return values, lengths


_CHECKS: Mapping[str, Callable[[Case], object]] = {
    "cross-entropy": _check_classes,
    "binary-cross-entropy": _check_answers,
    "mse": _alike,
    "l1": _alike,
    "smooth-l1": _alike,
    "ctc": _check_sequences,
}
