"""What an optimizer made of a model: nodes, whether it is valid and runs, and how far its outputs are off.

    python -m graphopt.models.benchmarks.peers_judge REQUEST.json

Run by `peers.py` in a process of its own, since a broken model may take ONNX Runtime (ORT) down with it: prints one
JSON line per candidate as it is judged.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from graphopt.errors import GraphoptError
from graphopt.models import zoo
from graphopt.runtime import Optimization, Session

WRONG = 1e-4
"""Largest error, as a part of the largest output, above which outputs are called wrong."""

Feed = dict[str, Any]


def count_nodes(model: onnx.ModelProto) -> int:
    """Return the nodes of all graphs and local functions; Constant nodes are not counted."""
    return sum(_count(nodes) for nodes in (model.graph.node, *(function.node for function in model.functions)))


def _count(nodes: Iterable[onnx.NodeProto]) -> int:
    count = 0
    for node in nodes:
        count += node.op_type != "Constant"
        for attribute in node.attribute:
            inner = [attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else attribute.graphs
            count += sum(_count(graph.node) for graph in inner)
    return count


def largest_error(reference: Feed, found: Feed) -> tuple[float, str]:
    """Return the largest error, as a part of each output's largest element, and what else differs ('' if nothing).

    Where the shape, type or the place of infinities differs, the error is infinite.
    """
    if set(reference) != set(found):
        return math.inf, f"outputs {sorted(found)} instead of {sorted(reference)}"
    worst = 0.0
    for name, values in reference.items():
        a, b = np.asarray(values), np.asarray(found[name])
        if a.dtype != b.dtype or a.shape != b.shape:
            return math.inf, f"output '{name}': {b.dtype}{list(b.shape)} instead of {a.dtype}{list(a.shape)}"
        a, b = a.astype(np.float64), b.astype(np.float64)
        finite = np.isfinite(a)
        if not np.array_equal(a[~finite], b[~finite], equal_nan=True) or not np.isfinite(b[finite]).all():
            return math.inf, f"output '{name}': not finite where the original is, or otherwise"
        if finite.any():
            scale = max(float(np.abs(a[finite]).max()), 1e-30)
            worst = max(worst, float(np.abs(a - b)[finite].max()) / scale)
    return worst, ""


def outputs(path: str, feeds: Sequence[Feed], optimization: Optimization) -> list[Feed]:
    """Return what a model gives for each feed."""
    session = Session(path, optimization=optimization)
    return [session.run(feed) for feed in feeds]


def judge(path: str, feeds: Sequence[Feed], reference: Sequence[Feed], *, valid: bool) -> dict[str, Any]:
    """Return status, reason, nodes and error of one candidate.

    Args:
        path: the candidate.
        feeds: what to run it on.
        reference: the original's outputs for them.
        valid: whether ONNX's checker accepts the original; otherwise it is not asked.
    """
    model = onnx.load(path)
    found: dict[str, Any] = {"status": "ok", "why": "", "nodes": count_nodes(model), "error": None}
    try:
        if valid:
            onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:  # ORT may run it all the same
        found.update(status="invalid", why=_line(error))
    try:
        given = outputs(path, feeds, "off")
        outputs(path, feeds[:1], "all")
    except GraphoptError as error:
        return found if found["why"] else {**found, "status": "broken", "why": _line(error)}
    found["error"], why = max(largest_error(a, b) for a, b in zip(reference, given, strict=True))
    if found["error"] > WRONG:
        found.update(status="wrong outputs", why=why)
    if math.isinf(found["error"]):
        found["error"] = None
    return found


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def is_valid(path: str) -> bool:
    """Tell whether ONNX's checker accepts a file."""
    try:
        onnx.checker.check_model(path)
    except onnx.checker.ValidationError:
        return False
    return True


def main() -> None:
    """Judge the candidates of a request: {model, source, shapes, feeds, candidates: {name: path}}."""
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    shapes = {name: tuple(shape) for name, shape in request["shapes"].items()}
    feeds = list(zoo.feeds(request["model"], request["seed"], count=request["feeds"], shapes=shapes))
    reference = outputs(request["source"], feeds, "off")
    valid = is_valid(request["source"])
    for name, path in request["candidates"].items():
        print(json.dumps({"name": name, **judge(path, feeds, reference, valid=valid)}), flush=True)


if __name__ == "__main__":
    main()
