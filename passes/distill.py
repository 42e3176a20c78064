"""Weights trained to give what the model gave before anything was cut: a training step of a pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import onnx_graphsurgeon as gs

from graphopt.base import Change, Context, Exactness, Loss, Pass
from graphopt.registry import register
from graphopt.training import DistillSettings

from .trained_weights import settings_of, trained


@register
@dataclass(frozen=True, kw_only=True)
class Distill(DistillSettings, Pass):
    """Train the weights so that the outputs are those of the model that the pipeline was given.

    Lossy, keeps the signature and the graph; needs torch, and samples: those of the pipeline, without labels, unless
    `data` names others.  Sparse weights keep their zeros, quantized ones stay quantized.  The same request does nothing
    as long as no weight has changed since.  Source: Hinton and others, Distilling the Knowledge in a Neural Network,
    2015.

    Options: those of `graphopt.training.DistillSettings`, and
        data: other samples, as `--data` takes them; with labels (pairs of feeds and labels) `alpha` may be below 1.
        teacher: a model's file, in place of the model that the pipeline was given.
    """

    name: ClassVar[str] = "distill"
    exactness: ClassVar[Exactness] = "lossy"
    loses: ClassVar[Loss] = "training"
    scope: ClassVar[Any] = "model"
    data: str = ""
    teacher: str = ""

    def run(self, graph: gs.Graph, ctx: Context) -> Iterator[Change]:
        """Propose to train all weights, as one change."""
        settings = settings_of(DistillSettings, self)
        yield from trained(self, ctx, settings, self.data, self.teacher, labels=self.alpha < 1.0)
