"""Random graphs of shape arithmetic as exporters write it, over inputs whose sizes are open."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SIZES = tuple(
    dict(zip("nhwt", sizes, strict=True))
    for sizes in ((2, 4, 6, 3), (1, 6, 4, 1), (3, 1, 2, 5), (0, 4, 6, 2), (1, 1, 1, 1), (4, 5, 3, 4))
)
"""Sizes of the open axes that models are run at; what ORT refuses of the original says nothing.

Not t = 0: a computed 0 in the middle of a Reshape's target copies the input's axis there, whatever was meant; that is
the one thing that the shape rules leave out.
"""

CHANNELS = 4


@dataclass
class ShapeBuilder:
    """Grows data tensors of shape [n, 4, h, w] and [n, t, 4] and what is computed of their shapes."""

    rng: np.random.Generator
    opset: int
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[TensorProto] = field(default_factory=list)
    images: list[str] = field(default_factory=lambda: ["x"])
    rows: list[str] = field(default_factory=lambda: ["s"])
    outputs: list[tuple[str, int]] = field(default_factory=list)
    count: int = 0

    def name(self) -> str:
        self.count += 1
        return f"v{self.count}"

    def const(self, values: Any, dtype: Any = np.int64) -> str:
        name = self.name()
        self.initializers.append(numpy_helper.from_array(np.asarray(values, dtype), name))
        return name

    def node(self, op: str, inputs: list[str], **attrs: Any) -> str:
        name = self.name()
        self.nodes.append(helper.make_node(op, inputs, [name], **attrs))
        return name

    def chance(self, probability: float = 0.5) -> bool:
        return bool(self.rng.random() < probability)

    def choose(self, *things: Any) -> Any:
        return things[int(self.rng.integers(0, len(things)))]

    def out(self, name: str, kind: int = TensorProto.FLOAT) -> str:
        self.outputs.append((name, kind))
        return name

    def dim(self, tensor: str, axis: int) -> str:
        """Return the size of an axis as a vector of one element, in one of the ways of exporters."""
        kind = int(self.rng.integers(0, 5))
        if kind == 0 and self.opset >= 15:
            return self.node("Shape", [tensor], start=axis, end=axis + 1)
        shape = self.node("Shape", [tensor])
        if kind == 1:
            cast = self.node("Cast", [shape], to=TensorProto.INT32)
            part = self.node("Slice", [cast, self.const([axis]), self.const([axis + 1]), self.const([0])])
            return self.node("Cast", [part], to=TensorProto.INT64)
        if kind == 2:
            return self.node("Gather", [shape, self.const([axis])], axis=0)
        if kind == 3:
            return self.node("Slice", [shape, self.const([axis]), self.const([axis + 1])])
        scalar = self.node("Gather", [shape, self.const(axis)], axis=0)
        if self.chance(0.3):
            scalar = self.node("Identity", [scalar])
        return self.node("Unsqueeze", [scalar, self.const([0])])

    def vector(self, parts: list[str]) -> str:
        return self.node("Concat", parts, axis=0)

    def model(self) -> onnx.ModelProto:
        infos = [helper.make_tensor_value_info(name, kind, None) for name, kind in self.outputs]
        graph = helper.make_graph(
            self.nodes, "shapes",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", CHANNELS, "h", "w"]),
             helper.make_tensor_value_info("s", TensorProto.FLOAT, ["n", "t", CHANNELS])],
            infos, self.initializers,
        )  # fmt: skip
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8)


Step = Callable[[ShapeBuilder], None]


def flatten_image(b: ShapeBuilder) -> None:
    """[n, 4, h, w] -> [n, 4, h*w] or [n, -1] and back, as view() does it."""
    x = b.images[-1]
    n, h, w = b.dim(x, 0), b.dim(x, 2), b.dim(x, 3)
    area = b.choose(b.const([-1]), b.node("Mul", [h, w]))
    c = b.choose(b.const([CHANNELS]), b.dim(x, 1))
    flat = b.node("Reshape", [x, b.vector([n, c, area])])
    flat = b.node("Relu", [flat])
    b.images.append(b.node("Reshape", [flat, b.choose(b.vector([n, c, h, w]), b.node("Shape", [x]))]))
    b.out(b.choose(flat, b.images[-1]))


def heads(b: ShapeBuilder) -> None:
    """[n, t, 4] -> [n, t, 2, 2] -> [n, 2, t, 2] -> [n*2, t, 2] -> [n, t, 4]."""
    s = b.rows[-1]
    n, t = b.dim(s, 0), b.dim(s, 1)
    split = b.node("Reshape", [s, b.vector([n, t, b.const([2, 2])])])
    turned = b.node("Transpose", [split], perm=[0, 2, 1, 3])
    if b.chance():
        both = b.node("Mul", [n, b.const([2])])
        merged = b.node("Reshape", [turned, b.vector([both, t, b.const([2])])])
        turned = b.node("Reshape", [b.node("Tanh", [merged]), b.vector([n, b.const([2]), t, b.const([2])])])
    back = b.node("Transpose", [turned], perm=[0, 2, 1, 3])
    width = b.choose(b.const([CHANNELS]), b.dim(s, 2), b.const([-1]))
    b.rows.append(b.out(b.node("Reshape", [back, b.vector([n, t, width])])))


def join_rows(b: ShapeBuilder) -> None:
    """[n, t, 4] -> [n*t, 4] -> [n, t, 4], with zeros for copied axes now and then."""
    s = b.rows[-1]
    n, t = b.dim(s, 0), b.dim(s, 1)
    flat = b.node("Reshape", [s, b.vector([b.choose(b.const([-1]), b.node("Mul", [n, t])), b.const([CHANNELS])])])
    flat = b.node("Sigmoid", [flat])
    b.rows.append(b.node("Reshape", [flat, b.vector([n, t, b.const([b.choose(CHANNELS, -1)])])]))
    b.out(b.choose(flat, b.rows[-1]))


def expand(b: ShapeBuilder) -> None:
    s = b.rows[-1]
    kind = b.choose("own", "mask", "ones")
    if kind == "own":
        target = b.vector([b.dim(s, 0), b.dim(s, 1), b.const([b.choose(1, CHANNELS)])])
    elif kind == "mask":  # torch's expand: -1 means the axis's own size
        asked = b.vector([b.dim(s, 0), b.const([-1, -1])])
        ones = b.node("ConstantOfShape", [b.const([3])], value=numpy_helper.from_array(np.array([1])))
        target = b.node("Where", [b.node("Equal", [asked, b.const([-1])]), ones, asked])
    else:
        target = b.node("Add", [b.node("Mul", [b.node("Shape", [s]), b.const(0)]), b.const([1, 1, 1])])
    b.rows.append(b.out(b.node("Expand", [s, target])))


def cut(b: ShapeBuilder) -> None:
    x = b.images[-1]
    axis = int(b.choose(2, 3))
    size = b.dim(x, axis)
    half = b.node("Div", [size, b.const([2])])
    start, end = b.choose((b.const([0]), size), (half, size), (b.const([0]), half), (b.const([0]), b.const([1 << 40])))
    if b.chance(0.3):
        end = b.node("Sub", [end, b.const([b.choose(0, 1)])])
    inputs = [x, start, end, b.const([axis])]
    if b.chance():
        inputs.append(b.const([b.choose(1, 1, 2)]))
    b.images.append(b.out(b.node("Slice", inputs)))


def resize(b: ShapeBuilder) -> None:
    x = b.images[-1]
    h, w = b.dim(x, 2), b.dim(x, 3)
    if b.chance():
        factor = b.const(b.choose(2.0, 1.0, 3.0), np.float32)

        def scaled(size: str) -> str:
            grown = b.node("Floor", [b.node("Mul", [b.node("Cast", [size], to=TensorProto.FLOAT), factor])])
            return b.node("Cast", [grown], to=TensorProto.INT64)
    else:
        whole = b.const([b.choose(1, 2)])

        def scaled(size: str) -> str:
            return b.node("Mul", [size, whole])

    sizes = b.vector([b.node("Slice", [b.node("Shape", [x]), b.const([0]), b.const([2])]), scaled(h), scaled(w)])
    mode = b.choose({"mode": "nearest", "nearest_mode": "floor", "coordinate_transformation_mode": "asymmetric"},
                    {"mode": "linear", "coordinate_transformation_mode": "half_pixel"},
                    {"mode": "linear", "coordinate_transformation_mode": "align_corners"})  # fmt: skip
    b.images.append(b.out(b.node("Resize", [x, "", "", sizes], **mode)))


def positions(b: ShapeBuilder) -> None:
    """Range, ConstantOfShape and comparisons over a sequence."""
    s = b.rows[-1]
    t = b.node("Squeeze", [b.dim(s, 1), b.const([0])])
    places = b.node("Range", [b.const(0), t, b.const(b.choose(1, 2))])
    b.out(places, TensorProto.INT64)
    zeros = b.node("ConstantOfShape", [b.vector([b.dim(s, 0), b.dim(s, 1), b.const([1])])])
    b.rows.append(b.out(b.node("Add", [s, zeros])))


def arithmetic(b: ShapeBuilder) -> None:
    """Numbers that come out whatever the sizes are, and numbers that do not."""
    x, s = b.images[-1], b.rows[-1]
    a, c = b.dim(x, int(b.choose(0, 2, 3))), b.dim(s, int(b.choose(0, 1, 2)))
    for _ in range(int(b.rng.integers(1, 4))):
        op = b.choose("Add", "Sub", "Mul", "Max", "Min")
        a = b.node(op, [a, b.choose(a, c, b.const([2]), b.const([0]))])
    if b.chance():
        a = b.node("Div" if b.chance() else "Mod", [a, b.const([b.choose(1, 2, 3)])])
    if b.chance():
        told = b.node(b.choose("Equal", "Less", "Greater", "GreaterOrEqual"), [a, b.choose(c, a, b.const([-1]))])
        a = b.node("Where", [told, a, c])
    b.out(b.choose(a, b.node("ReduceProd", [b.vector([a, c])], keepdims=0), b.node("Size", [x])), TensorProto.INT64)


def transposed_shape(b: ShapeBuilder) -> None:
    s = b.rows[-1]
    turned = b.node("Transpose", [s], perm=[1, 0, 2])
    target = b.vector([b.dim(turned, 1), b.dim(turned, 0), b.const([2, -1])])
    b.out(b.node("Reshape", [s, target]))


def branch(b: ShapeBuilder) -> None:
    """If on a comparison of sizes, which may or may not be known."""
    s = b.rows[-1]
    size = b.node("Squeeze", [b.dim(s, int(b.choose(0, 1, 2))), b.const([0])])
    condition = b.node(b.choose("Equal", "Greater", "Less"), [size, b.const(b.choose(-1, 1, CHANNELS))])
    bodies = []
    for op in ("Neg", "Abs"):
        inner = b.name()
        bodies.append(helper.make_graph([helper.make_node(op, [s], [inner])], op, [],
                                        [helper.make_tensor_value_info(inner, TensorProto.FLOAT, None)]))  # fmt: skip
    b.rows.append(b.out(b.node("If", [condition], then_branch=bodies[0], else_branch=bodies[1])))


def tile_and_pad(b: ShapeBuilder) -> None:
    x = b.images[-1]
    if b.chance():
        one = b.node("Div", [b.dim(x, 1), b.const([CHANNELS])])
        b.images.append(b.out(b.node("Tile", [x, b.vector([b.const([1, 1]), one, b.const([1])])])))
        return
    odd = b.node("Mod", [b.dim(x, 3), b.const([2])])
    zeros = b.node("ConstantOfShape", [b.const([6])], value=numpy_helper.from_array(np.array([0])))
    pads = b.vector([zeros, b.const([0]), odd])
    b.images.append(b.out(b.node("Pad", [x, pads])))


STEPS: tuple[Step, ...] = (
    flatten_image, heads, join_rows, expand, cut, resize, positions, arithmetic, transposed_shape, branch, tile_and_pad,
)  # fmt: skip


def random_model(seed: int) -> onnx.ModelProto:
    """Return a model of one to six steps."""
    rng = np.random.default_rng(seed)
    b = ShapeBuilder(rng, int(rng.choice([13, 15, 17, 18])))
    for _ in range(int(rng.integers(1, 7))):
        STEPS[int(rng.integers(0, len(STEPS)))](b)
    return b.model()


def feeds() -> Iterator[dict[str, np.ndarray[Any, Any]]]:
    """Yield random inputs at all sizes."""
    rng = np.random.default_rng(0)
    for size in SIZES:
        shapes = {"x": (size["n"], CHANNELS, size["h"], size["w"]), "s": (size["n"], size["t"], CHANNELS)}
        yield {name: np.asarray(rng.normal(size=shape), np.float32) for name, shape in shapes.items()}
