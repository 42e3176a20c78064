"""Factors of matrices: what a rank loses is what its spectrum says, and no other of that rank loses less."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from graphopt.low_rank import Spectrum, conv_splits, natural_step, product_split, rounded, spectrum

Array = np.ndarray[Any, Any]
RNG = np.random.default_rng(0)


def rows(width: int, count: int = 400) -> Array:
    """Correlated rows with a mean of their own: few directions hold most of their power."""
    spread = np.geomspace(1.0, 0.01, width)
    mix = np.linalg.qr(RNG.standard_normal((width, width)))[0]
    return np.asarray((RNG.standard_normal((count, width)) * spread) @ mix + RNG.standard_normal(width))


def centred(values: Array) -> Array:
    return np.asarray(values - values.mean(axis=0))


def lost(x: Array, matrix: Array, product: Array) -> float:
    return float(np.linalg.norm(x @ (matrix - product)) / np.linalg.norm(x @ matrix))


@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (20, 20)])
def test_error_is_what_the_outputs_lose(shape: tuple[int, int]) -> None:
    x, matrix = centred(rows(shape[0])), RNG.standard_normal(shape)
    found = spectrum(matrix, inputs=x.T @ x / len(x))
    for rank in (1, 4, 9, 15):
        assert lost(x, matrix, found.factors(rank).product) == pytest.approx(found.error(rank), rel=0.02)  # the ridge
    assert found.error(min(shape)) < 1e-3


@pytest.mark.parametrize("shape", [(24, 16), (16, 24)])
def test_moments_of_inputs_and_of_outputs_give_the_same_factors(shape: tuple[int, int]) -> None:
    x, matrix = centred(rows(shape[0])), RNG.standard_normal(shape)
    covariance = x.T @ x / len(x)
    by_inputs = spectrum(matrix, inputs=covariance)
    by_outputs = spectrum(matrix, outputs=matrix.T @ covariance @ matrix)
    for rank in (1, 5):
        one, other = by_inputs.factors(rank).product, by_outputs.factors(rank).product
        # directions of small energy move with the rounding of the larger ones
        assert lost(x, one, other) < 1e-3
        assert by_inputs.error(rank) == pytest.approx(by_outputs.error(rank), rel=1e-3)


def test_no_other_matrix_of_the_rank_loses_less() -> None:
    x, matrix = centred(rows(12)), RNG.standard_normal((12, 10))
    found = spectrum(matrix, inputs=x.T @ x / len(x)).factors(4)
    least = lost(x, matrix, found.product)
    plain = spectrum(matrix).factors(4)
    assert least < lost(x, matrix, plain.product)
    for scale in (1e-2, 1e-1):
        for _ in range(20):
            first = found.first + scale * RNG.standard_normal(found.first.shape) * np.abs(found.first).mean()
            second = found.second + scale * RNG.standard_normal(found.second.shape) * np.abs(found.second).mean()
            assert lost(x, matrix, first @ second) > least


@pytest.mark.parametrize("shape", [(30, 12), (12, 30)])
def test_without_samples_it_is_the_singular_value_decomposition(shape: tuple[int, int]) -> None:
    matrix = RNG.standard_normal(shape)
    found = spectrum(matrix)
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    for rank in (1, 5, 11):
        np.testing.assert_allclose(
            found.factors(rank).product, left[:, :rank] * values[:rank] @ right[:rank], atol=1e-6
        )
        wanted = np.sqrt(np.square(values[rank:]).sum() / np.square(values).sum())
        assert found.error(rank) == pytest.approx(wanted, rel=1e-6)


def test_what_flows_between_has_variance_one() -> None:
    x, matrix = centred(rows(16)), RNG.standard_normal((16, 14))
    for found in (
        spectrum(matrix, inputs=x.T @ x / len(x)),
        spectrum(matrix, outputs=np.cov(x @ matrix, rowvar=False)),
    ):
        between = x @ found.factors(6).first
        np.testing.assert_allclose(between.var(axis=0), 1.0, rtol=0.02)  # N or N - 1, and the ridge


def test_fewer_rows_than_inputs_do_no_harm() -> None:
    x, matrix = rows(40, count=5), RNG.standard_normal((40, 30))
    found = spectrum(matrix, inputs=x.T @ x / len(x))
    assert np.isfinite(found.factors(20).product).all()
    assert lost(x, matrix, found.factors(5).product) < 1e-2


@pytest.mark.parametrize("matrix", [np.zeros((6, 4)), np.zeros((4, 6)), np.ones((5, 7))])
def test_matrices_of_no_rank(matrix: Array) -> None:
    found = spectrum(matrix)
    np.testing.assert_allclose(found.factors(2).product, matrix, atol=1e-9)
    assert found.error(1) < 1e-6
    quiet = spectrum(np.ones((5, 4)), inputs=np.zeros((5, 5)))  # samples that never move
    np.testing.assert_allclose(quiet.factors(1).product, np.ones((5, 4)), atol=1e-9)


def test_ranks_by_error_and_by_energy() -> None:
    found = Spectrum(np.eye(3), np.eye(3), np.array([90.0, 9.0, 1.0]), 100.0)
    assert [found.rank_within(e) for e in (0.99, 0.32, 0.31, 0.1, 0.05)] == [1, 1, 2, 2, 3]
    assert found.error(1) == pytest.approx(np.sqrt(0.1))
    assert found.error(3) == 0.0


def test_ranks_are_rounded_to_what_kernels_are_made_for() -> None:
    assert [natural_step(limit) for limit in (3, 16, 63, 64, 500)] == [1, 4, 4, 16, 16]
    assert rounded(33, 500) == 48
    assert rounded(499, 500) == 496
    assert rounded(5, 7) == 5
    assert rounded(5, 60, multiple=8) == 8


@pytest.mark.parametrize("strides", [(1, 1), (2, 2), (2, 1)])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (5, 3), (1, 7)])
def test_splits_and_their_work(kernel: tuple[int, int], strides: tuple[int, int]) -> None:
    weight = RNG.standard_normal((14, 10, *kernel))
    splits = conv_splits(weight.shape, strides)
    assert [s.way for s in splits] == ["wide", *["narrow"] * (max(kernel) > 1), *["spatial"] * (min(kernel) > 1)]
    for split in splits:
        assert split.matrix(weight).shape == split.size
        np.testing.assert_array_equal(split.whole_weight(split.matrix(weight)), weight)
        factors = spectrum(split.matrix(weight)).factors(3)
        assert tuple(w.shape for w in split.weights(factors)) == split.shapes(3)
        first, second = split.shapes(3)
        finer = {"wide": 1, "narrow": strides[0] * strides[1], "spatial": strides[1]}[split.way]
        assert 3 * split.macs == np.prod(first) * finer + np.prod(second)
        assert split.whole == weight.size
        assert split.limit * split.macs < split.whole
        row = RNG.standard_normal(split.size[1])
        ones = np.repeat(row[None], split.size[0], axis=0)
        assert split.summed(row) * split.size[0] == pytest.approx(split.whole_weight(ones).sum(axis=(1, 2, 3)))


def test_a_product_is_its_own_matrix() -> None:
    split, weight = product_split(6, 8), RNG.standard_normal((6, 8))
    assert split.matrix(weight) is weight
    assert split.limit == 3
    assert split.shapes(2) == ((6, 2), (2, 8))
