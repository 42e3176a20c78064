"""The zoo through `prune-channels`: random 40 % of every group leaves what equals a twin read off the weights."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest

import graphopt
from graphopt import runtime
from graphopt.analysis.cost import costs
from graphopt.errors import ProviderError
from graphopt.models import zoo
from graphopt.pipeline import Pipeline, Settings
from tests.cut_twins import slices, twin

CUT = "prune-channels{criterion=random,spread=local,ratio=0.4,round_to=1}"

NOISE = 1e-4
"""Relative to the largest element: what `optimize` is held to; some of these differ by 5e-5 from themselves."""

QUICK = {"ppocr-cls", "magika", "silero-vad-16k-op15"}

REFUSED: dict[str, str] = {}
"""Models of which nothing can be cut, and a word of the reason that they give."""


def fetched(name: str) -> Path:
    try:
        return Path(zoo.fetch(name))
    except ProviderError as error:
        if os.environ.get("CI") and name not in zoo.names("torch"):
            pytest.fail(str(error))
        pytest.skip(str(error))


@pytest.mark.zoo
@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in zoo.names()])
def test_cut_equals_twin_or_reason_is_given(name: str) -> None:
    model = graphopt.optimize(fetched(name), stage="canonical", measure=False).model
    result = Pipeline(CUT).run(model, settings=Settings(verify="off"))
    (record,) = result.report.passes
    assert record.failure is None
    reasons = " ".join(row["why"] for row in record.blocked)
    if name in REFUSED:
        assert record.changes == 0
        assert REFUSED[name] in reasons
        return
    before, after = model.proto, result.proto
    onnx.checker.check_model(after, full_check=True)
    gone = slices(before, after)
    assert gone
    twins = twin(before, gone)
    for feed in zoo.feeds(name, count=1):
        wanted, found = runtime.evaluate(twins, feed), runtime.evaluate(after, feed)
        for key, value in wanted.items():
            assert float(np.abs(value - found[key]).max()) <= NOISE * float(np.abs(value).max())
    shapes = {key: list(spec.shape) for key, spec in zoo.get(name).inputs.items()}
    assert costs(result.model, inputs=shapes).macs < 0.9 * costs(model, inputs=shapes).macs
