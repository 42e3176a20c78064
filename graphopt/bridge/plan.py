"""How many updates there are, of which batches, and after which of them something is due."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from graphopt.bridge.parts import Data
from graphopt.errors import DataError
from graphopt.training import TrainSettings

ROWS = 200
"""Rows of a history, about, beside those of evaluations."""


@dataclass(frozen=True)
class Plan:
    """Updates and batches of a training.

    Attributes:
        batch: rows of a forward pass.
        accumulate: batches of an update, in each process.
        per_epoch: updates of an epoch.
        total: updates in all.
        evaluations: how often an epoch the model is judged.
        world: processes.
    """

    batch: int
    accumulate: int
    per_epoch: int
    total: int
    evaluations: float
    world: int = 1

    @staticmethod
    def of(settings: TrainSettings, data: Data, *, fixed: int | None = None, world: int = 1) -> Plan:
        """Return the plan for some data; `fixed` is the batch that the graph prescribes.

        Raises:
            DataError: there are fewer samples than that.
        """
        batch = fixed or settings.batch
        accumulate = max(1, round(settings.batch * settings.accumulate / batch))
        per_epoch = data.batches(batch, world * accumulate)
        if not per_epoch:
            raise DataError(
                f"{data.rows} samples do not fill a batch",
                at="training data",
                hint=f"the model takes {batch} at a time",
            )
        total = settings.steps or max(1, round(settings.epochs * per_epoch))
        return Plan(batch, accumulate, per_epoch, total, settings.evaluations, world)

    @property
    def rows(self) -> int:
        """Rows of a whole update."""
        return self.batch * self.accumulate * self.world

    def evaluated(self, step: int) -> bool:
        """Tell whether the model is judged after so many updates."""
        interval = self.per_epoch / self.evaluations if self.evaluations else math.inf
        return step >= self.total or int(step / interval) > int((step - 1) / interval)

    def logged(self, step: int) -> bool:
        """Tell whether the history has a row after so many updates."""
        return step % max(1, self.total // ROWS) == 0

    def groups(self, data: Data, epoch: int, *, seed: int, rank: int, start: int = 0) -> Iterator[list[Any]]:
        """Yield the batches of each update of an epoch, from number `start`, of one process.

        Batches that are accumulated are to the data what batches of further processes are: parts of one large batch.
        """
        parts = [
            data.epoch(
                epoch, seed=seed, batch=self.batch, rank=rank * self.accumulate + number,
                world=self.world * self.accumulate, start=start,
            )
            for number in range(self.accumulate)
        ]  # fmt: skip
        for group in zip(*parts, strict=True):
            used = [batch for batch in group if getattr(batch, "share", 1.0)]
            yield used or [group[0]]  # a process without rows takes part all the same
