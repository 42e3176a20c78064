"""Random graphs of normalisations as exporters spell them: the passes keep all outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from hypothesis import given, settings
from hypothesis import strategies as st

from .rewrites import assert_equal_outputs, parsed, run
from .test_random_activations import renamed

PIPELINE = (
    "repeat(canonicalize, fold-constants, eliminate-identity, fuse-activations, fuse-softmax, fuse-normalization, "
    "fold-affine, eliminate-common, eliminate-dead), lower-normalization, lower-softmax, eliminate-dead"
)
LENGTHS = {"[1]": 4, "[3]": 5, "[-1]": 5, "[2, 3]": 15, "[1, 2, 3]": 60, "[1, 3]": 20}
SQUARES = ("p = Pow({0}, two)", "p = Mul({0}, {0})")
ROOTS = (
    "s = Sqrt(e) q = Div(d, s)",
    "s = Sqrt(e) i = Reciprocal(s) q = Mul(i, d)",
    "s = Sqrt(e) i = Div(one, s) q = Mul(d, i)",
    "s = Sqrt(e) i = Reciprocal(s) j = Mul(i, cw) q = Mul(d, j)",
)
BEHIND = ("y = Identity(q)", "y = Mul(q, cw)", "t = Mul(q, cw) y = Add(t, cb)", "t = Mul(rw, q) y = Add(t, cb)")
STEPS = ("y = Relu(x)", "y = Add(x, cb)", "y = Mul(x, rw)", "y = Softmax<axis=1>(x)")
GROUP = "r = Reshape(x, into) n = InstanceNormalization(r, unit, none) q = Reshape(n, back) "

NUMBERS = {
    "two": 2.0, "one": 1.0, "eps": 1e-3, "cw": np.linspace(0.5, 2, 4).reshape(4, 1, 1),
    "cb": np.linspace(-0.5, 2, 4).reshape(1, 4, 1, 1), "rw": np.linspace(0.5, 1.5, 5), "none": np.zeros(2),
    "unit": np.ones(2), "into": np.array([0, 2, -1]), "back": np.array([0, 4, 3, 5]),
    **{f"over{length}": 1 / length for length in LENGTHS.values()},
}  # fmt: skip


@st.composite
def blocks(draw: Callable[..., Any]) -> str:
    """One normalisation in a random spelling, one in eight of them wrong on purpose."""

    def pick(options: tuple[str, ...]) -> str:
        return str(options[draw(st.integers(0, len(options) - 1))])

    axes = pick(tuple(LENGTHS))
    other = pick(tuple(LENGTHS)) if draw(st.integers(0, 7)) == 0 else axes
    kind = draw(st.integers(0, 9))
    if kind == 0:
        return pick(STEPS)
    if kind == 1:
        return GROUP + pick(BEHIND)
    mean = f"m = ReduceMean<axes={axes}>(x) d = Sub(x, m)"
    square = pick(SQUARES).format("d")
    variance = f"v = ReduceMean<axes={other}>(p)"
    if kind == 2:  # moments
        square, variance = (
            pick(SQUARES).format("x"),
            f"v0 = ReduceMean<axes={other}>(p) mm = Mul(m, m) v1 = Sub(v0, mm)",
        )
        variance += " v = Relu(v1)"
    if kind == 3:  # root mean square
        mean, square = "d = Identity(x)", pick(SQUARES).format("x")
    return f"{mean} {square} {variance} e = Add(v, eps) {pick(ROOTS)} {pick(BEHIND)}"


@st.composite
def models(draw: Callable[..., Any]) -> onnx.ModelProto:
    value, texts, outputs = "x", [], []
    for number in range(draw(st.integers(1, 4))):
        text, made = renamed(draw(blocks()), number, value)
        texts.append(text)
        if draw(st.integers(0, 4)) == 0:
            texts.append(f"sum_{number} = Add({made}, {value})")
            made = f"sum_{number}"
        if draw(st.integers(0, 4)) == 0:
            outputs.append(made)
        value = made
    batch = "N" if draw(st.booleans()) else "2"
    return parsed(
        " ".join(texts),
        inputs=f"float[{batch},4,3,5] x",
        outputs=", ".join(f"float[{batch},4,3,5] {n}" for n in dict.fromkeys([*outputs, value])),
        constants=NUMBERS,
    )


@settings(max_examples=250)
@given(models())
def test_outputs_stay(model: onnx.ModelProto) -> None:
    """1e-4: four norms in a row divide by small spreads, which enlarges what one rounds."""
    after = run(model, PIPELINE)
    assert_equal_outputs(model, after.model.proto, tolerance=1e-4)
    onnx.checker.check_model(after.model.proto, full_check=True)
