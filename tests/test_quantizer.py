"""`quantize` end to end on the committed model: what it returns was built, judged and timed, and can be made again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from graphopt.compiled import inspect_layers
from graphopt.decisions import save_decisions
from graphopt.errors import DataError, GateMissedError, SpecError
from graphopt.model import load
from graphopt.models import digits
from graphopt.models.digits import task
from graphopt.quality import Bound
from graphopt.quantizer import Quantized, quantize

FEEDS = list(task.calibration(128))


@pytest.fixture(scope="module")
def result() -> Quantized:
    return quantize(digits.demo_model(), data=FEEDS, bound=Bound(metric=task.accuracy, max_drop="1%"), budget=3.0)


def test_what_is_returned_is_what_the_report_says(result: Quantized) -> None:
    report = result.report
    onnx.checker.check_model(result.model.proto, full_check=True)
    assert report.decision in {"quantized", "lossless"}
    assert {row.precision for row in report.layers} <= {"float", "int8"}
    assert all(row.why for row in report.layers)
    assert report.quality is not None
    assert report.quality.ok
    if report.decision == "quantized":
        int8 = {row.layer for row in report.layers if row.precision == "int8"}
        assert inspect_layers(result.model, [row.layer for row in report.layers]).integer == int8
        assert report.timing is not None
        assert report.timing.overall.high < 1.0
        assert report.bytes_after < report.bytes_before
    else:
        assert report.reason
    json.dumps(report.to_dict(), default=str)


def test_a_replay_writes_the_same_bytes(result: Quantized, tmp_path: Path) -> None:
    _assert_replay_writes_the_same(result, tmp_path)


def _assert_replay_writes_the_same(found: Quantized, folder: Path) -> None:
    save_decisions(folder / "decisions.json", found.report.decisions or {})
    again = quantize(digits.demo_model(), data=FEEDS, decisions=folder / "decisions.json")
    found.save(folder / "a.onnx")
    again.save(folder / "b.onnx")
    assert (folder / "a.onnx").read_bytes() == (folder / "b.onnx").read_bytes()


@pytest.mark.slow
def test_a_bound_that_nothing_keeps_gives_the_lossless_model_and_why_and_a_replay_writes_it(
    tmp_path: Path,
) -> None:
    found = quantize(digits.demo_model(), data=FEEDS, bound=Bound(min_sqnr=120.0), budget=2.0)
    assert found.report.decision == "lossless"
    assert found.report.reason
    assert {row.precision for row in found.report.layers} == {"float"}
    assert not any(node.op == "QuantizeLinear" for node in found.model.nodes())
    _assert_replay_writes_the_same(found, tmp_path)


@pytest.mark.parametrize(("form", "largest"), [("int8", 0.85), ("int4", 0.85), ("nf4", 0.35), ("codebook", 0.45)])
def test_weight_only_forms_need_no_samples(form: str, largest: float, tmp_path: Path) -> None:
    """Convolutions hold most of the digits model: the first two forms are for products."""
    found = quantize(digits.demo_model(), weight_only=form)
    found.save(tmp_path / "small.onnx")
    size = (tmp_path / "small.onnx").stat().st_size
    assert size / digits.demo_model().stat().st_size < largest
    assert abs(size / found.report.bytes_after - 1.0) < 0.05
    assert task.accuracy(_predict(found)).mean() > 0.97


def _predict(found: Quantized) -> object:
    from graphopt.runtime import Session

    return Session(found.model).run


def test_fp16_is_half_the_size_and_says_where_it_was_judged() -> None:
    found = quantize(digits.demo_model(), data=FEEDS, precision="fp16", provider="cuda")
    assert found.report.bytes_after < 0.55 * found.report.bytes_before
    assert any("cuda" in note for note in found.report.notes)


def test_the_smallest_file_keeps_the_bound() -> None:
    found = quantize(digits.demo_model(), data=FEEDS, objective="size", bound=Bound(min_sqnr=40.0))
    kept = [t for t in found.report.tried if t.quality is not None and t.quality.ok]
    assert len(kept) < len(found.report.tried)  # nf4 is too coarse for 40 dB
    assert found.report.quality is not None
    assert found.report.quality.ok
    assert found.report.bytes_after < 0.6 * found.report.bytes_before


def test_a_form_that_was_asked_for_and_misses_the_bound_is_an_error() -> None:
    with pytest.raises(GateMissedError, match="misses the bound"):
        quantize(digits.demo_model(), data=FEEDS, weight_only="nf4", bound=Bound(min_sqnr=60.0))


def test_without_samples_one_clear_error() -> None:
    with pytest.raises(DataError, match="needs samples"):
        quantize(digits.demo_model())
    with pytest.raises(DataError, match="judged on samples"):
        quantize(digits.demo_model(), objective="size")


@pytest.mark.parametrize(
    "options",
    [{"precision": "int3"}, {"weight_only": "int2"}, {"block": 32}, {"objective": "speed"}, {"isa": "sse"},
     {"weight_only": "int8", "precision": "fp16"}],
)  # fmt: skip
def test_options_that_mean_nothing_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(SpecError):
        quantize(digits.demo_model(), data=FEEDS, **options)  # type: ignore[arg-type]


@pytest.mark.slow
def test_without_vnni_nothing_saturates(tmp_path: Path) -> None:
    from graphopt import saturation
    from graphopt.runtime import Session

    found = quantize(digits.demo_model(), data=FEEDS, isa="avx2", budget=2.0)
    concerned = saturation.layers(found.model.graph)
    if not concerned:
        assert found.report.decision == "lossless"
        return
    names = [layer.codes for layer in concerned]
    session = Session(found.model, optimization="off", extra_outputs=names)
    checked = saturation.check(concerned, [session.run(feed, names) for feed in FEEDS[:2]], rows=64)
    # round-weights may move single codes by one step after the ranges were reduced
    assert max(s.fraction for s in checked.values()) < 0.01


def test_the_command_prints_one_document(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("from graphopt.models.digits.task import accuracy, calibration\n")
    ran = subprocess.run(
        [sys.executable, "-m", "graphopt", "quantize", str(digits.demo_model()), "--data", "mine.py:calibration",
         "--eval", "mine.py:accuracy", "--max-drop", "1%", "--weight-only", "int8", "--json", "-o", "out.onnx"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    document = json.loads(ran.stdout)
    assert document["output"] == "out.onnx"
    assert load(tmp_path / "out.onnx").outputs[0].name == "logits"
    assert document["quality"]["ok"]
