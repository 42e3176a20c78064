"""Small graphs before and after each pass, as text, with the near misses; and that both compute the same.

A file of `golden/` has the pipeline, the model in ONNX's text form, the text after, and the near misses.  To
accept new texts: `GRAPHOPT_UPDATE_GOLDEN=1 pytest tests/test_passes_golden.py`, then read the difference.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest

from graphopt.data import load_samples
from graphopt.model import load
from graphopt.pipeline import Pipeline, Result, Settings
from graphopt.registry import all_passes
from graphopt.runtime import Session
from graphopt.samples import Samples
from graphopt.text import to_text

FOLDER = Path(__file__).parent / "golden"
NAMES = sorted(file.stem for file in FOLDER.glob("*.txt"))
BUILT_IN = sorted(n for n, cls in all_passes().items() if cls.__module__.startswith("graphopt.passes"))
"""Other tests register passes of their own."""

UPDATE = "GRAPHOPT_UPDATE_GOLDEN" in os.environ

UNRUNNABLE = {
    "fold-constants-kept": "it has a made-up operator",
    "fold-constants-growth": "it asks for terabytes",
    "fold-constants-fails": "it reads beyond the end",
    "fold-affine-norm-refused": "ORT has no training mode here",
}
"""Models that ORT does not run, as they came."""

TRAINS = {"distill": "distill{steps=2}"}
"""Passes that need torch -> how they are run here."""

NOT_FINITE = {"canonicalize-constants", "canonicalize-division-refused", "fold-affine-refused"}
"""Models whose outputs are infinite or NaN on random feeds: there is nothing to learn."""

LABELLED = {"finetune", "take-gradients"}
"""Passes that need labels, which no graph has of itself: see `test_train_passes.py`."""

TOLERANCE = 1e-6
"""Relative to the largest element: the graphs are a few operators deep, each of which rounds once (6e-8)."""


@dataclass(frozen=True)
class Golden:
    """One file of the folder."""

    pipeline: str
    model: onnx.ModelProto
    before: str
    after: str
    near_misses: str


def read(name: str) -> Golden:
    text = (FOLDER / f"{name}.txt").read_text()
    head, before, rest = text.partition("=== before\n")
    source, _, rest = rest.partition("=== after\n")
    after, _, misses = rest.partition("=== near misses\n")
    assert before, name
    return Golden(head.removeprefix("pipeline:").strip(), onnx.parser.parse_model(source), source, after, misses)


def run(pipeline: str, model: onnx.ModelProto, samples: Samples | None = None) -> Result:
    return Pipeline(pipeline).run(model, samples=samples, settings=Settings(verify="off", on_failure="stop"))


def near_misses(result: Result) -> str:
    return "".join(
        f"{b['where']}: {b['what']}: {b['why']}\n" for record in result.report.passes for b in record.blocked
    )


def feeds(model: onnx.ModelProto, *, size: int = 2, seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    """Return random inputs; symbolic dimensions are `size`."""
    rng = np.random.default_rng(seed)
    found = {}
    initializers = {t.name for t in model.graph.initializer}
    for info in model.graph.input:
        if info.name in initializers:
            continue
        tensor = info.type.tensor_type
        shape = [d.dim_value if d.HasField("dim_value") else size for d in tensor.shape.dim]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        if dtype == np.bool_:
            found[info.name] = np.asarray(rng.integers(0, 2, shape), np.bool_)
        elif dtype.kind == "i":
            found[info.name] = np.asarray(rng.integers(1, 9, shape), dtype)
        else:
            found[info.name] = np.asarray(rng.normal(size=shape) * 3, dtype)
    return found


def assert_same(before: onnx.ModelProto, after: onnx.ModelProto, *, sizes: tuple[int, ...] = (2, 5)) -> None:
    a, b = (Session(m, optimization="off") for m in (before, after))
    assert a.input_names == b.input_names
    assert a.output_names == b.output_names
    for seed, size in enumerate(sizes * 2):
        given = feeds(before, size=size, seed=seed)
        for (name, x), y in zip(a.run(given).items(), b.run(given).values(), strict=True):
            assert x.dtype == y.dtype, name
            assert x.shape == y.shape, name
            if x.dtype.kind == "f":
                largest = np.abs(x[np.isfinite(x)]).max(initial=1e-30)
                np.testing.assert_allclose(y, x, rtol=0, atol=TOLERANCE * largest, err_msg=name)
            else:
                np.testing.assert_array_equal(y, x, err_msg=name)


@pytest.mark.parametrize("name", NAMES)
def test_text(name: str) -> None:
    golden = read(name)
    result = run(golden.pipeline, golden.model)
    after, misses = to_text(result.model), near_misses(result)
    if UPDATE:
        text = f"pipeline: {golden.pipeline}\n=== before\n{golden.before}=== after\n{after}=== near misses\n{misses}"
        (FOLDER / f"{name}.txt").write_text(text)
        return
    assert after == golden.after
    assert misses == golden.near_misses


@pytest.mark.parametrize("name", [n for n in NAMES if n not in UNRUNNABLE])
def test_same_outputs(name: str) -> None:
    golden = read(name)
    assert_same(golden.model, run(golden.pipeline, golden.model).proto)


@pytest.mark.parametrize("pass_name", [p for p in BUILT_IN if p not in LABELLED])
@pytest.mark.parametrize("name", NAMES)
def test_every_pass_keeps_its_promises(name: str, pass_name: str) -> None:
    """On every golden model: valid, same signature, equal outputs; and a second run changes nothing."""
    golden = read(name)
    cls = all_passes()[pass_name]
    if cls.exactness == "lossy" and name in UNRUNNABLE:
        pytest.skip(f"nothing can be observed of it: {UNRUNNABLE[name]}")
    samples = None
    if pass_name in TRAINS:
        pytest.importorskip("torch")
        if name in NOT_FINITE:
            pytest.skip("its outputs are no numbers that could be learned")
    step = TRAINS.get(pass_name, pass_name)
    if cls.exactness == "lossy":
        samples = load_samples([feeds(golden.model, seed=seed) for seed in range(2)], load(golden.model))
    once = run(step, golden.model, samples)
    proto = once.proto
    onnx.checker.check_model(proto, full_check=True)
    if not cls.changes_signature:
        before, after = load(golden.model), once.model
        assert [str(s) for s in before.inputs] == [str(s) for s in after.inputs]
        assert [s.name for s in before.outputs] == [s.name for s in after.outputs]
    twice = run(step, proto, samples)
    assert to_text(twice.model) == to_text(load(proto))
    assert twice.report.passes[0].status != "changed"
    if name not in UNRUNNABLE and cls.exactness == "exact":
        assert_same(golden.model, proto)
