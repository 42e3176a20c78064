"""Models of the zoo through `quantize`, on samples that look like what it was made for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from graphopt import gate, lossy
from graphopt.compiled import inspect_layers
from graphopt.model import Model, load
from graphopt.models import zoo
from graphopt.quantization_report import QuantizationReport
from graphopt.quantizer import quantize
from graphopt.runtime import Session
from tests.zoo_files import fetched

SAMPLES = 4
"""Few, so that the same ones calibrate and judge: here it counts that each model comes through."""

BUDGET = 1.0

SPARED = {
    "alexnet", "vgg19", "zfnet512",
    "resnet50", "inception-v2", "efficientnet-lite0-torchscript", "minilm-torchscript",
}  # fmt: skip
"""Too large, or minutes for what others show: a sibling or another export of a model that is tried."""

QUICK = {"silero-vad", "silero-vad-half", "ppocr-cls"}
"""Layers that all stand in subgraphs; several inputs and a state; many small layers, few of which gain."""


@pytest.fixture(autouse=True)
def _short_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here is about times: the shortest look at them does."""
    monkeypatch.setattr(gate, "LOOKS", (0.3,))
    monkeypatch.setattr(lossy, "LOOKS", (0.3,))


@pytest.mark.zoo
@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in zoo.names() if n not in SPARED]
)
def test_result_is_valid_good_enough_and_what_the_report_says(name: str, tmp_path: Path) -> None:
    path = fetched(name)
    feeds = list(zoo.feeds(name, count=SAMPLES))
    result = quantize(path, data=feeds, budget=BUDGET)
    result.save(tmp_path / "out.onnx")
    onnx.checker.check_model(tmp_path / "out.onnx", full_check=True)
    written, report = load(tmp_path / "out.onnx"), result.report
    same_signature(load(path), written)
    outputs = Session(written).run(feeds[0])
    floats = {n: v for n, v in outputs.items() if v.dtype.kind == "f"}
    assert all(np.isfinite(values).all() for values in floats.values())
    assert report.quality is not None
    assert report.quality.ok
    assert report.decision in {"quantized", "lossless"}
    explained(report)
    if report.decision == "quantized":
        as_compiled(report, written)
    else:
        assert report.reason
        assert not onnx_ops(written) & {"QuantizeLinear", "DynamicQuantizeLinear"}


def same_signature(before: Model, after: Model) -> None:
    """Assert that inputs and outputs have the names, types and sizes that they had."""
    for old, new in ((before.inputs, after.inputs), (before.outputs, after.outputs)):
        assert [(t.name, t.dtype) for t in old] == [(t.name, t.dtype) for t in new]
        for was, now in zip(old, new, strict=True):
            known = [(a, b) for a, b in zip(was.shape or (), now.shape or (), strict=True) if isinstance(a, int)]
            assert all(a == b for a, b in known), was.name


def explained(report: QuantizationReport) -> None:
    """Assert that every layer has a precision, and a reason where it is float."""
    assert report.layers
    assert {row.precision for row in report.layers} <= {"int8", "float"}
    assert all(row.why for row in report.layers if row.precision == "float")
    assert len({row.layer for row in report.layers}) == len(report.layers)
    assert (report.precisions.get("int8", 0) > 0) == (report.decision == "quantized")


def as_compiled(report: QuantizationReport, written: Model) -> None:
    """Assert that ORT runs on integers what the report says, and nothing else."""
    found = inspect_layers(written, {row.layer for row in report.layers})
    assert found.readable
    assert found.integer == {row.layer for row in report.layers if row.precision == "int8"}


def onnx_ops(model: Model) -> set[str]:
    """Return the operators of a model, those of subgraphs included."""
    return {node.op for node in model.nodes()}
