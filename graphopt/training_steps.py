"""Training inside a pipeline: what `Context.training` does for passes, by `graphopt.bridge`, imported when it is used.

The teacher is the model that the pipeline was given; the data are its samples, unless a pass names others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from graphopt.errors import DataError, ModelError
from graphopt.model import Model, Snapshot, from_snapshot, load
from graphopt.samples import Samples
from graphopt.training import DistillSettings, TrainSettings

if TYPE_CHECKING:
    from graphopt.bridge.recover import Recovered

Array: TypeAlias = np.ndarray[Any, Any]


@dataclass(frozen=True)
class StepTrainer:
    """Trains the model of a pipeline as it is when asked.

    Attributes:
        model: the one that passes edit.
        original: returns the model that the pipeline was given.
        samples: representative feeds; random ones teach nothing, and are refused.
        seed: for every random choice.
        stages: the model before the first training, then after each.
    """

    model: Model
    original: Callable[[], Model]
    samples: Samples | None
    seed: int
    stages: Sequence[Snapshot]

    def check(self, data: str, *, labels: bool) -> None:
        """Refuse to train where something is missing.

        Args:
            data: samples that the pass names; '' for those of the pipeline.
            labels: whether there must be labels: the samples of a pipeline have none.

        Raises:
            ProviderError: torch is not installed.
            DataError: there is nothing to train on.
        """
        if not data and labels:
            raise DataError(
                "there are no labels to train by", at="data", hint='data="FILE.py:FUNCTION" yields (feeds, labels)'
            )  # fmt: skip
        if not data and (self.samples is None or self.samples.random):
            raise DataError("weights are trained on samples, and there are none", hint="give --data")
        import graphopt.bridge  # noqa: F401, PLC0415  (says what to install)

    def refusal(self, settings: TrainSettings) -> str:
        """Return why the model cannot be trained, '' where it can: an operator, or nothing to train."""
        from graphopt.bridge.graph import TrainableGraph  # noqa: PLC0415  (torch, only when needed)

        try:
            found = TrainableGraph(
                self.model, only=settings.only, freeze=settings.freeze, learn_scales=settings.learn_scales,
                batch_norm=settings.batch_norm,
            )  # fmt: skip
        except ModelError as error:
            return f"{error.what} ({error.at})" if error.at else str(error.what)
        return "" if found.parameters else "it has nothing to train"

    def train(self, settings: TrainSettings, data: str = "", teacher: str = "") -> tuple[Model, str]:
        """Return a trained copy of the model, and how that went in words.

        Args:
            settings: `DistillSettings` to learn from a teacher, others to learn from labels.
            data: samples; '' for those of the pipeline.
            teacher: a model's file; '' for the model that the pipeline was given.

        Raises:
            GraphoptError: the data are not usable, or the model cannot be trained.
        """
        from graphopt.bridge import recover  # noqa: PLC0415  (torch, only when needed)

        given = data or self.samples
        if isinstance(settings, DistillSettings):
            source = load(Path(teacher)) if teacher else self.original()
            found = recover.distill(self.model, source, given, settings, seed=self.seed)
        else:
            found = recover.finetune(self.model, given, settings, seed=self.seed)
        if found.history.failed:
            raise ModelError(f"training failed: {found.history.stopped}", hint="a lower rate, or clip = 1")
        return found.model, in_words(found)

    def gradients(self, settings: TrainSettings, data: str, *, moment: str = "first") -> dict[str, Array]:
        """Return gradients of the loss by the weights of the model as it is, by initializer name.

        Args:
            settings: loss, batch, subset.
            data: pairs of feeds and labels.
            moment: first (the mean over batches) or second (the root of the mean square).

        Raises:
            GraphoptError: the data are not usable, or the model cannot be trained.
        """
        from graphopt.bridge.gradient import gradients  # noqa: PLC0415  (torch, only when needed)

        return gradients(self.model, data, settings, moment=moment, seed=self.seed)

    def stage(self, number: int) -> Model | None:
        """Return the model before the first training (0), or after so many of them; None where there was none."""
        return from_snapshot(self.stages[number]) if number < len(self.stages) else None


def in_words(found: Recovered) -> str:
    """Return how training went: updates, the loss on samples that did not train, and what the data have to say."""
    before, after = found.losses
    loss = "" if before is None or after is None else f", loss on held-out samples {before:.4g} -> {after:.4g}"
    early = [found.history.stopped] if found.history.stopped else []
    return "; ".join([f"{found.history.steps} updates{loss}", *early, *found.notes])
