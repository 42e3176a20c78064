"""How much each unit of a channel group matters: `scores(groups, criterion, ctx)`, higher is worth keeping.

A unit is what is kept or cut together: a channel with its filter, its bias and what its consumers make of it; a whole
head.  A criterion gives each site of the group (an axis of a constant, `analysis/channels.py`) one number per unit;
those of all sites that make the units (or read them, as the criterion has it) are brought together, and scaled for
each group so that groups can be compared.

    random        seeded; what a criterion must beat
    l1, l2        norms of the filters that make the unit   Li and others, Pruning Filters for Efficient ConvNets, 2017
    bn-scale      |gamma| of the normalisation behind the layer              Liu and others, Network Slimming, ICCV 2017
    activation    mean |activation| x the norm of its consumers' weights                              neuron importance
    wanda         norm of |weight| x the norm of the input it meets, summed over consumers         Sun and others, 2024
    obs           error left at the consumers once the unit and all less important ones are gone and what stays is
                  solved again by least squares; see `channel_losses.py`                                    ZipLM, 2023
    gradient      norm of the loss' gradient by the weights
    taylor        |sum of gradient x weight|: how the loss changes without the unit, to first order
                                                              Molchanov and others, Importance Estimation, CVPR 2019
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from graphopt.base import Context
from graphopt.errors import SpecError, did_you_mean
from graphopt.tensors import is_float

if TYPE_CHECKING:
    from graphopt.analysis.channels import Group, Site

Array: TypeAlias = np.ndarray[Any, Any]

NORMALIZATION_SCALE: Mapping[str, int] = {
    "BatchNormalization": 1,
    "InstanceNormalization": 1,
    "GroupNormalization": 1,
    "LayerNormalization": 1,
}
"""Operator -> input that scales each channel after it was normalised."""


@dataclass(frozen=True)
class Question:
    """What a criterion may look at besides the group.

    Attributes:
        ctx: samples, seed, the model.
        combine: brings rows (sites, units) together to (units,).
        gradients: initializer name -> gradient of its shape.
    """

    ctx: Context
    combine: Callable[[Array], Array]
    seed: int = 0
    gradients: Mapping[str, Array] = field(default_factory=dict)


Criterion: TypeAlias = Callable[[Sequence["Group"], Question], dict[str, Array]]


def per_unit(values: Array, site: Site, size: int) -> Array:
    """Return for each unit the sum over its indices on the site's axis: float64, (size,).

    Args:
        values: of the constant's shape.
        site: where.
        size: units of the group.
    """
    axis = site.axis % values.ndim
    along = values.sum(axis=tuple(i for i in range(values.ndim) if i != axis), dtype=np.float64)
    mine = site.units >= 0
    return np.bincount(site.units[mine], weights=along[mine], minlength=size)[:size]


def weights_of(site: Site) -> Array | None:
    """Return a site's constant as float64; None where it holds no floats."""
    values = np.asarray(site.tensor.values)
    return values.astype(np.float64) if is_float(values.dtype) else None


def _rows(group: Group, roles: Sequence[str], number: Callable[[Site, Array], Array | None]) -> list[Array]:
    """Return one row of units for each site of these roles that has numbers."""
    found = []
    for site in group.sites:
        if site.role not in roles:
            continue
        values = weights_of(site)
        row = None if values is None else number(site, values)
        if row is not None:
            found.append(row)
    return found


def _together(group: Group, question: Question, number: Callable[[Site, Array], Array | None]) -> Array:
    """Return a number per unit from the sites that make the units; from those that read them where none does."""
    rows = _rows(group, ["makes"], number) or _rows(group, ["reads"], number)
    return question.combine(np.stack(rows)) if rows else np.ones(group.size)


def random(groups: Sequence[Group], question: Question) -> dict[str, Array]:
    """Seeded by the group's name: another group more or less changes nothing here."""
    return {
        g.name: np.random.default_rng([question.seed, zlib.crc32(g.name.encode())]).permutation(g.size) + 1.0
        for g in groups
    }


def l1(groups: Sequence[Group], question: Question) -> dict[str, Array]:
    """Sum of |w| of the filters."""
    return {g.name: _together(g, question, lambda s, w, n=g.size: per_unit(np.abs(w), s, n)) for g in groups}  # type: ignore[misc]


def l2(groups: Sequence[Group], question: Question) -> dict[str, Array]:
    """Root of the sum of w² of the filters."""
    return {
        g.name: _together(g, question, lambda s, w, n=g.size: np.sqrt(per_unit(np.square(w), s, n)))  # type: ignore[misc]
        for g in groups
    }


CRITERIA: Mapping[str, Criterion] = {
    "random": random,
    "l1": l1,
    "l2": l2,
}
"""Name -> how it scores all groups."""

NEEDS_SAMPLES = frozenset({"activation", "wanda", "obs"})
NEEDS_GRADIENTS = frozenset({"gradient", "taylor"})

COMBINES: Mapping[str, Callable[[Array], Array]] = {
    "sum": lambda rows: rows.sum(axis=0),
    "mean": lambda rows: rows.mean(axis=0),
    "max": lambda rows: rows.max(axis=0),
    "l2": lambda rows: np.sqrt(np.square(rows).sum(axis=0)),
}
"""How the sites of a group come together: (sites, units) -> (units,)."""

SCALES: Mapping[str, Callable[[Array], float]] = {
    "none": lambda _: 1.0,
    "max": lambda scores: float(scores.max()),
    "mean": lambda scores: float(scores.mean()),
    "sum": lambda scores: float(scores.sum()),
}
"""What the scores of a group are divided by."""


def needs_data(criterion: str) -> bool:
    """Tell whether a criterion looks at samples."""
    return criterion in NEEDS_SAMPLES


def needs_gradients(criterion: str) -> bool:
    """Tell whether a criterion looks at gradients."""
    return criterion in NEEDS_GRADIENTS


def scores(
    channels: Sequence[Group],
    criterion: str,
    ctx: Context,
    *,
    aggregate: str = "sum",
    normalise: str = "",
    seed: int = 0,
    gradients: Mapping[str, Array] | None = None,
) -> dict[str, Array]:
    """Return how much each unit of each group matters: float64 (units,) by the group's name, higher is worth keeping.

    Args:
        channels: the groups.
        criterion: a name in `CRITERIA`.
        ctx: the model, its samples.
        aggregate: how the sites of a group come together: sum, mean, max or l2.
        normalise: what a group's scores are divided by so that groups compare: none, max, mean, sum; '' for the
            criterion's own, which is mean where scores have no unit of their own.
        seed: of `random`.
        gradients: initializer name -> gradient of the loss, of its shape.

    Raises:
        SpecError: an unknown name, or no gradients where they are needed.
        DataError: there are no samples where they are needed.
    """
    rule = _known(criterion, CRITERIA, "criterion")
    combine = _known(aggregate, COMBINES, "aggregate")
    if needs_gradients(criterion) and not gradients:
        raise SpecError(f"criterion '{criterion}' needs gradients", hint="give a file of them: --gradients FILE.npz")
    scale = _known(normalise or ("none" if criterion in COMPARABLE else "mean"), SCALES, "normalise")
    found = rule(channels, Question(ctx, combine, seed, gradients or {}))
    return {name: _scaled(np.nan_to_num(values, posinf=np.finfo(float).max), scale) for name, values in found.items()}


COMPARABLE = frozenset({"obs", "taylor", "activation"})
"""Criteria whose scores compare between groups as they are."""


def _scaled(values: Array, scale: Callable[[Array], float]) -> Array:
    by = scale(values)
    return values / by if by > 0.0 else values


def _known(name: str, table: Mapping[str, Any], what: str) -> Any:
    if name not in table:
        raise SpecError(f"unknown {what} '{name}'", hint=did_you_mean(name, table) or f"known: {', '.join(table)}")
    return table[name]
