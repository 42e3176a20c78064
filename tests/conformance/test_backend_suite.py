"""The ONNX backend test suite through the default pipeline: every model that ORT runs gives the same outputs.

Run in chunks, so that pytest-xdist can share them out.  The chunk that ends last adds up what all counted, checks
that every pass fired (an optimizer that does nothing would pass, too) and puts the figures into the summary.
"""

from __future__ import annotations

import functools
import json
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from graphopt.errors import GraphoptError
from graphopt.ops import NONDETERMINISTIC
from graphopt.optimizer import default_pipeline
from graphopt.pipeline import Settings
from graphopt.registry import all_passes
from graphopt.runtime import Session

KINDS = ("node", "simple", "pytorch-operator", "pytorch-converted")

TOLERANCE = {"float64": 1e-7, "float32": 1e-5, "float16": 2e-3, "bfloat16": 2e-2}
"""Allowed difference, relative to the largest element of the output: a few roundings of each type.  All else
must be equal."""

RANDOM = NONDETERMINISTIC | {"Dropout"}

CHUNKS = 16

AT_LEAST = 1464
"""Models that ORT runs; their number grows with the suite."""

NOT_IN_SUITE = {
    "eliminate-casts", "expand-einsum", "flush-denormals", "fuse-convs", "fuse-linear", "lower-affine",
    "lower-attention", "lower-conv1d", "lower-normalization", "lower-pools", "lower-upsampling", "merge-parallel",
    "widen-channels",
}  # fmt: skip
"""Passes for which the suite has no model with constant weights (the zoo, golden and random tests have)."""

HIDDEN_FAULTS = {
    "node/test_affine_grid_2d_expanded": "Range reads a tensor of shape [1], which its specification forbids",
    "node/test_affine_grid_2d_align_corners_expanded": "Range reads a tensor of shape [1]",
}
"""Models of the suite with a fault that ONNX's checker sees only once a pass has made shapes known: that pass is
rolled back, and the outputs must be equal all the same."""


REASONS = {
    "NOT_IMPLEMENTED": "no kernel",
    "not a registered function": "unknown operator",
    "Numpy type": "type that NumPy lacks",
    "Numpy_type": "type that NumPy lacks",
    "model.cc": "opset not released",
}
"""What ORT says of a model that it does not run -> why."""


@dataclass
class Tally:
    """What came of the models of a chunk."""

    models: int = 0
    not_run: Counter[str] = field(default_factory=Counter)
    equal: int = 0
    random: int = 0
    changed: int = 0
    wrong: list[str] = field(default_factory=list)
    fired: Counter[str] = field(default_factory=Counter)
    touched: Counter[str] = field(default_factory=Counter)

    def add(self, other: dict[str, Any]) -> None:
        for name, value in other.items():
            mine = getattr(self, name)
            if isinstance(mine, Counter):
                mine.update(value)
            else:
                setattr(self, name, mine + value)

    def __str__(self) -> str:
        fired = ", ".join(f"{name} {count}" for name, count in sorted(self.fired.items()))
        return (
            f"conformance: {self.models} models, {self.equal + self.random} run by ORT and equal "
            f"({self.random} random: types and shapes only), {self.changed} of them changed, "
            f"{len(self.wrong)} wrong; not run: {dict(self.not_run)}; changes: {fired}"
        )


@dataclass(frozen=True)
class Case:
    """One model of the suite with one or more sets of inputs."""

    name: str
    model: onnx.ModelProto
    inputs: tuple[tuple[Any, ...], ...]


@functools.cache
def load_cases() -> list[Any]:
    """Return the suite's test cases, by name; building them takes seconds."""
    from onnx.backend.test.loader import load_model_tests

    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        cases = [case for kind in KINDS for case in load_model_tests(kind=kind)]
    return sorted(cases, key=lambda case: (case.kind, case.name))


def read_case(case: Any) -> Case:
    """Return a test case with its model and inputs in memory."""
    if case.model is not None:
        inputs = tuple(tuple(map(_as_feed, given)) for given, _ in case.data_sets)
        return Case(f"{case.kind}/{case.name}", case.model, inputs)
    folder = Path(case.model_dir)
    model = onnx.load(folder / "model.onnx")
    sets = [_read_inputs(model, data) for data in sorted(folder.glob("test_data_set_*"))]
    sets += [tuple(np.load(file, encoding="bytes")["inputs"]) for file in sorted(folder.glob("test_data_*.npz"))]
    return Case(f"{case.kind}/{case.name}", model, tuple(sets))


def _as_feed(value: Any) -> Any:
    """Return an input of a generated case as ORT takes it: some come as protos or NumPy scalars."""
    if isinstance(value, onnx.TensorProto):
        return numpy_helper.to_array(value)
    return np.asarray(value) if isinstance(value, np.generic) else value


def _read_inputs(model: onnx.ModelProto, folder: Path) -> tuple[Any, ...]:
    count = len(list(folder.glob("input_*.pb")))
    values: list[Any] = []
    for index, info in zip(range(count), model.graph.input, strict=False):
        data = (folder / f"input_{index}.pb").read_bytes()
        kind = info.type.WhichOneof("value")
        if kind == "sequence_type":
            values.append(numpy_helper.to_list(onnx.SequenceProto.FromString(data)))
        elif kind == "optional_type":
            values.append(numpy_helper.to_optional(onnx.OptionalProto.FromString(data)))
        else:
            values.append(numpy_helper.to_array(onnx.TensorProto.FromString(data)))
    return tuple(values)


def run_chunk(cases: Sequence[Any]) -> Tally:
    """Optimize each model and compare it with the original on the suite's own inputs."""
    tally = Tally()
    for case in cases:
        tally.models += 1
        _run_case(read_case(case), tally)
    return tally


def _run_case(case: Case, tally: Tally) -> None:
    try:
        session = Session(case.model, optimization="off")
        feeds = [dict(zip(session.input_names, given, strict=True)) for given in case.inputs]
        wanted = [session.run(feed) for feed in feeds]
    except (GraphoptError, ValueError) as error:
        tally.not_run[_kind_of(error)] += 1
        return
    try:
        on_failure: Any = "continue" if case.name in HIDDEN_FAULTS else "stop"
        result = default_pipeline().run(case.model, settings=Settings(verify="off", on_failure=on_failure))
        for record in result.report.passes:
            tally.fired[record.name] += record.changes
        for name in {r.name for r in result.report.passes if r.status == "changed"}:
            tally.touched[name] += 1
        tally.changed += any(r.status == "changed" for r in result.report.passes)
        proto = result.proto
        onnx.checker.check_model(proto)
        found = [Session(proto, optimization="off").run(feed) for feed in feeds]
    except Exception as error:  # noqa: BLE001  (all that is raised here is a defect to be listed)
        tally.wrong.append(f"{case.name}: {type(error).__name__}: {str(error)[:300]}")
        return
    random = _is_random(case.model)
    problems = [p for a, b in zip(wanted, found, strict=True) for p in differences(a, b, values=not random)]
    if problems:
        tally.wrong.append(f"{case.name}: {problems[0]}")
    elif random:
        tally.random += 1
    else:
        tally.equal += 1


def _kind_of(error: Exception) -> str:
    text = str(error)
    return next((kind for sign, kind in REASONS.items() if sign in text), "refused or failed")


def _is_random(model: onnx.ModelProto) -> bool:
    nodes = [*model.graph.node, *(n for f in model.functions for n in f.node)]
    while nodes:
        node = nodes.pop()
        if node.op_type in RANDOM:
            return True
        nodes.extend(n for a in node.attribute for n in a.g.node)
    return False


def differences(wanted: dict[str, Any], found: dict[str, Any], *, values: bool = True) -> Iterator[str]:
    """Yield in what two sets of outputs differ; without `values` only types and shapes count."""
    if list(wanted) != list(found):
        yield f"outputs {list(wanted)} became {list(found)}"
        return
    for name, value in wanted.items():
        reason = _difference(value, found[name], values=values)
        if reason:
            yield f"{name}: {reason}"


def _difference(a: Any, b: Any, *, values: bool) -> str | None:
    if type(a) is not type(b):
        return f"{type(a).__name__} became {type(b).__name__}"
    if isinstance(a, list):
        if len(a) != len(b):
            return f"{len(a)} elements became {len(b)}"
        return next((r for x, y in zip(a, b, strict=True) if (r := _difference(x, y, values=values))), None)
    if isinstance(a, dict):
        return None if a == b else f"{a} became {b}"
    if not isinstance(a, np.ndarray):
        return None if a == b else f"{a!r} became {b!r}"
    if a.dtype != b.dtype or a.shape != b.shape:
        return f"{a.dtype}{a.shape} became {b.dtype}{b.shape}"
    return _distance(a, b) if values and a.size else None


def _distance(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> str | None:
    tolerance = TOLERANCE.get(a.dtype.name)
    if tolerance is None:
        return None if np.array_equal(a, b) else f"{a.dtype} values differ"
    x, y = a.astype(np.float64), b.astype(np.float64)
    finite = np.isfinite(x)
    if not np.array_equal(x[~finite], y[~finite], equal_nan=True):
        return "infinities or NaNs differ"
    largest = float(np.abs(x[finite]).max(initial=0.0))
    error = float(np.abs(x[finite] - y[finite]).max(initial=0.0))
    return None if error <= tolerance * max(largest, 1e-30) else f"differs by {error:.2e} of {largest:.2e}"


@pytest.mark.conformance
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_outputs_are_equal(
    chunk: int, tmp_path_factory: pytest.TempPathFactory, record_property: Callable[[str, object], None]
) -> None:
    tally = run_chunk(load_cases()[chunk::CHUNKS])
    folder = shared_folder(tmp_path_factory)
    part = folder / f"{chunk}.json.part"
    part.write_text(json.dumps(vars(tally)))
    part.replace(folder / f"{chunk}.json")
    assert not tally.wrong, "\n".join(tally.wrong)
    parts = list(folder.glob("*.json"))
    if len(parts) == CHUNKS and claim(folder / "total"):
        check_total(parts, record_property)


def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that all workers of this run see."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "conformance"
    folder.mkdir(exist_ok=True)
    return folder


def claim(file: Path) -> bool:
    """Tell whether this worker is the first that asks."""
    try:
        file.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def check_total(parts: Sequence[Path], record_property: Callable[[str, object], None]) -> None:
    total = Tally()
    for part in parts:
        total.add(json.loads(part.read_text()))
    record_property("summary", str(total))
    assert total.equal + total.random >= AT_LEAST, total
    used = {name for name in all_passes() if name in str(default_pipeline())}
    idle = {name for name in used - NOT_IN_SUITE if not total.fired[name]}
    assert not idle, f"passes that never fired: {idle}"
