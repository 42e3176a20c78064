"""Scales with which floats and integers give the same codes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest

from graphopt.codes import activation_code, weight_code
from graphopt.data import load_samples
from graphopt.exact_codes import PHASES, exact_activation, exact_weight, phase_of
from graphopt.model import Model, load
from graphopt.pipeline import Pipeline, Settings
from graphopt.runtime import Session

Array = np.ndarray[Any, Any]

DEPTH = 10
"""Convolutions: deep enough for single flips to spread."""


def test_activations_get_the_phase_and_an_even_zero_point() -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        low, high = -rng.exponential(2.0) * rng.integers(2), rng.exponential(2.0) + 1e-3
        code = activation_code(low, high)
        for phase in PHASES:
            made = exact_activation(code, phase, bounded=False)
            assert np.log2(float(made.scale) / phase) % 1 == 0
            assert int(made.zero_point) % 2 == 0
            assert 0.9 < float(made.scale) / float(code.scale) <= 2.0
            assert made.low <= 0.9 * code.low + 2 * made.scale
            assert made.high >= 0.9 * code.high - 2 * made.scale


def test_a_range_that_stands_for_a_clip_gets_no_wider() -> None:
    code = activation_code(0.0, 6.0)
    phase = phase_of([(code, True)] * 3 + [(activation_code(0.0, 1.0), False)])
    assert phase == 1.5  # 6 / 256 is 1.5 / 64
    assert float(exact_activation(code, phase, bounded=True).high) == pytest.approx(255 * 6 / 256)
    assert float(exact_activation(code, 1.75, bounded=True).high) <= 6.0


def test_weights_get_the_better_neighbour() -> None:
    values = np.random.default_rng(2).standard_normal((8, 40)).astype(np.float32)
    code = weight_code(values, 0)
    made = exact_weight(code, values)
    assert np.all(np.frexp(made.scale)[0] * 8 % 1 == 0)
    assert np.all(np.abs(made.scale / code.scale - 1) <= 0.25)
    worst = np.square(values - made.approximate(values)).sum(axis=1)
    for factor in (0.5, 2.0):
        other = type(made)((made.scale * factor).astype(np.float32), made.zero_point, 0)
        assert np.all(worst <= np.square(values - other.approximate(values)).sum(axis=1) + 1e-6)
    assert np.all(exact_weight(code, values, code.scale).scale >= code.scale)


def network(opset: int = 17) -> onnx.ModelProto:
    """Return a chain of convolutions, each of whose codes depends on many of the one before."""
    layers, tensors, name = [], [], "x"
    rng = np.random.default_rng(3)
    for number in range(DEPTH):
        inputs = 3 if number == 0 else 16
        tensors += [
            onnx.numpy_helper.from_array((rng.standard_normal(shape) / 5).astype(np.float32), f"{kind}{number}")
            for kind, shape in (("w", (16, inputs, 3, 3)), ("b", (16,)))
        ]
        layers.append(f"c{number} = Conv <pads = [1, 1, 1, 1]> ({name}, w{number}, b{number})")
        layers.append(f"r{number} = Clip (c{number}, low, high)")
        name = f"r{number}"
    text = f"""<ir_version: 8, opset_import: ["": {opset}]>
        network (float[n, 3, 16, 16] x) => (float[n, 16, 16, 16] y) {{ {" ".join(layers)} y = Add (r0, {name}) }}"""
    model = onnx.parser.parse_model(text)
    bounds = [onnx.numpy_helper.from_array(np.asarray(v, np.float32), n) for n, v in (("low", 0.0), ("high", 6.0))]
    model.graph.initializer.extend([*tensors, *bounds])
    return model


def quantized(exact: bool) -> Model:
    feeds = [{"x": np.random.default_rng(4).standard_normal((8, 3, 16, 16)).astype(np.float32)}]
    pipeline = Pipeline(f"quantize-static{{exact={str(exact).lower()}}}, eliminate-dead")
    samples = load_samples(feeds, load(network()))
    return pipeline.run(network(), samples=samples, settings=Settings(verify="off", on_failure="stop")).model


def test_integers_and_floats_agree_bit_for_bit() -> None:
    """The control, with the scales that suit the ranges best, flips codes."""
    x = np.random.default_rng(5).standard_normal((8, 3, 16, 16)).astype(np.float32)
    float_answer = Session(network(), optimization="off").run({"x": x})["y"]
    differing = {}
    for exact in (False, True):
        model = quantized(exact)
        plain, fused = (Session(model, optimization=level).run({"x": x})["y"] for level in ("off", "all"))
        differing[exact] = int(np.count_nonzero(plain != fused))
        assert np.linalg.norm(plain - float_answer) < 0.1 * np.linalg.norm(float_answer)
    assert differing[False] > 0
    assert differing[True] == 0


def test_layers_between_different_phases_are_exact() -> None:
    """Inputs and outputs of one layer may have different phases: its weights hold what makes the quotient short."""
    feeds = [{"x": np.random.default_rng(4).standard_normal((8, 3, 16, 16)).astype(np.float32)}]
    found = set()
    for seed in range(6):
        rng = np.random.default_rng(seed)
        model = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["": 17]>
            network (float[n, 3, 16, 16] x) => (float[n, 8, 14, 14] y) {
                a = Conv (x, w, v) y = Conv <pads = [1, 1, 1, 1]> (a, u, t)
            }""")
        for name, shape in (("w", (8, 3, 3, 3)), ("v", (8,)), ("u", (8, 8, 3, 3)), ("t", (8,))):
            values = (rng.standard_normal(shape) * rng.uniform(0.1, 0.3)).astype(np.float32)
            model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
        pipeline = Pipeline("quantize-static{exact=true}, eliminate-dead")
        made = pipeline.run(model, samples=load_samples(feeds, load(model)), settings=Settings(verify="off")).model
        plain, fused = (Session(made, optimization=level).run(feeds[0])["y"] for level in ("off", "all"))
        assert np.array_equal(plain, fused)
        scales = [t for t in made.proto.graph.initializer if t.name.startswith("code") and t.name.endswith("scale")]
        found.add(len({float(np.frexp(onnx.numpy_helper.to_array(t))[0]) for t in scales}))
    assert max(found) > 1
