"""Codes against ONNX Runtime's own kernels, published numbers, and what they promise."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from graphopt.codes import (
    TINY,
    Affine,
    activation_code,
    code_range,
    codebook_code,
    grouped,
    lloyd,
    normal_float_code,
    normal_float_levels,
    power_of_two_code,
    power_of_two_levels,
    weight_code,
)
from graphopt.errors import DataError, SpecError
from graphopt.runtime import evaluate

TYPES: dict[str, int] = {
    name: getattr(TensorProto, name.upper()) for name in ("int8", "uint8", "int16", "uint16", "int4", "uint4")
}


def dtype_of(name: str) -> np.dtype[Any]:
    return np.dtype(getattr(ml_dtypes, name, None) or name)


def in_ort(code: Affine, values: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return the codes (int32) and the values that ORT makes, its optimisations off."""
    kind = TYPES[code.dtype.name]
    extra: dict[str, Any] = {} if code.axis is None else {"axis": code.axis}
    extra |= {"block_size": code.block} if code.block else {}
    scale = onnx.numpy_helper.from_array(code.scale, "s")
    zero = helper.make_tensor("z", kind, code.zero_point.shape, code.zero_point.astype(np.int32).reshape(-1).tolist())
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], **extra),
        helper.make_node("Cast", ["q"], ["codes"], to=TensorProto.INT32),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["back"], **extra),
    ]
    outputs = [
        helper.make_tensor_value_info("codes", TensorProto.INT32, None),
        helper.make_tensor_value_info("back", 1, None),
    ]
    graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("x", 1, values.shape)], outputs, [scale, zero])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    found = evaluate(model, {"x": values}, ["codes", "back"])
    return found["codes"], found["back"]


def same_as_ort(code: Affine, values: np.ndarray[Any, Any]) -> None:
    codes, back = in_ort(code, values)
    mine = code.quantize(values)
    assert mine.dtype == code.dtype
    np.testing.assert_array_equal(mine.astype(np.int32), codes)
    np.testing.assert_array_equal(code.dequantize(mine), back)


AWKWARD = np.array(
    [np.nan, np.inf, -np.inf, 3e38, -3e38, 1e-42, -0.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 0.25, 0.75, 254.5, 255.5,
     126.5, 127.5, -127.5, -128.5, -129.5, 65534.5, 7.5, -8.5],
    np.float32,
)  # fmt: skip


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("zero", [0, 1, 3])
@pytest.mark.parametrize("scale", [1.0, 0.5, 0.1, TINY, 1e30])
def test_one_scale_rounds_as_ort(name: str, zero: int, scale: float) -> None:
    code = Affine(np.asarray(scale, np.float32), np.asarray(zero).astype(dtype_of(name)))
    rng = np.random.default_rng(0)
    steps = rng.integers(-300, 300, 99) * (scale / 2)  # halves: ties
    spread = rng.normal(size=500).astype(np.float32) * np.float32(scale) * 100
    with np.errstate(over="ignore"):
        awkward = AWKWARD * np.float32(scale)
    same_as_ort(code, np.concatenate([AWKWARD, awkward, spread, steps.astype(np.float32)]))


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_a_scale_per_channel_rounds_as_ort(name: str, axis: int) -> None:
    rng = np.random.default_rng(1)
    values = rng.normal(size=(3, 5, 4)).astype(np.float32)
    count = values.shape[axis]
    low, high = code_range(dtype_of(name))
    zero = np.asarray(rng.integers(max(low, -7), min(high, 7) + 1, count)).astype(np.int32).astype(dtype_of(name))
    same_as_ort(Affine(np.asarray(rng.uniform(0.01, 0.1, count), np.float32), zero, axis % 3), values)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("axis", "block"), [(0, 2), (1, 16), (1, 7), (1, 64), (2, 3)])
@pytest.mark.parametrize("bits", [4, 8])
def test_blocks_with_a_short_last_one_round_as_ort(bits: int, axis: int, block: int, symmetric: bool) -> None:
    values = np.random.default_rng(2).normal(size=(4, 37, 5)).astype(np.float32)
    code = weight_code(values, axis, bits, symmetric, block)
    assert code.scale.shape == tuple(-(-n // block) if i == axis else n for i, n in enumerate(values.shape))
    same_as_ort(code, values)


@given(
    st.lists(st.floats(width=32), min_size=1, max_size=40),
    st.floats(min_value=TINY, max_value=2.0**100, width=32),
    st.integers(0, 255),
)
def test_any_value_rounds_as_ort(values: list[float], scale: float, zero: int) -> None:
    same_as_ort(Affine(np.asarray(scale, np.float32), np.asarray(zero, np.uint8)), np.array(values, np.float32))


@given(st.floats(-8e37, 8e37), st.floats(0, 8e37), st.sampled_from(list(TYPES)), st.booleans())
def test_activation_codes_hold_zero_and_both_ends(low: float, width: float, name: str, symmetric: bool) -> None:
    code = activation_code(low, low + width, dtype_of(name), symmetric)
    scale = float(code.scale)
    assert TINY <= scale <= np.finfo(np.float32).max
    assert code.approximate(np.zeros(1, np.float32))[0] == 0.0
    # half a step is lost at either end when the zero point is rounded; the float32 scale adds 2^-24 per level
    slack = (0.5 + 2.0**-7) * scale
    assert code.low - slack <= min(low, 0)
    assert code.high + slack >= max(low + width, 0)
    if symmetric:
        assert int(code.zero_point) == (0 if name.startswith("i") else 1 << (int(name.removeprefix("uint")) - 1))


@pytest.mark.parametrize(("low", "high"), [(0, 0), (5, 5), (-5, -5), (0, 1e-45), (-1e-40, 0), (-1.7e38, 1.7e38)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_odd_ranges_have_normal_scales(low: float, high: float, symmetric: bool) -> None:
    code = activation_code(low, high, np.int8, symmetric)
    assert np.isfinite(code.scale)
    assert code.scale >= TINY
    np.testing.assert_allclose(code.approximate(np.array([low, high], np.float32)), [low, high], rtol=0.01, atol=TINY)


def test_codes_of_the_widest_range_do_not_overflow() -> None:
    ends = np.array([-3.4e38, 3.4e38], np.float32)
    assert np.isfinite(activation_code(*ends.tolist()).approximate(ends)).all()


@pytest.mark.parametrize(("low", "high"), [(1.0, 0.0), (float("nan"), 1.0), (0.0, float("nan"))])
def test_no_range_is_refused(low: float, high: float) -> None:
    with pytest.raises(DataError, match="no range"):
        activation_code(low, high)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 7, 8, 12, 16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("narrow", [True, False])
@pytest.mark.parametrize("method", ["absmax", "mse"])
def test_weight_codes_stay_within_their_bits(bits: int, symmetric: bool, narrow: bool, method: Any) -> None:
    values = np.random.default_rng(3).standard_t(3, size=(6, 50)).astype(np.float32)
    code = weight_code(values, 0, bits, symmetric, method=method, narrow=narrow)
    codes = code.quantize(values).astype(np.int32)
    least = 0 if not symmetric else -(1 << (bits - 1)) + narrow
    assert least <= codes.min()
    assert codes.max() <= least + (1 << bits) - 1 - (narrow and symmetric)
    if symmetric:
        assert not code.zero_point.astype(np.int32).any()
    if method == "absmax":  # every value is within half a step, and what rounding the zero point moves
        assert np.all(np.abs(code.dequantize(code.quantize(values)) - values) <= 1.001 * code.scale[:, None])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", [0, 16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_least_squared_error_is_never_worse_and_near_the_best(bits: int, block: int, symmetric: bool) -> None:
    values = np.random.default_rng(4).standard_t(4, size=(8, 48)).astype(np.float32)

    def errors(code: Affine) -> Any:
        return np.square(grouped(code.approximate(values) - values, 1 if block else 0, block)[0]).sum(axis=1)

    plain = weight_code(values, 1 if block else 0, bits, symmetric, block)
    best = weight_code(values, 1 if block else 0, bits, symmetric, block, "mse")
    assert np.all(errors(best) <= errors(plain) * (1 + 1e-6))
    if symmetric:  # exhaustive search over 2,000 scales: the ones tried are a hundredth apart
        exhaustive = np.min(
            [errors(Affine(plain.scale * np.float32(f), plain.zero_point, plain.axis, block, plain.limits))
             for f in np.linspace(0.25, 1.0, 2000)], axis=0,
        )  # fmt: skip
        assert errors(best).sum() <= 1.06 * exhaustive.sum()
    if bits == 4:
        assert errors(best).sum() < 0.98 * errors(plain).sum()


def test_channels_of_zeros_have_a_normal_scale() -> None:
    values = np.zeros((3, 8), np.float32)
    values[1] = 1e-44
    for block in (0, 4):
        for symmetric in (True, False):
            code = weight_code(values, 0 if not block else 1, 8, symmetric, block, "mse")
            assert np.all(code.scale >= TINY)
            assert not code.approximate(values).any()


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
def test_empty_weights_have_a_code(shape: tuple[int, ...]) -> None:
    values = np.zeros(shape, np.float32)
    code = weight_code(values, 0)
    assert code.scale.shape == (shape[0],)
    assert code.approximate(values).shape == shape


def test_bad_weights_and_options_are_refused() -> None:
    values = np.ones((2, 2), np.float32)
    with pytest.raises(DataError, match="NaN"):
        weight_code(values * np.nan, 0)
    with pytest.raises(SpecError, match="axis"):
        weight_code(values, None, block=2)
    with pytest.raises(SpecError, match="at least one"):
        weight_code(values, 0, block=-1)
    with pytest.raises(SpecError, match="2 to 16 bits"):
        weight_code(values, 0, bits=1)
    with pytest.raises(SpecError, match="no integer codes"):
        activation_code(0, 1, np.float32)


def test_normal_float_levels_are_the_published_ones() -> None:
    published = [  # Dettmers et al. 2023, appendix E
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ]  # fmt: skip
    # the published ones were computed in single precision
    np.testing.assert_allclose(normal_float_levels(), published, atol=5e-7)


def test_powers_of_two_are_exact_shifts() -> None:
    assert power_of_two_levels(3).tolist() == [-1, -0.5, -0.25, 0, 0.25, 0.5, 1]
    values = np.random.default_rng(5).normal(size=(4, 100)).astype(np.float32)
    code = power_of_two_code(values, 0, 5)
    back = code.approximate(values)
    exponents = np.log2(np.abs(back[back != 0]))
    assert np.array_equal(exponents, np.rint(exponents))
    peaks = np.abs(values).max(axis=1)
    # the power of two nearest to a peak is from 2/3 to 4/3 of it
    assert np.all((code.scale >= peaks * 2 / 3 * 0.999) & (code.scale <= peaks * 4 / 3 * 1.001))


def test_codebooks_take_the_nearest_level() -> None:
    values = np.random.default_rng(6).normal(size=(6, 70)).astype(np.float32)
    for code in (
        normal_float_code(values, 1, block=32), power_of_two_code(values, 0, 4), codebook_code(values, 0, 3),
        codebook_code(values, None, 5),
    ):  # fmt: skip
        scale = np.asarray(code.scale)
        if code.block:
            scale = np.repeat(scale, code.block, axis=1)[:, : values.shape[1]]
        elif scale.ndim:
            scale = scale[:, None]
        all_levels = code.levels * np.broadcast_to(scale, values.shape)[..., None]
        least = np.abs(all_levels - values[..., None]).min(axis=-1)
        np.testing.assert_allclose(np.abs(code.approximate(values) - values), least, atol=1e-6)
        assert code.quantize(values).dtype == code.dtype


def test_k_means_is_as_good_as_a_library() -> None:
    from scipy.cluster.vq import kmeans, vq

    values = np.random.default_rng(7).laplace(size=4000)
    mine = lloyd(values.astype(np.float32), 16)
    theirs = kmeans(values[:, None], 16, iter=10, rng=np.random.default_rng(0))[0]
    error = [
        float(np.mean(vq(values[:, None], np.asarray(levels, float).reshape(-1, 1))[1] ** 2))
        for levels in (mine, theirs)
    ]
    assert error[0] <= 1.02 * error[1]  # both stop in a local minimum


def test_k_means_weighs_values() -> None:
    values = np.array([0, 1, 10, 11], np.float32)
    np.testing.assert_allclose(lloyd(values, 2), [0.5, 10.5])
    np.testing.assert_allclose(lloyd(values, 2, np.array([3, 1, 1, 0.0])), [0.25, 10])
    assert lloyd(values, 8).tolist() == [0, 1, 10, 11]
    assert lloyd(values[:0], 8).tolist() == [0]


def test_a_codebook_beats_even_codes_on_weights_of_many_small_values() -> None:
    values = np.random.default_rng(8).laplace(size=(16, 400)).astype(np.float32)

    def error(code: Any) -> float:
        return float(np.square(code.approximate(values) - values).sum())

    even = error(weight_code(values, 0, 4, method="mse"))
    assert error(codebook_code(values, 0, 4)) < 0.8 * even
    assert error(normal_float_code(values, 1, block=64)) < error(weight_code(values, 1, 4, block=64))
