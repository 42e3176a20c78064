"""Random feeds for a model nobody gave data for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from graphopt.data import Feeds, Samples
from graphopt.model import Model


def random_feeds(
    model: Model, *, seed: int = 0, shapes: Mapping[str, Sequence[int]] | None = None, count: int = 2
) -> Samples:
    """Return `count` random feeds for the model."""
    given = dict(shapes or {})

    def make() -> Iterator[Feeds]:
        for index in range(count):
            rng = np.random.default_rng([seed, index])
            yield {
                s.name: rng.standard_normal(
                    given.get(s.name, [d if isinstance(d, int) else 1 for d in s.shape or ()])
                ).astype(s.dtype)
                for s in model.inputs
            }

    return Samples(make, f"{count} random feeds (seed {seed})", random=True)
