"""What a classifier reads is not cut where samples show too few of its classes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

import graphopt
from graphopt.analysis.channels import find_groups
from graphopt.analysis.shapes import Shapes
from graphopt.data import load_samples
from graphopt.model import Model, load
from graphopt.runtime import evaluate
from graphopt.unseen_classes import unseen

FEATURES = 16


def network(classes: int, tail: str = "") -> Model:
    """Two Gemms with a hidden layer of 32 before the features; the scores of a class are largest where x points."""
    rng = np.random.default_rng(0)
    held = {
        "w0": rng.normal(size=(classes, 32)) / 8, "w1": rng.normal(size=(32, FEATURES)) / 5,
        "w2": rng.normal(size=(FEATURES, classes)),
    }  # fmt: skip
    held["w2"] /= np.linalg.norm(held["w2"], axis=0)  # so that none is larger than all others everywhere
    nodes = [
        helper.make_node("MatMul", ["x", "w0"], ["h0"], name="first"), helper.make_node("Relu", ["h0"], ["r0"]),
        helper.make_node("MatMul", ["r0", "w1"], ["h1"], name="features"), helper.make_node("Relu", ["h1"], ["r1"]),
        helper.make_node("MatMul", ["r1", "w2"], ["s" if tail else "y"], name="head"),
    ]  # fmt: skip
    if tail:
        nodes.append(helper.make_node(tail, ["s"], ["y"]))
    infos = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", classes]) for n in ("x", "y")]
    tensors = [numpy_helper.from_array(values.astype(np.float32), name) for name, values in held.items()]
    graph = helper.make_graph(nodes, "g", infos[:1], infos[1:], tensors)
    return load(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


def feeds(classes: int, shown: int) -> list[dict[str, Any]]:
    """Return samples of so many points, a little moved: as many classes are the largest somewhere, at most."""
    rng = np.random.default_rng(1)
    points = 10.0 * rng.normal(size=(shown, classes)).astype(np.float32)
    return [{"x": points[np.arange(64 * i, 64 * i + 64) % shown] * (1 + i / 100)} for i in range(64)]


def spared(classes: int, shown: int, tail: str = "") -> dict[str, str]:
    model = network(classes, tail)
    groups = find_groups(model, Shapes(model), evaluate)
    assert {group.name for group in groups.prunable()} == {"first", "features"}
    return unseen(model, groups, load_samples(feeds(classes, shown), model))


@pytest.mark.parametrize("tail", ["", "Softmax", "LogSoftmax"])
def test_features_of_classes_that_are_not_shown_stay(tail: str) -> None:
    found = spared(100, 5, tail)
    assert list(found) == ["features"]
    assert "of the 100 classes" in found["features"]
    assert int(found["features"].split()[2]) <= 5


def test_they_are_cut_where_classes_are_few_or_shown() -> None:
    assert not spared(40, 5)
    assert not spared(60, 4096)


@pytest.mark.parametrize("tail", ["Sigmoid", "LpNormalization"])
def test_outputs_that_are_no_classes_do_not_count(tail: str) -> None:
    assert not spared(100, 5, tail)


def test_prune_says_what_it_left_and_cuts_it_when_asked_to() -> None:
    model = network(100, "Softmax")
    samples = feeds(100, 5)
    rows = {row.group: row for row in cut(model, samples).report.groups}
    assert rows["features"].after == FEATURES
    assert "samples show" in rows["features"].why
    assert rows["first"].after < rows["first"].before
    everything = {row.group: row for row in cut(model, samples, only=("*",)).report.groups}
    assert everything["features"].after < FEATURES


def cut(model: Model, samples: Any, **options: Any) -> Any:
    return graphopt.prune(model, data=samples, ratio=0.5, round_to=1, measure=False, **options)
