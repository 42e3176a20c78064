"""Random graphs of activations as exporters spell them: the passes keep all outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx
from hypothesis import given, settings
from hypothesis import strategies as st

from .rewrites import Array, assert_equal_outputs, parsed, run
from .test_fuse_activations import CUBES, HALVES, LOWERED, NUMBERS, SPELLINGS
from .test_fuse_softmax import AXES
from .test_fuse_softmax import SPELLINGS as SOFTMAXES

PIPELINE = (
    "repeat(canonicalize, fold-constants, eliminate-identity, fuse-activations, fuse-gelu, fuse-softmax, "
    "fold-affine, eliminate-common, eliminate-dead), lower-activations, lower-softmax, eliminate-dead"
)

GELUS = [f"{cube} u = Tanh(t) {half}" for cube in CUBES.values() for half in HALVES.values()]
BLOCKS = [
    *(body.replace("three0", "three_") for body, _ in SPELLINGS),
    *(body for body, opset, _ in LOWERED if opset <= 17),
    *(body for body, _ in SOFTMAXES if "first" not in body),
    *GELUS,
]
STEPS = ["y = Add(x, side)", "y = Mul(x, channel)", "y = Add(x, half)", "y = Neg(x)", "y = MatMul(x, weight)"]


def renamed(body: str, number: int, given: str) -> tuple[str, str]:
    """Return a block with names of its own that reads `given`, and the name of what it makes."""
    model = parsed(body)
    own = {o: f"{o}_{number}" for node in model.graph.node for o in node.output}
    names = {**own, "x": given}
    for node in model.graph.node:
        node.input[:] = [names.get(i, i) for i in node.input]
        node.output[:] = [own[o] for o in node.output]
    text = onnx.printer.to_text(model).split("{", 1)[1].rsplit("}", 1)[0]
    return text, own["y"]


@st.composite
def models(draw: Callable[..., int], pools: Sequence[Sequence[str]], most: int = 6) -> onnx.ModelProto:
    """A chain of blocks and steps; some intermediate values are graph outputs, too, or read twice."""
    value, texts, outputs = "x", [], []
    for number in range(draw(st.integers(1, most))):
        pool = pools[draw(st.integers(0, len(pools) - 1))]
        text, made = renamed(pool[draw(st.integers(0, len(pool) - 1))], number, value)
        texts.append(text)
        if draw(st.integers(0, 5)) == 0:
            texts.append(f"sum_{number} = Add({made}, {value})")
            made = f"sum_{number}"
        if draw(st.integers(0, 5)) == 0:
            outputs.append(made)
        value = made
    names = [*dict.fromkeys([*outputs, value])]
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    weight: Array = rng.normal(size=(6, 6)) * 0.4
    constants = {**NUMBERS, **AXES, "three_": 3.0, "side": rng.normal(size=6), "weight": weight}
    batch = "N" if draw(st.booleans()) else "2"
    return parsed(
        " ".join(texts),
        inputs=f"float[{batch},4,6] x",
        outputs=", ".join(f"float[{batch},4,6] {n}" for n in names),
        constants=constants,
    )


@settings(max_examples=250)
@given(models([BLOCKS, STEPS]))
def test_outputs_stay(model: onnx.ModelProto) -> None:
    """1e-4: a chain of six may amplify what one rounds (up to 1e-5 each); log of a softmax most."""
    after = run(model, PIPELINE)
    assert_equal_outputs(model, after.model.proto, tolerance=1e-4, scales=(1.0,))
    onnx.checker.check_model(after.model.proto, full_check=True)
