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

import itertools
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from graphopt.base import Context
from graphopt.channel_costs import weights_of
from graphopt.channel_losses import curves, reader_of
from graphopt.errors import SpecError, did_you_mean

if TYPE_CHECKING:
    from graphopt.analysis.channels import Group, Site

Array: TypeAlias = np.ndarray[Any, Any]

SCALED_BY: Mapping[str, int] = {
    "BatchNormalization": 1,
    "InstanceNormalization": 1,
    "GroupNormalization": 1,
    "LayerNormalization": 1,
}
"""Operator -> input that scales each channel after it was normalised."""

FEEDS = 64
"""Samples at most whose activations are looked at."""


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


def bn_scale(groups: Sequence[Group], question: Question) -> dict[str, Array]:
    """|gamma| of what normalises the units or scales them behind their layer; where there is none, that is noted."""
    found: dict[str, Array] = {}
    for group in groups:
        rows = [
            per_unit(np.abs(values), site, group.size)
            for site in group.role("holds")
            if site.node is not None
            and SCALED_BY.get(site.node.op) == site.port
            and (values := weights_of(site)) is not None
        ]
        if rows:
            found[group.name] = question.combine(np.stack(rows))
    if groups and not found:
        raise SpecError(
            "no channel group has a normalisation left to read scales from",
            hint="they were folded into the weights: take another criterion, such as l2 or obs",
        )
    rest = [g for g in groups if g.name not in found]
    if rest:
        question.ctx.notes.append(f"{_named(rest)}: no normalisation to read scales from; l2 is taken there")
        found |= l2(rest, question)
    return found


def activation(groups: Sequence[Group], question: Question) -> dict[str, Array]:
    """Sum over consumers of mean |x| times the norm of the weights that x meets."""
    return _by_reader(groups, question, lambda size, weight: size.mean * np.sqrt(np.square(weight).sum(axis=1)))


def wanda(groups: Sequence[Group], question: Question) -> dict[str, Array]:
    """Sum over consumers of root mean square of x times the sum of |w| of the weights that x meets."""
    return _by_reader(groups, question, lambda size, weight: size.root * np.abs(weight).sum(axis=1))


@dataclass
class _Sizes:
    """How large each channel of a tensor is: sums over what was seen."""

    absolute: Array
    square: Array
    count: int = 0

    def add(self, values: Array, axis: int) -> None:
        flat = np.moveaxis(values, axis, -1).reshape(-1, values.shape[axis]).astype(np.float64)
        self.absolute = self.absolute + np.abs(flat).sum(axis=0)
        self.square = self.square + np.square(flat).sum(axis=0)
        self.count += len(flat)

    def rows(self, kernel: int) -> _Rows:
        """Return the numbers for each row of a weight with so many rows per channel."""
        mean, root = self.absolute / max(self.count, 1), np.sqrt(self.square / max(self.count, 1))
        return _Rows(np.repeat(mean, kernel), np.repeat(root, kernel))


@dataclass(frozen=True)
class _Rows:
    """Mean of |x| and root of the mean of x² by row of a weight."""

    mean: Array
    root: Array


def _by_reader(
    groups: Sequence[Group], question: Question, number: Callable[[_Rows, Array], Array]
) -> dict[str, Array]:
    """Score by what the linear layers that read a group make of it; groups without any by l2."""
    readers = {g.name: [r for s in g.role("reads") if (r := reader_of(s, g.size)) is not None] for g in groups}
    seen: dict[tuple[str, int], _Sizes] = {}
    for r in (r for row in readers.values() for r in row):
        seen.setdefault((r.request.tensor, r.channel_axis), _Sizes(np.zeros(()), np.zeros(())))
    if seen:
        for values in itertools.islice(question.ctx.fetches({name for name, _ in seen}), FEEDS):
            for (name, axis), sizes in seen.items():
                sizes.add(np.asarray(values[name]), axis)
    found: dict[str, Array] = {}
    for group in groups:
        rows = [
            number(seen[r.request.tensor, r.channel_axis].rows(r.kernel), r.matrix())[r.rows].sum(axis=1)
            for r in readers[group.name]
        ]
        if rows:
            found[group.name] = question.combine(np.stack(rows))
    rest = [g for g in groups if g.name not in found]
    if rest:
        question.ctx.notes.append(f"{_named(rest)}: no linear layer reads it; l2 is taken there")
        found |= l2(rest, question)
    return found


def obs(groups: Sequence[Group], question: Question) -> dict[str, Array]:
    """Error at the consumers once the unit and all that go before it are gone and the rest is solved again."""
    return {name: curve.scores for name, curve in curves(groups, question.ctx).items()}


def gradient(groups: Sequence[Group], question: Question) -> dict[str, Array]:
    """Norm of the gradient by the filters."""
    return _with_gradients(groups, question, lambda g, _, s, n: np.sqrt(per_unit(np.square(g), s, n)))


def taylor(groups: Sequence[Group], question: Question) -> dict[str, Array]:
    """|sum of gradient x weight| of the filters."""
    return _with_gradients(groups, question, lambda g, w, s, n: np.abs(per_unit(g * w, s, n)))


def _with_gradients(
    groups: Sequence[Group], question: Question, number: Callable[[Array, Array, Site, int], Array]
) -> dict[str, Array]:
    found: dict[str, Array] = {}
    for group in groups:
        rows = []
        for site in group.role("makes"):
            weight, held = weights_of(site), question.gradients.get(site.tensor.name)
            if weight is not None and held is not None and np.shape(held) == weight.shape:
                rows.append(number(np.asarray(held, np.float64), weight, site, group.size))
        if not rows:
            raise SpecError(
                "there is no gradient of any weight that makes the channels", at=group.name,
                hint="gradients go by initializer name: take them of this model, or skip the group",
            )  # fmt: skip
        found[group.name] = question.combine(np.stack(rows))
    return found


def _named(groups: Sequence[Group]) -> str:
    names = [g.name for g in groups]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


CRITERIA: Mapping[str, Criterion] = {
    "random": random,
    "l1": l1,
    "l2": l2,
    "bn-scale": bn_scale,
    "activation": activation,
    "wanda": wanda,
    "obs": obs,
    "gradient": gradient,
    "taylor": taylor,
}
"""Name -> how it scores all groups."""

COMPARABLE = frozenset({"obs", "taylor"})
"""Criteria whose scores compare between groups as they are."""

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
        gradients: initializer name -> gradient of the loss, of its shape; the context's where none are given.

    Raises:
        SpecError: an unknown name, or no gradients where they are needed.
        DataError: there are no samples where they are needed.
    """
    rule = _known(criterion, CRITERIA, "criterion")
    combine = _known(aggregate, COMBINES, "aggregate")
    held = gradients or ctx.gradients or {}
    if needs_gradients(criterion) and not held:
        raise SpecError(f"criterion '{criterion}' needs gradients", hint="give a file of them: --gradients FILE.npz")
    scale = _known(normalise or ("none" if criterion in COMPARABLE else "mean"), SCALES, "normalise")
    found = rule(channels, Question(ctx, combine, seed, held))
    return {name: _scaled(np.nan_to_num(values, posinf=np.finfo(float).max), scale) for name, values in found.items()}


def _scaled(values: Array, scale: Callable[[Array], float]) -> Array:
    by = scale(values)
    return values / by if by > 0.0 else values


def _known(name: str, table: Mapping[str, Any], what: str) -> Any:
    if name not in table:
        raise SpecError(f"unknown {what} '{name}'", hint=did_you_mean(name, table) or f"known: {', '.join(table)}")
    return table[name]
