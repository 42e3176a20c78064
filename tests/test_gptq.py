"""GPTQ and coordinate descent: each step lowers the error of the layer's output, measured from its definition."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.codes import weight_code
from graphopt.gptq import Grid, cost, damped, descend, rescale, round_to_codes, search_grid

Array = np.ndarray[Any, Any]


def layer(seed: int, inputs: int = 48, outputs: int = 12, rows: int = 400) -> tuple[Array, Array]:
    """Return inputs (rows, inputs) that go together in a few directions, as real ones do, and a weight."""
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(rows, 6)) @ rng.normal(size=(6, inputs)) + 0.3 * rng.normal(size=(rows, inputs))
    scaled = mixed * rng.lognormal(sigma=0.7, size=inputs)
    return scaled.astype(np.float32), rng.normal(size=(inputs, outputs)).astype(np.float32)


def rtn(weight: Array, bits: int, block: int) -> Array:
    return weight_code(weight, 0 if block else 1, bits, False, block).approximate(weight)


@given(st.integers(0, 9), st.sampled_from([2, 3, 4, 8]), st.sampled_from([0, 16, 20]), st.booleans())
@settings(max_examples=30)
def test_the_output_is_nearer_than_with_plain_rounding(seed: int, bits: int, block: int, ordered: bool) -> None:
    x, weight = layer(seed)
    codes, grid = round_to_codes(weight, x.T @ x, bits=bits, block=block, ordered=ordered)
    assert codes.min() >= 0
    assert codes.max() < 1 << bits
    found = np.square(x @ (weight - grid.values(codes))).sum()
    plain = np.square(x @ (weight - rtn(weight, bits, block))).sum()
    assert found < 0.8 * plain


def test_cost_is_the_squared_error_of_the_output() -> None:
    x, weight = layer(0)
    rounded = rtn(weight, 4, 16)
    expected = np.square(x.astype(np.float64) @ (weight - rounded)).sum()
    assert cost(weight, rounded, x.astype(np.float64).T @ x) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("symmetric", [True, False])
def test_no_refinement_raises_the_cost(symmetric: bool) -> None:
    x, weight = layer(3)
    hessian = damped(x.astype(np.float64).T @ x)
    single = hessian.astype(np.float32)
    grid = search_grid(weight, np.diagonal(hessian), 4, 16, symmetric=symmetric)
    codes = np.stack([grid.row(i, weight[i])[0] for i in range(len(weight))])
    costs = [cost(weight, grid.values(codes), hessian)]
    for _ in range(3):
        rescale(weight, codes, grid, single)
        costs.append(cost(weight, grid.values(codes), hessian))
        descend(weight, codes, grid, single)
        costs.append(cost(weight, grid.values(codes), hessian))
    assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(costs))  # float32
    assert costs[-1] < 0.8 * costs[0]


def test_descent_stops_where_no_single_code_can_be_better() -> None:
    x, weight = layer(5, inputs=10, outputs=3)
    hessian = damped(x.astype(np.float64).T @ x)
    grid = search_grid(weight, np.diagonal(hessian), 3, 10, symmetric=False)
    codes = np.stack([grid.row(i, weight[i])[0] for i in range(len(weight))])
    for _ in range(50):
        if not descend(weight, codes, grid, hessian.astype(np.float32)):
            break
    best = cost(weight, grid.values(codes), hessian)
    for i, j in np.ndindex(*codes.shape):
        for step in (-1, 1):
            other = codes.copy()
            other[i, j] = np.clip(other[i, j] + step, grid.low, grid.high)
            assert cost(weight, grid.values(other), hessian) >= best * (1 - 1e-5)


def test_uncorrelated_inputs_need_no_making_up() -> None:
    weight = layer(1)[1]
    codes, grid = round_to_codes(weight, np.eye(len(weight)), bits=4, block=16, sweeps=0)
    plain = np.stack([grid.row(i, weight[i])[0] for i in range(len(weight))])
    np.testing.assert_array_equal(codes, plain)


@pytest.mark.parametrize("gram", ["zero", "one direction", "dead input"])
def test_degenerate_inputs(gram: str) -> None:
    x, weight = layer(2)
    if gram == "zero":
        x = np.zeros_like(x)
    elif gram == "one direction":
        x = np.outer(np.ones(len(x)), x[0])
    else:
        x[:, 7] = 0
    codes, grid = round_to_codes(weight, x.T @ x, bits=4, block=16)
    values = grid.values(codes)
    assert np.isfinite(values).all()
    relative = np.linalg.norm(weight - values) / np.linalg.norm(weight)
    assert relative < 0.5  # what nothing is known of is still rounded to something near


def test_short_last_block_and_equal_weights() -> None:
    x, _ = layer(4, inputs=21)
    codes, grid = round_to_codes(np.zeros((21, 3), np.float32), x.T @ x, bits=4, block=16)
    assert grid.scale.shape == (2, 3)
    np.testing.assert_array_equal(grid.values(codes), np.zeros((21, 3)))


def test_scales_are_used_as_they_are_stored() -> None:
    x, weight = layer(6)
    _, grid = round_to_codes(weight, x.T @ x, bits=4, block=16, rounded=lambda s: s.astype(np.float16))
    np.testing.assert_array_equal(grid.scale, grid.scale.astype(np.float16).astype(np.float32))


def test_grid_is_what_dequantize_linear_computes() -> None:
    weight = layer(7)[1]
    code = weight_code(weight, 0, 4, False, 16)
    grid = Grid(code.scale, code.zero_point.astype(np.int32), 0, 15, 16)
    codes = code.quantize(weight)
    np.testing.assert_array_equal(grid.values(codes.astype(np.int32)), code.dequantize(codes))
