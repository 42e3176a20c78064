"""Random graphs of data movement between arithmetic: valid, equal in ORT whether it optimises or not, at a fixpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from graphopt.model import load
from graphopt.pipeline import Pipeline, Result, Settings
from graphopt.runtime import Session
from graphopt.text import to_text

TOLERANCE = 1e-5
"""Relative to the largest element: what the passes promise; sums of a few float32 products are reordered."""

PASSES = ("sink-transposes", "fuse-movement", "fuse-parts", "hoist-slices", "eliminate-casts")
PIPELINE = f"repeat(canonicalize, {', '.join(PASSES)}, eliminate-identity, eliminate-common, eliminate-dead)"

Size: TypeAlias = int | str
"""A number, or "N": dynamic."""


@dataclass
class Builder:
    """Grows a graph from random steps.

    Attributes:
        rng: of all choices.
        opset: of the model.
        values: tensors to go on from: name, sizes.
    """

    rng: np.random.Generator
    opset: int
    values: list[tuple[str, list[Size]]]
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[TensorProto] = field(default_factory=list)
    count: int = 0

    def const(self, values: Any, dtype: Any = np.int64) -> str:
        self.count += 1
        self.initializers.append(numpy_helper.from_array(np.asarray(values, dtype), f"c{self.count}"))
        return f"c{self.count}"

    def node(self, op: str, inputs: list[str], shape: list[Size], **attrs: Any) -> tuple[str, list[Size]]:
        return self.many(op, inputs, [shape], **attrs)[0]

    def many(self, op: str, inputs: list[str], shapes: list[list[Size]], **attrs: Any) -> list[tuple[str, list[Size]]]:
        names = []
        for _ in shapes:
            self.count += 1
            names.append(f"t{self.count}")
        self.nodes.append(helper.make_node(op, inputs, names, name=f"n{self.count}", **attrs))
        made = list(zip(names, shapes, strict=True))
        self.values += made
        return made

    def axes(self, op: str, name: str, axes: list[int], shape: list[Size], **attrs: Any) -> tuple[str, list[Size]]:
        """Add an operator whose axes are an attribute or an input, as the opset has it."""
        since = 18 if op.startswith("Reduce") and op != "ReduceSum" else 13
        if self.opset >= since:
            return self.node(op, [name, self.const(axes)], shape, **attrs)
        return self.node(op, [name], shape, axes=axes, **attrs)

    def pick(self) -> tuple[str, list[Size]]:
        """Return a tensor, rather a late one."""
        return self.values[-1 - int(self.rng.integers(0, min(4, len(self.values))))]

    def any_axis(self, shape: list[Size]) -> int:
        return int(self.rng.integers(0, len(shape)))

    def static_axis(self, shape: list[Size]) -> int | None:
        found = [i for i, s in enumerate(shape) if isinstance(s, int)]
        return int(self.rng.choice(found)) if found else None


Step = Callable[[Builder], Any]


def transpose(b: Builder) -> None:
    name, shape = b.pick()
    perm = [int(i) for i in b.rng.permutation(len(shape))]
    b.node("Transpose", [name], [shape[i] for i in perm], perm=perm)


def transpose_back(b: Builder) -> None:
    """Swap the last two axes, so that others undo it."""
    name, shape = b.pick()
    if len(shape) > 1:
        perm = [*range(len(shape) - 2), len(shape) - 1, len(shape) - 2]
        b.node("Transpose", [name], [shape[i] for i in perm], perm=perm)


def unary(b: Builder) -> None:
    name, shape = b.pick()
    b.node(str(b.rng.choice(["Relu", "Sigmoid", "Neg", "Tanh"])), [name], shape)


def with_constant(b: Builder) -> None:
    name, shape = b.pick()
    sizes = [s if isinstance(s, int) and b.rng.random() < 0.6 else 1 for s in shape]
    held = b.rng.normal(size=sizes[int(b.rng.integers(0, len(sizes) + 1)) :])
    b.node(str(b.rng.choice(["Add", "Mul"])), [name, b.const(held, np.float32)], shape)


def with_itself(b: Builder) -> None:
    """Join two tensors of one shape."""
    name, shape = b.pick()
    same = [n for n, s in b.values if s == shape]
    b.node(str(b.rng.choice(["Add", "Mul", "Max"])), [name, str(b.rng.choice(same))], shape)


def reduce(b: Builder) -> None:
    name, shape = b.pick()
    axis, keep = b.any_axis(shape), int(b.rng.integers(0, 2))
    out = [1 if i == axis else s for i, s in enumerate(shape) if keep or i != axis]
    if out:
        op = str(b.rng.choice(["ReduceMean", "ReduceMax", "ReduceSum"]))
        b.axes(op, name, [axis - len(shape) * int(b.rng.integers(0, 2))], out, keepdims=keep)


def softmax(b: Builder) -> None:
    name, shape = b.pick()
    if b.opset >= 13:
        b.node("Softmax", [name], shape, axis=b.any_axis(shape))


def squeeze(b: Builder) -> None:
    name, shape = b.pick()
    ones = [i for i, s in enumerate(shape) if s == 1]
    if ones and len(shape) > 1:
        axis = int(b.rng.choice(ones))
        b.axes("Squeeze", name, [axis], shape[:axis] + shape[axis + 1 :])


def unsqueeze(b: Builder) -> None:
    name, shape = b.pick()
    if len(shape) < 5:
        axis = int(b.rng.integers(0, len(shape) + 1))
        b.axes("Unsqueeze", name, [axis], [*shape[:axis], 1, *shape[axis:]])


def reshape(b: Builder) -> None:
    """Merge two axes, part one in two, or write the shape with 0 and -1."""
    name, shape = b.pick()
    i = b.static_axis(shape)
    if i is None:
        return
    out, size = list(shape), shape[i]
    if i + 1 < len(shape) and isinstance(shape[i + 1], int) and b.rng.random() < 0.5:
        out[i : i + 2] = [size * shape[i + 1]]  # type: ignore[operator]  # both are numbers
    elif isinstance(size, int) and size % 2 == 0 and len(shape) < 5:
        out[i : i + 1] = [2, size // 2]
    target = [0 if i < len(shape) and s == shape[i] else s for i, s in enumerate(out)]
    dynamic = [i for i, s in enumerate(target) if isinstance(s, str)]
    if len(dynamic) > 1:
        return
    if dynamic or b.rng.random() < 0.3:
        target[dynamic[0] if dynamic else int(b.rng.integers(0, len(target)))] = -1
    b.node("Reshape", [name, b.const(target)], out)


def concat(b: Builder) -> None:
    name, shape = b.pick()
    axis = b.static_axis(shape)
    if axis is None:
        return
    fit = [(n, s) for n, s in b.values if len(s) == len(shape)]
    fit = [
        (n, s)
        for n, s in fit
        if isinstance(s[axis], int) and s[:axis] == shape[:axis] and s[axis + 1 :] == shape[axis + 1 :]
    ]
    chosen = [(name, shape), *(fit[i] for i in b.rng.integers(0, len(fit), int(b.rng.integers(1, 3))))]
    size = sum(int(s[axis]) for _, s in chosen)
    if size <= 24:
        b.node("Concat", [n for n, _ in chosen], [*shape[:axis], size, *shape[axis + 1 :]], axis=axis)


def split(b: Builder) -> None:
    name, shape = b.pick()
    axis = b.static_axis(shape)
    if axis is None or int(shape[axis]) < 2:
        return
    cut = int(b.rng.integers(1, int(shape[axis])))
    sizes = [cut, int(shape[axis]) - cut]
    outs = [[*shape[:axis], s, *shape[axis + 1 :]] for s in sizes]
    if b.opset >= 13:
        made = b.many("Split", [name, b.const(sizes)], outs, axis=axis)
    else:
        made = b.many("Split", [name], outs, axis=axis, split=sizes)
    if b.rng.random() < 0.4:
        b.node("Concat", [n for n, _ in made], shape, axis=axis)


def unstack(b: Builder) -> None:
    """Part an axis into its elements, and drop it."""
    name, shape = b.pick()
    axis = b.static_axis(shape)
    if axis is None or not 1 < int(shape[axis]) < 5 or len(shape) < 2:
        return
    count, rest = int(shape[axis]), shape[:axis] + shape[axis + 1 :]
    held = {} if b.opset < 18 else {"num_outputs": count}
    parts = b.many("Split", [name], [[*shape[:axis], 1, *shape[axis + 1 :]]] * count, axis=axis, **held)
    del b.values[-count:]
    for part, wide in parts:
        b.axes("Squeeze", part, [axis - len(wide) * int(b.rng.integers(0, 2))], rest)


def cut(b: Builder, name: str, shape: list[Size], axis: int, start: int, end: int, step: int = 1) -> None:
    left = len(range(int(shape[axis]))[start:end:step])
    inputs = [name, b.const([start]), b.const([end]), b.const([axis - len(shape) * int(b.rng.integers(0, 2))])]
    if step != 1 or b.rng.random() < 0.2:
        inputs.append(b.const([step]))
    b.node("Slice", inputs, [*shape[:axis], left, *shape[axis + 1 :]])


def slice_(b: Builder) -> None:
    name, shape = b.pick()
    axis = b.static_axis(shape)
    if axis is None:
        return
    size = int(shape[axis])
    start = int(b.rng.integers(0, size))
    if b.rng.random() < 0.2:
        if start:
            cut(b, name, shape, axis, start, -size - 1, -1)
        return
    end = int(b.rng.choice([size, 1 << 40, int(b.rng.integers(start + 1, size + 1))]))
    cut(b, name, shape, axis, start if b.rng.random() < 0.5 else start - size, end, int(b.rng.integers(1, 3)))


def slices(b: Builder) -> None:
    """Take a tensor apart by Slices, and maybe put it together."""
    name, shape = b.pick()
    axis = b.static_axis(shape)
    if axis is None or int(shape[axis]) < 2:
        return
    middle, before = int(b.rng.integers(1, int(shape[axis]))), len(b.values)
    cut(b, name, shape, axis, 0, middle)
    cut(b, name, shape, axis, middle, int(shape[axis]))
    if b.rng.random() < 0.5:
        b.node("Concat", [n for n, _ in b.values[before:]], shape, axis=axis)


def gather(b: Builder) -> None:
    name, shape = b.pick()
    axis = b.static_axis(shape)
    if axis is None:
        return
    size = int(shape[axis])
    kind = int(b.rng.integers(0, 3))
    if kind == 0 and len(shape) > 1:
        index = int(b.rng.integers(-size, size))
        b.node("Gather", [name, b.const(index)], shape[:axis] + shape[axis + 1 :], axis=axis)
        return
    indices = list(range(size))[: max(1, size - 1)] if kind == 1 else [int(i) for i in b.rng.integers(-size, size, 3)]
    b.node("Gather", [name, b.const(indices)], [*shape[:axis], len(indices), *shape[axis + 1 :]], axis=axis)


def pad(b: Builder) -> None:
    name, shape = b.pick()
    pads = [0] * (2 * len(shape))
    axis = b.static_axis(shape)
    if axis is not None and int(shape[axis]) < 8:
        pads[axis], pads[len(shape) + axis] = (int(i) for i in b.rng.integers(0, 2, 2))
        out = [int(s) + pads[axis] + pads[len(shape) + axis] if i == axis else s for i, s in enumerate(shape)]
        value = [b.const(float(b.rng.integers(0, 2)), np.float32)] if b.rng.random() < 0.5 else []
        b.node("Pad", [name, b.const(pads), *value], out)


def expand(b: Builder) -> None:
    name, shape = b.pick()
    ones = [i for i, s in enumerate(shape) if s == 1]
    if ones:
        axis = int(b.rng.choice(ones))
        op = str(b.rng.choice(["Expand", "Tile"]))
        made = b.node(op, [name, b.const([3 if i == axis else 1 for i in range(len(shape))])],
                      [3 if i == axis else s for i, s in enumerate(shape)])  # fmt: skip
        same = [n for n, s in b.values if s == made[1]]
        b.node("Add", [made[0], str(b.rng.choice(same))], made[1])


def matmul(b: Builder) -> None:
    name, shape = b.pick()
    if len(shape) > 1 and isinstance(shape[-1], int):
        size = int(b.rng.integers(1, 5))
        b.node("MatMul", [name, b.const(b.rng.normal(size=(shape[-1], size)), np.float32)], [*shape[:-1], size])


def there_and_back(b: Builder) -> None:
    """Convert to float64, move, convert back."""
    name, shape = b.pick()
    perm = [int(i) for i in b.rng.permutation(len(shape))]
    wide = b.node("Cast", [name], shape, to=TensorProto.DOUBLE)
    b.values.pop()
    moved = b.node("Transpose", [wide[0]], [shape[i] for i in perm], perm=perm)
    b.values.pop()
    back = b.node("Cast", [moved[0]], moved[1], to=TensorProto.FLOAT)
    if b.rng.random() < 0.3:
        b.node("Cast", [moved[0]], moved[1], to=TensorProto.BOOL)
        again = b.node("Cast", [b.values.pop()[0]], moved[1], to=TensorProto.FLOAT)
        b.node("Add", [back[0], again[0]], moved[1])


def tail(b: Builder) -> None:
    """Read the last of an axis behind a little network."""
    name, shape = b.pick()
    axis = b.static_axis(shape)
    if axis is None or len(shape) < 2 or axis == len(shape) - 1 or not isinstance(shape[-1], int):
        return
    x = b.node("MatMul", [name, b.const(b.rng.normal(size=(shape[-1], shape[-1])) * 9, np.float32)], shape)
    y = b.node("Tanh", [x[0]], shape)
    z = b.node("Add", [y[0], name], shape)
    if b.rng.random() < 0.5:
        b.node("Gather", [z[0], b.const(-1)], shape[:axis] + shape[axis + 1 :], axis=axis)
    else:
        cut(b, z[0], shape, axis, 0, 1)


FAMILIES: dict[str, tuple[Step, ...]] = {
    "transposes": (transpose, transpose, transpose_back, transpose_back, unary, with_constant, with_itself, reduce,
                   softmax, concat, split, slice_, pad, squeeze, unsqueeze, gather, matmul),
    "views": (reshape, reshape, squeeze, unsqueeze, transpose, reduce, unary, with_itself, expand),
    "parts": (split, unstack, slices, concat, slice_, gather, pad, unary, with_itself, reshape),
    "tails": (tail, tail, slice_, gather, with_constant, matmul, softmax, reshape, reduce, transpose, with_itself),
    "casts": (there_and_back, transpose, reshape, concat, slice_, unary, with_itself, unsqueeze),
}  # fmt: skip


def random_model(seed: int, family: str, opset: int, *, dynamic: bool) -> onnx.ModelProto:
    rng = np.random.default_rng(seed)
    shape: list[Size] = [int(s) for s in rng.integers(1, 5, int(rng.integers(2, 5)))]
    if dynamic:
        shape[0] = "N"
    b = Builder(rng, opset, [("x", shape), ("z", list(shape))])
    steps = FAMILIES[family]
    for _ in range(int(rng.integers(4, 14))):
        steps[int(rng.integers(0, len(steps)))](b)
    last = b.values[-1][0]
    outputs = {last, *(n for n, _ in b.values if n not in ("x", "z") and rng.random() < 0.1)}
    if outputs <= {"x", "z"}:
        b.node("Relu", ["x"], shape)
        outputs = {b.values[-1][0]}
    infos = [helper.make_tensor_value_info(n, TensorProto.FLOAT, list(s)) for n, s in b.values if n in outputs]
    graph = helper.make_graph(
        b.nodes, family, [helper.make_tensor_value_info(n, TensorProto.FLOAT, list(shape)) for n in ("x", "z")],
        infos, b.initializers,
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def run(model: onnx.ModelProto) -> Result:
    return Pipeline(PIPELINE).run(model, settings=Settings(verify="off", on_failure="stop"))


def assert_equal(before: onnx.ModelProto, after: onnx.ModelProto, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for optimization in ("off", "all"):
        a, b = (Session(m, optimization=optimization) for m in (before, after))
        for size in (2, 3):
            feeds = {}
            for info in before.graph.input:
                dims = [d.dim_value or size for d in info.type.tensor_type.shape.dim]
                feeds[info.name] = np.asarray(rng.normal(size=dims), np.float32)
            for (name, x), y in zip(a.run(feeds).items(), b.run(feeds).values(), strict=True):
                assert x.shape == y.shape, (optimization, name)
                np.testing.assert_allclose(
                    y, x, rtol=0, atol=TOLERANCE * max(1.0, np.abs(x).max(initial=0)), err_msg=name
                )


@pytest.mark.parametrize("family", sorted(FAMILIES))
@settings(max_examples=200)
@given(seed=st.integers(0, 1 << 32), opset=st.sampled_from([11, 13, 17, 18]), dynamic=st.booleans())
def test_random_graphs(family: str, seed: int, opset: int, dynamic: bool) -> None:
    model = random_model(seed, family, opset, dynamic=dynamic)
    result = run(model)
    proto = result.proto
    onnx.checker.check_model(proto, full_check=True)
    assert_equal(model, proto, seed)
    assert to_text(run(proto).model) == to_text(load(proto))
