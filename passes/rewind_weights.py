"""Lottery tickets: what is left of a trained model's weights goes back to where it was before it was trained.

Frankle, Carbin: The Lottery Ticket Hypothesis, ICLR 2019 (back to the start); Frankle and others: Linear Mode
Connectivity and the Lottery Ticket Hypothesis, ICML 2020 (back to a little after it, which works for large models).

    finetune{steps=200}, finetune{epochs=10}, sparsify-weights{amount=0.5}, rewind-weights{to=1}, finetune{epochs=10}
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.base import Change, Context, Exactness, Loss, Pass
from graphopt.model import Model
from graphopt.registry import register
from graphopt.slots import Slot
from graphopt.sparse_marks import marks

from .trained_weights import WHERE, learning

WHAT = "go back to the weights before"


@register
@dataclass(frozen=True)
class RewindWeights(Pass):
    """Set weights back to what they were before the pipeline first trained them; zeros of sparse weights stay.

    Lossy, keeps the signature and the graph.  A weight that has another shape since, or another name, stays as it is.

    Options:
        to: trainings of the pipeline whose effect stays; 0 is none.
    """

    name: ClassVar[str] = "rewind-weights"
    exactness: ClassVar[Exactness] = "lossy"
    loses: ClassVar[Loss] = "training"
    scope: ClassVar[Any] = "model"
    to: int = 0

    def __post_init__(self) -> None:
        """Refuse a negative number.

        Raises:
            ValueError: `to` is one.
        """
        if self.to < 0:
            raise ValueError(f"to is a number of trainings, not {self.to}")

    def run(self, graph: gs.Graph, ctx: Context) -> Iterator[Change]:
        """Propose one change for each weight."""
        before = None if ctx.trainer is None else ctx.trainer.stage(self.to)
        if before is None:
            done = f"{self.to} times" if self.to else ""
            yield Change(WHERE, WHAT, f"this pipeline has not trained it {done}".rstrip())
            return
        past, sparse = learning(before), _sparse(ctx.model)
        for key, slot in learning(ctx.model).items():
            if key in past:
                yield from _back(slot, past[key], sparse=id(slot.tensor) in sparse)


def _back(now: Slot, then: Slot, *, sparse: bool) -> Iterator[Change]:
    """Propose to set a constant back."""
    if (now.shape, now.dtype) != (then.shape, then.dtype):
        shapes = f"{list(then.shape)} {then.dtype} then, {list(now.shape)} {now.dtype} now"
        yield Change(now.key, WHAT, f"it has changed its form since: {shapes}")
        return
    old, new = now.read(), then.read()
    if sparse:
        new = np.where(old == 0, old, new)
    if old.tobytes() != new.tobytes():
        yield Change(now.key, WHAT, "its zeros stay" if sparse else "", lambda: now.write(new))


def _sparse(model: Model) -> set[int]:
    """Return the weights whose zeros are meant: ids of the tensors that nodes read."""
    return {id(node.inputs[port]) for node in model.nodes() for port in marks(model.metadata(node))}
