"""What factors do to the outputs of the whole model, without building it: weights of low rank in the layers' places.

A layer with the product of its factors for a weight computes what the two factors would, so one session whose weights
are inputs tries any choice of ranks (`Trials`), and a copy with other weights can be judged (`Trials.model`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analysis.factorable import Factorable, find, held_type
from graphopt.errors import DataError
from graphopt.factors import Solved
from graphopt.model import Model
from graphopt.ops import is_standard
from graphopt.samples import Samples
from graphopt.trials import Measure, output_noise

Array: TypeAlias = np.ndarray[Any, Any]
Choice: TypeAlias = Mapping[str, tuple[Solved, int]]
"""Label of a layer -> how it is solved, and the rank."""

FEEDS = 8
"""Samples that trials run on at most."""

SECONDS = 60.0
"""That all layers' trials may take, about; fewer samples are run where they would take longer."""


@dataclass(frozen=True)
class _Place:
    """The constants of one layer: its weight, and its bias with its shape, where it has one."""

    weight: str
    dtype: np.dtype[Any]
    bias: str = ""
    bias_shape: tuple[int, ...] = ()


class Trials:
    """Measures choices of ranks on samples.

    Args:
        model: the model before factors.
        labels: layers that may get factors.
        samples: what to run; the first few are kept in memory.  None where nothing is measured.
        threads: of the sessions.
    """

    def __init__(self, model: Model, labels: Sequence[str], samples: Samples | None, *, threads: int = 1) -> None:
        self.opened, self._places = _opened(model, labels)
        self._reference, self._samples, self._threads = model, samples, threads
        self._measure: Measure | None = None

    def _within_time(self, trials: int) -> Measure:
        """Return a measure on as many samples as time allows."""
        found = self._measure_on(1)
        begun = time.perf_counter()
        found({})
        seconds = max(time.perf_counter() - begun, 1e-6) * max(trials, 1)
        count = min(FEEDS, max(1, int(SECONDS / seconds)))
        return found if count == 1 else self._measure_on(count)

    def _measure_on(self, count: int) -> Measure:
        if self._samples is None:
            raise DataError("choices are tried on samples, and there are none", hint="give --data")
        names = [name for place in self._places.values() for name in (place.weight, place.bias) if name]
        return output_noise(self.opened, self._reference, self._samples, names, limit=count, threads=self._threads)

    def noise(self, choice: Choice) -> float:
        """Return noise over signal power, summed over the outputs.

        Raises:
            DataError: there are no samples.
        """
        if self._measure is None:
            self._measure = self._within_time(len(self._places))
        return self._measure(self._values(choice))

    def model(self, choice: Choice) -> Model:
        """Return a model that computes what the factors would."""
        values = self._values(choice)
        copy = self.opened.copy()
        for node in copy.graph.nodes:
            for tensor in node.inputs:
                if isinstance(tensor, gs.Constant) and tensor.name in values:
                    tensor.values = values[tensor.name]
                    tensor.__dict__.pop("origin", None)
        return copy

    def _values(self, choice: Choice) -> dict[str, Array]:
        found: dict[str, Array] = {}
        for label, (solved, rank) in choice.items():
            place = self._places[label]
            found[place.weight] = np.ascontiguousarray(solved.whole(rank), place.dtype)
            bias = solved.bias(rank)
            if bias is not None and place.bias:
                found[place.bias] = np.asarray(bias.reshape(place.bias_shape), place.dtype)
        return found


def _opened(model: Model, labels: Sequence[str]) -> tuple[Model, dict[str, _Place]]:
    """Return a copy whose layers have weights and biases of their own, as `Factorable` gives them; and their names."""
    copy = model.copy()
    chosen, places = set(labels), {}
    for number, layer in enumerate(list(find(copy.graph, tables=True))):
        if layer.label in chosen and not layer.why:
            places[layer.label] = _open(layer, f"graphopt.trial.{number}")
    return copy, places


def _open(layer: Factorable, name: str) -> _Place:
    node, weight, bias = layer.node, layer.weight(), layer.bias_values()
    if is_standard(node, "Gemm"):
        for attribute in ("alpha", "beta", "transB") if layer.bias is not None else ("alpha", "transB"):
            node.attrs.pop(attribute, None)
    node.inputs[layer.port] = gs.Constant(f"{name}.weight", weight)
    if layer.bias is None:
        return _Place(f"{name}.weight", weight.dtype)
    place = layer.bias
    held = None if place.tensor is None or place.node is node else held_type(place.tensor)
    shape = (*[1] * (len(held[1]) - 1), -1) if held is not None else (-1,)
    constant = gs.Constant(f"{name}.bias", bias.astype(weight.dtype).reshape(shape))
    while len(place.node.inputs) <= place.port:
        place.node.inputs.append(gs.Variable.empty())
    place.node.inputs[place.port] = constant
    return _Place(f"{name}.weight", weight.dtype, f"{name}.bias", constant.values.shape)
