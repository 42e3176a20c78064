"""Pruning, reconstruction, low rank and quantization as one pipeline from a TOML file, on models of the zoo."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from graphopt.data import load_samples
from graphopt.model import load
from graphopt.models import zoo
from graphopt.models.digits import demo_model
from graphopt.models.digits.task import accuracy, calibration
from graphopt.optimizer import read_pipeline
from graphopt.pipeline import Result, Settings
from graphopt.runtime import Session
from tests.zoo_files import fetched

STEPS = """
[[step]]
pass = "canonical"

[[step]]
pass = "prune-channels"
ratio = 0.2
of = "macs"

[[step]]
pass = "reconstruct-weights"

[[step]]
pass = "factorize-layers"
error = 0.05

[[step]]
pass = "quantize-static"

[[step]]
pass = "round-weights"

[[step]]
pass = "correct-bias"

[[step]]
pass = "eliminate-dead"
"""

SPARED = {"alexnet", "vgg19", "zfnet512", "resnet50", "densenet121", "inception-v2"}
"""Minutes for what others show."""

QUICK = {"silero-vad", "shufflenet", "magika"}
"""Layers in subgraphs; grouped convolutions with a shuffle; a transformer-like classifier."""


def run(path: Path, data: object, folder: Path) -> Result:
    """Return what the pipeline makes of a model, no pass rolled back."""
    (folder / "steps.toml").write_text(STEPS)
    model = load(path)
    settings = Settings(verify="off", on_failure="stop")
    return read_pipeline(folder / "steps.toml").run(model, samples=load_samples(data, model), settings=settings)  # type: ignore[arg-type]  # tests give lists


@pytest.mark.zoo
@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in zoo.names() if n not in SPARED]
)
def test_one_file_prunes_fits_factorizes_and_quantizes(name: str, tmp_path: Path) -> None:
    path = fetched(name)
    feeds = list(zoo.feeds(name, count=4))
    result = run(path, feeds, tmp_path)
    result.save(tmp_path / "out.onnx")
    onnx.checker.check_model(tmp_path / "out.onnx", full_check=True)
    outputs = Session(load(tmp_path / "out.onnx")).run(feeds[0])
    reference = Session(load(path)).run(feeds[0])
    assert {n: v.shape for n, v in outputs.items()} == {n: v.shape for n, v in reference.items()}
    assert all(np.isfinite(v).all() for v in outputs.values() if v.dtype.kind == "f")
    for record in result.report.passes:
        explained = record.changes or record.blocked
        assert explained or record.name not in {"prune-channels", "quantize-static"}


def test_the_digits_network_keeps_its_accuracy_through_all_of_it(tmp_path: Path) -> None:
    result = run(demo_model(), list(calibration()), tmp_path)
    changed = {record.name for record in result.report.passes if record.status == "changed"}
    assert {"prune-channels", "reconstruct-weights", "quantize-static"} <= changed
    before, after = Session(load(demo_model())), Session(result.model)
    drop = accuracy(lambda f: before.run(dict(f))).mean() - accuracy(lambda f: after.run(dict(f))).mean()
    assert drop <= 0.015
