"""How each operator that moves data is tried out: what stands for its axes, and which of them it acts on.

Reshape and its kin     each block of axes with one product by itself; sizes from the proved shapes
all others              true sizes where it acts, small stand-ins elsewhere
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analysis.channel_sizes import Block, stand_ins, view_blocks
from graphopt.analysis.channel_trials import LARGEST, Map, Move, Part, Trial, run
from graphopt.analysis.constants import Unknown, array_of, parameter
from graphopt.analysis.region import Evaluate
from graphopt.analysis.shapes import Shapes
from graphopt.analysis.symbolic_expr import Size
from graphopt.ops import MOVED_TO_INPUT, is_standard


def probe(nodes: Iterable[gs.Node], shapes: Shapes, evaluate: Evaluate, opset: int) -> dict[int, Move]:
    """Return what is known of the nodes that move data, by their id.

    Args:
        nodes: of one graph.
        shapes: as far as they are proved.
        evaluate: runs a small model.
        opset: of the graph.
    """
    found = {}
    for node in nodes:
        plan = PLANS.get(node.op) if is_standard(node) else None
        move = None if plan is None else plan(node, shapes, opset)
        if move is not None:
            found[id(node)] = move
    parts = [part for move in found.values() for part in move.parts]
    maps = run({part.trial for part in parts if part.trial.size <= LARGEST}, evaluate)
    for part in parts:
        part.found = maps.get(part.trial, Map())
    return found


Array: TypeAlias = np.ndarray[Any, Any]

Plan: TypeAlias = Callable[[gs.Node, Shapes, int], "Move | None"]


def _shape(shapes: Shapes, tensor: gs.Tensor) -> tuple[int | str | None, ...] | None:
    return shapes.proved(tensor).shape


def _sizes(shapes: Shapes, tensor: gs.Tensor) -> tuple[Size, ...] | None:
    """Return a shape as expressions."""
    return tuple(tensor.shape) if isinstance(tensor, gs.Constant) else shapes.symbolic.of(tensor).shape


def _view(node: gs.Node, shapes: Shapes, _opset: int) -> Move | None:
    """Reshape and its kin: elements stay in their order, so axes whose products agree form blocks."""
    x, y = (_sizes(shapes, t) for t in (node.inputs[0], node.outputs[0]))
    if x is None or y is None:
        return Move(why="has a shape that is not known")
    move = Move()
    for block in view_blocks(x, y):
        _add_block(move, block)
    return move


def _add_block(move: Move, block: Block) -> None:
    if len(block.read) == len(block.made) == 1 and -1 not in (*block.read, *block.made):
        move.same.append((0, block.read[0], 0, block.made[0]))
    elif block.sizes_read:
        trial = Trial("Reshape", (block.sizes_read,), (), (block.sizes_made,))
        move.parts.append(Part(trial, [list(block.read)], [list(block.made)]))


def _around(shape: Sequence[int | str | None], acted: Mapping[int, int], step: int = 1) -> tuple[int, ...]:
    """Return a shape for a trial: sizes that count where the operator acts, small different ones elsewhere."""
    rest = iter(stand_ins())
    return tuple(acted[at] if at in acted else next(rest) * step for at in range(len(shape)))


def _static(shape: Sequence[int | str | None], axes: Iterable[int]) -> dict[int, int] | None:
    """Return the sizes of some axes, None where one is not known."""
    found = {at: shape[at] for at in axes}
    if not all(isinstance(n, int) for n in found.values()):
        return None
    return {at: int(n) for at, n in found.items() if isinstance(n, int)}


def _simple(
    shape: Sequence[int | str | None], axes: Iterable[int], op: str, attrs: Mapping[str, Any],
    parameters: Sequence[tuple[int, ...] | int] = (), outputs: int = 1,
) -> Move | None:  # fmt: skip
    """Return a move of one tensor that keeps its rank and acts on a few axes."""
    axes = list(axes)
    sizes = _static(shape, axes)
    everywhere = list(range(len(shape)))
    if sizes is None:
        return _others(shape, axes, outputs)
    trial = Trial(op, (_around(shape, sizes),), tuple(sorted(attrs.items())), tuple(parameters), outputs)
    part = Part(trial, [everywhere], [everywhere] * outputs, frozenset(axes), frozenset(axes))
    return Move(parts=[part])


def _others(shape: Sequence[Any], axes: Iterable[int], outputs: int = 1) -> Move:
    """Return a move of which only the axes that it does not act on are known."""
    acted = set(axes)
    return Move([(0, at, o, at) for at in range(len(shape)) if at not in acted for o in range(outputs)])


def _transpose(node: gs.Node, shapes: Shapes, _opset: int) -> Move | None:
    shape = _shape(shapes, node.inputs[0])
    if shape is None:
        return None
    rank = len(shape)
    perm = [int(p) for p in node.attrs.get("perm", range(rank)[::-1])]
    trial = Trial("Transpose", (_around(shape, {}),), (("perm", tuple(perm)),))
    axes = list(range(rank))
    return Move(parts=[Part(trial, [axes], [axes], frozenset(), frozenset())])


def _concat(node: gs.Node, shapes: Shapes, _opset: int) -> Move | None:
    found = [_shape(shapes, t) for t in node.inputs]
    ranked = [shape for shape in found if shape is not None]
    if len(ranked) < len(found):
        return None
    rank = len(ranked[0])
    axis = int(node.attrs.get("axis", 1)) % max(rank, 1)
    everywhere = list(range(rank))
    sizes = [_static(shape, [axis]) for shape in ranked]
    if any(s is None for s in sizes):
        same = [(i, at, 0, at) for i in range(len(found)) for at in everywhere if at != axis]
        return Move(same, ports=None)
    trial = Trial("Concat", tuple(_around(s, n or {}) for s, n in zip(ranked, sizes, strict=True)), (("axis", axis),))
    part = Part(trial, [everywhere] * len(found), [everywhere], frozenset([axis]), frozenset([axis]))
    return Move(parts=[part], ports=None)


def _split(node: gs.Node, shapes: Shapes, _opset: int) -> Move | None:
    shape = _shape(shapes, node.inputs[0])
    outs = [_shape(shapes, t) for t in node.outputs]
    if shape is None or any(o is None for o in outs) or any(t.is_empty() for t in node.outputs):
        return None
    axis = int(node.attrs.get("axis", 0)) % max(len(shape), 1)
    sizes = tuple(o[axis] for o in outs if o is not None)
    if not all(isinstance(n, int) for n in sizes) or not isinstance(shape[axis], int):
        return _others(shape, [axis], len(outs))
    known = tuple(int(n) for n in sizes if isinstance(n, int))
    return _simple(shape, [axis], "Split", {"axis": axis}, [known], len(outs))


def _given(node: gs.Node, name: str, shapes: Shapes, opset: int) -> Array | Unknown | None:
    """Return a parameter, one that is computed from known sizes too."""
    found = parameter(node, name, opset)
    if isinstance(found, Unknown):
        known = shapes.symbolic.of(node.inputs[MOVED_TO_INPUT[node.op, name][1]]).known_values
        return found if known is None else known.astype(np.int64)
    return found


def _slice(node: gs.Node, shapes: Shapes, opset: int) -> Move | None:
    shape = _shape(shapes, node.inputs[0])
    given = {name: _given(node, name, shapes, opset) for name in ("starts", "ends", "axes", "steps")}
    if shape is None or isinstance(given["axes"], Unknown):
        return None
    starts = given["starts"]
    if given["axes"] is not None:
        axes = [int(a) % len(shape) for a in given["axes"].reshape(-1)]
    elif isinstance(starts, Unknown) or starts is None:
        return None
    else:
        axes = list(range(starts.size))
    values = {k: v for k, v in given.items() if isinstance(v, np.ndarray)}
    if any(isinstance(v, Unknown) for v in given.values()):
        return _others(shape, axes)
    steps = values.get("steps", np.ones(len(axes), np.int64)).reshape(-1)
    rows = list(zip(values["starts"].reshape(-1), values["ends"].reshape(-1), axes, steps, strict=True))
    known = [row for row in rows if isinstance(shape[row[2]], int)]
    columns = [tuple(int(v) for v in column) for column in zip(*known, strict=True)] or [(), (), (), ()]
    if len(known) < len(rows):
        return _others(shape, axes)
    return _simple(shape, [row[2] for row in known], "Slice", {}, columns)


def _gather(node: gs.Node, shapes: Shapes, _opset: int) -> Move | None:
    """By constant indices; others have a rule."""
    shape = _shape(shapes, node.inputs[0])
    if shape is None:
        return None
    axis = int(node.attrs.get("axis", 0)) % max(len(shape), 1)
    sizes = _static(shape, [axis])
    indices = array_of(node.inputs[1])
    if indices is None and (known := shapes.symbolic.of(node.inputs[1]).known_values) is not None:
        indices = known.astype(np.int64)
    if sizes is None or indices is None or indices.size > LARGEST >> 8:
        return None
    everywhere, rank = list(range(len(shape))), indices.ndim
    made = list(range(len(shape) - 1 + rank))
    trial = Trial("Gather", (_around(shape, sizes),), (("axis", axis),), (_tupled(indices.tolist()),))
    part = Part(trial, [everywhere], [made], frozenset([axis]), frozenset(range(axis, axis + rank)))
    return Move(parts=[part])


def _tupled(values: Any) -> Any:
    return tuple(_tupled(v) for v in values) if isinstance(values, list) else values


def _tile(node: gs.Node, shapes: Shapes, opset: int) -> Move | None:
    shape, repeats = _shape(shapes, node.inputs[0]), _given(node, "repeats", shapes, opset)
    if shape is None or not isinstance(repeats, np.ndarray):
        return None
    times = tuple(int(r) for r in repeats.reshape(-1))
    return _simple(shape, [at for at, n in enumerate(times) if n != 1], "Tile", {}, [times])


def _pad(node: gs.Node, shapes: Shapes, opset: int) -> Move | None:
    shape, pads = _shape(shapes, node.inputs[0]), _given(node, "pads", shapes, opset)
    if shape is None or not isinstance(pads, np.ndarray):
        return None
    axes = _given(node, "axes", shapes, opset) if opset >= 18 else None
    if isinstance(axes, Unknown):
        return None
    places = [int(a) % len(shape) for a in axes.reshape(-1)] if axes is not None else list(range(len(shape)))
    values = [int(p) for p in pads.reshape(-1)]
    full = [0] * (2 * len(shape))
    for i, at in enumerate(places):
        full[at], full[at + len(shape)] = values[i], values[i + len(places)]
    acted = [at for at in range(len(shape)) if full[at] or full[at + len(shape)]]
    mode = node.attrs.get("mode", "constant")
    return _simple(shape, acted, "Pad", {"mode": mode}, [tuple(full)])


def _depth_to_space(node: gs.Node, shapes: Shapes, _opset: int) -> Move | None:
    shape = _shape(shapes, node.inputs[0])
    out = _shape(shapes, node.outputs[0])
    if shape is None or out is None or len(shape) != 4:
        return None
    sizes = _static(shape, [1])
    if sizes is None:
        return Move([(0, 0, 0, 0)])
    block = int(node.attrs["blocksize"])
    attrs: list[tuple[str, Any]] = [("blocksize", block)]
    if node.op == "DepthToSpace":
        attrs.append(("mode", node.attrs.get("mode", "DCR")))
    trial = Trial(node.op, (_around(shape, sizes, block),), tuple(attrs))
    axes = list(range(4))
    return Move(parts=[Part(trial, [axes], [axes], frozenset([1]), frozenset([1]))])


PLANS: Mapping[str, Plan] = {
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), _view),
    "Transpose": _transpose,
    "Concat": _concat,
    "Split": _split,
    "Slice": _slice,
    "Gather": _gather,
    "Tile": _tile,
    "Pad": _pad,
    "DepthToSpace": _depth_to_space,
    "SpaceToDepth": _depth_to_space,
}
"""Operator -> how it is tried out; None where a rule has to say it."""
