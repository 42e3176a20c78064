"""More structures written node by node: where weights come from, and how small tensors meet large ones."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from .builder import Builder, Made
from .spec import Input

IMAGE = {"x": Input((2, 3, 8, 8), (3, 3, 10, 12))}
ROWS = {"x": Input((4, 20), (7, 20))}


def _head(b: Builder, x: str, channels: int) -> str:
    return b.gemm(b.op("Flatten", b.op("GlobalAveragePool", x)), channels, 5)


def computed_weights(rng: np.random.Generator) -> Made:
    """Weights that are standardised in the graph, transposed, reshaped, cast from half precision, behind Identity."""
    b = Builder(rng)
    weight = b.weight(16, 3, 3, 3, fan_in=27)
    centred = b.op("Sub", weight, b.op("ReduceMean", weight, axes=[1, 2, 3]))
    spread = b.op("ReduceMean", b.op("Mul", centred, centred), axes=[1, 2, 3])
    scaled = b.op("Div", centred, b.op("Mul", b.op("Sqrt", spread), b.constant(5.0)))
    x = b.op("Relu", b.op("Conv", "x", scaled, b.op("Identity", b.spread(16)), pads=[1] * 4))
    flat = b.op("Reshape", b.weight(12, 16 * 9, fan_in=144), b.ints(12, 16, 3, 3))
    x = b.op("Relu", b.op("Conv", x, flat, pads=[1] * 4))
    half = b.constant(rng.standard_normal((10, 12, 1, 1)) * 0.35, np.float16)
    x = b.op("Relu", b.op("Conv", x, b.op("Cast", half, to=TensorProto.FLOAT)))
    x = b.op("Flatten", b.op("GlobalAveragePool", x))
    y = b.op("Tanh", b.op("MatMul", x, b.op("Transpose", b.weight(14, 10, fan_in=10), perm=[1, 0])))
    return b.made(IMAGE, [b.gemm(y, 14, 5)])


def constant_nodes(rng: np.random.Generator) -> Made:
    """Weights in Constant nodes; a bias by Add of (1, C, 1, 1); a norm by Mul and Add; Gemm with alpha and beta."""
    b = Builder(rng)

    def held(*shape: int, scale: float) -> str:
        values = (rng.standard_normal(shape) * scale).astype(np.float32)
        return str(b.op("Constant", value=numpy_helper.from_array(values)))

    x = b.op("Add", b.op("Conv", "x", held(16, 3, 3, 3, scale=0.25), pads=[1] * 4), held(1, 16, 1, 1, scale=0.1))
    x = b.op("Add", b.op("Mul", held(16, 1, 1, scale=1.0), x), held(16, 1, 1, scale=0.1))
    x = b.op("Flatten", b.op("GlobalAveragePool", b.op("Relu", x)))
    x = b.op("Relu", b.op("Gemm", x, held(16, 12, scale=0.5), held(1, 12, scale=0.2), alpha=1.5, beta=0.5))
    return b.made(IMAGE, [b.op("MatMul", x, held(12, 5, scale=0.4))])


def small_meets_large(rng: np.random.Generator) -> Made:
    """A vector tiled and expanded over an image; a map of one channel added to many and multiplied with them."""
    b = Builder(rng)
    x = b.op("Relu", b.conv("x", 3, 16))
    vector = b.op("Relu", b.conv(b.op("GlobalMaxPool", x), 16, 10, 1))
    whole = b.op(
        "Expand", vector, b.op("Concat", b.ints(1, 1), b.op("Slice", b.op("Shape", x), b.ints(2), b.ints(4)), axis=0)
    )
    tiled = b.op("Tile", b.conv(b.op("GlobalAveragePool", x), 16, 6, 1), b.ints(1, 1, 8, 8))
    one = b.op("Sigmoid", b.conv(x, 16, 1))
    y = b.op("Add", b.op("Mul", b.op("Concat", x, whole, tiled, axis=1), one), one)
    fixed = {"x": Input((2, 3, 8, 8), (3, 3, 8, 8))}
    return b.made(fixed, [_head(b, b.conv(y, 32, 12), 12)])


def written_layer_norm(rng: np.random.Generator) -> Made:
    """LayerNorm in single steps between two layers, one of whose halves it does not touch."""
    b = Builder(rng)
    x = b.op("Relu", b.gemm("x", 20, 24))
    centred = b.op("Sub", x, b.op("ReduceMean", x, axes=[-1]))
    spread = b.op("ReduceMean", b.op("Pow", centred, b.constant(2.0)), axes=[-1])
    y = b.op("Div", centred, b.op("Sqrt", b.op("Add", spread, b.constant(1e-5))))
    y = b.op("Add", b.op("Mul", y, b.spread(24, low=0.7, high=1.2)), b.spread(24))
    y = b.op("Add", b.gemm(b.op("Relu", b.gemm(y, 24, 32)), 32, 24), y)
    return b.made(ROWS, [b.gemm(y, 24, 5)])


def heads_by_split(rng: np.random.Generator) -> Made:
    """One packed layer split into query, key and value; heads by Reshape with zeros; a bias per head."""
    b = Builder(rng)
    packed = b.op("Add", b.op("MatMul", "x", b.weight(20, 72, fan_in=20)), b.spread(72))
    query, key, value = b.op("Split", packed, b.ints(24, 24, 24), outputs=3, axis=2)
    heads = [b.op("Transpose", b.op("Reshape", t, b.ints(0, 0, 4, 6)), perm=[0, 2, 1, 3]) for t in (query, key, value)]
    scores = b.op("MatMul", heads[0], b.op("Transpose", heads[1], perm=[0, 1, 3, 2]))
    scores = b.op("Add", b.op("Mul", scores, b.constant(0.4)), b.spread(4, 1, 1))
    mixed = b.op("MatMul", b.op("Softmax", scores, axis=-1), heads[2])
    y = b.op("Reshape", b.op("Transpose", mixed, perm=[0, 2, 1, 3]), b.ints(0, 0, 24))
    y = b.op("Add", b.op("MatMul", y, b.weight(24, 20, fan_in=24)), "x")
    return b.made({"x": Input((2, 5, 20), (3, 9, 20))}, [y])


def many_exits(rng: np.random.Generator) -> Made:
    """Three heads on one trunk; one reads it before the activation, one by a maximum of two layers."""
    b = Builder(rng)
    trunk = b.norm(b.conv("x", 3, 16), 16)
    x = b.op("LeakyRelu", trunk, alpha=0.2)
    one = b.op("Max", b.conv(x, 16, 12), b.conv(trunk, 16, 12))
    two = b.op("Where", b.op("Greater", one, b.constant(0.2)), one, b.op("Neg", one))
    three = b.op("Clip", b.conv(two, 12, 10), b.constant(-1.0), b.constant(1.0))
    return b.made(IMAGE, [b.conv(one, 12, 3, 1), _head(b, two, 12), b.op("Sigmoid", b.conv(three, 10, 2, 1))])


def weight_codes(rng: np.random.Generator) -> Made:
    """Weights alone in codes: per output channel, per tensor; a table of embeddings in codes."""
    b = Builder(rng, opset=13)

    def decoded(*shape: int, scale: float, axis: int | None) -> str:
        codes = b.constant(rng.integers(-127, 128, shape), np.int8)
        if axis is None:
            return str(b.op("DequantizeLinear", codes, b.constant(scale), b.constant(0, np.int8)))
        steps = b.constant(rng.uniform(0.5, 1.5, shape[axis]) * scale)
        return str(b.op("DequantizeLinear", codes, steps, axis=axis))

    x = b.op("Gather", decoded(40, 16, scale=0.012, axis=None), "tokens")
    x = b.op("Relu", b.op("Add", b.op("MatMul", x, decoded(16, 24, scale=0.005, axis=1)), b.spread(24)))
    x = b.op("ReduceMean", x, axes=[1], keepdims=0)
    y = b.op("Relu", b.op("Gemm", x, decoded(20, 24, scale=0.004, axis=0), b.spread(20), transB=1))
    return b.made({"tokens": Input((2, 5), (3, 8), 40)}, [b.gemm(y, 20, 5)])


def steps_of_memory(rng: np.random.Generator) -> Made:
    """LSTM and GRU with first states that are constants, lengths, peepholes; hidden state used beside the steps."""
    b = Builder(rng)

    def first(hidden: int) -> str:
        sizes = b.op("Concat", b.ints(1), b.op("Slice", b.op("Shape", "x"), b.ints(1), b.ints(2)), b.ints(1), axis=0)
        return str(b.op("Expand", b.spread(1, 1, hidden), sizes))

    x, hidden, _ = b.op(
        "LSTM", "x", b.weight(1, 64, 10, fan_in=10), b.weight(1, 64, 16, fan_in=16), b.spread(1, 128), "",
        first(16), first(16), b.spread(1, 48), outputs=3, hidden_size=16,
    )  # fmt: skip
    steps = b.op("Squeeze", x, b.ints(1))
    y, last = b.op(
        "GRU", steps, b.weight(1, 36, 16, fan_in=16), b.weight(1, 36, 12, fan_in=12), b.spread(1, 72), "", first(12),
        outputs=2, hidden_size=12, linear_before_reset=1,
    )  # fmt: skip
    merged = b.op("Concat", b.op("Squeeze", last, b.ints(0)), b.op("Squeeze", hidden, b.ints(0)), axis=1)
    mean = b.op("ReduceMean", b.op("Squeeze", y, b.ints(1)), axes=[0], keepdims=0)
    out = b.op("Add", b.gemm(merged, 28, 5), b.gemm(mean, 12, 5))
    return b.made({"x": Input((6, 2, 10), (9, 3, 10))}, [out])


def loop_beside(rng: np.random.Generator) -> Made:
    """A Loop that changes one tensor turn by turn; layers before, beside and behind it."""
    b = Builder(rng)
    x = b.op("Relu", b.gemm(b.op("Relu", b.gemm("x", 20, 18)), 18, 12))
    names = ["turn", "go", "held"]
    types = [TensorProto.INT64, TensorProto.BOOL, TensorProto.FLOAT]
    inputs = [
        helper.make_tensor_value_info(n, t, s) for n, t, s in zip(names, types, ([], [], [None, 12]), strict=True)
    ]
    body = [helper.make_node("Identity", ["go"], ["still"]), helper.make_node("Tanh", ["held"], ["next"])]
    outputs = [
        helper.make_tensor_value_info("still", TensorProto.BOOL, []),
        helper.make_tensor_value_info("next", TensorProto.FLOAT, [None, 12]),
    ]
    turns, go = b.constant(3, np.int64), b.constant(True, np.bool_)
    y = b.op("Loop", turns, go, x, body=helper.make_graph(body, "turns", inputs, outputs))
    side = b.gemm(b.op("Relu", b.gemm(x, 12, 14)), 14, 12)
    return b.made(ROWS, [b.gemm(b.op("Relu", b.gemm(b.op("Add", y, side), 12, 16)), 16, 5)])


FORMS: tuple[Callable[[np.random.Generator], Made], ...] = (
    computed_weights,
    constant_nodes,
    heads_by_split,
    loop_beside,
    many_exits,
    small_meets_large,
    steps_of_memory,
    weight_codes,
    written_layer_norm,
)
