"""What the loop is made of, as far as it looks into it: the module, its data, its loss, who judges and who watches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, TypeAlias

from graphopt.model import Model

Judge: TypeAlias = Callable[[Model], float]
"""Quality of a written-back model, computed in ORT: higher is better."""


class Progress(Protocol):
    """Who is told how far training is."""

    def __call__(self, done: int, total: int, sentence: str, /) -> None:
        """Take updates done, of how many, and a sentence: loss, rate, time left."""


class Trainable(Protocol):
    """A graph as a module (`TrainableGraph`)."""

    model: Model
    module: Any
    batch: int | None

    @property
    def parameters(self) -> Mapping[str, Any]:
        """What is trained, by name."""

    @property
    def roles(self) -> Mapping[str, Any]:
        """What each tensor is to its operators."""

    @property
    def coded(self) -> Mapping[str, float]:
        """Parameters that stand for codes or their scales, by name -> what one code is, in their units."""

    @property
    def statistics(self) -> Mapping[str, Any]:
        """Running statistics that forward passes change, by name."""

    def channel_axis(self, name: str) -> int:
        """Return the axis of a weight's output channels."""

    def write_back(self, into: Model | None = None) -> Model:
        """Return a copy of the model with the present weights."""


class Data(Protocol):
    """What is trained on (`TrainingData`); `batch` is the one that the model prescribes."""

    batch: int | None

    @property
    def rows(self) -> int:
        """Number of samples."""

    def batches(self, batch: int, world: int = 1) -> int:
        """Return how many batches an epoch has in each process."""

    def epoch(
        self, epoch: int, *, seed: int, batch: int, rank: int = 0, world: int = 1, start: int = 0
    ) -> Iterator[Any]:
        """Yield the batches of an epoch from number `start`, the same ones each time."""


class Loss(Protocol):
    """What is to become small (`Objective`)."""

    def __call__(self, outputs: dict[str, Any], batch: Any, /) -> Mapping[str, Any]:
        """Return terms by name, their sum as `loss`."""
