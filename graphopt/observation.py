"""What a pass may ask about the values that flow through the model: run on the user's samples, and only when asked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from graphopt.errors import DataError
from graphopt.model import Model
from graphopt.samples import Samples

if TYPE_CHECKING:
    from graphopt.calibrate import Calibration
    from graphopt.grams import Gram, GramRequest
    from graphopt.moments import Fit, Split

Array: TypeAlias = np.ndarray[Any, Any]


@dataclass
class Observer:
    """Runs a model as it is when asked.

    Attributes:
        model: the one that passes edit.
        samples: representative feeds; random ones stand for nothing, and are refused.
        known: statistics taken before, which hold as long as the tensors that they name are computed the same way.
        seed: for every random choice.
    """

    model: Model
    samples: Samples | None
    known: Calibration | None = None
    seed: int = 0

    def calibration(self, tensors: Iterable[str], channels: Mapping[str, int] | None = None) -> Calibration:
        """Return statistics of tensors of the main graph, per channel for those in `channels` (name -> axis).

        Raises:
            DataError: there are no samples.
        """
        from graphopt.calibrate import calibrate  # noqa: PLC0415  (heavy imports only when needed)

        names = list(dict.fromkeys((*tensors, *(channels or {}))))
        if self.known is not None and not channels and set(names) <= set(self.known.names):
            return self.known
        return calibrate(self.model, self._samples("ranges"), names, channels=channels or {}, seed=self.seed)

    def grams(self, requests: Mapping[str, GramRequest], rows: int = 0) -> dict[str, Gram]:
        """Return Gram matrices of layer inputs, by the label of the request; of so many rows per sample, 0 for all.

        Raises:
            DataError: there are no samples.
        """
        from graphopt.grams import collect  # noqa: PLC0415

        return collect(self.model, self._samples("second moments"), requests, rows=rows, seed=self.seed)

    def means(
        self, axes: Mapping[str, tuple[int, int]], model: Model | None = None, limit: int = 0
    ) -> dict[str, Array]:
        """Return means of channels of tensors: name -> (axis, rank) to name -> (channels,).

        Raises:
            DataError: there are no samples.
        """
        from graphopt.channel_means import collect  # noqa: PLC0415

        return collect(model or self.model, self._samples("means"), axes, limit=limit)

    def output_noise(
        self, reference: Model, names: Sequence[str], limit: int = 0, model: Model | None = None
    ) -> Callable[[Mapping[str, Array]], float]:
        """Return a function from values of constants to the noise at the outputs.

        Raises:
            DataError: there are no samples.
        """
        from graphopt.trials import output_noise  # noqa: PLC0415

        return output_noise(model or self.model, reference, self._samples("output errors"), names, limit=limit)

    def sweep(self, fits: Sequence[Fit], reference: Model, rows: int = 0) -> Iterator[tuple[Fit, Split]]:
        """Yield moments of layers' inputs in the graph as it is against tensors of a reference, in order.

        Raises:
            DataError: there are no samples.
        """
        from graphopt.sweep import sweep  # noqa: PLC0415

        return sweep(self.model, reference, self._samples("layers"), fits, rows=rows, seed=self.seed)

    def random_feeds(self) -> Samples:
        """Return random feeds for the model as it is now, of two shapes where dimensions are open."""
        from graphopt.random_feeds import random_feeds  # noqa: PLC0415

        return random_feeds(self.model.copy(), seed=self.seed)

    def runner(self, model: Model) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
        """Return a function that runs a model as it is written."""
        from graphopt.runtime import Session  # noqa: PLC0415

        return Session(model, optimization="off").run

    def fetches(self, tensors: Iterable[str]) -> Iterator[dict[str, Any]]:
        """Yield the values of tensors of the main graph for each sample, the model run as it is written.

        Raises:
            DataError: there are no samples.
        """
        from graphopt.runtime import Session  # noqa: PLC0415

        names = list(dict.fromkeys(tensors))
        session = Session(self.model, optimization="off", extra_outputs=names)
        for feed in self._samples("values"):
            yield session.run(feed, names)

    def halves(self) -> tuple[Observer, Observer] | None:
        """Return the same for the two halves of the samples that differ most, None where they are few.

        Raises:
            DataError: there are no samples.
        """
        from graphopt.dissimilar import split_apart  # noqa: PLC0415
        from graphopt.runtime import Session  # noqa: PLC0415

        found = split_apart(self.model, self._samples("halves"), Session(self.model).run)
        if found is None:
            return None
        first, second = (Observer(self.model, half, seed=self.seed) for half in found)
        return first, second

    def _samples(self, what: str) -> Samples:
        if self.samples is None or self.samples.random:
            raise DataError(f"{what} are measured on samples, and there are none", hint="give --data")
        return self.samples
