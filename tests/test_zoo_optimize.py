"""Every model of the zoo through `optimize` and `validate`, as a user runs them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import graphopt
from graphopt.errors import ProviderError
from graphopt.models import zoo

LIMIT = 1e-4
"""Largest error, relative to the largest output: the bound that the default pipeline is held to."""

SLOW = {"alexnet", "vgg19", "zfnet512", *zoo.names("torch")}


@pytest.mark.zoo
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in zoo.names()])
def test_optimized_model_gives_equal_outputs(name: str, tmp_path: Path) -> None:
    try:
        path = zoo.fetch(name)
    except ProviderError as error:
        if os.environ.get("CI") and name not in zoo.names("torch"):
            pytest.fail(str(error))
        pytest.skip(str(error))
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
