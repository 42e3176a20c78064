"""All labels looked at before anything is trained: the model is run on one sample of each shape, for its outputs'."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch

from graphopt.bridge.losses import Case, check, fitting
from graphopt.bridge.scores import Score, scores
from graphopt.bridge.tensors import to_tensor
from graphopt.errors import DataError, did_you_mean
from graphopt.model import Model

Array: TypeAlias = np.ndarray[Any, Any]
Labels: TypeAlias = "Array | dict[str, Array]"
Run: TypeAlias = Callable[[Mapping[str, Array], Sequence[str]], Mapping[str, Array]]


def inner_tensors(model: Model) -> list[str]:
    """Return the tensors beside the outputs that the check asks for."""
    return list(dict.fromkeys(tap for score in scores(model).values() for tap in score.taps))


class LabelCheck:
    """Compares labels with a model's outputs.

    Args:
        model: what is to be trained.
        run: runs it: feeds, and names of tensors -> arrays.
        loss: as in `TrainSettings`; not a function of the user's, which alone knows what it takes.
    """

    def __init__(self, model: Model, run: Run, loss: str) -> None:
        self._scores, self._loss = scores(model), loss
        self._wanted = [*self._scores, *inner_tensors(model)]
        self._run = run

    def __call__(self, feeds: Mapping[str, Array], rows: int | None, labels: Iterable[Labels]) -> None:
        """Look at labels of samples that are all of one shape.

        Args:
            feeds: of one of the samples, or of as many as the model takes.
            rows: how many those are; None where a sample is a whole feed.
            labels: of all samples.

        Raises:
            DataError: labels do not fit.
        """
        if not self._scores:
            return  # the objective says so
        values = {n: to_tensor(v) for n, v in self._run(feeds, self._wanted).items()}
        for held in labels:
            named = held if isinstance(held, dict) else {next(iter(self._scores)): held}
            for name, array in named.items():
                score = self._scores.get(name)
                if score is None:
                    hint = did_you_mean(name, self._scores) or f"outputs of floats: {', '.join(self._scores)}"
                    raise DataError(f"labels for output '{name}', which no loss fits", hint=hint)
                case = _case(score, values, rows, to_tensor(array))
                check(case, fitting(case) if self._loss == "auto" else self._loss)


def _case(score: Score, values: Mapping[str, torch.Tensor], rows: int | None, labels: torch.Tensor) -> Case:
    output = values[score.output]
    found, axis = score.read(values, output.shape)
    if rows is not None:
        output, found = (_with_rows(value, rows, labels.shape[0]) for value in (output, found))
    return Case(score.output, output, found, axis, score.maker, labels)


def _with_rows(values: torch.Tensor, rows: int, wanted: int) -> torch.Tensor:
    """Return a tensor of the shape that so many samples would give, which takes no memory of its own."""
    batched = [i for i, size in enumerate(values.shape) if size == rows][:1]
    if not batched:
        return values
    one = values.narrow(batched[0], 0, 1)
    return one.expand(*(wanted if i == batched[0] else -1 for i in range(values.dim())))
