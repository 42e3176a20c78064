"""How far a model's outputs are off without some units of a channel group, measured on samples.

The readers of the group are solved again without them, by least squares (`channel_losses.py`), on one half of the
samples, which also says which units go first; the other half judges, and the halves change places.  The two halves
differ as much as they can (`dissimilar.py`): late channels of a network often look idle on the few things that samples
show, and a fit makes up for them perfectly there and nowhere else.  Between the counts that were measured, the curve of
errors leads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.base import Context
from graphopt.channel_costs import MacsModel
from graphopt.channel_losses import Curve, Solved, shrinking
from graphopt.model import Model
from graphopt.ops import is_standard

if TYPE_CHECKING:
    from graphopt.analysis.channels import Group

PROBABILITIES = ("Softmax", "Sigmoid", "LogSoftmax")
VIEWED = ("Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Transpose", "Cast")

WORK = 4e11
"""MACs that all trials together may take."""

FEEDS = (4, 64)
"""Samples of a trial, at least and at most."""

LEVELS = (0.25, 0.5)
"""Parts of a group without which the outputs are measured."""


def losses(
    groups: Sequence[Group], ctx: Context, *, feeds: int = 0, progress: Callable[[str], None] | None = None
) -> dict[str, Curve]:
    """Return how each group shrinks, with the noise at the model's outputs measured at `LEVELS`.

    Args:
        groups: those that may be cut.
        ctx: the model and its samples.
        feeds: run for each trial (0: as many as keep all trials within `WORK`, from `FEEDS[0]` to `FEEDS[1]`).
        progress: takes short sentences about what is going on.

    Raises:
        DataError: there are no samples.
    """
    found: dict[str, Curve] = {}
    model = before_probabilities(ctx.model)
    if not feeds:
        each = MacsModel.of(ctx.model, (), ctx.samples).macs() * (len(LEVELS) + 1) * max(len(groups), 1)
        feeds = int(np.clip(WORK / max(each, 1.0), *FEEDS))
    parts = ctx.halves() or (ctx,)
    judges = parts[::-1]  # what was solved on one half is judged by the other
    for name, curve, fitted in shrinking(groups, parts):
        if progress is not None:
            progress(f"loss of group {len(found) + 1} of {len(groups)}")
        pairs = [(one, judge) for one, judge in zip(fitted, judges, strict=True) if one[1]]
        noise = [_measured(*one, judge, model, feeds) for one, judge in pairs]
        found[name] = replace(curve, noise=_mean(noise)) if noise else curve
    return _levelled(found)


def _mean(noise: Sequence[Sequence[tuple[int, float]]]) -> tuple[tuple[int, float], ...]:
    """Return the mean of what several judges found, at the same counts."""
    return tuple((points[0][0], float(np.mean([value for _, value in points]))) for points in zip(*noise, strict=True))


def before_probabilities(model: Model) -> Model:
    """Return a copy whose outputs are what Softmax and Sigmoid make probabilities of, where these are its outputs.

    Errors hide in probabilities near 0 and 1, until many of them together turn one over.
    """
    copy = model.copy()
    found: dict[int, gs.Tensor] = {}
    for tensor in copy.graph.outputs:
        behind = _behind(tensor)
        found[id(behind)] = behind
    for tensor in found.values():
        if not any(tensor is output for output in copy.graph.outputs):
            tensor.dtype, tensor.shape = None, None  # ORT infers the type: a stale one would make it refuse the model
            tensor.__dict__.pop("origin", None)
    copy.graph.outputs[:] = list(found.values())
    return copy


def _behind(tensor: gs.Tensor) -> gs.Tensor:
    """Return what a probability is made of, the tensor itself where it is none."""
    current = tensor
    while not isinstance(current, gs.Constant) and current.inputs:
        node = current.inputs[0]
        if is_standard(node, *PROBABILITIES):
            below = node.inputs[0]
            return tensor if isinstance(below, gs.Constant) or not below.inputs else below
        if not is_standard(node, *VIEWED):
            break
        current = node.inputs[0]
    return tensor


def _measured(
    curve: Curve, solved: Sequence[Solved], judge: Context, model: Model, feeds: int
) -> list[tuple[int, float]]:
    """Return the noise at the outputs without some units, at `LEVELS`: (units gone, noise), rising."""
    size = len(curve.order)
    counts = sorted({round(level * size) for level in LEVELS} - {0, size})
    trials = [{k: v for s in solved for k, v in s.without(curve.order[:count]).items()} for count in counts]
    if not trials:
        return []
    measure = judge.output_noise(model, list(trials[0]), feeds, model)
    noise = np.maximum.accumulate([measure(trial) for trial in trials])
    return list(zip(counts, map(float, noise), strict=True))


def _levelled(found: Mapping[str, Curve]) -> dict[str, Curve]:
    """Give groups that could not be measured the noise per error that is usual among those that were."""
    rates = [c.noise[-1][1] / c.errors[c.noise[-1][0]] for c in found.values() if c.noise and c.errors[c.noise[-1][0]]]
    usual = float(np.median(rates)) if rates else 1.0
    result = {}
    for name, curve in found.items():
        half = len(curve.order) // 2
        known = curve.noise or not half
        result[name] = curve if known else replace(curve, noise=((half, usual * float(curve.errors[half])),))
    return result
