"""Means of channels, taken inside ORT: what NumPy gives for the same tensors, whatever the shapes and the opset."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest

from graphopt.channel_means import collect
from graphopt.data import load_samples
from graphopt.errors import DataError
from graphopt.model import Model, load
from graphopt.runtime import Session
from graphopt.samples import Samples

TEXT = """<ir_version: 9, opset_import: ["": OPSET]> g (float[n, 3, h, w] x) => (float[n, 3, h, w] y) {
    a = Sin(x) b = Mul(a, a) c = Exp(b) y = Neg(c) d = Transpose <perm = [0, 2, 3, 1]> (a) }"""

ROUNDING = 1e-6
"""Float32 sums of some hundred numbers of unit size."""


def model(opset: int) -> Model:
    return load(onnx.parser.parse_model(TEXT.replace("OPSET", str(opset))))


def samples(loaded: Model, shapes: list[tuple[int, ...]]) -> Samples:
    rng = np.random.default_rng(0)
    return load_samples([{"x": np.asarray(rng.normal(size=shape), np.float32)} for shape in shapes], loaded)


def by_numpy(loaded: Model, feeds: Samples, name: str, axis: int) -> np.ndarray[Any, Any]:
    session = Session(loaded, extra_outputs=[name])
    values = [np.moveaxis(session.run(feed)[name], axis, 0).reshape(3, -1) for feed in feeds]
    return np.asarray(np.concatenate(values, axis=1).mean(axis=1, dtype=np.float64))


@pytest.mark.parametrize("opset", [13, 17, 18])
def test_means_of_ragged_samples_are_those_of_all_values(opset: int) -> None:
    loaded = model(opset)
    feeds = samples(loaded, [(1, 3, 4, 5), (2, 3, 7, 2), (1, 3, 1, 1)])
    found = collect(loaded, feeds, {"b": (1, 4), "d": (-1, 4), "c": (1, 4)})
    for name, axis in (("b", 1), ("c", 1), ("d", 3)):
        np.testing.assert_allclose(found[name], by_numpy(loaded, feeds, name, axis), atol=ROUNDING)


def test_limit_takes_the_first_samples_only() -> None:
    loaded = model(17)
    feeds = samples(loaded, [(1, 3, 4, 4), (1, 3, 4, 4)])
    found = collect(loaded, feeds, {"b": (1, 4)}, limit=1)["b"]
    np.testing.assert_allclose(found, by_numpy(loaded, feeds.limit(1), "b", 1), atol=ROUNDING)
    assert np.abs(found - by_numpy(loaded, feeds, "b", 1)).max() > 100 * ROUNDING


def test_the_model_is_left_as_it_is_and_nothing_asked_is_nothing_run() -> None:
    loaded = model(17)
    before = loaded.proto.SerializeToString()
    feeds = samples(loaded, [(1, 3, 2, 2)])
    assert collect(loaded, feeds, {}) == {}
    collect(loaded, feeds, {"a": (1, 4)})
    assert loaded.proto.SerializeToString() == before


def test_no_samples_is_an_error() -> None:
    with pytest.raises(DataError, match="no samples"):
        collect(model(17), Samples(lambda: iter(()), "none"), {"a": (1, 4)})
