"""Operators in torch against ORT: random attributes and shapes, opsets 9 to 23, host values, gradients."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from graphopt.errors import GraphoptError
from graphopt.runtime import Session

torch = pytest.importorskip("torch")

from graphopt.bridge.coverage import computed, refused  # noqa: E402  (torch may be missing)
from graphopt.bridge.graph import TrainableGraph  # noqa: E402
from graphopt.bridge.ops import OPS  # noqa: E402
from graphopt.bridge.refusals import REFUSED  # noqa: E402

Array = np.ndarray[Any, Any]

TOLERANCE = 2e-5
"""Of the largest element: a few roundings of float32."""

CONSTANT = frozenset({"Resize", "Upsample", "EmbedLayerNormalization"})
"""Operators of which all but the first input are constants here: settings, or tables whose size ORT has to know."""


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@dataclass
class Case:
    """One node with what it reads; what is small and no data is a constant, as in real models."""

    op: str
    inputs: Sequence[Array | None]
    opset: int = 17
    attributes: dict[str, Any] = field(default_factory=dict)
    outputs: int = 1
    domain: str = ""

    def model(self) -> tuple[onnx.ModelProto, dict[str, Array]]:
        """Return the model, its shapes open, and its feeds."""
        names = [f"x{i}" if value is not None else "" for i, value in enumerate(self.inputs)]
        given = {name: value for name, value in zip(names, self.inputs, strict=True) if value is not None}
        held = {n: v for n, v in given.items() if n != "x0" and (v.dtype.kind in "ib" or v.size <= 1) and v.ndim <= 1}
        if self.op in CONSTANT:
            held |= {n: v for n, v in given.items() if n != "x0"}
        outputs = [f"y{i}" for i in range(self.outputs)]
        node = helper.make_node(self.op, names, outputs, domain=self.domain, **self.attributes)
        free = {name: value for name, value in given.items() if name not in held}
        graph = helper.make_graph(
            [node], self.op, [_info(name, value) for name, value in free.items()],
            [helper.make_empty_tensor_value_info(name) for name in outputs],
            [numpy_helper.from_array(value, name) for name, value in held.items()],
        )  # fmt: skip
        imports = [helper.make_opsetid("", self.opset), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=imports, ir_version=8 if self.opset < 19 else 10), free

    def difference(self) -> float | None:
        """Return how far the bridge is from ORT, relative to the largest element; None where ORT does not run it."""
        model, feeds = self.model()
        try:
            wanted = list(Session(model, optimization="off").run(feeds).values())
        except GraphoptError:
            return None
        with torch.no_grad():
            found = [value.numpy() for value in TrainableGraph(model).module(feeds).values()]
        assert [(a.shape, a.dtype) for a in wanted] == [(b.shape, b.dtype) for b in found], self
        return max(_distance(a, b) for a, b in zip(wanted, found, strict=True))


def _info(name: str, value: Array) -> onnx.ValueInfoProto:
    kind = helper.np_dtype_to_tensor_dtype(value.dtype)
    return helper.make_tensor_value_info(name, kind, [f"{name}_{i}" for i in range(value.ndim)])


def _distance(a: Array, b: Array) -> float:
    x, y = a.astype(np.float64), b.astype(np.float64)
    finite = np.isfinite(x)
    if not np.array_equal(x[~finite], y[~finite], equal_nan=True):
        return float("inf")
    largest = float(np.abs(x[finite]).max(initial=0.0))
    return float(np.abs(x[finite] - y[finite]).max(initial=0.0)) / max(largest, 1e-30)


class Draw:
    """Random parts of cases, from a seed."""

    def __init__(self, *seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def of(self, *choices: Any) -> Any:
        """Return one of the choices."""
        return choices[int(self.rng.integers(len(choices)))]

    def ints(self, count: int, low: int, high: int) -> list[int]:
        """Return numbers with low <= n < high."""
        return [int(n) for n in self.rng.integers(low, high, count)]

    def floats(self, *shape: int) -> Array:
        return self.rng.standard_normal(shape).astype(np.float32)

    def maybe(self, name: str, value: Callable[[], Any]) -> dict[str, Any]:
        """Return an attribute, or none."""
        return {name: value()} if self.of(0, 1) else {}


def _windows(d: Draw, count: int, kernel: list[int]) -> dict[str, Any]:
    """Return strides and one kind of pads."""
    pads = d.of(
        {}, {"pads": [d.ints(1, 0, k)[0] for k in kernel * 2]}, {"auto_pad": d.of("SAME_UPPER", "SAME_LOWER", "VALID")}
    )
    return {**d.maybe("strides", lambda: d.ints(count, 1, 4)), **pads}


def conv(d: Draw) -> Case:
    count, group = d.of(1, 2, 2, 3), d.of(1, 2)
    kernel = d.ints(count, 1, 4)
    attributes = {"group": group, **_windows(d, count, kernel), **d.maybe("kernel_shape", lambda: kernel)}
    attributes |= d.maybe("dilations", lambda: d.ints(count, 1, 3))
    x, w = d.floats(2, 2 * group, *d.ints(count, 7, 10)), d.floats(3 * group, 2, *kernel)
    return Case("Conv", [x, w, *d.of([], [d.floats(3 * group)])], d.of(9, 11, 22), attributes)


def conv_transpose(d: Draw) -> Case:
    count, group = d.of(1, 2, 2, 3), d.of(1, 2)
    kernel, sizes = d.ints(count, 1, 4), d.ints(count, 2, 6)
    attributes = {"group": group, **_windows(d, count, kernel), **d.maybe("dilations", lambda: d.ints(count, 1, 3))}
    strides, dilations = attributes.get("strides", [1] * count), attributes.get("dilations", [1] * count)
    most = [max(s, t) for s, t in zip(strides, dilations, strict=True)]
    attributes |= d.maybe("output_padding", lambda: [d.ints(1, 0, m)[0] for m in most])
    if d.of(0, 0, 1):
        full = [(n - 1) * s + (k - 1) * t + 1 for n, s, k, t in zip(sizes, strides, kernel, dilations, strict=True)]
        attributes["output_shape"] = [n + d.ints(1, -1, 2)[0] for n in full]
    x, w = d.floats(2, 2 * group, *sizes), d.floats(2 * group, 3, *kernel)
    return Case("ConvTranspose", [x, w, *d.of([], [d.floats(3 * group)])], d.of(9, 11, 22), attributes)


def pool(d: Draw) -> Case:
    op = d.of("MaxPool", "MaxPool", "AveragePool", "AveragePool", "LpPool")
    count = d.of(1, 2, 2, 3)
    kernel = d.ints(count, 1, 4)
    opset = d.of(*{"MaxPool": (9, 10, 12, 22), "AveragePool": (9, 10, 11, 19, 22), "LpPool": (11, 18, 22)}[op])
    attributes = {"kernel_shape": kernel, **_windows(d, count, kernel)}
    if "auto_pad" not in attributes and opset >= (18 if op == "LpPool" else 10):
        attributes |= d.maybe("ceil_mode", lambda: 1)
    if opset >= {"MaxPool": 10, "AveragePool": 19, "LpPool": 18}[op]:
        attributes |= d.maybe("dilations", lambda: d.ints(count, 1, 3))
    if op == "AveragePool":
        attributes |= d.maybe("count_include_pad", lambda: 1)
    if op == "LpPool":
        attributes["p"] = d.of(1, 2, 3)
    indices = op == "MaxPool" and d.of(0, 1)
    if indices:
        attributes["storage_order"] = d.of(0, 1)
    return Case(op, [d.floats(2, 3, *d.ints(count, 6, 12))], opset, attributes, outputs=1 + int(indices))


def pad(d: Draw) -> Case:
    opset, rank = d.of(10, 11, 13, 18, 19, 21), d.of(1, 2, 3, 4, 5)
    mode = d.of("constant", "reflect", "edge", *(["wrap"] if opset >= 19 else []))
    pads = d.ints(2 * rank, -1 if mode == "constant" else 0, 3)
    x = d.floats(*d.ints(rank, 3, 6))
    if opset == 10:
        return Case("Pad", [x], opset, {"pads": pads, "mode": mode, "value": 1.5})
    inputs = [x, np.array(pads), np.array(d.of(0, 2), np.float32) if mode == "constant" else None]
    if opset >= 18 and d.of(0, 1):
        axes = d.rng.permutation(rank)[: max(1, rank - 1)]
        inputs[1:] = [np.array(pads[: len(axes)] + pads[rank : rank + len(axes)]), inputs[2], axes]
    return Case("Pad", inputs, opset, {"mode": mode})


def recurrent(d: Draw) -> Case:
    op = d.of("LSTM", "GRU", "RNN")
    gates, each = {"LSTM": (4, 3), "GRU": (3, 2), "RNN": (1, 1)}[op]
    direction = d.of("forward", "reverse", "bidirectional")
    two = 2 if direction == "bidirectional" else 1
    steps, batch, width, hidden = d.ints(4, 1, 6)
    inputs: list[Array | None] = [
        d.floats(steps, batch, width), d.floats(two, gates * hidden, width), d.floats(two, gates * hidden, hidden) / 4,
        d.of(None, d.floats(two, 2 * gates * hidden)),
        d.of(None, np.array(d.ints(batch, 1, steps + 1), np.int32)), d.of(None, d.floats(two, batch, hidden)),
    ]  # fmt: skip
    attributes: dict[str, Any] = {"hidden_size": hidden, "direction": direction}
    if op == "LSTM":
        inputs += [d.of(None, d.floats(two, batch, hidden)), d.of(None, None, d.floats(two, 3 * hidden))]
        attributes["input_forget"] = d.of(0, 0, 1)
    if op == "GRU":
        attributes["linear_before_reset"] = d.of(0, 1)
    attributes |= d.of({}, {}, {"clip": 0.4}) | d.of({}, {}, _activations(d, each * two))
    while inputs[-1] is None:
        inputs.pop()
    return Case(op, inputs, d.of(9, 14, 22), attributes, outputs=3 if op == "LSTM" else 2)


def _activations(d: Draw, count: int) -> dict[str, Any]:
    takes = {"HardSigmoid": 2, "ScaledTanh": 2, "Affine": 2, "LeakyRelu": 1, "Elu": 1, "ThresholdedRelu": 1}
    names = [d.of("Sigmoid", "Tanh", "Relu", "Softsign", *takes) for _ in range(count)]
    given = {
        "activation_alpha": [0.3 + 0.1 * i for i, name in enumerate(names) if name in takes],
        "activation_beta": [0.6 - 0.1 * i for i, name in enumerate(names) if takes.get(name) == 2],
    }
    return {"activations": names, **{name: values for name, values in given.items() if values}}


def resize(d: Draw) -> Case:
    opset, count = d.of(9, 10, 11, 13, 18, 19), d.of(1, 2, 2, 2, 3)
    x = d.floats(d.of(1, 2), d.of(1, 3), *d.ints(count, 2, 9))
    if opset < 11:
        scales = [1, 1, *(d.of(1, 1.5, 2, 3) if opset == 9 else d.of(0.5, 1, 1.5, 2.3) for _ in range(count))]
        mode = d.of("nearest", "linear")
        return Case("Upsample" if opset == 9 else "Resize", [x, np.array(scales, np.float32)], opset, {"mode": mode})
    mode, places = d.of("nearest", "nearest", "linear", "cubic"), d.of(*_places(opset))
    attributes = {"mode": mode, "coordinate_transformation_mode": places}
    attributes |= {"nearest_mode": d.of("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")}
    attributes |= {"cubic_coeff_a": d.of(-0.5, -0.75), "exclude_outside": d.of(0, 1) if mode == "cubic" else 0}
    if opset >= 18 and mode != "nearest" and count == 2 and "crop" not in places:
        attributes["antialias"] = d.of(0, 1)
    named = opset >= 18 and d.of(0, 1)
    attributes |= {"axes": list(range(2, x.ndim))} if named else {}
    front = [] if named else [1.0, 1.0]
    empty = np.zeros(0, np.float32) if opset < 13 else None
    roi = empty
    if "crop" in places:
        attributes["extrapolation_value"] = 3.0
        starts, ends = d.rng.uniform(-0.2, 0.4, count), d.rng.uniform(0.5, 1.3, count)
        roi = np.array([*np.zeros(len(front)), *starts, *front, *ends], np.float32)
    if d.of(0, 1):
        if named:
            attributes["keep_aspect_ratio_policy"] = d.of("stretch", "not_larger", "not_smaller")
        sizes = np.array([*([] if named else x.shape[:2]), *d.ints(count, 2, 12)])
        return Case("Resize", [x, roi, empty, sizes], opset, attributes)
    scales = [*front, *(d.of(0.5, 0.6, 1, 1.5, 2, 2.3, 3) for _ in range(count))]
    return Case("Resize", [x, roi, np.array(scales, np.float32)], opset, attributes)


def _places(opset: int) -> Iterator[str]:
    yield from ("half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric", "tf_crop_and_resize")
    if opset < 13:
        yield "tf_half_pixel_for_nn"
    if opset >= 19:
        yield "half_pixel_symmetric"


def reduction(d: Draw) -> Case:
    kinds = ("Sum", "Mean", "Max", "Min", "Prod", "L1", "L2", "LogSum", "LogSumExp", "SumSquare")
    op, opset, rank = f"Reduce{d.of(*kinds)}", d.of(9, 11, 13, 18, 20), d.of(1, 2, 4)
    axes = d.of(None, [int(i) for i in d.rng.permutation(rank)[: d.of(1, rank)]])
    x = np.abs(d.floats(*d.ints(rank, 1, 5))) + 0.1
    x = x if d.of(0, 0, 1) == 0 or "Log" in op else (x * 4).astype(d.of(np.int32, np.int64))
    attributes: dict[str, Any] = {"keepdims": d.of(0, 1)}
    if opset >= (13 if op == "ReduceSum" else 18):
        attributes["noop_with_empty_axes"] = d.of(0, 1)
        return Case(op, [x, None if axes is None else np.array(axes)][: 1 + (axes is not None)], opset, attributes)
    return Case(op, [x], opset, attributes | ({} if axes is None else {"axes": axes}))


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 8))])
@pytest.mark.parametrize("make", [conv, conv_transpose, pool, pad, recurrent, resize, reduction])
def test_random_nodes_equal_ort(make: Callable[[Draw], Case], seed: int) -> None:
    ran = 0
    for index in range(25):
        case = make(Draw(zlib.crc32(make.__name__.encode()), seed, index))
        found = case.difference()
        ran += found is not None
        assert found is None or found < TOLERANCE, (found, case)
    assert ran >= 15, "ORT runs most of them"


def test_the_page_lists_the_operators() -> None:
    page = (Path(__file__).parent.parent / "docs" / "bridge.md").read_text()
    assert computed() in page, "print it with python -m graphopt.bridge.coverage"
    assert refused() in page, "print it with python -m graphopt.bridge.coverage"
    assert not {op for domain, op in OPS if not domain} & REFUSED.keys(), "computed or refused"
