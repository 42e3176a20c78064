"""Samples in two halves that differ, and losses that must hold from one to the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import pytest

from graphopt.analysis.channels import find_groups
from graphopt.analysis.shapes import Shapes
from graphopt.channel_noise import losses
from graphopt.data import load_samples
from graphopt.dissimilar import LEAST, cuts_by_rows, split_apart
from graphopt.model import Model, load
from graphopt.observation import Observer
from graphopt.pipeline import Settings, context_of
from graphopt.runtime import Session, evaluate

Array = np.ndarray[Any, Any]
WIDTH = 16


def network(batch: str = "N") -> Model:
    text = f"""
        <ir_version: 8, opset_import: ["": 17]>
        net (float[{batch}, {WIDTH}] x) => (float[{batch}, 4] y) {{ a = MatMul(x, w1)  r = Relu(a)  y = MatMul(r, w2) }}
    """
    proto = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    w1 = np.zeros((WIDTH, 32))
    w1[: WIDTH // 2, :16] = rng.standard_normal((WIDTH // 2, 16))  # half of the units see one half of the input each
    w1[WIDTH // 2 :, 16:] = rng.standard_normal((WIDTH // 2, 16))
    for name, values in {"w1": w1, "w2": rng.standard_normal((32, 4))}.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(values.astype(np.float32), name))
    return load(proto)


def feeds(count: int, *, batch: int = 1) -> list[dict[str, Array]]:
    """Samples of two kinds in turn: with the first half of the input, or with the second."""
    rng = np.random.default_rng(1)
    x = np.abs(rng.standard_normal((count * batch, WIDTH))).astype(np.float32)
    x[::2, WIDTH // 2 :] = 0.0
    x[1::2, : WIDTH // 2] = 0.0
    return [{"x": x[i : i + batch]} for i in range(0, len(x), batch)]


def kind(feed: Mapping[str, Array]) -> int:
    return int(feed["x"][0, : WIDTH // 2].sum() == 0.0)


@pytest.mark.parametrize("batch", [1, 8])
def test_like_samples_lie_in_one_half(batch: int) -> None:
    model = network()
    samples = load_samples(feeds(80 // batch, batch=batch), model)
    found = split_apart(model, samples, Session(model).run)
    assert found is not None
    halves = [[kind(feed) for feed in half] for half in found]
    assert sorted(sum(half) / len(half) for half in halves) == [0.0, 1.0]
    assert sum(map(len, halves)) == 80
    assert all(feed["x"].shape == (1, WIDTH) for half in found for feed in half)


def test_feeds_of_a_fixed_batch_are_not_cut() -> None:
    model = network("2")
    assert not cuts_by_rows(model)
    samples = load_samples(feeds(40, batch=2), model)
    found = split_apart(model, samples, Session(model).run)
    assert found is not None
    assert sum(len(list(half)) for half in found) == 40


def test_few_samples_are_not_split_and_equal_ones_are() -> None:
    model = network()
    assert split_apart(model, load_samples(feeds(LEAST - 1), model), Session(model).run) is None
    same = split_apart(model, load_samples([feeds(1)[0]] * 20, model), Session(model).run)
    assert same is not None
    assert [len(list(half)) for half in same] == [10, 10]


def test_what_only_unseen_samples_need_is_not_taken_for_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the units do nothing on each kind of sample: judged on the other kind, cutting them costs all of it."""
    model = network()
    groups = find_groups(model, Shapes(model), evaluate).prunable()
    ctx = context_of(model, load_samples(feeds(80), model), Settings())
    crossed = losses(groups, ctx)[groups[0].name]
    monkeypatch.setattr(Observer, "halves", lambda _: None)
    plain = losses(groups, ctx)[groups[0].name]
    half = groups[0].size // 2
    assert crossed.loss(half) > 0.4
    assert plain.loss(half) < 0.5 * crossed.loss(half)
