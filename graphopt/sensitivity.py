"""What each layer in int8 does to the output: noise power relative to the signal, which nearly adds up over layers.

    noise(layer) = sum |y_layer - y|^2 / sum |y|^2        y: float outputs, y_layer: with this layer alone in int8

Rounding errors of different layers are nearly uncorrelated and small enough to pass the rest of the network linearly,
so their powers add up; how far that holds is measured with all layers together (`Sensitivity.additivity`).
Source: Lin, Talathi, Annapureddy, "Fixed Point Quantization of Deep Convolutional Networks", ICML 2016, section 4.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from graphopt.errors import DataError
from graphopt.model import Model
from graphopt.runtime import Feeds, Session

Array: TypeAlias = npt.NDArray[Any]
Make: TypeAlias = Callable[[frozenset[str]], Model]
"""Labels of layers -> the model with exactly these in int8."""

SAMPLES = 8
"""Feeds that are run at most."""

BUDGET = 60.0
"""Seconds that all layers together may take, about."""


@dataclass(frozen=True)
class Sensitivity(Mapping[str, float]):
    """Layer -> noise power at the output, relative to the signal, when this layer alone is int8.

    Layers whose int8 form gives values that are not finite are missing.

    Attributes:
        noise: the numbers.
        together: noise of all these layers in int8 at once; NaN where it was not measured.
        groups: layers that were measured together for want of time; each has an equal share.
        broken: layers that are missing.
        samples: feeds that were run.
    """

    noise: Mapping[str, float]
    together: float = math.nan
    groups: tuple[tuple[str, ...], ...] = ()
    broken: tuple[str, ...] = ()
    samples: int = 0

    def __getitem__(self, layer: str) -> float:
        return self.noise[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self.noise)

    def __len__(self) -> int:
        return len(self.noise)

    @property
    def additivity(self) -> float:
        """Noise of all layers together over the sum of their own: 1 where powers add up."""
        total = sum(self.noise.values())
        return self.together / total if total > 0.0 else math.nan

    def sqnr(self, layer: str) -> float:
        """Return signal over noise at the output with this layer alone in int8, in dB."""
        return decibels(self.noise[layer])

    def table(self) -> list[dict[str, Any]]:
        """Return one row per layer, the most harmful first."""
        total = sum(self.noise.values()) or 1.0
        ordered = sorted(self.noise.items(), key=lambda item: -item[1])
        return [{"layer": n, "noise": v, "sqnr_db": decibels(v), "share": v / total} for n, v in ordered]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "layers": self.table(), "together": self.together, "additivity": self.additivity,
            "groups": [list(g) for g in self.groups], "broken": list(self.broken), "samples": self.samples,
        }  # fmt: skip


def decibels(noise: float) -> float:
    """Return the SQNR of a relative noise power."""
    return -10.0 * math.log10(noise) if noise > 0.0 else math.inf


def power(sqnr: float) -> float:
    """Return the relative noise power of an SQNR in dB."""
    return float(10.0 ** (-sqnr / 10.0))


def measure(
    float_model: Model,
    make: Make,
    layers: Sequence[str],
    samples: Iterable[Feeds],
    *,
    limit: int = SAMPLES,
    provider: str = "cpu",
    threads: int = 1,
    budget: float = BUDGET,
    progress: Callable[[str], None] | None = None,
) -> Sensitivity:
    """Return the noise that each layer adds to the output, measured with one layer in int8 at a time.

    Args:
        float_model: the model whose outputs are the signal.
        make: builds the model with some layers in int8.
        layers: labels of the layers that may be int8.
        samples: feeds; the first `limit` are run.
        limit: how many.
        provider: short name of the execution provider.
        threads: ORT's intra-op threads.
        budget: seconds, about; where the layers that are left would take longer, neighbours are measured together.
        progress: takes short sentences about what is going on.

    Raises:
        DataError: there are no samples, they do not fit, or no output is a float tensor.
        ModelError: ORT refuses a model.
    """
    feeds = list(itertools.islice(samples, limit))
    if not feeds:
        raise DataError("there are no samples to measure noise on")
    reference = _Reference(Session(float_model, threads=threads, provider=provider), feeds)

    def noise(group: Iterable[str]) -> float:
        return reference.noise(Session(make(frozenset(group)), threads=threads, provider=provider))

    say = progress or _silent
    together = noise(layers) if layers else 0.0
    found: dict[str, float] = {}
    groups: list[tuple[str, ...]] = []
    broken: list[str] = []
    begun = time.perf_counter()
    while len(found) + len(broken) < len(layers):
        done = len(found) + len(broken)
        size = _group_size(len(layers) - done, budget - (time.perf_counter() - begun), len(groups), budget)
        group = tuple(layers[done : done + size])
        say(f"noise of layer {done + 1} of {len(layers)}")
        value = noise(group)
        if math.isfinite(value):
            found.update(dict.fromkeys(group, value / len(group)))
        else:
            broken.extend(group)
        groups.append(group)
    return Sensitivity(found, together, tuple(g for g in groups if len(g) > 1), tuple(broken), len(feeds))


def _group_size(layers: int, left: float, done: int, budget: float) -> int:
    """Return how many of the layers that are left to measure together, so that the seconds left suffice for all."""
    if not done:
        return 1
    each = (budget - left) / done
    return -(-layers // max(1, int(left / max(each, 1e-9))))


def noise_of(
    float_model: Model, candidate: Model, feeds: Sequence[Feeds], *, provider: str = "cpu", threads: int = 1
) -> float:
    """Return the noise power of a candidate's outputs, relative to those of the float model.

    Raises:
        DataError: the feeds do not fit, or no output is a float tensor.
        ModelError: ORT refuses a model.
    """
    reference = _Reference(Session(float_model, threads=threads, provider=provider), feeds)
    return reference.noise(Session(candidate, threads=threads, provider=provider))


def _silent(text: str) -> None:
    """Say nothing."""


@dataclass
class _Reference:
    """Outputs of the float model, and how far those of others are from them."""

    session: Session
    feeds: Sequence[Feeds]
    outputs: list[dict[str, Array]] = field(default_factory=list)
    signal: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.outputs = [_floats(self.session.run(feed)) for feed in self.feeds]
        for row in self.outputs:
            for name, values in row.items():
                self.signal[name] = self.signal.get(name, 0.0) + _power(values)
        if not self.signal:
            raise DataError("noise is measured on float outputs: the model has none")

    def noise(self, session: Session) -> float:
        """Return the noise power of a model's outputs relative to the signal, the mean over outputs that have any."""
        gaps = dict.fromkeys(self.signal, 0.0)
        for feed, expected in zip(self.feeds, self.outputs, strict=True):
            for name, values in _floats(session.run(feed)).items():
                known = expected.get(name)
                if known is None or known.shape != values.shape:
                    return math.inf  # an output whose shape depends on values: nothing to compare
                gaps[name] += _power(values.astype(np.float64) - known)
        parts = [gap / self.signal[name] for name, gap in gaps.items() if self.signal[name] > 0.0]
        return float(np.mean(parts)) if parts else 0.0


def _floats(outputs: Mapping[str, Any]) -> dict[str, Array]:
    return {k: v for k, v in outputs.items() if isinstance(v, np.ndarray) and v.dtype.kind == "f"}


def _power(values: Array) -> float:
    """Return the sum of squares; infinite where a value is not finite."""
    flat = values.astype(np.float64).ravel()
    total = float(flat @ flat)
    return total if math.isfinite(total) else math.inf
