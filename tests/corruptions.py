"""Thirty ways to break zoo models as converters, exporters and optimisers do, each at a place drawn by a seed.

None changes an output's shape, so that only values can tell.  `break_model` returns the broken model and the
label of the node that is wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.edit import label
from graphopt.model import Model, load
from graphopt.sameness import constant_behind

Array = np.ndarray[Any, Any]
Edit = Callable[[Model, gs.Node, np.random.Generator], None]
Suits = Callable[[gs.Node], bool]


@dataclass(frozen=True)
class Corruption:
    """One corruption: of which zoo model, at a node of which operator that suits, how."""

    name: str
    model: str
    op: str
    edit: Edit
    suits: Suits = lambda _: True
    seed: int = 0


def break_model(original: Model, corruption: Corruption) -> tuple[Model, str]:
    """Return a broken copy and the label of the wrong node."""
    model = load(original)
    nodes = [n for n in model.nodes() if n.op == corruption.op and corruption.suits(n)]
    rng = np.random.default_rng([corruption.seed, len(nodes)])
    node = nodes[int(rng.integers(len(nodes)))]
    named = label(node)
    corruption.edit(model, node, rng)
    return model, named


def constant(node: gs.Node, slot: int) -> Array | None:
    """Return the values of a constant input, None for anything else."""
    if slot >= len(node.inputs):
        return None
    found = constant_behind(node.inputs[slot])
    return np.array(found.values) if isinstance(found, gs.Constant) else None


def put(node: gs.Node, slot: int, values: Array) -> None:
    """Replace a constant input of this node alone."""
    old = node.inputs[slot]
    node.inputs[slot] = gs.Constant(f"{old.name}/{label(node)}/changed", np.array(values, order="C"))


def edit_constant(slot: int, change: Callable[[Array, np.random.Generator], Array]) -> Edit:
    """Return an edit of a constant input."""

    def edit(_model: Model, node: gs.Node, rng: np.random.Generator) -> None:
        values = constant(node, slot)
        assert values is not None
        changed = change(values.copy(), rng).astype(values.dtype)
        assert not np.array_equal(changed, values), "the corruption changes nothing"
        put(node, slot, changed.reshape(values.shape))

    return edit


def set_attribute(key: str, value: Any) -> Edit:
    """Return an edit that sets an attribute to another value."""

    def edit(_model: Model, node: gs.Node, _rng: np.random.Generator) -> None:
        assert node.attrs.get(key) != value, "the corruption changes nothing"
        node.attrs[key] = value

    return edit


def swap_inputs(_model: Model, node: gs.Node, _rng: np.random.Generator) -> None:
    """Swap the first two inputs."""
    first, second = node.inputs[0], node.inputs[1]
    node.inputs[0], node.inputs[1] = second, first


def swap_branches(_model: Model, node: gs.Node, _rng: np.random.Generator) -> None:
    """Swap what an If does when true and when false."""
    node.attrs["then_branch"], node.attrs["else_branch"] = node.attrs["else_branch"], node.attrs["then_branch"]


def shift_slice(_model: Model, node: gs.Node, _rng: np.random.Generator) -> None:
    """Take the next item."""
    for slot in (1, 2):
        values = constant(node, slot)
        assert values is not None
        put(node, slot, values + 1)


def bypass(_model: Model, node: gs.Node, _rng: np.random.Generator) -> None:
    """Turn an activation into nothing."""
    node.op = "Identity"
    node.attrs.clear()


def other_op(op: str, **attrs: Any) -> Edit:
    """Return an edit that puts another operator in the place."""

    def edit(_model: Model, node: gs.Node, _rng: np.random.Generator) -> None:
        node.op = op
        node.attrs.clear()
        node.attrs.update(attrs)

    return edit


def zeros(values: Array, _rng: np.random.Generator) -> Array:
    return np.zeros_like(values)


def swap_two(axis: int, values: Array, rng: np.random.Generator) -> Array:
    i, j = rng.choice(values.shape[axis], 2, replace=False)
    order = np.arange(values.shape[axis])
    order[[i, j]] = order[[j, i]]
    return np.take(values, order, axis)


def zero_one(axis: int, values: Array, rng: np.random.Generator) -> Array:
    index: list[Any] = [slice(None)] * values.ndim
    index[axis] = int(rng.integers(values.shape[axis]))
    values[tuple(index)] = 0
    return values


def negate_one(axis: int, values: Array, rng: np.random.Generator) -> Array:
    index: list[Any] = [slice(None)] * values.ndim
    index[axis] = int(rng.integers(values.shape[axis]))
    values[tuple(index)] *= -1
    return values


def saturate(values: Array, _rng: np.random.Generator) -> Array:
    """Clip to half the range: what a scale that is too small does."""
    limit = np.abs(values).max() / 2
    return np.clip(values, -limit, limit)


def roll(axis: int, values: Array, _rng: np.random.Generator) -> Array:
    return np.roll(values, 1, axis)


def flip_kernel(values: Array, _rng: np.random.Generator) -> Array:
    return values[..., ::-1, ::-1]


def swap_gates(values: Array, _rng: np.random.Generator) -> Array:
    """Order the LSTM's gates i, f, o, c in place of ONNX's i, o, f, c."""
    i, o, f, c = np.split(values, 4, axis=1)
    return np.concatenate([i, f, o, c], axis=1)


def scaled(factor: float, values: Array, _rng: np.random.Generator) -> Array:
    return values * factor


def shifted(step: float, values: Array, _rng: np.random.Generator) -> Array:
    return values + step


def has_constant(slot: int, *, size: int | None = None, rank: int | None = None, value: float | None = None) -> Suits:
    """Return a test of a constant input: its size at least, its rank, its single value."""

    def suits(node: gs.Node) -> bool:
        values = constant(node, slot)
        if values is None or (size is not None and values.size < size) or (rank is not None and values.ndim != rank):
            return False
        return value is None or bool(values.size == 1 and np.isclose(float(values.reshape(-1)[0]), value))

    return suits


def kernel(size: int, **attrs: Any) -> Suits:
    """Return a test for a convolution with a square kernel and these attributes."""

    def suits(node: gs.Node) -> bool:
        weight = constant(node, 1)
        same = all(node.attrs.get(k) == v for k, v in attrs.items())
        return weight is not None and weight.ndim == 4 and weight.shape[2:] == (size, size) and same

    return suits


def varied(slot: int) -> Suits:
    """Return a test for a constant whose values are not all alike."""
    return lambda node: (values := constant(node, slot)) is not None and np.ptp(values) > 0


def equal_halves(node: gs.Node) -> bool:
    """Tell whether a Concat joins two tensors of as many channels (each made by a Relu of a Conv)."""
    if len(node.inputs) != 2 or any(not t.inputs or t.inputs[0].op != "Relu" for t in node.inputs):
        return False
    weights = [constant(t.inputs[0].inputs[0].inputs[0], 1) for t in node.inputs]
    return len({w.shape[0] if w is not None else i for i, w in enumerate(weights)}) == 1


def next_item_exists(node: gs.Node) -> bool:
    """Tell whether a Slice takes the query or key out of (query, key, value), stacked on the first axis."""
    starts, ends, axes = (constant(node, slot) for slot in (1, 2, 3))
    if starts is None or ends is None or axes is None or node.inputs[0].inputs[0].op != "Transpose":
        return False
    return axes.tolist() == [0] and int(starts[0]) < 2 and int(ends[0]) == int(starts[0]) + 1


def _is_main_if(node: gs.Node) -> bool:
    return node.name in ("If_0", "node_cond__1")


CORRUPTIONS = (
    Corruption("wrong alpha", "ppocr-det", "HardSigmoid", set_attribute("alpha", 0.25)),
    Corruption("dropped bias", "ppocr-det", "Add", edit_constant(1, zeros), has_constant(1, size=8, rank=4)),
    Corruption("flipped kernel", "ppocr-det", "ConvTranspose", edit_constant(1, flip_kernel)),
    Corruption("wrong resize", "ppocr-det", "Resize", set_attribute("nearest_mode", "ceil")),
    Corruption("two channels swapped", "ppocr-det", "Conv", edit_constant(1, partial(swap_two, 0)), kernel(3)),
    Corruption("softmax over the wrong axis", "ppocr-rec", "Softmax", set_attribute("axis", 2),
               lambda n: n.attrs.get("axis") == 3),
    Corruption("mean over the wrong axis", "ppocr-rec", "ReduceMean", set_attribute("axes", [-2])),
    Corruption("wrong epsilon", "ppocr-rec", "Add", edit_constant(1, partial(scaled, 100.0)),
               lambda n: has_constant(1)(n) and n.outputs[0].outputs[0].op == "Sqrt"),
    Corruption("two columns swapped", "ppocr-rec", "MatMul", edit_constant(1, partial(swap_two, 1)),
               has_constant(1, rank=2)),
    Corruption("sigmoid for hard sigmoid", "ppocr-rec", "HardSigmoid", other_op("Sigmoid")),
    Corruption("wrong epsilon in normalisation", "ppocr-cls", "BatchNormalization", set_attribute("epsilon", 1e-3)),
    Corruption("mean dropped", "ppocr-cls", "BatchNormalization", edit_constant(3, zeros)),
    Corruption("clip at 5 for 6", "ppocr-cls", "Clip", edit_constant(2, partial(shifted, -1.0)),
               has_constant(2, value=6.0)),
    Corruption("pad off by one", "ppocr-cls", "Conv", set_attribute("pads", [2, 1, 0, 1]),
               kernel(3, pads=[1, 1, 1, 1], strides=[1, 1])),
    Corruption("LSTM gates in another order", "silero-vad-16k-sequence", "LSTM", edit_constant(1, swap_gates)),
    Corruption("wrong branch", "silero-vad", "If", swap_branches, _is_main_if),
    Corruption("sign of one channel", "silero-vad", "Conv", edit_constant(1, partial(negate_one, 0)),
               # the sign of the STFT's channels is lost in the magnitude that follows
               lambda n: has_constant(1, size=1000)(n) and "stft" not in n.name),
    Corruption("gather off by one", "silero-vad-op18-ifless", "Gather", edit_constant(1, partial(shifted, 1)),
               lambda n: n.inputs[0].name == "state" and has_constant(1, value=0)(n)),
    Corruption("transposed weight", "silero-vad-op18-ifless", "Gemm",
               edit_constant(1, lambda v, _: v.reshape(4, 128, 128).transpose(0, 2, 1).reshape(v.shape))),
    Corruption("slice off by one", "ppocr-rec", "Slice", shift_slice, next_item_exists),
    Corruption("edge padding for reflection", "silero-vad-half", "Pad", set_attribute("mode", "edge")),
    Corruption("wrong constant in Gelu", "magika", "Mul", edit_constant(0, partial(scaled, 1.05)),
               # in the second one it matters only to values that the maximum over positions never picks
               lambda n: has_constant(0, value=0.044715)(n) and "ApplyActivation_0" in n.name),
    Corruption("one row zeroed", "magika", "MatMul", edit_constant(1, partial(zero_one, 0)), has_constant(1, rank=2)),
    Corruption("concatenated in another order", "squeezenet", "Concat", swap_inputs, equal_halves),
    Corruption("activation lost", "squeezenet", "Relu", bypass),
    Corruption("average for maximum", "inception-v1", "MaxPool",
               lambda _m, n, _r: setattr(n, "op", "AveragePool")),
    Corruption("channels not shuffled", "shufflenet", "Transpose", set_attribute("perm", [0, 1, 2, 3, 4])),
    Corruption("average counts the padding", "shufflenet", "AveragePool", set_attribute("count_include_pad", 1),
               lambda n: any(n.attrs.get("pads", []))),
    Corruption("saturated scale", "densenet121", "Conv", edit_constant(1, saturate), kernel(1)),
    Corruption("bias off by one channel", "digits", "BatchNormalization", edit_constant(2, partial(roll, 0)),
               varied(2)),
)  # fmt: skip
