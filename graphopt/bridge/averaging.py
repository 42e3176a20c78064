"""Tensors kept beside the trained ones: copies of the best, and the exponential moving average (EMA).

    average <- d * average + (1 - d) * weights        after every update, d = min(ema, (1 + u) / (10 + u))

The smaller `d` of the first updates u keeps the average from staying where training began when updates are few.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from graphopt.bridge.tensors import to_array

Tensors = dict[str, Any]
"""Torch tensors by name."""


def array(value: Any) -> np.ndarray[Any, Any]:
    """Return the values of a tensor or number as an array; bfloat16, which files do not hold, as float32."""
    if not isinstance(value, torch.Tensor):
        return np.asarray(value)
    return to_array(value.float() if value.dtype == torch.bfloat16 else value)


def copied(tensors: Mapping[str, Any]) -> Tensors:
    """Return independent copies."""
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def copy_into(tensors: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Give the tensors the values (tensors or arrays) of the same names."""
    with torch.no_grad():
        for name, tensor in tensors.items():
            value = values[name]
            tensor.copy_(value if isinstance(value, torch.Tensor) else torch.from_numpy(np.array(value)))


class Average:
    """The moving average of some tensors.

    Args:
        tensors: what is averaged; they are looked at in each `update`.
        decay: d above, below 1.
    """

    def __init__(self, tensors: Mapping[str, Any], decay: float) -> None:
        self.tensors, self.decay, self.updates = dict(tensors), decay, 0
        self.values = copied(tensors)

    def update(self) -> None:
        """Take the present values in."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        with torch.no_grad():
            for name, value in self.values.items():
                value.lerp_(self.tensors[name], 1.0 - decay)


@contextmanager
def shown(tensors: Mapping[str, Any], values: Mapping[str, Any]) -> Iterator[None]:
    """Put values in the place of tensors for a while."""
    present = copied(tensors)
    copy_into(tensors, values)
    try:
        yield
    finally:
        copy_into(tensors, present)
