"""Optimizers by name, from `torch.optim`; weight decay for weights alone.

Decay of norms, biases and scales pulls them away from what they calibrate and regularises nothing (He et al. 2019,
"Bag of tricks"): they stand in a group without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from graphopt.bridge.averaging import array
from graphopt.training import TrainSettings


def _sgd(groups: Any, settings: TrainSettings) -> Any:
    momentum, nesterov = settings.momentum, settings.nesterov
    return torch.optim.SGD(groups, lr=settings.rate, momentum=momentum, nesterov=nesterov, fused=True)


def _adam(groups: Any, settings: TrainSettings) -> Any:
    return torch.optim.Adam(groups, lr=settings.rate, fused=True)


def _adamw(groups: Any, settings: TrainSettings) -> Any:
    return torch.optim.AdamW(groups, lr=settings.rate, fused=True)


def _rmsprop(groups: Any, settings: TrainSettings) -> Any:
    return torch.optim.RMSprop(groups, lr=settings.rate, momentum=settings.momentum, foreach=True)


OPTIMIZERS = {"sgd": _sgd, "adam": _adam, "adamw": _adamw, "rmsprop": _rmsprop}


SMALLEST = 1e-3
"""What the root mean square of a tensor counts as at least: one of zeros moves, too (Shazeer and Stern 2018)."""


def root_mean_square(tensor: Any) -> float:
    """Return the scale of a tensor, that of its values before training."""
    return max(SMALLEST, float(tensor.detach().double().square().mean().sqrt()))


class Optimizer:
    """One of `torch.optim`, whose state has the names of the tensors that it is about.

    Args:
        parameters: what is trained, by name.
        decayed: names of those that weight decay is for.
        coded: what one code is, of those that stand for codes: relative rates are parts of that.
        settings: says which optimizer, and its options.
    """

    def __init__(
        self,
        parameters: Mapping[str, Any],
        decayed: frozenset[str],
        coded: Mapping[str, float],
        settings: TrainSettings,
    ) -> None:
        weights = [name for name in parameters if name in decayed]
        others = [name for name in parameters if name not in decayed]
        self._order = [*weights, *others]
        decays = ((weights, settings.weight_decay), (others, 0.0))
        groups: list[dict[str, Any]] = [
            {"params": [parameters[name] for name in part], "weight_decay": decay, "part": 1.0, "names": part}
            for names, decay in decays
            for part in ([[name] for name in names] if settings.relative else [names])
            if part
        ]
        for group in groups:
            (name, *_) = group.pop("names")
            if settings.relative:
                group["part"] = coded[name] if name in coded else root_mean_square(parameters[name])
        self.torch = OPTIMIZERS[settings.optimizer](groups, settings)

    def set_rate(self, rate: float) -> None:
        """Take this learning rate from now on."""
        for group in self.torch.param_groups:
            group["lr"] = rate * group["part"]

    def state(self) -> dict[str, np.ndarray[Any, Any]]:
        """Return the moments and counts, by `tensor<tab>entry`."""
        held = self.torch.state_dict()["state"]
        return {
            f"{self._order[place]}\t{key}": array(value)
            for place, entries in held.items()
            for key, value in entries.items()
            if value is not None
        }

    def restore(self, state: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Take the state that `state` returned."""
        places = {name: place for place, name in enumerate(self._order)}
        entries: dict[int, dict[str, Any]] = {}
        for key, value in state.items():
            name, _, entry = key.rpartition("\t")
            entries.setdefault(places[name], {})[entry] = torch.from_numpy(value.copy())
        self.torch.load_state_dict({"state": entries, "param_groups": self.torch.state_dict()["param_groups"]})
