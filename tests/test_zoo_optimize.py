"""Every model of the zoo through `optimize` and `validate`, as a user runs them."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import pytest

import graphopt
from graphopt.models import zoo
from graphopt.optimizer import default_pipeline
from graphopt.validate import Reference
from tests.zoo_files import fetched

LIMIT = 1e-4
"""Largest error, relative to the largest output: the bound that the default pipeline is held to."""

SLOW = {"alexnet", "vgg19", "zfnet512", *zoo.names("torch")}


@pytest.mark.zoo
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in zoo.names()])
def test_optimized_model_gives_equal_outputs(name: str, tmp_path: Path) -> None:
    path = fetched(name)
    before = path.stat().st_mtime_ns
    result = graphopt.optimize(path, measure=False)
    result.save(tmp_path / "out.onnx")
    assert not result.report.failures
    assert path.stat().st_mtime_ns == before
    checked = graphopt.validate(path, tmp_path / "out.onnx")
    assert checked.ok, checked.failures
    assert {row["optimization"] for row in checked.rows} == {"off", "all"}
    assert max(row["relative"] for row in checked.rows if row["relative"] is not None) <= LIMIT
    assert result.report.after.nodes <= result.report.before.nodes
    assert (tmp_path / "out.onnx").stat().st_size <= 1.1 * path.stat().st_size


@pytest.mark.zoo
@pytest.mark.parametrize("name", ["silero-vad", "ppocr-cls", "silero-vad-16k-op15"])
def test_any_number_of_first_changes_leaves_an_equal_model(name: str) -> None:
    """What bisection stands on: a change left out must not break those before it."""
    model = graphopt.load(zoo.fetch(name))
    reference = Reference(model)
    unchecked = graphopt.Settings(verify="off", on_failure="stop")
    total = sum(r.changes for r in default_pipeline().run(model, settings=unchecked).report.passes)
    for limit in sorted(random.Random(0).sample(range(total), 6)):
        result = default_pipeline().run(model, settings=dataclasses.replace(unchecked, limit=limit))
        assert sum(r.changes for r in result.report.passes) == limit
        checked = reference.check(result.model)
        assert checked.ok, f"{limit} of {total} changes: {checked.failures}"
