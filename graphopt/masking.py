"""The masked twin of a model: uncut, but what reads the channels that are to go reads zeros; and the proof by it.

    cut:     y = W[:, kept] x[kept]              masked:   y = (W with zeros for the others) x

Both are the same sums, less terms that are zero, so they differ by rounding alone: the sums may be added up in another
order.  How much that is depends on the model.  A difference of up to `FLOAT_NOISE` of the largest element always
passes.  Where it is larger, the twin is run once more with the weights that read channels moved by one unit in the
last place at random, which is what adding up in another order does to each term; a few times that difference passes,
too, but never more than `LIMIT`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analysis.constants import array_of
from graphopt.edit import Edit
from graphopt.errors import GraphoptError
from graphopt.model import Model, from_snapshot
from graphopt.tensors import is_float

if TYPE_CHECKING:
    from graphopt.analysis.channels import Group
    from graphopt.base import Runner

Array: TypeAlias = np.ndarray[Any, Any]

FLOAT_NOISE = 1e-5
"""Difference relative to the largest element of an output that float32 sums in another order make (DESIGN: exact)."""

TIMES = 8.0
"""How often the difference that one unit in the last place of the weights makes may be reached."""

LIMIT = 1e-2
"""Difference from which on a model is too sensitive to tell a wrong cut from rounding."""


@dataclass(frozen=True)
class Verdict:
    """What came of a proof.

    Attributes:
        worst: largest difference of an output, relative to its largest element.
        allowed: what rounding explains.
        why: what is wrong; "" where the cut is proved.
    """

    worst: float
    allowed: float
    why: str = ""


def masked(model: Model, groups: Iterable[tuple[Group, Array]], *, jitter: int | None = None) -> Model:
    """Return the uncut model with zeros where channels that are to go would be read.

    Args:
        model: what the groups were found on; not changed.
        groups: each with the units that stay.
        jitter: seed of moving the weights that read channels by one unit in the last place; None to leave them.
    """
    twin = from_snapshot(model.snapshot())
    places = {id(node): place for place, node in enumerate(model.graph.nodes)}
    gone: dict[tuple[int, int], list[tuple[int, Array]]] = {}
    for group, kept in groups:
        stays = np.zeros(group.size, np.bool_)
        stays[kept] = True
        for site in group.sites:
            if site.role == "reads" and site.node is not None:
                lost = (site.units >= 0) & ~stays[site.units]
                gone.setdefault((places[id(site.node)], site.port), []).append((site.axis, lost))
    rng = None if jitter is None else np.random.default_rng(jitter)
    nodes = list(twin.graph.nodes)
    with Edit(twin.graph) as edit:
        for (place, port), losses in gone.items():
            tensor = nodes[place].inputs[port]
            values = array_of(tensor)
            assert values is not None  # what reads channels is a weight
            zeroed = gs.Constant(f"{tensor.name}/masked/{place}.{port}", _zeroed(nodes[place], values, losses, rng))
            edit.set_input(nodes[place], port, zeroed)
    return twin


def _zeroed(
    node: gs.Node, values: Array, losses: Sequence[tuple[int, Array]], rng: np.random.Generator | None
) -> Array:
    """Return a weight with zeros for what is lost, in codes the zero point."""
    found = values.copy()
    if rng is not None and is_float(values.dtype):
        found = _moved(values, rng)
    zero = _zero_code(node, values)
    for axis, lost in losses:
        place = [slice(None)] * values.ndim
        place[axis] = lost  # type: ignore[call-overload]
        found[tuple(place)] = np.broadcast_to(zero, values.shape)[tuple(place)]
    return found


def _zero_code(node: gs.Node, values: Array) -> Array:
    """Return what stands for zero in a constant, in a shape that broadcasts to it."""
    if node.op != "DequantizeLinear" or len(node.inputs) < 3 or node.inputs[2].is_empty():
        return np.zeros((), values.dtype)
    point = array_of(node.inputs[2])
    if point is None:
        return np.zeros((), values.dtype)
    if point.ndim != 1 or point.size == 1:
        return point.reshape(()) if point.size == 1 else point
    axis = int(node.attrs.get("axis", 1)) % values.ndim
    return point.reshape([-1 if i == axis else 1 for i in range(values.ndim)])


def proved(
    cut: Model, model: Model, groups: Sequence[tuple[Group, Array]], feeds: Sequence[Mapping[str, Any]],
    runner: Callable[[Model], Runner], *, seed: int = 0,
) -> Verdict:  # fmt: skip
    """Run a cut model and the masked twin on feeds, ORT's optimisations off, and say whether they are the same.

    Args:
        cut: the cut model.
        model: what it was cut from.
        groups: what was cut, with the units that stay.
        feeds: inputs; of two shapes where dimensions are open.
        runner: as `base.Context.runner`.
        seed: of the weights and inputs moved to learn what rounding does.
    """
    wanted = _outputs(masked(model, groups), feeds, runner)
    try:
        found = _outputs(cut, feeds, runner)
    except GraphoptError as error:
        return Verdict(float("inf"), FLOAT_NOISE, f"the cut model does not run: {error.what}")
    name, worst = max((_apart(a, b) for a, b in zip(wanted, found, strict=True)), key=lambda at: at[1])
    allowed = FLOAT_NOISE
    if allowed < worst <= LIMIT:
        moved = _outputs(masked(model, groups, jitter=seed), [_jittered(feed, seed) for feed in feeds], runner)
        noise = max(_apart(a, b)[1] for a, b in zip(wanted, moved, strict=True))
        allowed = max(allowed, min(LIMIT, TIMES * noise))
    if worst > allowed:
        why = f"output '{name}' of the cut model is {worst:.1e} off the masked one, {allowed:.0e} would be rounding"
        return Verdict(worst, allowed, why)
    return Verdict(worst, allowed)


def runs(model: Model, feeds: Sequence[Mapping[str, Any]], runner: Callable[[Model], Runner]) -> str:
    """Return why a model does not run on feeds, "" where it does."""
    try:
        _outputs(model, feeds, runner)
    except GraphoptError as error:
        return f"the cut model does not run: {error.what}"
    return ""


def _outputs(
    model: Model, feeds: Sequence[Mapping[str, Any]], runner: Callable[[Model], Runner]
) -> list[dict[str, Any]]:
    """Return the outputs for each feed; the session is gone before another is made."""
    run = runner(model)
    return [run(feed) for feed in feeds]


def _jittered(feed: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Return a feed with its floats moved by one unit in the last place of float32 at random."""
    rng = np.random.default_rng(seed)
    moved = dict(feed)
    for name, value in feed.items():
        if isinstance(value, np.ndarray) and is_float(value.dtype):
            moved[name] = _moved(value, rng)
    return moved


def _moved(values: Array, rng: np.random.Generator) -> Array:
    """Return floats moved by about one unit in the last place (float32's at least) up or down."""
    away = rng.choice(np.array([-1.0, 1.0]), size=values.shape)
    step = max(float(ml_dtypes.finfo(values.dtype).eps), float(np.finfo(np.float32).eps))
    return np.asarray(values.astype(np.float64) * (1.0 + away * step), values.dtype)


def _apart(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> tuple[str, float]:
    """Return the output that differs most, and by how much of its largest element."""
    worst: tuple[str, float] = ("", 0.0)
    for name, value in wanted.items():
        other = found[name]
        apart = _difference(value, other)
        if apart > worst[1]:
            worst = name, apart
    return worst


def _difference(a: Any, b: Any) -> float:
    """Return the largest difference relative to the largest element; infinity where they do not compare."""
    if isinstance(a, list) and isinstance(b, list):
        return max(map(_difference, a, b), default=0.0) if len(a) == len(b) else float("inf")
    if not isinstance(a, np.ndarray) or not isinstance(b, np.ndarray):
        return 0.0 if a is b or a == b else float("inf")
    if a.shape != b.shape:
        return float("inf")
    if not is_float(a.dtype):
        return 0.0 if np.array_equal(a, b) else float("inf")
    x, y = a.astype(np.float64), b.astype(np.float64)
    same = (x == y) | (np.isnan(x) & np.isnan(y))
    if same.all():
        return 0.0
    if not np.isfinite(x[~same]).all() or not np.isfinite(y[~same]).all():
        return float("inf")
    largest = float(np.abs(x[np.isfinite(x)]).max(initial=0.0))
    return float(np.abs(x - y)[~same].max()) / largest if largest > 0 else float("inf")
