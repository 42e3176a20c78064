"""Facts about a model held against a run of it: which of them the run contradicts."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx

from graphopt.analysis.facts import Fact
from graphopt.analysis.symbolic import Symbolic
from graphopt.analysis.symbolic_expr import Expr, Size
from graphopt.model import Model, load
from graphopt.runtime import Session


class Solver:
    """Values of symbols, learned from the tensors of a run; whatever is said twice must agree."""

    def __init__(self) -> None:
        self.known: dict[str, int] = {}
        self.checked = 0

    def contradicts(self, size: Size, actual: int) -> bool:
        """Take down that `size` is `actual`; tell whether that cannot be."""
        value = self.value(size)
        if value is None and isinstance(size, Expr) and list(size.terms.values()) == [1]:
            (product,) = size.terms
            if len(product) == 1:
                self.known[product[0].name] = value = actual
                low = product[0].low
                return low is not None and actual < low
        self.checked += value is not None and isinstance(size, Expr)
        return value is not None and value != actual

    def value(self, size: Size) -> int | None:
        """Return what a size comes to, None where a symbol is not known yet."""
        if isinstance(size, int):
            return size
        total = 0
        for product, factor in size.terms.items():
            factors = [self.symbol(symbol.name) for symbol in product]
            if None in factors:
                return None
            total += factor * math.prod(f for f in factors if f is not None)
        return total

    def symbol(self, name: str) -> int | None:
        """Return a symbol's value; one that is called like an expression is computed."""
        if name in self.known:
            return self.known[name]
        if not re.search(r"//|\(", name):
            return None
        text = name
        for other in sorted(self.known, key=len, reverse=True):
            text = re.sub(rf"(?<![\w.?]){re.escape(other)}(?![\w.\[])", f"({self.known[other]})", text)
        try:
            return int(eval(text, {"min": min, "max": max, "broadcast": lambda a, b: b if a == 1 else a}))
        except (NameError, SyntaxError, ZeroDivisionError, AttributeError, TypeError):
            return None


def inner_names(model: onnx.ModelProto) -> list[str]:
    """Return the names of what the nodes of the main graph make."""
    ends = {o.name for o in model.graph.output}
    return [t for n in model.graph.node for t in n.output if t and t not in ends]


def contradictions(source: onnx.ModelProto | Model, feeds: Mapping[str, Any]) -> tuple[list[str], int]:
    """Run a model and return what of its facts is not so, and how many expressions were held against the run."""
    model = load(source)
    proto = model.proto
    results = Session(proto, optimization="off", extra_outputs=inner_names(proto)).run(dict(feeds))
    symbolic, solver = Symbolic(model), Solver()
    tensors = {t.name: t for t in model.graph.inputs}
    tensors.update({t.name: t for n in model.graph.nodes for t in n.outputs if t.name})
    found = []
    for name, tensor in tensors.items():
        actual = feeds.get(name, results.get(name))
        if isinstance(actual, np.ndarray):
            found += [f"{name}: {problem}" for problem in _problems(symbolic.of(tensor), actual, solver)]
    return found, solver.checked


def _problems(fact: Fact, actual: np.ndarray[Any, Any], solver: Solver) -> Iterator[str]:
    if fact.dtype is not None and fact.dtype.kind in "iufb" and fact.dtype != actual.dtype:
        yield f"type {fact.dtype} is {actual.dtype}"
    if fact.shape is None:
        return
    if len(fact.shape) != actual.ndim:
        yield f"shape {fact.shape} is {actual.shape}"
        return
    for size, dim in zip(fact.shape, actual.shape, strict=True):
        if solver.contradicts(size, dim):
            yield f"shape {fact.shape} is {actual.shape} (known: {solver.known})"
            return
    if fact.values is None or fact.values.shape != actual.shape:
        return
    for element, value in zip(fact.values.flat, actual.flat, strict=True):
        if element is None:
            continue
        same = not solver.contradicts(element, int(value)) if isinstance(element, Expr) else element == value
        if not (same or (np.isnan(element) and np.isnan(value))):  # NaN is not itself
            yield f"value {element} is {value} (known: {solver.known})"
            return


def opened(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model whose inputs have no sizes any more, only ranks."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    constants = {i.name for i in result.graph.initializer}
    for info in result.graph.input:
        if info.name not in constants and info.type.WhichOneof("value") == "tensor_type":
            for dim in info.type.tensor_type.shape.dim:
                dim.Clear()
    for info in (*result.graph.output, *result.graph.value_info):
        if info.type.WhichOneof("value") == "tensor_type":
            info.type.tensor_type.ClearField("shape")
    return result
