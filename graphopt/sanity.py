"""Checks of what was loaded, each with a message that says what, where and what to do."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import onnx
import onnx_graphsurgeon as gs

from graphopt.errors import ModelError, did_you_mean
from graphopt.importer import opset_of
from graphopt.ops import STANDARD_DOMAINS
from graphopt.order import sort_nodes

EXPERIMENTS = frozenset(
    {
        "ATen", "Affine", "ConstantFill", "Crop", "DynamicSlice", "GRUUnit", "GivenTensorFill", "ImageScaler",
        "MeanVarianceNormalization", "ParametricSoftplus", "Scale", "ScaledTanh", "ThresholdedRelu",
    }
)  # fmt: skip
"""Experimental operators of opsets 1 to 9: gone from ONNX's tables, but runtimes still know most of them."""

_MAX_DEPTH = 100  # of messages in each other: protobuf's own limit when it reads a file
_STRING = onnx.ModelProto.DESCRIPTOR.fields_by_name["producer_name"].type
_LATEST_IR = max(v for k, v in onnx.Version.items() if k.startswith("IR_VERSION"))


def check_proto(proto: onnx.ModelProto, where: str) -> None:
    """Raise ModelError unless `proto` has the parts and versions of a model that can be read."""
    if not proto.ir_version or not proto.HasField("graph"):
        raise ModelError("not an ONNX model: it has no graph", at=where, hint="export or download the model again")
    if proto.ir_version > _LATEST_IR:
        raise ModelError(
            f"IR version {proto.ir_version} is newer than the installed onnx package knows ({_LATEST_IR})",
            at=where,
            hint="upgrade: pip install -U onnx onnxruntime",
        )
    _check_fields(proto, where)
    latest = onnx.defs.onnx_opset_version()
    version = opset_of(proto.opset_import)
    if version is not None and not 1 <= version <= latest:
        raise ModelError(
            f"opset {version} is not known: the installed onnx package knows 1 to {latest}",
            at=where,
            hint="upgrade: pip install -U onnx onnxruntime",
        )
    known = {entry.domain for entry in proto.opset_import} | {f.domain for f in proto.functions}
    uses_standard = any(node.domain in STANDARD_DOMAINS for node in proto.graph.node)
    if version is None and uses_standard and proto.ir_version >= 3:
        raise ModelError(
            "the model imports no standard operator set", at=where, hint=f"its opset imports: {sorted(known)}"
        )


def _check_fields(proto: onnx.ModelProto, where: str) -> None:
    """Raise ModelError for what protobuf takes and then fails on: text that is not UTF-8, endless nesting."""
    stack: list[tuple[Any, int]] = [(proto, 0)]
    kinds: dict[Any, tuple[bool, bool, bool]] = {}  # asking a descriptor takes long
    while stack:
        message, depth = stack.pop()
        if depth > _MAX_DEPTH:
            raise ModelError("subgraphs are nested too deeply", at=where, hint="no file could hold this model")
        for descriptor, value in message.ListFields():
            inner, text, repeated = kinds.get(descriptor) or kinds.setdefault(descriptor, _kind(descriptor))
            if inner:
                stack += [(v, depth + 1) for v in value] if repeated else [(value, depth + 1)]
            elif text and bytes in map(type, value if repeated else (value,)):
                raise ModelError(
                    f"text that is not UTF-8 in field '{descriptor.name}'", at=where, hint="the file is damaged"
                )


def _kind(descriptor: Any) -> tuple[bool, bool, bool]:
    """Tell of a field whether it holds messages, whether text, and whether several."""
    return descriptor.message_type is not None, descriptor.type == _STRING, bool(descriptor.is_repeated)


def check_graphs(graphs: Iterable[gs.Graph], functions: Iterable[gs.Function]) -> None:
    """Check operators and order of every graph; nodes out of order are sorted.

    Raises:
        ModelError: an operator that its opset does not have, or a cycle.
    """
    local = {(f.domain, f.name) for f in functions}
    for graph in graphs:
        _check_operators(graph.nodes, graph.opset, local)
        sort_nodes(graph)


def _check_operators(nodes: Iterable[gs.Node], opset: int, functions: set[tuple[str, str]]) -> None:
    seen: set[str] = set()
    for node in nodes:
        if node.domain not in STANDARD_DOMAINS or node.op in seen or (node.domain or "", node.op) in functions:
            continue
        seen.add(node.op)
        if node.op in EXPERIMENTS and opset < 10:
            continue
        try:
            onnx.defs.get_schema(node.op, opset, "")
        except onnx.defs.SchemaError as error:
            raise ModelError(
                f"operator '{node.op}' does not exist in opset {opset}",
                at=f"node '{node.name or next((t.name for t in node.outputs), '')}'",
                hint=_operator_hint(node.op, opset),
            ) from error


def _operator_hint(op: str, opset: int) -> str:
    """Say which opset has the operator, what else was meant, or what a custom operator needs."""
    history = [s for s in onnx.defs.get_all_schemas_with_history() if not s.domain]
    since = [s.since_version for s in history if s.name == op]
    if since:
        return f"it came with opset {min(since)}: the model states the wrong one"
    known = {s.name for s in history if s.since_version <= opset}
    return did_you_mean(op, known) or "a custom operator needs a domain of its own"
