"""Rounding from covariances: never worse than to the nearest, and near the best there is."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt import obs
from graphopt.rounding import carry, costs, damp, descend, round_rows


def problem(
    rng: np.random.Generator, groups: int, rows: int, columns: int
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return a weight, its scales, and a covariance of inputs that depend on each other."""
    weight = rng.normal(size=(groups, rows, columns)) * rng.uniform(0.1, 10, (groups, rows, 1))
    scale = np.abs(weight).max(axis=-1) / 7
    mixed = rng.normal(size=(groups, 4 * columns, max(columns // 2, 1))) @ rng.normal(
        size=(groups, max(columns // 2, 1), columns)
    )
    mixed += 0.3 * rng.normal(size=mixed.shape)
    return weight, scale, np.swapaxes(mixed, 1, 2) @ mixed / mixed.shape[1]


@given(st.integers(0, 10_000), st.integers(1, 3), st.integers(1, 5), st.integers(1, 12))
def test_no_row_is_worse_than_nearest_and_codes_stay_in_range(seed: int, groups: int, rows: int, columns: int) -> None:
    rng = np.random.default_rng(seed)
    weight, scale, covariance = problem(rng, groups, rows, columns)
    low, high = (-8, 7) if seed % 2 else (-5, 5)
    found = round_rows(weight, scale, covariance, low=low, high=high)
    assert found.codes.shape == weight.shape
    assert low <= found.codes.min()
    assert found.codes.max() <= high
    damped = damp(covariance)
    steps = weight / scale[..., None]
    nearest = np.clip(np.rint(steps), low, high)
    again = costs(steps, found.codes, damped) * scale**2
    np.testing.assert_allclose(found.cost, again, rtol=1e-9)  # float64 sums in another order
    np.testing.assert_allclose(found.nearest, costs(steps, nearest, damped) * scale**2, rtol=1e-9)
    assert (found.cost <= found.nearest).all()


@pytest.mark.parametrize("seed", range(6))
def test_cost_is_near_the_best_of_all_roundings(seed: int) -> None:
    rng = np.random.default_rng(seed)
    weight, scale, covariance = problem(rng, 1, 3, 8)
    found = round_rows(weight, scale, covariance, low=-8, high=7, damping=1e-6)
    damped = damp(covariance, 1e-6)
    steps = weight / scale[..., None]
    offsets = np.array(list(itertools.product((0, 1), repeat=8)))
    best = np.full(3, np.inf)
    for row in range(3):
        tried = np.clip(np.floor(steps[0, row]) + offsets, -8, 7)
        best[row] = costs(steps[:, row : row + 1], tried[None], damped).min() * scale[0, row] ** 2
    excess = found.cost[0].sum() / best.sum()
    assert excess < 1.5, excess  # a greedy search beside all 256 ups and downs; nearest is far off here
    assert found.nearest.sum() / best.sum() > 1.5 * excess


def test_inputs_that_do_not_depend_on_each_other_are_rounded_to_the_nearest() -> None:
    rng = np.random.default_rng(1)
    weight, scale, _ = problem(rng, 2, 4, 10)
    covariance = np.stack([np.diag(rng.uniform(0.1, 5, 10)) for _ in range(2)])
    found = round_rows(weight, scale, covariance)
    np.testing.assert_array_equal(found.codes, np.rint(weight / scale[..., None]))


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_a_covariance_that_says_nothing_gives_nearest(value: float) -> None:
    rng = np.random.default_rng(2)
    weight, scale, _ = problem(rng, 1, 3, 6)
    found = round_rows(weight, scale, np.full((1, 6, 6), value))
    np.testing.assert_array_equal(found.codes, np.rint(weight / scale[..., None]))


def test_groups_do_not_meet() -> None:
    rng = np.random.default_rng(3)
    weight, scale, covariance = problem(rng, 3, 2, 9)
    together = round_rows(weight, scale, covariance).codes
    alone = [round_rows(weight[g : g + 1], scale[g : g + 1], covariance[g : g + 1]).codes[0] for g in range(3)]
    np.testing.assert_array_equal(together, np.stack(alone))


def test_columns_in_chunks_come_out_as_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(4)
    weight, scale, covariance = problem(rng, 1, 4, 21)
    steps, damped = weight / scale[..., None], damp(covariance)
    whole = carry(steps, damped, -8, 7)
    monkeypatch.setattr(obs, "LAZY", 4)
    np.testing.assert_array_equal(carry(steps, damped, -8, 7), whole)


def test_descent_ends_where_no_single_step_helps() -> None:
    rng = np.random.default_rng(5)
    weight, scale, covariance = problem(rng, 1, 3, 10)
    steps, damped = weight / scale[..., None], damp(covariance)
    codes = np.clip(np.rint(steps), -8, 7)
    before = costs(steps, codes, damped)
    assert descend(steps, codes, damped, -8, 7, sweeps=100) > 0
    settled = costs(steps, codes, damped)
    assert (settled <= before).all()
    for column, step in itertools.product(range(10), (-1, 1)):
        moved = codes.copy()
        moved[..., column] = np.clip(moved[..., column] + step, -8, 7)
        assert (costs(steps, moved, damped) >= settled - 1e-9).all()


def test_outputs_of_a_layer_come_nearer() -> None:
    rng = np.random.default_rng(6)
    inputs = np.maximum(rng.normal(size=(2000, 6)) @ rng.normal(size=(6, 32)) + 0.3, 0)
    weight = rng.normal(size=(1, 16, 32))
    scale = np.abs(weight).max(axis=-1) / 127
    covariance = np.cov(inputs.T, bias=True)[None]
    found = round_rows(weight, scale, covariance)
    centred = inputs - inputs.mean(axis=0)

    def error(codes: np.ndarray[Any, Any]) -> float:
        return float(np.square(centred @ (codes * scale[..., None] - weight)[0].T).mean())

    assert error(found.codes) < 0.5 * error(np.rint(weight / scale[..., None]))
