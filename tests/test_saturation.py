"""What VPMADDUBSW cuts off: counted against an emulation, product by product; and what ORT here adds up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper, numpy_helper

from graphopt import saturation
from graphopt.codes import weight_code
from graphopt.data import load_samples
from graphopt.errors import SpecError
from graphopt.model import load
from graphopt.pipeline import Pipeline, Settings
from graphopt.runtime import Session

Array = np.ndarray[Any, Any]


def emulated(codes: Array, weights: Array) -> Array:
    """Return codes x weights, two products at a time in int16, as the instruction is defined."""
    rows, depth = codes.shape
    total = np.zeros((rows, weights.shape[1]), np.int64)
    for k in range(0, depth, 2):
        sums = np.zeros_like(total)
        for j in range(k, min(k + 2, depth)):
            sums += codes[:, j].astype(np.int64)[:, None] * weights[j].astype(np.int64)[None]
        total += np.clip(sums, -(1 << 15), (1 << 15) - 1)
    return total


def exact(codes: Array, weights: Array) -> Array:
    return codes.astype(np.int64) @ weights.astype(np.int64)


matrices = st.tuples(st.integers(1, 9), st.integers(1, 11), st.integers(1, 6)).flatmap(
    lambda s: st.tuples(
        hnp.arrays(np.uint8, (s[0], s[1]), elements=st.sampled_from([0, 1, 100, 128, 200, 254, 255])),
        hnp.arrays(np.int8, (s[1], s[2]), elements=st.sampled_from([-128, -127, -65, -64, 0, 1, 63, 64, 65, 127])),
    )
)


@given(matrices)
def test_counts_are_those_of_the_instruction(given_matrices: tuple[Array, Array]) -> None:
    codes, weights = given_matrices
    np.testing.assert_array_equal(saturation.multiply(codes, weights), emulated(codes, weights))
    found = saturation.saturating(weights, codes)
    lost = exact(codes, weights) - emulated(codes, weights)
    np.testing.assert_array_equal(found.error, np.abs(lost).max(axis=0))
    assert found.rows == len(codes)
    # losses of both signs may cancel: then an output is touched, and right all the same
    assert (found.outputs >= (lost != 0).mean(axis=0) - 1e-12).all()
    assert not (found.channels & ~found.possible).any(), "what happens was possible"


@given(matrices)
def test_what_is_impossible_by_range_never_happens(given_matrices: tuple[Array, Array]) -> None:
    codes, weights = given_matrices
    low, high = int(codes.min()), int(codes.max())
    in_order = saturation.possible(weights, low, high, any_order=False)
    assert not (in_order & ~saturation.possible(weights, low, high)).any()
    assert not (saturation.saturating(weights, codes).channels & ~in_order).any()


def test_seven_bits_are_safe_and_eight_are_not() -> None:
    seven = np.array([[-64, 63], [-64, 63]], np.int8)
    assert not saturation.possible(seven).any()
    eight = np.array([[-65, 65], [-64, 64]], np.int8)
    assert saturation.possible(eight).all()  # 255 * 129 = 32895
    assert not saturation.possible(eight, 0, 200).any()
    assert saturation.possible(np.array([[127], [0], [127], [0]], np.int8)).all()
    assert not saturation.possible(np.array([[127], [0], [127], [0]], np.int8), any_order=False).any()


def test_only_channels_that_saturate_lose_a_bit() -> None:
    values = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    code = weight_code(values, 0)
    kept = saturation.reduced(values, code, np.zeros(4, bool))
    assert kept is code
    channels = np.array([False, True, False, True])
    less = saturation.reduced(values, code, channels)
    largest = np.abs(less.quantize(values).astype(int)).max(axis=1)
    assert (largest[channels] <= 64).all()
    assert (largest[~channels] == 127).all()
    scalar = saturation.reduced(values, weight_code(values, None), channels)
    assert np.abs(scalar.quantize(values).astype(int)).max() <= 64
    with pytest.raises(SpecError, match="only int8"):
        saturation.reduced(values, weight_code(values, 0, bits=4), channels)


def test_instruction_sets() -> None:
    assert [saturation.saturates(isa) for isa in ("avx2", "avx512", "vnni")] == [True, True, False]
    with pytest.raises(SpecError, match="unknown instruction set 'neon'"):
        saturation.saturates("neon")


# --- graphs


def quantized(op: str, weights: Array, shape: Sequence[int], zero: int = 0, **attrs: Any) -> onnx.ModelProto:
    """Return Q -> DQ -> op (int8 weights, scale 1) -> Q at a scale of 1000, all with the codes as outputs."""
    kind = np.int8 if attrs.pop("signed", False) else np.uint8
    constants = {
        "xs": np.float32(1), "xz": kind(zero), "ws": np.ones(1, np.float32)[0], "wz": np.int8(0),
        "ys": np.float32(1000), "yz": kind(zero), "w": weights,
    }  # fmt: skip
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "xs", "xz"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"]),
        helper.make_node(op, ["xd", "wd"], ["c"], name="layer", **attrs),
        helper.make_node("QuantizeLinear", ["c", "ys", "yz"], ["cq"]),
        helper.make_node("DequantizeLinear", ["cq", "ys", "yz"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def checked(model: onnx.ModelProto, x: Array, rows: int = 0) -> dict[str, saturation.Saturation]:
    concerned = saturation.layers(load(model).graph)
    names = list(dict.fromkeys(layer.codes for layer in concerned))
    values = Session(model, optimization="off", extra_outputs=names).run({"x": x}, names) if names else {}
    return saturation.check(concerned, [values], rows=rows)


rng = np.random.default_rng(0)


@pytest.mark.parametrize("trans", [0, 1])
def test_gemm_and_matmul_pair_neighbouring_rows(trans: int) -> None:
    weights = np.array([[127, 127], [127, 0], [0, 127], [0, 0]], np.int8)
    x = np.full((3, 4), 255, np.float32)
    given_weights = weights.T.copy() if trans else weights
    found = checked(quantized("Gemm", given_weights, [3, 4], transB=trans), x)["layer"]
    assert found.channels.tolist() == [True, False]
    assert found.possible.tolist() == [True, True]
    assert found.error.tolist() == [255 * 254 - 32767, 0]
    assert trans or checked(quantized("MatMul", weights, [3, 4]), x)["layer"].channels.tolist() == [True, False]


def patches(codes: Array, kernel: int, zero: int) -> Array:
    """Return the rows of a padded convolution, (rows, kernel places, channels), written out."""
    padded = np.pad(codes, [(0, 0), (0, 0), (1, 1), (1, 1)], constant_values=zero)
    height, width = codes.shape[2:]
    return np.stack(
        [
            padded[n, :, i : i + kernel, j : j + kernel].transpose(1, 2, 0).reshape(-1)
            for n in range(len(codes)) for i in range(height) for j in range(width)
        ]
    )  # fmt: skip


@pytest.mark.parametrize(("channels", "groups"), [(3, 1), (4, 1), (8, 2)])
def test_convolutions_pair_channels_at_each_place(channels: int, groups: int) -> None:
    weights = rng.integers(-128, 128, (6, channels // groups, 3, 3)).astype(np.int8)
    x = rng.integers(0, 256, (2, channels, 5, 5)).astype(np.float32)
    found = checked(quantized("Conv", weights, [2, channels, 5, 5], zero=9, pads=[1] * 4, group=groups), x)["layer"]
    codes = np.clip(x + 9, 0, 255).astype(np.uint8)
    for group in range(groups):
        each = channels // groups
        rows = patches(codes[:, group * each : (group + 1) * each], 3, 9)
        mine = slice(group * 6 // groups, (group + 1) * 6 // groups)
        matrix = weights[mine].transpose(2, 3, 1, 0).reshape(-1, 6 // groups)
        lost = exact(rows, matrix) - emulated(rows, matrix)
        np.testing.assert_array_equal(found.error[mine], np.abs(lost).max(axis=0))
    assert found.rows == 50
    assert found.fraction > 0.25


def test_what_is_not_concerned() -> None:
    x = np.full((1, 4, 4, 4), 255, np.float32)
    depthwise = np.full((4, 1, 3, 3), 127, np.int8)
    assert checked(quantized("Conv", depthwise, [1, 4, 4, 4], group=4), x) == {}
    plain = quantized("Conv", np.full((4, 4, 3, 3), 127, np.int8), [1, 4, 4, 4])
    assert checked(plain, x)["layer"].channels.all()
    del plain.graph.node[2]  # weights not quantized: nothing to see
    plain.graph.node[2].input[1] = "wf"
    plain.graph.initializer.append(numpy_helper.from_array(np.ones((4, 4, 3, 3), np.float32), "wf"))
    assert checked(plain, x) == {}


def test_signed_activations_are_shifted() -> None:
    weights = np.full((4, 1), 127, np.int8)
    model = quantized("MatMul", weights, [1, 4], zero=0, signed=True)
    assert checked(model, np.full((1, 4), 127, np.float32))["layer"].channels.all()  # 255 after the shift
    assert not checked(model, np.full((1, 4), -100, np.float32))["layer"].channels.any()


def test_rows_are_drawn_and_samples_add_up() -> None:
    weights = rng.integers(-128, 128, (64, 8)).astype(np.int8)
    x = rng.integers(0, 256, (100, 64)).astype(np.float32)
    all_rows = checked(quantized("MatMul", weights, [100, 64]), x)["layer"]
    some = checked(quantized("MatMul", weights, [100, 64]), x, rows=10)["layer"]
    assert (all_rows.rows, some.rows) == (100, 10)
    codes = x.astype(np.uint8)
    halves = saturation.saturating(weights, codes[:30]) + saturation.saturating(weights, codes[30:])
    np.testing.assert_allclose(halves.outputs, all_rows.outputs, rtol=1e-12)
    np.testing.assert_array_equal(halves.error, all_rows.error)


@pytest.mark.parametrize("op", ["MatMul", "Conv"])
def test_this_machine_adds_up_exactly_or_as_emulated(op: str) -> None:
    """With VNNI the sums are exact; without, they are what the emulation says: one of the two, all over."""
    depth, columns = 64, 32
    matrix = rng.integers(-128, 128, (depth, columns)).astype(np.int8)
    x = rng.integers(0, 256, (16, depth)).astype(np.float32)
    if op == "MatMul":
        model, feed = quantized("MatMul", matrix, [16, depth], zero=128), x - 128
    else:
        model = quantized("Conv", matrix.T.reshape(columns, depth, 1, 1).copy(), [1, depth, 4, 4], zero=128)
        feed = x.T.reshape(1, depth, 4, 4) - 128
    y = Session(model).run({"x": feed})["y"]
    found = y if op == "MatMul" else y.reshape(columns, 16).T
    codes, total = x.astype(np.uint8), 128 * matrix.astype(np.int64).sum(axis=0)
    sums = {"exact": exact(codes, matrix) - total, "cut off": emulated(codes, matrix) - total}
    assert (sums["exact"] != sums["cut off"]).mean() > 0.5
    same = {name: np.array_equal(rounded(values), found) for name, values in sums.items()}
    assert sum(same.values()) == 1, same


def rounded(sums: Array) -> Array:
    """Return sums as codes of scale 1000 around 128, and back."""
    return np.asarray(np.clip(np.rint(sums / 1000.0) + 128, 0, 255) * 1000.0 - 128000.0)


def test_reduce_range_leaves_nothing_that_saturates() -> None:
    """Large weights meet large activations; after reduce-range, no sum of two products leaves 16 bits."""
    draw = np.random.default_rng(3)
    weight = (draw.standard_normal((16, 16, 1, 1)) * 0.2).astype(np.float32)
    weight[::2] = draw.uniform(0.4, 0.5, weight[::2].shape)  # codes of 100 and more in every other channel
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"], name="c")]
    shape = [1, 16, 8, 8]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n in ("x", "y")]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], [numpy_helper.from_array(weight, "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    feeds = [{"x": draw.uniform(0.5, 1.0, shape).astype(np.float32)} for _ in range(4)]
    samples = load_samples(feeds, load(model))
    run = Settings(verify="off", on_failure="stop")

    def saturated(spec: str) -> int:
        made = Pipeline(spec).run(model, samples=samples, settings=run).model
        concerned = saturation.layers(made.graph)
        session = Session(made, optimization="off", extra_outputs=[layer.codes for layer in concerned])
        values = [session.run(feed, [layer.codes for layer in concerned]) for feed in feeds]
        return sum(int(s.channels.sum()) for s in saturation.check(concerned, values).values())

    assert saturated("quantize-static") >= 8
    assert saturated("quantize-static, reduce-range{isa=avx2}") == 0
    assert saturated("quantize-static, reduce-range{isa=vnni}") == saturated("quantize-static")
