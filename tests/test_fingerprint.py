"""Fingerprints: equal for what runs alike, different for what does not."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import graphopt
from graphopt.fingerprint import runs_as, structure_of

BASE = """
    <ir_version: 8, opset_import: ["": 17]>
    g (float[N, 64] x, bool c) => (float[N, 64] y, float[N, 64] z)
    {
        a = Relu(x)
        b = Sigmoid(x)
        y = Add(a, b)
        z = If <
            then_branch = t () => (float[N, 64] o) { o = Neg(a) },
            else_branch = e () => (float[N, 64] p) { p = Abs(b) }
        > (c)
    }
"""


def of(text: str) -> str:
    return structure_of(graphopt.load(onnx.parser.parse_model(text)))


def test_names_and_the_order_of_independent_nodes_do_not_count() -> None:
    assert of(BASE.replace("a =", "first =").replace("(a,", "(first,").replace("(a)", "(first)")) == of(BASE)
    swapped = BASE.replace("a = Relu(x)\n        b = Sigmoid(x)", "b = Sigmoid(x)\n        a = Relu(x)")
    assert swapped != BASE
    assert of(swapped) == of(BASE)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Relu(x)", "Tanh(x)"),
        ("Add(a, b)", "Add(b, a)"),
        ("Neg(a)", "Neg(b)"),
        ("Abs(b)", "Exp(b)"),
        ("b = Sigmoid(x)", "b = Sigmoid(a)"),
        ("(float[N, 64] x,", "(float[N, 65] x,"),
        ("a = Relu(x)", "a = Elu <alpha = 2.0> (x)"),
        ('"": 17', '"": 18'),
    ],
)
def test_what_is_computed_counts(old: str, new: str) -> None:
    assert old in BASE
    assert of(BASE.replace(old, new)) != of(BASE)


def test_attributes_count() -> None:
    one = BASE.replace("Relu(x)", "Elu <alpha = 1.0> (x)")
    assert of(one) != of(one.replace("1.0", "1.5"))


def test_a_node_less_counts() -> None:
    assert of(BASE.replace("a = Relu(x)", "a = Relu(x)  d = Relu(x)")) != of(BASE)


def weighted(values: np.ndarray, name: str = "w") -> graphopt.Model:
    text = BASE.replace("y = Add(a, b)", f"s = Add(a, b)  y = MatMul(s, {name})")
    model = onnx.parser.parse_model(text)
    model.graph.initializer.append(numpy_helper.from_array(values, name))
    return graphopt.load(model)


def test_values_of_large_weights_do_not_count_but_denormals_do() -> None:
    ones, twos = np.ones((64, 64), np.float32), np.full((64, 64), 2, np.float32)
    denormal = ones.copy()
    denormal[3, 3] = 1e-40
    assert runs_as(weighted(ones)) == runs_as(weighted(twos, "other"))
    assert runs_as(weighted(ones)) != runs_as(weighted(denormal))
    assert structure_of(weighted(ones)) == structure_of(weighted(twos))
    assert structure_of(weighted(ones)) != structure_of(weighted(np.ones((64, 64), np.float64)))


def test_what_ort_removes_itself_does_not_count() -> None:
    longer = BASE.replace("a = Relu(x)", "i = Identity(x)  a = Relu(i)")
    models = [graphopt.load(onnx.parser.parse_model(text)) for text in (BASE, longer)]
    assert structure_of(models[0]) != structure_of(models[1])
    assert runs_as(models[0]) == runs_as(models[1])
    assert runs_as(models[0], provider="cuda") is None
