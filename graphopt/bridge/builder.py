"""ONNX graph -> `torch.fx.GraphModule`: one fx node per ONNX node, all constants once on the root.

Local functions are put in the place of their calls.  A branch of an If is a module of its own without state: what it
reads from outside, its own constants among it, is handed to it, so a weight is one tensor wherever it is used.
"""

from __future__ import annotations

import keyword
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import torch
from torch import fx, nn

from graphopt.analysis.constants import array_of, is_constant
from graphopt.bridge.attributes import arguments, schema_of, where
from graphopt.bridge.host import LARGEST, as_tensor, host_of, to_torch, torch_kind, total
from graphopt.bridge.modules import BatchNormalization, Dropout, If, first, typed
from graphopt.bridge.ops import OPS
from graphopt.bridge.refusals import refusal
from graphopt.bridge.table import Op
from graphopt.edit import label
from graphopt.errors import ModelError
from graphopt.model import Model
from graphopt.ops import STANDARD_DOMAINS, is_standard
from graphopt.order import used_tensors

_SHAPES = frozenset({"Shape", "Size"})
_DEPTH = 32

MOST_CALLED = 100_000
"""Nodes that calls of local functions may add: a few functions that call each other twice make any number."""

FOLDED = frozenset(
    {
        "Add", "Cast", "Concat", "ConstantOfShape", "Div", "Gather", "Identity", "Mul", "Neg", "Reshape", "Shape",
        "Size", "Slice", "Squeeze", "Sub", "Transpose", "Unsqueeze",
    }
)  # fmt: skip
"""Operators that small constants of integers go through; none makes much of little."""

Given = Mapping[str, Any]


@dataclass
class Frame:
    """A module in the making: the main graph, or a branch of an If.

    Attributes:
        parent: the module around it.
        values: `id` of a tensor -> what stands for it (an fx node, or a host value).
        captured: what it takes from outside, in the order of its placeholders.
        tensors: `id` of a value that may be on the host -> it as a tensor.
    """

    parent: Frame | None = None
    fx: fx.Graph = field(default_factory=fx.Graph)
    root: nn.Module = field(default_factory=nn.Module)
    values: dict[int, Any] = field(default_factory=dict)
    captured: list[Any] = field(default_factory=list)
    tensors: dict[int, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Form:
    """What nodes read in the place of a constant: a function of tensors on the root.

    Attributes:
        function: module-level.
        of: names on the root of its arguments, in their own forms where those are of another
            function, else the constants themselves.
        keywords: further arguments, numbers and strings.
    """

    function: Callable[..., Any]
    of: tuple[str, ...]
    keywords: Mapping[str, Any] = field(default_factory=dict)


class Builder:
    """Builds one model.

    Args:
        model: the model.
        leaves: `id` of a constant -> the name that it has on `root`.
        root: a module that holds the constants.
        forms: name on `root` of a constant -> what nodes read in its place.
        learn: whether BatchNormalization trains its statistics.
        statistics: `id` of constants that it may write.
    """

    def __init__(
        self, model: Model, leaves: Mapping[int, str], root: nn.Module, *, forms: Mapping[str, Form] | None = None,
        learn: bool = False, statistics: Iterable[int] = (),
    ) -> None:  # fmt: skip
        self.model = model
        self.leaves = leaves
        self.root = root
        self.forms = forms or {}
        self._made: dict[str, Any] = {}
        self.learn = learn
        self.statistics = frozenset(statistics)
        self.functions = {(f.domain, f.name): f for f in model.functions}
        self.on_host: set[int] = set()
        self.known: dict[int, Any] = {}
        self.opsets = dict(model.opsets)
        self.left = MOST_CALLED + sum(len(graph.nodes) for graph in model.graphs())

    def run(self, taps: Sequence[gs.Tensor] = ()) -> fx.GraphModule:
        """Return a module of the model's inputs, in order, that gives its outputs and then the taps.

        Raises:
            ModelError: an operator, type or attribute that the bridge does not know; names the node.
        """
        frame = Frame(root=self.root)
        optional = {spec.name for spec in self.model.optional_inputs}
        for tensor in self.model.graph.inputs:
            if tensor.name not in optional:
                frame.values[id(tensor)] = frame.fx.placeholder(f"in_{identifier(tensor.name)}")
        self._nodes(_needed(self.model.graph, taps), frame, {})
        frame.fx.output(tuple(self._out(frame, tensor) for tensor in (*self.model.graph.outputs, *taps)))
        return fx.GraphModule(self.root, frame.fx, "Bridge")

    def _out(self, frame: Frame, tensor: gs.Tensor) -> Any:
        kind = None if tensor.dtype is None else torch_kind(tensor.dtype)
        return frame.fx.call_function(typed, (self._value(frame, tensor, host=True), kind))

    def _nodes(self, nodes: Iterable[gs.Node], frame: Frame, given: Given, depth: int = 0) -> None:
        if depth > _DEPTH:
            raise ModelError("functions or branches are nested too deeply", hint="the model is damaged or hostile")
        for node in nodes:
            self.left -= 1
            if self.left < 0:
                raise ModelError("local functions call each other too often", hint="the model is damaged or hostile")
            called = self.functions.get((node.domain or "", node.op))
            if called is not None:
                self._call(node, called, frame, given, depth)
            elif is_standard(node, "Constant"):
                self._constant(node, frame, given)
            elif is_standard(node) and node.op in MODULES:
                MODULES[node.op](self, node, frame, given, depth)
            else:
                self._function(node, frame, given)

    # --- values -------------------------------------------------------------------------------------------------

    def _value(self, frame: Frame, tensor: gs.Tensor, *, host: bool) -> Any:
        """Return what stands for a tensor in a frame: where not `host`, surely a tensor."""
        if not tensor.name:
            return None
        if id(tensor) in self.leaves:
            return self._leaf(frame, tensor, host=host)
        value = self._raw(frame, tensor)
        if host or id(tensor) not in self.on_host:
            return value
        if id(tensor) not in frame.tensors:
            frame.tensors[id(tensor)] = frame.fx.call_function(as_tensor, (value,))
        return frame.tensors[id(tensor)]

    def _raw(self, frame: Frame, tensor: gs.Tensor) -> Any:
        if id(tensor) in frame.values:
            return frame.values[id(tensor)]
        if is_constant(tensor):
            kind = tensor.dtype if isinstance(tensor, gs.Constant) else "this type"
            raise ModelError(
                f"torch has no tensors of {kind}", at=f"constant '{tensor.name}'",
                hint="strings and 8-bit floats are not trained: convert the model, or cut that part off",
            )  # fmt: skip
        if frame.parent is None:
            raise ModelError(
                f"tensor '{tensor.name}' is read before it is made", hint="graphopt inspect checks a model"
            )
        return self._capture(frame, id(tensor), self._raw(frame.parent, tensor))

    def _capture(self, frame: Frame, key: int, outside: Any) -> Any:
        """Hand a value from outside to a branch."""
        if not isinstance(outside, fx.Node):
            frame.values[key] = outside
        else:
            frame.captured.append(outside)
            frame.values[key] = frame.fx.placeholder(f"captured_{len(frame.captured)}")
        return frame.values[key]

    def _leaf(self, frame: Frame, tensor: gs.Tensor, *, host: bool) -> Any:
        name = self.leaves[id(tensor)]
        if host and id(tensor) in self.on_host:
            return host_of(array_of(tensor))  # type: ignore[arg-type]  # it is a constant
        if id(tensor) in frame.values:
            return frame.values[id(tensor)]
        if frame.parent is not None:
            return self._capture(frame, id(tensor), self._leaf(frame.parent, tensor, host=False))
        frame.values[id(tensor)] = self._formed(frame, name)
        return frame.values[id(tensor)]

    def _formed(self, frame: Frame, name: str) -> Any:
        """Return what is on the root under a name, in its form; forms may be of other forms."""
        if name not in self._made:
            form = self.forms.get(name)
            if form is None:
                self._made[name] = frame.fx.get_attr(name)
            else:
                of = tuple(self._formed(frame, n) if self._further(n, form) else frame.fx.get_attr(n) for n in form.of)
                self._made[name] = frame.fx.call_function(form.function, of, dict(form.keywords))
        return self._made[name]

    def _further(self, name: str, form: Form) -> bool:
        """Tell whether an argument of a form is taken in a form of its own, by another function."""
        other = self.forms.get(name)
        return other is None or other.function is not form.function

    def _constant(self, node: gs.Node, frame: Frame, given: Given) -> None:
        """Take note of a Constant; one whose value is an attribute of its function gets it here."""
        tensor = node.outputs[0]
        if id(tensor) in self.leaves:
            self._note_host(tensor)
            return
        reference = next((v for v in node.attrs.values() if isinstance(v, gs.Node.AttributeRef)), None)
        if reference is None:
            return  # of a type that torch lacks: who reads it is refused
        value = given.get(reference.name)
        array = array_of(value) if isinstance(value, gs.Constant) else value
        if array is None:
            raise ModelError("a Constant without a value", at=where(node))
        kind = np.float32 if np.asarray(array).dtype.kind == "f" and not isinstance(array, np.ndarray) else None
        values = np.asarray(array, dtype=kind)
        held = host_of(values)
        self._keep(frame, tensor, _tensor_of(values, node) if held is None else held)

    def _note_host(self, tensor: gs.Tensor) -> None:
        """Note which constants may travel as Python numbers."""
        if id(tensor) in self.leaves and id(tensor) not in self.on_host:
            array = array_of(tensor, limit=64)
            if array is not None and host_of(array) is not None:
                self.on_host.add(id(tensor))

    # --- nodes --------------------------------------------------------------------------------------------------

    def _function(self, node: gs.Node, frame: Frame, given: Given) -> None:
        """Add a node that one function computes."""
        domain = "" if node.domain in STANDARD_DOMAINS else node.domain
        opset = self.opsets.get(domain, 1)
        op = self._op(node, domain, opset)
        for tensor in node.inputs:
            self._note_host(tensor)
        if self._folded(node, op, opset, frame, given):
            return
        inputs = tuple(self._input(frame, tensor, op, port) for port, tensor in enumerate(node.inputs))
        extras = {"outputs": len(node.outputs), "opset": opset, "code": _code_of(node)}
        keywords = arguments(node, op.function, opset, given, extras)
        made = frame.fx.create_node("call_function", op.function, _trimmed(inputs), keywords, identifier(label(node)))
        schema = schema_of(node.op, domain, opset)
        several = "outputs" not in keywords and (schema is None or schema.max_output > 1)
        on_host = op.host and (node.op in _SHAPES or all(t.is_empty() or self._hosted(t, frame) for t in node.inputs))
        self._outputs(node, made, frame, several=several, on_host=on_host)

    def _folded(self, node: gs.Node, op: Op, opset: int, frame: Frame, given: Given) -> bool:
        """Compute a node of small integer constants now, such as those that pads are made of."""
        if not op.host or not is_standard(node) or node.op not in FOLDED or len(node.outputs) != 1:
            return False
        inputs = [self._known(tensor) for tensor in node.inputs]
        if any(value is None and tensor.name for value, tensor in zip(inputs, node.inputs, strict=True)):
            return False
        if node.op == "ConstantOfShape" and total(inputs[0]) > LARGEST:
            return False
        keywords = arguments(node, op.function, opset, given, {"outputs": 1, "opset": opset})
        try:
            made = as_tensor(op.function(*_trimmed(tuple(inputs)), **keywords))
        except (RuntimeError, ValueError, TypeError, IndexError, ArithmeticError):
            return False  # it fails when it runs, and then says where
        if made.is_floating_point() or made.numel() > LARGEST:
            return False
        held = made.tolist()
        self._keep(frame, node.outputs[0], made if made.dim() > 1 else tuple(held) if made.dim() else held)
        return True

    def _known(self, tensor: gs.Tensor) -> Any:
        """Return a small constant of integers as a host value, or a tensor where its rank is above 1."""
        if id(tensor) in self.known or id(tensor) not in self.leaves:
            return self.known.get(id(tensor))
        array = array_of(tensor, limit=LARGEST)
        if array is None or array.dtype.kind not in "bi":
            return None
        held = host_of(array)
        return to_torch(array) if held is None else held

    def _keep(self, frame: Frame, tensor: gs.Tensor, value: Any) -> None:
        """Let a value that is known now stand for a tensor."""
        self.known[id(tensor)] = value
        if not isinstance(value, torch.Tensor):
            self.on_host.add(id(tensor))
            frame.values[id(tensor)] = value
            return
        name = free_name(frame.root, f"constant_{len(frame.values)}")
        frame.root.register_buffer(name, value, persistent=False)
        frame.values[id(tensor)] = frame.fx.get_attr(name)

    def _input(self, frame: Frame, tensor: gs.Tensor, op: Op, port: int) -> Any:
        array = array_of(tensor, limit=LARGEST) if port in op.numbers and id(tensor) in self.leaves else None
        if array is None or array.ndim > 1:
            return self._value(frame, tensor, host=op.host)
        values = array.tolist()
        return tuple(values) if isinstance(values, list) else values

    def _op(self, node: gs.Node, domain: str, opset: int) -> Op:
        versions = [op for op in OPS.get((domain, node.op), ()) if op.since <= opset]
        if versions:
            return versions[-1]
        why, hint = refusal(node.op)
        raise ModelError(f"{node.op} cannot be trained: {why}", at=where(node), hint=hint)

    def _hosted(self, tensor: gs.Tensor, frame: Frame) -> bool:
        return id(tensor) in self.on_host

    def _outputs(self, node: gs.Node, made: Any, frame: Frame, *, several: bool, on_host: bool = False) -> None:
        """Name what a node made."""
        made.meta["onnx"] = where(node)
        for index, tensor in enumerate(node.outputs):
            if not tensor.name:
                continue
            if len(node.outputs) > 1:
                frame.values[id(tensor)] = frame.fx.call_function(operator.getitem, (made, index))
            else:
                frame.values[id(tensor)] = frame.fx.call_function(first, (made,)) if several else made
            frame.tensors.pop(id(tensor), None)  # of an earlier call of the same function
            self.known.pop(id(tensor), None)
            (self.on_host.add if on_host else self.on_host.discard)(id(tensor))

    def _call(self, node: gs.Node, called: gs.Function, frame: Frame, given: Given, depth: int) -> None:
        """Put a local function in the place of its call."""
        for index, inner in enumerate(called.inputs):
            outer = node.inputs[index] if index < len(node.inputs) else gs.Variable.empty()
            self._rename(frame, outer, inner)
        attributes = {name: value for name, value in called.attrs.items() if value is not None}
        for name, held in node.attrs.items():
            attributes[name] = given.get(held.name) if isinstance(held, gs.Node.AttributeRef) else held
        outside = self.opsets
        imports = {"" if o.domain == "ai.onnx" else o.domain: int(o.version) for o in called.import_domains or ()}
        self.opsets = {**outside, **imports}
        self._nodes(called.nodes, frame, attributes, depth + 1)
        self.opsets = outside
        for outer, inner in zip(node.outputs, called.outputs, strict=False):
            self._rename(frame, inner, outer)

    def _module(self, node: gs.Node, module: nn.Module, args: tuple[Any, ...], frame: Frame, **kind: bool) -> None:
        name = free_name(frame.root, identifier(label(node)))
        frame.root.add_module(name, module)
        self._outputs(node, frame.fx.call_module(name, args), frame, several=False, **kind)

    def _batch_norm(self, node: gs.Node, frame: Frame, given: Given, depth: int) -> None:
        opset = self.opsets.get("", 1)
        settings = arguments(node, _batch_norm_attributes, opset, given, {})
        if not settings.get("spatial", 1):
            raise ModelError("BatchNormalization of each place of an image is not known", at=where(node))
        module = BatchNormalization(
            epsilon=settings.get("epsilon", 1e-5), momentum=settings.get("momentum", 0.9),
            training_mode=bool(settings.get("training_mode", 0)), outputs=len(node.outputs),
            learn=self.learn and all(id(t) in self.statistics for t in node.inputs[3:5]),
        )  # fmt: skip
        args = tuple(self._value(frame, tensor, host=False) for tensor in node.inputs)
        self._module(node, module, args, frame)

    def _dropout(self, node: gs.Node, frame: Frame, given: Given, depth: int) -> None:
        held = array_of(node.inputs[1]) if len(node.inputs) > 1 and node.inputs[1].name else node.attrs.get("ratio")
        if held is None and len(node.inputs) > 1 and node.inputs[1].name:
            raise ModelError("the ratio of a Dropout is computed", at=where(node), hint="make it a constant")
        ratio = 0.5 if held is None else float(np.asarray(held).reshape(-1)[0])
        module = Dropout(ratio=ratio, outputs=len(node.outputs))
        self._module(node, module, (self._value(frame, node.inputs[0], host=False),), frame)

    def _if(self, node: gs.Node, frame: Frame, given: Given, depth: int) -> None:
        self._note_host(node.inputs[0])
        condition = self._value(frame, node.inputs[0], host=True)
        if not isinstance(condition, fx.Node):
            self._taken(node, condition, frame, given, depth)
            return
        inner = [self._branch(node.attrs[name], frame, given, depth) for name in ("then_branch", "else_branch")]
        (then, then_hosted), (other, other_hosted) = inner
        module = If(fx.GraphModule(then.root, then.fx), fx.GraphModule(other.root, other.fx), outputs=len(node.outputs))
        args = (condition, tuple(then.captured), tuple(other.captured))
        self._module(node, module, args, frame)
        for tensor, *sides in zip(node.outputs, then_hosted, other_hosted, strict=False):
            if any(sides):
                self.on_host.add(id(tensor))

    def _taken(self, node: gs.Node, condition: Any, frame: Frame, given: Given, depth: int) -> None:
        """Put the branch that a constant condition takes in the place of an If."""
        taken = condition[0] if isinstance(condition, tuple) else condition
        branch = node.attrs["then_branch" if taken else "else_branch"]
        self._nodes(branch.nodes, frame, given, depth + 1)
        for outer, inner in zip(node.outputs, branch.outputs, strict=False):
            self._rename(frame, inner, outer)

    def _rename(self, frame: Frame, inner: gs.Tensor, outer: gs.Tensor) -> None:
        """Let a tensor of a graph that is put in its place stand for that of the node."""
        if outer.name:
            self._note_host(inner)
            frame.values[id(outer)] = self._value(frame, inner, host=True)
            frame.tensors.pop(id(outer), None)
            (self.on_host.add if id(inner) in self.on_host else self.on_host.discard)(id(outer))

    def _branch(self, graph: gs.Graph, frame: Frame, given: Given, depth: int) -> tuple[Frame, list[bool]]:
        inner = Frame(parent=frame)
        self._nodes(graph.nodes, inner, given, depth + 1)
        for tensor in graph.outputs:
            self._note_host(tensor)
        inner.fx.output(tuple(self._value(inner, tensor, host=True) for tensor in graph.outputs))
        return inner, [id(tensor) in self.on_host for tensor in graph.outputs]


MODULES: Mapping[str, Callable[..., None]] = {
    "BatchNormalization": Builder._batch_norm, "Dropout": Builder._dropout, "If": Builder._if,
}  # fmt: skip
"""Operators whose result depends on the mode of the module, or that hold graphs."""


def _needed(graph: gs.Graph, taps: Sequence[gs.Tensor]) -> list[gs.Node]:
    """Return the nodes that the outputs and taps are made by, in order: others may be of any operator."""
    makers = {id(tensor): node for node in graph.nodes for tensor in node.outputs}
    found: set[int] = set()
    stack = [*graph.outputs, *taps]
    while stack:
        node = makers.get(id(stack.pop()))
        if node is not None and id(node) not in found:
            found.add(id(node))
            stack.extend(used_tensors(node))
    return [node for node in graph.nodes if id(node) in found]


def _batch_norm_attributes(*, epsilon: float, momentum: float, training_mode: int, spatial: int, is_test: int) -> None:
    """Has the attributes of BatchNormalization as its parameters."""


def _trimmed(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return inputs without those left out at their end."""
    while inputs and inputs[-1] is None:
        inputs = inputs[:-1]
    return inputs


def _code_of(node: gs.Node) -> str:
    """Return the name of the type of codes that a node makes or reads, as far as its constants tell."""
    for port in (2, 0):
        tensor = node.inputs[port] if port < len(node.inputs) else None
        array = None if tensor is None else array_of(tensor)
        if array is not None and array.dtype.kind != "f":
            return str(array.dtype.name)
    return ""


def _tensor_of(array: np.ndarray[Any, Any], node: gs.Node) -> torch.Tensor:
    try:
        return to_torch(array)
    except ModelError as error:
        error.at = where(node)
        raise


def identifier(name: str) -> str:
    """Return a name that Python and torch accept, as like to `name` as may be."""
    found = re.sub(r"\W+", "_", name, flags=re.ASCII).strip("_")
    if keyword.iskeyword(found):
        return f"{found}_"
    return found if found and not found[0].isdigit() else f"n_{found}"


def free_name(root: nn.Module, name: str) -> str:
    """Return a name that neither `root` nor a module made of a graph uses."""
    found, number = name, 0
    while hasattr(root, found) or hasattr(fx.GraphModule, found):
        number += 1
        found = f"{name}_{number}"
    return found
