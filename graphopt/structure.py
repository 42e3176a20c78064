"""Structural check of a model after a pass: names, types, signature, ONNX's own checker, ORT's opinion."""

from __future__ import annotations

from dataclasses import dataclass

import onnx
import onnx_graphsurgeon as gs

from graphopt.errors import ModelError
from graphopt.model import Model, ValueSpec


@dataclass(frozen=True)
class Structure:
    """What a model must keep: its signature, and the checks it passed when it came.

    `strict` tells whether ONNX's full checker (with strict shape inference) accepted the original; some valid
    exports fail it, and a pass is not to blame for that.
    """

    inputs: tuple[ValueSpec, ...]
    outputs: tuple[ValueSpec, ...]
    strict: bool
    checked: bool

    @classmethod
    def of(cls, model: Model) -> Structure:
        """Return the structure of an original model."""
        skeleton = model.skeleton()
        strict = _refusal(skeleton, full=True) is None
        checked = strict or _refusal(skeleton, full=False) is None
        return cls(tuple(model.inputs), tuple(model.outputs), strict, checked)

    def check(self, model: Model) -> None:
        """Raise ModelError unless `model` is well formed and has this signature."""
        for graph in model.graphs():
            check_names(graph)
        _check_signature(self.inputs, tuple(model.inputs), "inputs")
        _check_signature(self.outputs, tuple(model.outputs), "outputs")
        if self.checked:
            skeleton = model.skeleton()
            if self.strict and _refusal(skeleton, full=True) is None:
                return
            refusal = _refusal(skeleton, full=False) or (_inference_refusal(skeleton) if self.strict else None)
            if refusal is not None:
                raise ModelError(f"ONNX's checker refuses the model: {refusal}")


def _refusal(proto: onnx.ModelProto, *, full: bool) -> str | None:
    """Return why ONNX's checker refuses a model, None where it does not."""
    try:
        onnx.checker.check_model(proto, full_check=full)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        return _short(error)
    return None


def _inference_refusal(proto: onnx.ModelProto) -> str | None:
    """Return why strict shape inference fails with the outputs' shapes left open, None where it does not.

    Some exports state a wrong output shape (their author named the axes by hand), and inference sees that only when
    a pass has made the graph clearer.
    """
    for output in proto.graph.output:
        if output.type.HasField("tensor_type"):
            output.type.tensor_type.ClearField("shape")
    try:
        onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True)
    except onnx.shape_inference.InferenceError as error:
        return _short(error)
    return None


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:400]


def check_names(graph: gs.Graph) -> None:
    """Raise ModelError where two tensors share a name, a used tensor has none, or nothing produces it."""
    made: dict[str, gs.Tensor] = {}
    for node in graph.nodes:
        for tensor in node.outputs:
            if tensor.name and made.setdefault(tensor.name, tensor) is not tensor:
                raise ModelError(f"two tensors are called '{tensor.name}'", at=f"node '{node.name}' ({node.op})")
            if len(tensor.inputs) > 1 and tensor.name:
                raise ModelError(f"tensor '{tensor.name}' has two producers", at=f"node '{node.name}' ({node.op})")
    local = {id(n) for n in graph.nodes}
    for node in graph.nodes:
        for tensor in node.inputs:
            same = made.get(tensor.name)
            if same is not None and same is not tensor and tensor.name:
                raise ModelError(f"two tensors are called '{tensor.name}'", at=f"node '{node.name}' ({node.op})")
            if isinstance(tensor, gs.Constant) and not tensor.name:
                raise ModelError("a constant has no name", at=f"node '{node.name}' ({node.op})")
    for tensor in graph.outputs:
        if (
            isinstance(tensor, gs.Variable)
            and not any(id(n) in local for n in tensor.inputs)
            and not _is_fed(graph, tensor)
        ):
            raise ModelError(f"output '{tensor.name}' is not produced in its graph")


def _is_fed(graph: gs.Graph, tensor: gs.Tensor) -> bool:
    return any(tensor is t for t in graph.inputs) or not tensor.inputs or graph.nodes == []


def _check_signature(before: tuple[ValueSpec, ...], after: tuple[ValueSpec, ...], what: str) -> None:
    names = [s.name for s in before], [s.name for s in after]
    if names[0] != names[1]:
        raise ModelError(f"the pass changed the model's {what}: {names[0]} became {names[1]}")
    for old, new in zip(before, after, strict=True):
        if old.dtype is not None and new.dtype != old.dtype:
            raise ModelError(f"the pass changed the type of '{old.name}': {old.dtype} became {new.dtype}")
