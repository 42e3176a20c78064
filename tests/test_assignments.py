"""The comparison of ways to choose layers: what it draws and picks, and the page it writes."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from graphopt.latency import PRECISIONS, Cell, LatencyModel, Measured
from graphopt.models.benchmarks import assignments
from graphopt.sensitivity import Sensitivity

LAYERS = [f"l{n}" for n in range(14)]


def costs() -> LatencyModel:
    """Layers in a row that gain unequally, with borders that cost."""
    rng = np.random.default_rng(3)
    own = [Cell((n,), {("float",): 1.0, ("int8",): float(rng.uniform(0.2, 1.1))}) for n in LAYERS]
    borders = [
        Cell(pair, {c: 0.3 * (c[0] != c[1]) for c in itertools.product(PRECISIONS, repeat=2)})
        for pair in itertools.pairwise(LAYERS)
    ]
    return LatencyModel(tuple(LAYERS), (*own, *borders), 1.0, (Measured(frozenset(), 15.0, 1),))


NOISE = {n: float(10 ** np.random.default_rng(4).uniform(-5, -2, 14)[i]) for i, n in enumerate(LAYERS)}


def test_random_assignments_are_the_same_for_a_seed_and_of_both_kinds() -> None:
    found = assignments.random_assignments(LAYERS, seed=5)
    assert found == assignments.random_assignments(LAYERS, seed=5)
    assert found != assignments.random_assignments(LAYERS, seed=6)
    assert len(found) == 10
    for region in found[::2]:
        numbers = sorted(LAYERS.index(layer) for layer in region)
        assert numbers == list(range(numbers[0], numbers[-1] + 1))


def test_least_noise_first_keeps_the_bound() -> None:
    noise = {"a": 0.3, "b": 0.1, "c": 0.2}
    assert assignments.least_noise_first(noise, 0.35) == {"b", "c"}
    assert assignments.least_noise_first(noise, 0.6) == {"a", "b", "c"}
    assert assignments.least_noise_first(noise, 0.05) == frozenset()


def test_the_solver_is_never_predicted_to_be_slower_and_all_keep_the_bound() -> None:
    found = assignments.choices(costs(), NOISE)
    for bound in dict.fromkeys(t.bound for t in found):
        by_name = {t.name: t for t in found if t.bound == bound}
        assert all(t.noise <= bound * (1 + 1e-6) for t in by_name.values())
        # each layer in int8 is charged 1e-4 of the whole, which may go to another choice
        slack = 1e-4 * len(LAYERS)
        assert all(by_name["solver"].predicted <= t.predicted + slack for t in by_name.values())
    assert sum(t.name == "all int8" for t in found) == 1


def test_the_page() -> None:
    random = [
        assignments.Tried("random", math.inf, frozenset(LAYERS[:3]), 0.9, 0.0, 1.0, 20.0),
        assignments.Tried("random", math.inf, frozenset(LAYERS[:5]), 1.0, 0.0, 1.0, 20.0),
    ]
    chosen = [replace(t, measured=0.5, sqnr=30.0) for t in assignments.choices(costs(), NOISE)]
    outcome = assignments.Outcome("some-model", costs(), Sensitivity(NOISE, 0.01), random, chosen, 12.0, 1.0)
    assert outcome.errors == pytest.approx([-0.1, 0.0])
    assert "2 of 2 within 10 %" in outcome.text()
    table = assignments.summary([outcome]).strip().splitlines()
    assert len(table) == 2 + 5
    assert all(row.count("|") == table[0].count("|") for row in table)
    assert table[2].startswith("| some-model |")
