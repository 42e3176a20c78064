"""Weights trained on labels: a training step of a pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import onnx_graphsurgeon as gs

from graphopt.base import Change, Context, Exactness, Loss, Pass
from graphopt.registry import register
from graphopt.training import TrainSettings

from .trained_weights import settings_of, trained


@register
@dataclass(frozen=True, kw_only=True)
class Finetune(TrainSettings, Pass):
    """Train the weights on labels.

    Lossy, keeps the signature and the graph; needs torch and labels.  Sparse weights keep their zeros, quantized ones
    stay quantized.  The same request does nothing as long as no weight has changed since.

    Options: those of `graphopt.training.TrainSettings`, and
        data: pairs of feeds and labels, as `--train` of `graphopt finetune` takes them.
    """

    name: ClassVar[str] = "finetune"
    exactness: ClassVar[Exactness] = "lossy"
    loses: ClassVar[Loss] = "training"
    scope: ClassVar[Any] = "model"
    data: str = ""

    def run(self, graph: gs.Graph, ctx: Context) -> Iterator[Change]:
        """Propose to train all weights, as one change."""
        yield from trained(self, ctx, settings_of(TrainSettings, self), self.data, labels=True)
