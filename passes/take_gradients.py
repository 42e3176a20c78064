"""Gradients of the task's loss, taken of the model as it is, for the passes behind: a step of a pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import onnx_graphsurgeon as gs

from graphopt.base import Change, Context, Exactness, Loss, Pass
from graphopt.registry import register
from graphopt.training import TrainSettings

from .trained_weights import WHERE


@register
@dataclass(frozen=True)
class TakeGradients(Pass):
    """Take gradients of the loss by the weights, for criteria of the passes behind: `taylor`, `gradient`.

    Changes nothing of the model; needs torch and labels.  The gradients hold until others are taken: take them again
    behind what changes weights or their names.

    Options:
        data: pairs of feeds and labels, as `--train` of `graphopt gradients` takes them.
        loss: of labels against outputs, as in `graphopt.training.TrainSettings`.
        moment: first is the mean over batches, second the root of the mean square over batches.
        batch: rows that one gradient is taken of.
        subset: rows drawn at random; 0 for all.
    """

    name: ClassVar[str] = "take-gradients"
    exactness: ClassVar[Exactness] = "lossy"
    loses: ClassVar[Loss] = "numbers"
    scope: ClassVar[Any] = "model"
    data: str = ""
    loss: str = "auto"
    moment: str = "first"
    batch: int = 32
    subset: int = 0

    def __post_init__(self) -> None:
        """Refuse what has no meaning.

        Raises:
            ValueError: `moment` is something else.
            SpecError: the other options are out of range.
        """
        if self.moment not in ("first", "second"):
            raise ValueError(f"moment is first or second, not {self.moment!r}")
        self._settings()

    def _settings(self) -> TrainSettings:
        return TrainSettings(loss=self.loss, batch=self.batch, subset=self.subset)

    def run(self, graph: gs.Graph, ctx: Context) -> Iterator[Change]:
        """Put the gradients into the context; propose nothing."""
        ctx.training.check(self.data, labels=True)
        settings = self._settings()
        if why := ctx.training.refusal(settings):
            yield Change(WHERE, "take gradients", why)
            return
        ctx.gradients = ctx.training.gradients(settings, self.data, moment=self.moment)
        ctx.notes.append(f"gradients of {len(ctx.gradients)} tensors")
