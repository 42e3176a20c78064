"""The zoo through `prune-channels`: random 40 % of every group leaves what equals a twin read off the weights."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import graphopt
from graphopt import runtime
from graphopt.analysis.cost import costs
from graphopt.models import zoo
from graphopt.pipeline import Pipeline, Settings
from tests.cut_twins import slices, twin
from tests.zoo_files import fetched

CUT = "prune-channels{criterion=random,spread=local,ratio=0.4,round_to=1}"

NOISE = 1e-4
"""Relative to the largest element: what `optimize` is held to; some of these differ by 5e-5 from themselves."""

SHAKY = {"ppocr-det": 1e-3}
"""The same where random channels leave outputs of 1e-3 at most: weights one unit in the last place off do as much."""

SMALL = 16
"""Elements up to which a constant may be something else than weights."""

QUICK = {"ppocr-cls", "magika", "silero-vad-16k-op15"}

REFUSED = dict.fromkeys(("silero-vad", "silero-vad-op18-ifless"), "graphs inside nodes are not cut")
"""Models of which nothing can be cut, and the reason that they give."""


def distinct(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with weights a thousandth off, so that hardly any number stands twice among them."""
    rng = np.random.default_rng(0)
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and np.prod(tensor.dims) > SMALL:
            values = numpy_helper.to_array(tensor)
            off = (np.abs(values) + 1e-2 * values.std()) * 1e-3 * rng.standard_normal(values.shape)  # zeros too
            tensor.CopyFrom(numpy_helper.from_array((values + off).astype(np.float32), tensor.name))
    return model


@pytest.mark.zoo
@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in zoo.names()])
def test_cut_equals_twin_or_reason_is_given(name: str) -> None:
    before = distinct(graphopt.optimize(fetched(name), stage="canonical", measure=False).proto)
    model = graphopt.load(before)
    result = Pipeline(CUT).run(model, settings=Settings(verify="off"))
    (record,) = result.report.passes
    assert record.failure is None
    reasons = " ".join(row["why"] for row in record.blocked)
    if name in REFUSED:
        assert record.changes == 0
        assert REFUSED[name] in reasons
        return
    after = result.proto
    onnx.checker.check_model(after, full_check=True)
    gone = slices(before, after)
    assert gone
    twins = twin(before, gone)
    for feed in zoo.feeds(name, count=1):
        wanted, found = runtime.evaluate(twins, feed), runtime.evaluate(after, feed)
        for key, value in wanted.items():
            assert float(np.abs(value - found[key]).max()) <= SHAKY.get(name, NOISE) * float(np.abs(value).max())
    shapes = {key: list(spec.shape) for key, spec in zoo.get(name).inputs.items()}
    assert costs(result.model, inputs=shapes).macs < 0.9 * costs(model, inputs=shapes).macs
