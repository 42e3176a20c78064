"""A rule's pattern -> small random models in which it should fire, and near misses in which it must not.

The pattern is a function, so it can be traced into models: operands of commutative operators in any order, every
spelling, constants of any rank, sizes as `Rule.shapes` says, element types, dynamic dimensions, inside a subgraph or
a function.  A near miss is such a model with one thing changed.

A rule whose operators need inputs that random draws do not hit may define `examples(rng) -> dict`: capture name ->
shape or array, and "call.attribute" -> value for calls that have a name.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from graphopt.rewrite import Rule
from graphopt.rule_tracer import Draft, InvalidDrawError, draw
from graphopt.tensors import onnx_dtype

Array = np.ndarray[Any, Any]
Expect = Literal["fires", "silent", "equal"]


@dataclass
class Case:
    """One model to try a rule on.

    Attributes:
        model: the model.
        expect: whether the rule should fire; "silent" where it must not, "equal" where another spelling of its may.
        what: how the case was made.
        feeds: input name -> array.
    """

    model: onnx.ModelProto
    expect: Expect
    what: str
    feeds: dict[str, Array]


def _model(draft: Draft, *, extra: Sequence[str] = ()) -> onnx.ModelProto:
    graph = helper.make_graph(
        draft.nodes, "case", [_info(n, a, dynamic=draft.dynamic) for n, a in draft.inputs.items()],
        [onnx.ValueInfoProto(name=n) for n in (*draft.outputs, *extra)],
        [numpy_helper.from_array(v, n) for n, v in draft.constants.items()],
    )  # fmt: skip
    return _finished(graph, draft.opset)


def _finished(graph: onnx.GraphProto, opset: int, functions: Sequence[onnx.FunctionProto] = ()) -> onnx.ModelProto:
    imports = [helper.make_opsetid("", opset), *([helper.make_opsetid("local", 1)] if functions else [])]
    model = helper.make_model(graph, opset_imports=imports, functions=list(functions), ir_version=9)
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    if any(not o.type.WhichOneof("value") for o in inferred.graph.output):
        raise InvalidDrawError("an output's type is unknown")
    return inferred


def _info(name: str, array: Array, *, dynamic: bool = False) -> onnx.ValueInfoProto:
    shape: list[int | str] = list(array.shape)
    if dynamic and shape:
        shape[0] = "batch"
    return helper.make_tensor_value_info(name, onnx_dtype(array.dtype), shape)


def _plain(draft: Draft, _: np.random.Generator) -> Case:
    return Case(_model(draft), "fires", "as it is", dict(draft.inputs))


def _in_branch(draft: Draft, _: np.random.Generator) -> Case:
    """The pattern inside both branches of an If, its inputs and constants from outside."""
    branches = []
    for side in ("then", "else"):
        nodes = [_renamed(n, side, {t for m in draft.nodes for t in m.output}) for n in draft.nodes]
        outputs = [onnx.ValueInfoProto(name=f"{side}_{n}") for n in draft.outputs]
        for info in outputs:
            info.type.tensor_type.elem_type = TensorProto.UNDEFINED
        branches.append(helper.make_graph(nodes, side, [], outputs))
    plain = _model(draft)
    for branch in branches:
        for info, known in zip(branch.output, plain.graph.output, strict=True):
            info.type.CopyFrom(known.type)
    node = helper.make_node("If", ["cond"], draft.outputs, then_branch=branches[0], else_branch=branches[1])
    infos = [_info(n, a, dynamic=draft.dynamic) for n, a in draft.inputs.items()]
    cond = helper.make_tensor_value_info("cond", TensorProto.BOOL, [])
    constants = [numpy_helper.from_array(v, n) for n, v in draft.constants.items()]
    graph = helper.make_graph([node], "case", [cond, *infos], list(plain.graph.output), constants)
    return Case(_finished(graph, draft.opset), "fires", "in a subgraph", {"cond": np.array(True), **draft.inputs})


def _in_function(draft: Draft, _: np.random.Generator) -> Case:
    """The pattern as the body of a local function, where constants are nodes."""
    held = [
        helper.make_node("Constant", [], [n], f"make_{n}", value=numpy_helper.from_array(v))
        for n, v in draft.constants.items()
    ]
    imports = [helper.make_opsetid("", draft.opset)]
    body = helper.make_function("local", "Body", list(draft.inputs), draft.outputs, [*held, *draft.nodes], imports)
    plain = _model(draft)
    node = helper.make_node("Body", list(draft.inputs), draft.outputs, "body", domain="local")
    graph = helper.make_graph([node], "case", list(plain.graph.input), list(plain.graph.output))
    return Case(_finished(graph, draft.opset, [body]), "fires", "in a function", dict(draft.inputs))


def _renamed(node: onnx.NodeProto, prefix: str, own: set[str]) -> onnx.NodeProto:
    new = onnx.NodeProto()
    new.CopyFrom(node)
    new.name = f"{prefix}_{node.name}"
    del new.input[:], new.output[:]
    new.input.extend(f"{prefix}_{n}" if n in own else n for n in node.input)
    new.output.extend(f"{prefix}_{n}" for n in node.output)
    return new


def _two_uses(draft: Draft, _: np.random.Generator) -> Case:
    """The pattern twice, on the same constants."""
    again = [_renamed(n, "again", {t for m in draft.nodes for t in m.output}) for n in draft.nodes]
    twice = replace(
        draft, nodes=[*draft.nodes, *again], outputs=[*draft.outputs, *(f"again_{n}" for n in draft.outputs)]
    )
    return Case(_model(twice), "fires", "twice on the same constants", dict(draft.inputs))


def _inner_output(draft: Draft, rng: np.random.Generator) -> Case | None:
    inner = draft.inner()
    if not inner:
        return None
    name = str(rng.choice(inner))
    return Case(_model(draft, extra=[name]), "silent", f"inner value {name} is an output", dict(draft.inputs))


def _inner_read(draft: Draft, rng: np.random.Generator) -> Case | None:
    inner = draft.inner()
    if not inner:
        return None
    name = str(rng.choice(inner))
    reader = helper.make_node("Shape", [name], ["read_size"], "reader")
    widened = replace(draft, nodes=[*draft.nodes, reader], outputs=[*draft.outputs, "read_size"])
    return Case(_model(widened), "silent", f"inner value {name} is read elsewhere", dict(draft.inputs))


def _other_number(draft: Draft, rng: np.random.Generator) -> Case | None:
    if not draft.numbers:
        return None
    name = str(rng.choice(draft.numbers))
    held = draft.constants[name]
    changed = np.asarray(held + 1 if held.dtype.kind in "iu" else held * 1.05 + 0.01).astype(held.dtype)
    other = replace(draft, constants={**draft.constants, name: changed})
    return Case(_model(other), "equal", f"{name} is another number", dict(draft.inputs))


def _constant_fed(draft: Draft, rng: np.random.Generator) -> Case | None:
    if not draft.captured:
        return None
    name = str(rng.choice(draft.captured))
    constants = {n: v for n, v in draft.constants.items() if n != name}
    other = replace(draft, constants=constants, inputs={**draft.inputs, name: draft.constants[name]}, dynamic=False)
    return Case(_model(other), "silent", f"constant {name} is fed", dict(other.inputs))


def _other_domain(draft: Draft, rng: np.random.Generator) -> Case | None:
    """One operator put into a local function of its own: another domain, the same values."""
    place = int(rng.integers(len(draft.nodes) - len(draft.results)))  # not a reader behind the pattern
    node = draft.nodes[place]
    # as many inputs as the operator has: ORT takes some domains' Mul for its own and reads the second
    inside = onnx.NodeProto()
    inside.CopyFrom(node)
    inside.input[:] = [f"p{i}" if n else "" for i, n in enumerate(node.input)]
    imports = [helper.make_opsetid("", draft.opset)]
    body = helper.make_function(
        "local", node.op_type, [n for n in inside.input if n], list(node.output), [inside], imports
    )
    given = [n for n in node.input if n]
    calling = helper.make_node(node.op_type, given, node.output, node.name, domain="local")
    nodes = [calling if i == place else n for i, n in enumerate(draft.nodes)]
    plain = _model(draft)
    graph = helper.make_graph(
        nodes, "case", list(plain.graph.input), list(plain.graph.output), list(plain.graph.initializer)
    )
    return Case(
        _finished(graph, draft.opset, [body]), "silent", f"{node.op_type} of another domain", dict(draft.inputs)
    )


MAKERS: Sequence[Callable[[Draft, np.random.Generator], Case | None]] = (
    _plain, _plain, _inner_output, _in_branch, _inner_read, _in_function, _two_uses, _other_number, _plain,
    _constant_fed, _other_domain,
)  # fmt: skip


def cases(rule: type[Rule], seed: int = 0, draws: int = 1000) -> Iterator[Case]:
    """Yield the cases that come of so many draws; none of them is known to run in ORT."""
    rng = np.random.default_rng(seed)
    for maker in itertools.islice(itertools.cycle(MAKERS), draws):
        draft = draw(rule, rng)
        if draft is None:
            continue
        try:
            case = maker(draft, rng)
        except InvalidDrawError:
            continue
        if case is not None:
            yield case
