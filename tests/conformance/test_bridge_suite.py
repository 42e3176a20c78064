"""The node models of the ONNX backend test suite as torch modules: the suite's outputs, or ORT's where those differ.

By default each model runs with its small integer inputs as constants (shapes, axes, indices), which real models have:
they travel as Python numbers.  The slow half gives them as feeds, which is another way through the operators.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from graphopt.errors import GraphoptError
from graphopt.ops import NONDETERMINISTIC, STEPS
from graphopt.runtime import Session

from .test_backend_suite import load_cases

torch = pytest.importorskip("torch")

from graphopt.bridge.graph import TrainableGraph  # noqa: E402  (torch may be missing)

Array = np.ndarray[Any, Any]

AT_LEAST = {True: 1480, False: 1515}
"""Models that are equal, with integers as constants (some have no other inputs, and are left out) and as feeds."""

TOLERANCE = 2e-5
"""Allowed difference, relative to the largest element."""

COARSE = {"16": 1e-2, "softmax_precision": 1e-2, "roialign": 1e-4}
"""Where the suite's outputs are rounded (half precision, four digits) -> what is allowed."""

WIDER = re.compile(r"U?INT4|quantizelinear_u?int(4|16)|bitwise_not_3d")
"""Models of integers that torch lacks: wider types hold them, and what overflows is another number."""

NO_GRADIENT = STEPS | NONDETERMINISTIC | {
    "Shape", "Size", "ConstantOfShape", "EyeLike", "Cast", "CastLike", "Not", "Hardmax", "Range", "OneHot",
}  # fmt: skip
"""Operators with outputs that no gradient goes through to their first input of floats."""


@dataclass
class Tally:
    """What came of the models of a chunk."""

    equal: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    unknown: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def _array(value: Any) -> Any:
    if isinstance(value, onnx.TensorProto):
        return numpy_helper.to_array(value)
    return np.asarray(value) if isinstance(value, np.generic) else value


def _with_constants(model: onnx.ModelProto, feeds: dict[str, Any]) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """Return a model with its small integer inputs as constants, and the feeds that are left."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    left = dict(feeds)
    for info in list(changed.graph.input):
        value = feeds[info.name]
        if isinstance(value, np.ndarray) and value.dtype in (np.int64, np.int32, np.bool_) and value.ndim <= 1:
            changed.graph.input.remove(info)
            changed.graph.initializer.append(numpy_helper.from_array(left.pop(info.name), info.name))
    return changed, left


def _problem(name: str, wanted: Sequence[Any], found: Sequence[Any]) -> str | None:
    """Return in what outputs differ."""
    tolerance = next((value for sign, value in COARSE.items() if sign in name), TOLERANCE)
    for value, tensor in zip(map(_array, wanted), found, strict=True):
        if value.shape != tuple(tensor.shape):
            return f"{tuple(tensor.shape)}, not {value.shape}"
        if value.dtype.kind == "f" and value.itemsize >= 4 and str(tensor.dtype) != f"torch.{value.dtype.name}":
            return f"{tensor.dtype}, not {value.dtype}"
        a, b = value.astype(np.float64), tensor.double().numpy()
        finite = np.isfinite(a)
        if not np.array_equal(a[~finite], b[~finite], equal_nan=True):
            return "infinities or NaNs differ"
        error = float(np.abs(a[finite] - b[finite]).max(initial=0.0))
        if error > tolerance * max(float(np.abs(a[finite]).max(initial=0.0)), 1e-30):
            return f"differs by {error:.1e}"
    return None


def _gradient_problem(model: onnx.ModelProto, feeds: dict[str, Any], module: Any) -> str | None:
    """Return what is wrong with the gradient of the first input of floats."""
    tensors = {
        name: torch.tensor(v) for name, v in feeds.items() if isinstance(v, np.ndarray) and v.dtype == np.float32
    }
    if not tensors or {node.op_type for node in model.graph.node} & NO_GRADIENT:
        return None
    first = next(iter(tensors.values())).requires_grad_()
    outputs = [y for y in module({**feeds, **tensors}).values() if y.is_floating_point() and y.numel()]
    if not outputs or not first.numel():
        return None
    if not any(y.requires_grad for y in outputs):
        return "no gradient"
    (gradient,) = torch.autograd.grad(sum(y.sum() for y in outputs if y.requires_grad), [first])
    return None if gradient.shape == first.shape else "a gradient of another shape"


def _by_ort(model: onnx.ModelProto, feeds: dict[str, Any]) -> list[Any]:
    return list(Session(model, optimization="off").run(feeds).values())


def _run_case(case: Any, tally: Tally, *, constant: bool) -> None:
    names = [info.name for info in case.model.graph.input]
    for inputs, wanted in case.data_sets:
        whole = dict(zip(names, map(_array, inputs), strict=True))
        if not all(isinstance(value, np.ndarray) for value in whole.values()):
            continue  # sequences
        model, feeds = _with_constants(case.model, whole) if constant else (case.model, whole)
        if not feeds:
            continue
        try:
            module = TrainableGraph(model).module.eval()
            with torch.no_grad():
                found = list(module(feeds).values())
            problem = _problem(case.name, wanted, found)
            problem = problem and _problem(
                case.name, list(Session(case.model, optimization="off").run(whole).values()), found
            )
            problem = problem or _gradient_problem(model, feeds, module)
        except GraphoptError as error:
            tally.refused[error.what.split(":")[0]] += 1
            if "does not know" in error.what or "cannot compute" in error.what:
                tally.unknown.append(f"{case.name}: {error.what}")
            continue
        tally.equal += problem is None
        if problem is not None:
            tally.wrong.append(f"{case.name}: {problem}")


@pytest.mark.conformance
@pytest.mark.parametrize("constant", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_nodes_of_the_suite(constant: bool, record_property: Callable[[str, object], None]) -> None:
    torch.set_num_threads(1)
    tally = Tally()
    for case in load_cases():
        if case.kind == "node" and not WIDER.search(case.name) and not _draws(case.model):
            _run_case(case, tally, constant=constant)
    record_property("summary", f"bridge: {tally.equal} node models equal; refused: {dict(tally.refused)}")
    assert not tally.wrong, "\n".join(tally.wrong)
    assert not tally.unknown, "\n".join(tally.unknown)
    assert tally.equal >= AT_LEAST[constant]


def _draws(model: onnx.ModelProto) -> bool:
    return any(node.op_type in NONDETERMINISTIC for node in model.graph.node)
