"""simplify-shapes on random shape arithmetic, on golden graphs, and its near misses."""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.errors import GraphoptError
from graphopt.optimizer import default_pipeline
from graphopt.pipeline import Pipeline, Result, Settings
from graphopt.runtime import Optimization, Session

from .fact_check import contradictions
from .shape_graphs import feeds, random_model

FIXPOINT = "repeat(fold-constants, simplify-shapes, fold-if, eliminate-identity, eliminate-common, eliminate-dead)"


def run(model: onnx.ModelProto, pipeline: str = FIXPOINT) -> Result:
    return Pipeline(pipeline).run(model, settings=Settings(verify="off", on_failure="stop"))


Outputs = dict[str, np.ndarray[Any, Any]]


def outputs(model: onnx.ModelProto, optimization: Optimization) -> list[Outputs]:
    """Return what a model gives at all sizes; nothing where ORT refuses it."""
    session = Session(model, optimization=optimization)
    found = []
    for feed in feeds():
        try:
            found.append(session.run(feed))
        except GraphoptError:
            found.append({})
    return found


def assert_same(before: onnx.ModelProto, after: onnx.ModelProto) -> int:
    """Compare at all sizes that the original takes, ORT's optimisations off and on; return how many.

    Where those two differ in the shapes they give (empty tensors, reshaped in vain), the original says nothing.
    With an empty batch only "off" counts: ORT's own reshape fusion writes [0, 4, -1], which then fails, wherever it
    sees the pattern.
    """
    wanted = [outputs(before, "off"), outputs(before, "all")]
    found = [outputs(after, "off"), outputs(after, "all")]
    compared = 0
    for feed, a, b, mine, others in zip(feeds(), *wanted, *found, strict=True):
        if not a or not b or any(a[name].shape != b[name].shape for name in a):
            continue
        compared += 1
        assert_equal(a, mine)
        if feed["x"].size:
            assert_equal(b, others)
    return compared


def assert_equal(a: Outputs, b: Outputs) -> None:
    assert b, "it fails now"
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert a[name].shape == b[name].shape, name
        # moved elements, and relu, tanh and sigmoid of them: the same operators on the same numbers
        np.testing.assert_allclose(b[name], a[name], rtol=0, atol=1e-6 * np.abs(a[name]).max(initial=1e-30))


@settings(max_examples=250)
@given(st.integers(0, 1 << 32))
def test_random_shape_arithmetic(seed: int) -> None:
    model = random_model(seed)
    assert_same(model, run(model).proto)


@settings(max_examples=60)
@given(st.integers(0, 1 << 32))
def test_all_canonical_passes_on_random_shape_arithmetic(seed: int) -> None:
    """Other passes rely on the shapes that are proved here."""
    model = random_model(seed)
    result = default_pipeline(stage="canonical").run(model, settings=Settings(verify="off", on_failure="stop"))
    assert_same(model, result.proto)


@settings(max_examples=60)
@given(st.integers(0, 1 << 32), st.sampled_from(["simplify-shapes", "fold-if", "hoist-loop-invariants"]))
def test_a_second_run_changes_nothing(seed: int, name: str) -> None:
    once = run(random_model(seed), name)
    assert run(once.proto, name).report.passes[0].status != "changed"


@settings(max_examples=60)
@given(st.integers(0, 1 << 32))
def test_no_fact_is_contradicted(seed: int) -> None:
    model = random_model(seed)
    for feed in feeds():
        try:
            found, _ = contradictions(model, feed)
        except GraphoptError:
            continue
        assert not found


@functools.cache
def statistics() -> Counter[str]:
    """What became of 100 random models."""
    counts: Counter[str] = Counter()
    for seed in range(100):
        model = random_model(seed)
        result = run(model)
        counts["before"] += result.report.before.nodes
        counts["after"] += result.report.after.nodes
        counts["compared"] += assert_same(model, result.proto)
    return counts


def test_random_models_run_and_shrink() -> None:
    """The random tests would prove nothing if ORT refused their models, or if nothing changed."""
    counts = statistics()
    assert counts["compared"] > 100 * 4
    assert counts["after"] < 0.6 * counts["before"]


@pytest.mark.parametrize("size", [0, 1, 5])
def test_empty_batch_still_runs(size: int) -> None:
    """n*4 may not become -1 beside a copied axis: ORT refuses that where the axis is empty."""
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["": 17]>
        g (float[n, 4, h, w] x) => (float[a, b, c] y)
        <int64[1] four = {4}, int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2}, int64[1] three = {3}> {
            s = Shape(x)
            n = Gather(s, zero)
            h = Gather(s, two)
            w = Gather(s, three)
            area = Mul(h, w)
            target = Concat<axis = 0>(n, four, area)
            y = Reshape(x, target)
        }""")
    result = run(model)
    x = np.zeros((size, 4, 2, 3), np.float32)
    for proto in (model, result.proto):
        assert Session(proto, optimization="off").run({"x": x})["y"].shape == (size, 4, 6)
    whys = [b["why"] for r in result.report.passes for b in r.blocked if r.name == "simplify-shapes"]
    assert "axis 2 of its target would become -1, which fails where another axis is empty" in whys
