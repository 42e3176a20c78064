"""Samples in two halves that differ as much as they can, for estimates that must hold on what was not seen.

What is chosen and fitted on samples looks good on these, and on others like them.  Neighbours in a set are often alike
(crops of one photograph, pages of one book), so that samples held out at random say little about the rest of the world.
Here each sample is described by what the model makes of it, like samples are brought together, and the clusters dealt
out to two halves: what was fitted on one half then meets, on the other, something that it has not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from graphopt.model import Model
from graphopt.samples import Feeds, Samples
from graphopt.tensors import is_float

Array: TypeAlias = np.ndarray[Any, Any]
Run: TypeAlias = Callable[[Feeds], Mapping[str, Any]]

LEAST = 16
"""Samples from which on a set is cut in two."""

CLUSTERS = 16
"""That a set is cut into at most."""

MOST = 1024
"""Samples that are looked at: those behind them belong to the first half."""


def split_apart(model: Model, samples: Samples, run: Run) -> tuple[Samples, Samples] | None:
    """Return the two halves of a set that differ most; None where there are fewer than `LEAST` samples.

    Args:
        model: whose inputs and outputs tell whether a feed of a batch can be cut into single samples.
        samples: read twice or more.
        run: feeds -> the model's outputs.
    """
    cut = cuts_by_rows(model)
    described = [row for feed in samples for row in _descriptions(feed, run(feed), cut=cut)]
    described = described[:MOST]
    if len(described) < LEAST:
        return None
    second = _far_side(described)

    def half(which: bool) -> Samples:
        def chosen() -> Iterator[Feeds]:
            rows = (row for feed in samples for row in (_rows(feed) if cut else [feed]))
            for index, row in enumerate(rows):
                if (index < len(second) and bool(second[index])) == which:
                    yield row

        return Samples(chosen, f"a half of {samples.description}")

    return half(False), half(True)


def cuts_by_rows(model: Model) -> bool:
    """Tell whether the first axis of all inputs and outputs is one batch of any size."""
    shapes = [tensor.shape for tensor in (*model.graph.inputs, *model.graph.outputs)]
    first = {shape[0] if shape else None for shape in shapes}
    name = next(iter(first))
    return len(first) == 1 and isinstance(name, str) and bool(name)


def _rows(feed: Feeds) -> Iterator[Feeds]:
    count = min((len(value) for value in feed.values()), default=0)
    for row in range(count):
        yield {name: value[row : row + 1] for name, value in feed.items()}


def _descriptions(feed: Feeds, outputs: Mapping[str, Any], *, cut: bool) -> Iterator[Array]:
    """Yield what is known of each sample: float64 vectors."""
    arrays = [v for v in (*outputs.values(), *feed.values()) if isinstance(v, np.ndarray) and is_float(v.dtype)]
    count = min((len(v) for v in feed.values()), default=0) if cut else 1
    for row in range(count):
        mine = [v[row] if cut else v for v in arrays]
        yield np.concatenate([_pooled(v) for v in mine] or [np.zeros(1)])


def _pooled(values: Array) -> Array:
    """Return means and spreads over places, by channel: of a vector itself."""
    found = np.nan_to_num(values.astype(np.float64), posinf=0.0, neginf=0.0)
    if found.ndim <= 1:
        return found.reshape(-1)
    channel = 0 if found.ndim >= 3 else found.ndim - 1
    flat = np.moveaxis(found, channel, 0).reshape(found.shape[channel], -1)
    return np.asarray(np.concatenate([flat.mean(axis=1), flat.std(axis=1)]))


def _far_side(described: Sequence[Array]) -> Array:
    """Return of each sample whether it lies in the second half: like samples lie in the same one.

    The tree of Ward's clustering is cut into as few clusters as leave none with more than half of the samples, or into
    `CLUSTERS`; the larger ones are dealt out first, each to the half that has less.
    """
    from scipy.cluster.hierarchy import fcluster, ward  # noqa: PLC0415  (slow to import, for those who need it)

    width = min(len(vector) for vector in described)
    table = np.stack([vector[:width] for vector in described])
    table = table - table.mean(axis=0)
    spread = table.std(axis=0)
    varies = spread > 1e-9 * max(float(spread.max(initial=0.0)), 1e-300)
    if not varies.any():
        return np.asarray(np.arange(len(described)) % 2 == 1)
    tree = ward(table[:, varies] / spread[varies])
    for number in range(2, CLUSTERS + 1):
        labels = np.asarray(fcluster(tree, number, "maxclust")) - 1
        sizes = np.bincount(labels)
        if sizes.max() <= len(described) / 2:
            break
    held = [0, 0]
    side = np.zeros(len(sizes), bool)
    for cluster in np.argsort(-sizes, kind="stable"):
        lighter = int(held[1] < held[0])
        side[cluster] = bool(lighter)
        held[lighter] += int(sizes[cluster])
    return np.asarray(side[labels], bool)
