"""Gradients of a task's loss by the weights of a model: what criteria of importance rank by.

    first     g = mean over rows of dL/dw                     Molchanov and others, 2019 (taylor); Lee and others, 2019
    second    g = root of the mean over batches of (dL/dw)²   the diagonal of the empirical Fisher matrix, in batches

The first fades where a model is trained to its end, the second does not, but has no sign.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch

from graphopt.bridge.batch import Batch
from graphopt.bridge.batches import load_training_data
from graphopt.bridge.graph import TrainableGraph
from graphopt.bridge.objective import task_objective
from graphopt.data import Spec
from graphopt.errors import DataError, ModelError, SpecError
from graphopt.model import Source, load
from graphopt.training import TrainSettings

Array: TypeAlias = np.ndarray[Any, Any]
Moment: TypeAlias = Literal["first", "second"]


def gradients(
    model: Source, train: Spec, settings: TrainSettings, *, moment: str = "first", seed: int = 0
) -> dict[str, Array]:
    """Return the gradient of the loss by each float tensor that has a part in it, over all samples once.

    The model is looked at as it runs: normalisation by its own statistics, nothing dropped.

    Args:
        model: left as it is.
        train: pairs of feeds and labels, as in `load_training_data`.
        settings: `loss`, `label_smoothing`, `batch`, `subset`, `sampling`, `only` and `freeze` are used.
        moment: `first` or `second`, see the module.
        seed: of the order, and of the subset.

    Returns:
        Name of the initializer -> float32, of its shape.

    Raises:
        SpecError: another moment.
        DataError: the data are not usable, or the loss of some is no number.
        ModelError: the model cannot be differentiated, or holds nothing to differentiate by.
    """
    if moment not in get_args(Moment):
        raise SpecError(f"unknown moment '{moment}'", hint=f"one of: {', '.join(get_args(Moment))}")
    source = load(model)
    data = load_training_data(train, source, settings, seed=seed, labelled=True)
    objective = task_objective(source, settings)
    bridge = TrainableGraph(source, taps=objective.taps, only=settings.only, freeze=settings.freeze)
    if not bridge.parameters:
        raise ModelError("the model holds nothing to take gradients by", hint="see --only and --freeze")
    bridge.module.eval()
    power = 2 if moment == "second" else 1
    sums = {name: np.zeros(tuple(p.shape), np.float64) for name, p in bridge.parameters.items()}
    rows = 0
    for batch in data.epoch(0, seed=seed, batch=settings.batch):
        count = len(batch.index)
        rows += count
        for name, value in _of_batch(bridge, objective, batch):
            sums[name] += count * value.astype(np.float64) ** power
    return {name: ((total / rows) ** (1.0 / power)).astype(np.float32) for name, total in sums.items()}


def _of_batch(bridge: TrainableGraph, objective: Any, batch: Batch) -> Iterator[tuple[str, Array]]:
    loss = objective(bridge.module(batch.feeds), batch)["loss"]
    if not torch.isfinite(loss):
        raise DataError(f"the loss is {float(loss.detach())}", at=f"sample {int(batch.index[0])}")
    if not loss.requires_grad:
        raise ModelError("the loss depends on no weight", hint="see --only and --freeze")
    found = torch.autograd.grad(loss, list(bridge.parameters.values()), allow_unused=True)
    for name, gradient in zip(bridge.parameters, found, strict=True):
        if gradient is not None:
            yield name, gradient.detach().numpy()
