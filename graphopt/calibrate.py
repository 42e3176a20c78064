"""Samples -> what is known of a model's tensors: histograms, ranges, means, per-channel statistics.

Tensors are read in groups, each small enough for what one sample makes of it to fit a fixed budget; a group is one sweep
over the samples.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from graphopt.errors import DataError, ModelError, did_you_mean
from graphopt.histogram import CHUNK, Histogram
from graphopt.model import Model, Source, load
from graphopt.ranges import Range, find_range
from graphopt.runtime import Session
from graphopt.samples import Feeds

Array = npt.NDArray[Any]

BUDGET = 1 << 28


class TensorStatistics:
    """What is known of one tensor."""

    def __init__(self, axis: int | None = None) -> None:
        self.histogram = Histogram()
        self.total = 0.0
        self.squares = 0.0
        self.axis = axis
        self.channels: tuple[Array, Array, Array, Array] | None = None
        self.channel_count = 0
        self.nans = 0
        self.infinities = 0
        self.samples = 0

    def add(self, values: Array) -> None:
        """Add a sample's values (floats of any type and shape)."""
        self.samples += 1
        if not values.size:
            return
        values = np.ascontiguousarray(values, np.float32)
        low, high = float(values.min()), float(values.max())
        if not np.isfinite(low + high):
            self.nans += int(np.isnan(values).sum())
            self.infinities += int(np.isinf(values).sum())
        finite = values[np.isfinite(values)] if not np.isfinite(low + high) else values.reshape(-1)
        if not finite.size:
            return
        self.histogram.add(finite, float(finite.min()), float(finite.max()))
        for start in range(0, finite.size, CHUNK):
            part = finite[start : start + CHUNK]
            self.total += float(part.sum(dtype=np.float64))
            self.squares += float(np.dot(part, part))
        if self.axis is not None:
            self._add_channels(values)

    def _add_channels(self, values: Array) -> None:
        assert self.axis is not None
        others = tuple(i for i in range(values.ndim) if i != self.axis % values.ndim)
        found = (
            values.min(axis=others), values.max(axis=others),
            values.sum(axis=others, dtype=np.float64), np.square(values, dtype=np.float64).sum(axis=others),
        )  # fmt: skip
        self.channel_count += values.size // values.shape[self.axis]
        if self.channels is None:
            self.channels = found
            return
        held = self.channels
        self.channels = (
            np.minimum(held[0], found[0]), np.maximum(held[1], found[1]), held[2] + found[2], held[3] + found[3],
        )  # fmt: skip


class Calibration:
    """What samples told of a model's tensors."""

    def __init__(self) -> None:
        self.tensors: dict[str, TensorStatistics] = {}
        self.skipped: dict[str, str] = {}
        self.samples = 0

    @property
    def names(self) -> list[str]:
        """The tensors."""
        return list(self.tensors)

    def range(self, name: str, method: str = "min-max", **options: Any) -> Range:
        """Return the range of a tensor that a method picks (`ranges.METHODS`)."""
        return find_range(self._of(name).histogram, method, **options)

    def mean(self, name: str) -> float:
        """Return the mean of all values."""
        held = self._of(name)
        return held.total / max(held.histogram.count, 1)

    def second_moment(self, name: str) -> float:
        """Return the mean of the squares."""
        held = self._of(name)
        return held.squares / max(held.histogram.count, 1)

    def channel_low(self, name: str) -> Array:
        """Return the smallest value of each channel."""
        return self._channels(name)[0]

    def channel_high(self, name: str) -> Array:
        """Return the largest value of each channel."""
        return self._channels(name)[1]

    def channel_mean(self, name: str) -> Array:
        """Return the mean of each channel."""
        return self._channels(name)[2] / max(self._of(name).channel_count, 1)

    def channel_second_moment(self, name: str) -> Array:
        """Return the mean square of each channel."""
        return self._channels(name)[3] / max(self._of(name).channel_count, 1)

    def problems(self, name: str) -> str | None:
        """Return what is odd about a tensor's values in words, None if nothing is."""
        if name in self.skipped:
            return self.skipped[name]
        held = self._of(name)
        if not held.histogram.count:
            return "no finite values"
        if held.nans or held.infinities:
            return f"{held.nans} NaN and {held.infinities} infinite values were left out"
        return "constant" if held.histogram.low == held.histogram.high else None

    def _of(self, name: str) -> TensorStatistics:
        if name in self.skipped:
            raise DataError(f"tensor '{name}' was not calibrated: {self.skipped[name]}", at=name)
        if name not in self.tensors:
            raise DataError(f"no tensor '{name}' was calibrated", at=name, hint=did_you_mean(name, self.tensors))
        return self.tensors[name]

    def _channels(self, name: str) -> tuple[Array, Array, Array, Array]:
        channels = self._of(name).channels
        if channels is None:
            raise DataError(f"channels of tensor '{name}' were not asked for", at=name)
        return channels


def calibrate(
    model: Source, samples: Iterable[Feeds], tensors: Sequence[str] | None = None, *, budget: int = BUDGET,
    jobs: int = 1, channels: Mapping[str, int] | None = None, seed: int = 0,
) -> Calibration:  # fmt: skip
    """Run samples through a model and return what they tell of its tensors.

    Args:
        model: what to run.
        samples: feeds, which can be iterated more than once.
        tensors: of the main graph; None for all float activations.
        budget: bytes that the fetched tensors of one sample may take.
        jobs: processes.
        channels: tensor name -> channel axis, for those that statistics are wanted of channel by channel.
        seed: of random choices.

    Raises:
        DataError: no samples, or they do not fit the model.
        ModelError: a tensor that the model does not have.
    """
    model = load(model)
    channels = dict(channels or {})
    names = list(dict.fromkeys([*(tensors if tensors is not None else _activations(model)), *channels]))
    found = Calibration()
    inputs = {t.name for t in model.graph.inputs}
    for group in itertools.batched(names, 256) if hasattr(itertools, "batched") else _batched(names, 256):
        session = _tapped(model, [n for n in group if n not in inputs])
        count = 0
        for feeds in samples:
            values = session.run(feeds, [n for n in group if n not in inputs])
            for name in group:
                _add(found, name, values.get(name, feeds.get(name)), channels.get(name))
            count += 1
        found.samples = count
        if not count:
            raise DataError("there are no samples to calibrate on")
    return found


def _batched(names: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    for start in range(0, len(names), size):
        yield names[start : start + size]


def _add(found: Calibration, name: str, value: Any, axis: int | None) -> None:
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "fV":
        found.skipped[name] = "not a float tensor"
        return
    if name not in found.tensors:
        found.tensors[name] = TensorStatistics(axis)
    found.tensors[name].add(value)


def _activations(model: Model) -> list[str]:
    made = [t for node in model.graph.nodes for t in node.outputs if t.name]
    return [t.name for t in [*model.graph.inputs, *made] if t.dtype is None or np.dtype(t.dtype).kind in "fV"]


def _tapped(model: Model, names: Sequence[str]) -> Session:
    made = {t.name for node in model.graph.nodes for t in node.outputs}
    for name in names:
        if name not in made:
            raise ModelError(f"the model makes no tensor '{name}'", at=name, hint=did_you_mean(name, made))
    return Session(model, extra_outputs=list(names))
