"""Structures written node by node: couplings that exporters seldom write, and forms of old opsets."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from onnx import TensorProto, helper

from .builder import Builder, Made
from .handmade_forms import FORMS
from .spec import Input

IMAGE = {"x": Input((2, 3, 8, 8), (3, 3, 10, 12))}
FIXED = {"x": Input((2, 3, 8, 8), (3, 3, 8, 8))}


def _head(b: Builder, x: str, channels: int) -> str:
    """Global mean, Flatten, Gemm."""
    return b.gemm(b.op("Flatten", b.op("GlobalAveragePool", x)), channels, 5)


def concat_of_concats(rng: np.random.Generator) -> Made:
    """Concat inside Concat; Slices that cross the seams."""
    b = Builder(rng)
    one, two, three = (b.op("Relu", b.conv("x", 3, width)) for width in (8, 12, 10))
    whole = b.op("Concat", b.op("Concat", one, two, axis=1), three, b.op("Concat", two, one, axis=1), axis=1)
    left = b.op("Slice", whole, b.ints(4), b.ints(24), b.ints(1))
    right = b.op("Slice", whole, b.ints(-20), b.ints(1 << 40), b.ints(1))
    return b.made(IMAGE, [_head(b, b.op("Add", b.conv(left, 20, 16), b.conv(right, 20, 16)), 16)])


def unequal_split(rng: np.random.Generator) -> Made:
    """Parts of 6, 10 and 16 channels that go different ways; one is added to another layer's output."""
    b = Builder(rng)
    x = b.op("Relu", b.conv("x", 3, 32))
    small, middle, large = b.op("Split", x, b.ints(6, 10, 16), outputs=3, axis=1)
    y = b.op("Concat", b.conv(small, 6, 8), b.op("Add", middle, b.conv(large, 16, 10)), axis=1)
    return b.made(IMAGE, [_head(b, y, 18)])


def gathered_channels(rng: np.random.Generator) -> Made:
    """Channels permuted by a constant index; another Gather takes some twice and leaves some out."""
    b = Builder(rng)
    x = b.op("Relu", b.conv("x", 3, 12))
    order = b.constant(rng.permutation(12), np.int64)
    y = b.op("Relu", b.conv(b.op("Add", b.op("Gather", x, order, axis=1), x), 12, 10))
    y = b.op("Gather", y, b.ints(0, 2, 2, 5, 7, 9), axis=1)
    return b.made(IMAGE, [_head(b, y, 6)])


def squeeze_excite_gemm(rng: np.random.Generator) -> Made:
    """Gates from ReduceMean without kept axes, Gemm, Unsqueeze."""
    b = Builder(rng)
    x = b.op("Relu", b.norm(b.conv("x", 3, 16, bias=False), 16))
    means = b.op("ReduceMean", x, axes=[2, 3], keepdims=0)
    gates = b.op("Sigmoid", b.gemm(b.op("Relu", b.gemm(means, 16, 6)), 6, 16))
    y = b.op("Mul", x, b.op("Unsqueeze", gates, b.ints(2, 3)))
    return b.made(IMAGE, [_head(b, b.conv(y, 16, 12), 12)])


def written_group_norm(rng: np.random.Generator) -> Made:
    """GroupNorm as exporters write it: Reshape to groups, InstanceNormalization, Reshape back, scale and shift."""
    b = Builder(rng)
    x = b.conv("x", 3, 24)
    grouped = b.op("Reshape", x, b.ints(0, 4, -1))
    y = b.op("InstanceNormalization", grouped, b.constant(np.ones(4)), b.constant(np.zeros(4)), epsilon=1e-5)
    y = b.op("Reshape", y, b.op("Shape", x))
    y = b.op("Add", b.op("Mul", y, b.spread(24, 1, 1, low=0.7, high=1.2)), b.spread(24, 1, 1))
    return b.made(IMAGE, [_head(b, b.conv(b.op("Relu", y), 24, 10), 10)])


def flatten_places(rng: np.random.Generator) -> Made:
    """Flatten of channels and 16 places into a Gemm; a Reshape does the same elsewhere."""
    b = Builder(rng)
    x = b.op("MaxPool", b.op("Relu", b.conv("x", 3, 12)), kernel_shape=[2, 2], strides=[2, 2])
    one = b.op("Relu", b.gemm(b.op("Flatten", x), 12 * 16, 20))
    two = b.op("MatMul", b.op("Reshape", b.conv(x, 12, 8), b.ints(0, -1)), b.weight(8 * 16, 20, fan_in=128))
    return b.made(FIXED, [b.gemm(b.op("Add", one, two), 20, 5)])


def grouped_transpose_conv(rng: np.random.Generator) -> Made:
    """ConvTranspose of 4 groups, of depth, and a plain one."""
    b = Builder(rng)
    x = b.op("Relu", b.conv("x", 3, 16))
    x = b.op("ConvTranspose", x, b.weight(16, 6, 2, 2, fan_in=4), b.spread(24), group=4, strides=[2, 2])
    x = b.op("Relu", b.norm(x, 24))
    x = b.op("ConvTranspose", x, b.weight(24, 1, 3, 3, fan_in=3), b.spread(24), group=24, pads=[1] * 4)
    x = b.op("ConvTranspose", b.op("Relu", x), b.weight(24, 10, 2, 2, fan_in=24), strides=[2, 2])
    return b.made(IMAGE, [b.conv(b.op("Relu", x), 10, 4)])


def grouped_channels(rng: np.random.Generator) -> Made:
    """Groups after groups of another number; a depth multiplier of 2."""
    b = Builder(rng)
    x = b.op("Relu", b.conv("x", 3, 24))
    x = b.op("Relu", b.conv(x, 24, 24, group=4))
    x = b.op("Relu", b.conv(x, 24, 12, group=6))
    x = b.op("Relu", b.conv(x, 12, 24, group=12))
    return b.made(IMAGE, [_head(b, b.conv(x, 24, 10, 1), 10)])


def one_dimension(rng: np.random.Generator) -> Made:
    """Conv1d, BatchNorm, pooling over time; a MatMul over channels turned last."""
    b = Builder(rng)
    x = b.op("Relu", b.norm(b.conv("x", 3, 16, dims=1), 16))
    x = b.op("MaxPool", b.conv(x, 16, 16, dims=1, group=16), kernel_shape=[2], strides=[2])
    x = b.op("MatMul", b.op("Transpose", x, perm=[0, 2, 1]), b.weight(16, 12, fan_in=16))
    x = b.op("ReduceMax", b.op("Tanh", x), axes=[1], keepdims=0)
    return b.made({"x": Input((2, 3, 16), (3, 3, 22))}, [b.gemm(x, 12, 5)])


def three_dimensions(rng: np.random.Generator) -> Made:
    """Conv3d and its depthwise form."""
    b = Builder(rng)
    x = b.op("Relu", b.norm(b.conv("x", 2, 12, dims=3), 12))
    x = b.op("Relu", b.conv(x, 12, 12, dims=3, group=12))
    return b.made({"x": Input((2, 2, 4, 6, 6), (1, 2, 5, 6, 8))}, [_head(b, b.conv(x, 12, 10, 1, dims=3), 10)])


def slopes(rng: np.random.Generator) -> Made:
    """PRelu with a slope per channel, with one slope, after a convolution and after a Gemm."""
    b = Builder(rng)
    x = b.op("PRelu", b.conv("x", 3, 16), b.spread(16, 1, 1, low=0.1, high=0.4))
    x = b.op("PRelu", b.conv(x, 16, 12), b.spread(1, low=0.1, high=0.4))
    x = b.gemm(b.op("Flatten", b.op("GlobalMaxPool", x)), 12, 14)
    return b.made(IMAGE, [b.gemm(b.op("PRelu", x, b.spread(14, low=0.1, high=0.4)), 14, 5)])


def padded_channels(rng: np.random.Generator) -> Made:
    """A shortcut that grows by zero channels (ResNet's option A)."""
    b = Builder(rng)
    x = b.op("Relu", b.conv("x", 3, 12))
    wide = b.op("Pad", x, b.ints(0, 2, 0, 0, 0, 6, 0, 0))
    y = b.op("Relu", b.op("Add", b.conv(x, 12, 20), wide))
    return b.made(IMAGE, [_head(b, b.conv(y, 20, 10), 10)])


def einsum_attention(rng: np.random.Generator) -> Made:
    """Heads made, compared, mixed and merged by Einsum."""
    b = Builder(rng)
    query, key, value = (b.op("Einsum", "x", b.weight(20, 4, 6, fan_in=20), equation="btd,dhe->bthe") for _ in "qkv")
    query = b.op("Add", query, b.spread(4, 6))
    scores = b.op("Softmax", b.op("Einsum", query, key, equation="bqhe,bkhe->bhqk"), axis=-1)
    mixed = b.op("Einsum", scores, value, equation="bhqk,bkhe->bqhe")
    y = b.op("Einsum", mixed, b.weight(4, 6, 16, fan_in=24), equation="bqhe,hed->bqd")
    y = b.op("MatMul", b.op("Relu", y), b.weight(16, 5, fan_in=16))
    return b.made({"x": Input((2, 5, 20), (3, 9, 20))}, [y])


def channels_last(rng: np.random.Generator) -> Made:
    """A residual branch that works with channels last, between Transposes."""
    b = Builder(rng)
    x = b.op("Relu", b.conv("x", 3, 16))
    y = b.op("MatMul", b.op("Transpose", x, perm=[0, 2, 3, 1]), b.weight(16, 24, fan_in=16))
    y = b.op("Relu", b.op("Add", y, b.spread(24)))
    y = b.op("Add", b.op("MatMul", y, b.weight(24, 16, fan_in=24)), b.spread(16))
    x = b.op("Add", x, b.op("Transpose", y, perm=[0, 3, 1, 2]))
    return b.made(IMAGE, [_head(b, b.conv(x, 16, 10), 10)])


def branch_in_the_middle(rng: np.random.Generator) -> Made:
    """An If between two convolutions that reads an outer tensor; the first layers are out of its reach."""
    b = Builder(rng)
    x = b.op("Relu", b.conv(b.op("Relu", b.conv("x", 3, 14)), 14, 12))
    wide = b.op("Gather", b.op("Shape", "x"), b.constant(3, np.int64), axis=0)
    condition = b.op("Greater", wide, b.constant(9, np.int64))

    def body(kind: str) -> object:
        node = helper.make_node(kind, [x], [f"{kind}_inside"], name=f"{kind}_inside")
        value = helper.make_tensor_value_info(f"{kind}_inside", TensorProto.FLOAT, [None, 12, None, None])
        return helper.make_graph([node], f"{kind}_body", [], [value])

    y = b.op("If", condition, then_branch=body("Relu"), else_branch=body("Neg"))
    y = b.op("Relu", b.conv(y, 12, 16))
    return b.made(IMAGE, [_head(b, b.conv(y, 16, 10), 10)])


def quantized(rng: np.random.Generator) -> Made:
    """Quantize and dequantize around convolutions: activations per tensor, weights per channel, int32 biases."""
    b = Builder(rng, opset=13)
    zero = b.constant(0, np.int8)

    def wrapped(x: str, scale: float) -> str:
        step = b.constant(scale)
        return b.op("DequantizeLinear", b.op("QuantizeLinear", x, step, zero), step, zero)

    def layer(x: str, inputs: int, outputs: int, group: int = 1) -> str:
        codes = b.constant(rng.integers(-127, 128, (outputs, inputs // group, 3, 3)), np.int8)
        steps = rng.uniform(0.5, 1.0, outputs) * (3.0 / (inputs // group * 9)) ** 0.5 / 73
        scale, zeros = b.constant(steps), b.constant(np.zeros(outputs), np.int8)
        weight = b.op("DequantizeLinear", codes, scale, zeros, axis=0)
        biases = b.constant(rng.integers(-300, 300, outputs), np.int32)
        bias = b.op(
            "DequantizeLinear", biases, b.constant(steps * 0.02), b.constant(np.zeros(outputs), np.int32), axis=0
        )
        return b.op("Conv", x, weight, bias, pads=[1] * 4, group=group)

    x = wrapped("x", 0.03)
    for inputs, outputs, group in ((3, 16, 1), (16, 16, 16), (16, 12, 1)):
        x = wrapped(b.op("Relu", layer(x, inputs, outputs, group)), 0.02)
    return b.made(IMAGE, [_head(b, x, 12)])


def opset_9(rng: np.random.Generator) -> Made:
    """Attributes where later opsets have inputs: Slice, Pad, Clip, Squeeze, Unsqueeze, Upsample, Split, ReduceMean."""
    b = Builder(rng, opset=9)
    x = b.op("Clip", b.norm(b.conv("x", 3, 16), 16), min=0.0, max=6.0)
    one, two = b.op("Split", x, outputs=2, axis=1, split=[6, 10])
    x = b.op("Concat", b.conv(one, 6, 8), b.op("Slice", two, axes=[1], starts=[2], ends=[9]), axis=1)
    x = b.op("Pad", x, mode="constant", pads=[0, 0, 1, 1, 0, 0, 1, 1], value=0.0)
    x = b.op("Upsample", b.conv(x, 15, 12), b.constant([1, 1, 2, 2]), mode="nearest")
    gates = b.op("Sigmoid", b.gemm(b.op("ReduceMean", x, axes=[2, 3], keepdims=0), 12, 12))
    x = b.op("Mul", x, b.op("Unsqueeze", gates, axes=[2, 3]))
    x = b.op("Squeeze", b.op("GlobalAveragePool", b.op("Dropout", x, ratio=0.5)), axes=[2, 3])
    return b.made(IMAGE, [b.op("Softmax", b.gemm(x, 12, 5), axis=1)])


def opset_11(rng: np.random.Generator) -> Made:
    """Bounds as inputs, axes as attributes: Slice, Pad, Clip, Resize; a Reshape that counts channels."""
    b = Builder(rng, opset=11)
    x = b.op("Clip", b.conv("x", 3, 16), b.constant(0.0), b.constant(6.0))
    y = b.op("Slice", x, b.ints(1), b.ints(16), b.ints(1), b.ints(2))
    y = b.op("Pad", b.conv(y, 8, 12), b.ints(0, 0, 1, 1, 0, 0, 1, 1), b.constant(0.0))
    y = b.op("Resize", y, b.constant([], np.float32), b.constant([1, 1, 2, 2]), mode="nearest")
    sizes = b.op("Unsqueeze", b.op("Gather", b.op("Shape", y), b.constant(0, np.int64)), axes=[0])
    y = b.op("Reshape", b.op("GlobalAveragePool", y), b.op("Concat", sizes, b.ints(12), axis=0))
    return b.made(IMAGE, [b.gemm(y, 12, 5)])


def shared_weights(rng: np.random.Generator) -> Made:
    """One weight in two convolutions of different places, one bias in three layers, a scale used as an offset too."""
    b = Builder(rng)
    weight, bias = b.weight(12, 12, 3, 3, fan_in=108), b.spread(12)
    x = b.op("Relu", b.op("Conv", "x", b.weight(12, 3, 3, 3, fan_in=27), bias, pads=[1] * 4))
    y = b.op("Relu", b.op("Conv", x, weight, bias, pads=[1] * 4))
    z = b.op("Relu", b.op("Conv", y, weight, bias, pads=[1] * 4))
    scale = b.spread(12, 1, 1, low=0.2, high=0.5)
    z = b.op("Add", b.op("Mul", z, scale), scale)
    return b.made(IMAGE, [_head(b, b.op("Add", z, y), 12)])


def written_softmax_head(rng: np.random.Generator) -> Made:
    """Classes by Exp over its sum; hidden units normalised by their length before."""
    b = Builder(rng)
    x = b.op("Relu", b.gemm(b.op("Flatten", b.op("GlobalAveragePool", b.conv("x", 3, 16))), 16, 20))
    length = b.op("Sqrt", b.op("ReduceSum", b.op("Mul", x, x), b.ints(1), keepdims=1))
    y = b.gemm(b.op("Div", x, b.op("Max", length, b.constant(1e-6))), 20, 5)
    powers = b.op("Exp", y)
    return b.made(IMAGE, [b.op("Div", powers, b.op("ReduceSum", powers, b.ints(1), keepdims=1))])


def several_outputs(rng: np.random.Generator) -> Made:
    """Inner channels that leave the graph beside others that do not."""
    b = Builder(rng)
    x = b.op("Relu", b.conv("x", 3, 16))
    y = b.op("Relu", b.conv(x, 16, 12))
    return b.made(IMAGE, [b.op("Sigmoid", x), _head(b, y, 12)])


def space_and_depth(rng: np.random.Generator) -> Made:
    """SpaceToDepth in, DepthToSpace of both modes out."""
    b = Builder(rng)
    x = b.op("SpaceToDepth", b.op("Relu", b.conv("x", 3, 8)), blocksize=2)
    x = b.op("Relu", b.conv(x, 32, 48))
    one = b.op("DepthToSpace", x, blocksize=2, mode="DCR")
    two = b.op("DepthToSpace", b.conv(x, 48, 40), blocksize=2, mode="CRD")
    return b.made(IMAGE, [b.conv(b.op("Concat", one, two, axis=1), 22, 4)])


def maxout(rng: np.random.Generator) -> Made:
    """Pairs of channels compared by Reshape and ReduceMax; ArgMax of the classes beside them."""
    b = Builder(rng)
    x = b.op("ReduceMax", b.op("Reshape", b.conv("x", 3, 24), b.ints(0, 12, 2, 8, 8)), axes=[2], keepdims=0)
    y = b.op("Relu", b.conv(x, 12, 16))
    return b.made(FIXED, [_head(b, y, 16)])


MODELS: dict[str, Callable[[np.random.Generator], Made]] = {
    f"handmade-{make.__name__.replace('_', '-')}": make
    for make in (
        branch_in_the_middle,
        channels_last,
        concat_of_concats,
        einsum_attention,
        flatten_places,
        gathered_channels,
        grouped_channels,
        grouped_transpose_conv,
        maxout,
        one_dimension,
        opset_9,
        opset_11,
        padded_channels,
        quantized,
        several_outputs,
        shared_weights,
        slopes,
        space_and_depth,
        squeeze_excite_gemm,
        three_dimensions,
        unequal_split,
        written_group_norm,
        written_softmax_head,
        *FORMS,
    )
}
