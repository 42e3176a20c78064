"""Model -> short stable text, and the difference of two texts; for people, golden tests and error messages.

    graph 'main' (%x: float32[1,3,N]) -> (%y: float32[1,N]) {
      %w: float32[64,3,3,3]
      %one: float32[] = 1.0
      %a: float32[1,64,N] = Conv(%x, %w) {strides=[2,2]}  # conv1
      %y: float32[1,N] = ReduceSum(%a, _)
    }

`_` is an input or output that is left out, `?` a dimension that nothing is known of, `[...]` an unknown rank.
Attributes are sorted by name and values cut short, so that the text depends on the graph alone.
"""

from __future__ import annotations

import bisect
import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graphopt.errors import ModelError
from graphopt.exporter import constants_of, untouched
from graphopt.model import Model
from graphopt.tensors import LazySparse

_SHOWN_VALUES = 8
_SHOWN_BYTES = 128
_SHOWN_ITEMS = 16
_SHOWN_TEXT = 60
_SHOWN_NAME = 200
_DIFFLIB_LINES = 400  # difflib takes quadratic time and more: larger gaps become "all of it changed"


def to_text(source: Model | gs.Graph) -> str:
    """Return a model (its graph and functions), a graph or a function as text, a line per node.

    Values of at most 8 elements are shown, no others are read.
    """
    if isinstance(source, Model):
        domains = "".join(f", {_quote(d)} {v}" for d, v in sorted(source.opsets.items()) if d)
        lines = [f"model ir {source.ir_version}, opset {source.opset}{domains}"]
        for graph in (source.graph, *source.functions):
            lines.extend(_graph(graph, set(), ""))
        return "\n".join(lines) + "\n"
    return "\n".join(_graph(source, set(), "")) + "\n"


def _graph(graph: gs.Graph, outer: set[int], indent: str, label: str = "") -> Iterator[str]:
    yield f"{indent}{label}{_title(graph)} ({_signature(graph.inputs)}) -> ({_signature(graph.outputs)}) {{"
    inside = indent + "  "
    constants = constants_of(graph, outer)
    for constant in constants:
        yield f"{inside}{_constant(constant)}"
    visible = outer | {id(c) for c in constants}
    for node in graph.nodes:
        yield from _node(node, visible, inside)
    yield f"{indent}}}"


def _title(graph: gs.Graph) -> str:
    if isinstance(graph, gs.Function):
        attrs = ", ".join(sorted(k if v is None else f"{k}={_attribute(v)}" for k, v in graph.attrs.items()))
        return f"function {_name(f'{graph.domain}.{graph.name}')}{f'<{attrs}>' if attrs else ''}"
    return f"graph {_quote(graph.name or '')}"


def _signature(tensors: Iterable[gs.Tensor]) -> str:
    return ", ".join(_typed(t) for t in tensors)


def _node(node: gs.Node, visible: set[int], indent: str) -> Iterator[str]:
    plain = {k: v for k, v in node.attrs.items() if v is not None and not isinstance(v, gs.Graph)}
    graphs = {k: v for k, v in node.attrs.items() if isinstance(v, gs.Graph)}
    operator = f"{node.domain}.{node.op}" if node.domain not in (None, "", "ai.onnx") else node.op
    outputs, inputs = _signature(node.outputs), ", ".join(_ref(t) for t in node.inputs)
    line = f"{outputs} = {_name(operator)}({inputs})"
    if plain:
        line += f" {{{', '.join(f'{_name(k)}={_attribute(v)}' for k, v in sorted(plain.items()))}}}"
    if node.name:
        line += f"  # {_name(node.name)}"
    yield indent + line
    for key, inner in sorted(graphs.items()):
        yield from _graph(inner, visible, indent + "    ", f"{_name(key)}: ")


def _constant(constant: gs.Constant) -> str:
    sparse = "sparse " if isinstance(untouched(constant), LazySparse) else ""
    shown = _small(constant)
    return f"{_ref(constant)}: {sparse}{_type(constant)}{'' if shown is None else f' = {shown}'}"


def _ref(tensor: gs.Tensor) -> str:
    return f"%{_name(tensor.name)}" if tensor.name else "_"


def _typed(tensor: gs.Tensor) -> str:
    kind = _type(tensor) if tensor.name else ""
    return f"{_ref(tensor)}: {kind}" if kind else _ref(tensor)


def _type(tensor: gs.Tensor) -> str:
    kind = getattr(tensor, "type", None) or "tensor_type"
    if kind != "tensor_type":
        return str(kind).removesuffix("_type")
    if tensor.dtype is None and tensor.shape is None:
        return ""
    dtype = "?" if tensor.dtype is None else _dtype(tensor.dtype)
    if tensor.shape is None:
        return f"{dtype}[...]"
    return f"{dtype}[{','.join('?' if d is None else str(d) for d in tensor.shape)}]"


def _dtype(dtype: Any) -> str:
    dtype = np.dtype(dtype)
    return "string" if dtype.kind in "OSU" else dtype.name


def _small(constant: gs.Constant) -> str | None:
    """Return the values of a constant when they are few, None otherwise; reading leaves it lazy."""
    values = untouched(constant)
    count = int(np.prod(values.shape, dtype=object)) if len(values.shape) else 1
    if count > _SHOWN_VALUES or (not isinstance(values, np.ndarray) and values.nbytes > _SHOWN_BYTES):
        return None
    try:
        array = values if isinstance(values, np.ndarray) else values.load()
    except ModelError:  # a text for error messages must not fail itself
        return None
    if array.ndim == 0:
        return _scalar(array[()])
    return f"[{','.join(_scalar(v) for v in array.reshape(-1))}]"


def _scalar(value: object) -> str:
    if isinstance(value, float):  # attributes are float32: 0.1, not 0.10000000149011612
        with np.errstate(over="ignore"):
            return str(np.float32(value))
    if isinstance(value, bytes | str):
        return _quote(value)
    return str(value)


def _attribute(value: object) -> str:
    if isinstance(value, gs.Constant):
        shown = _small(value)
        return _type(value) + ("" if shown is None else f" {shown}")
    if isinstance(value, gs.Node.AttributeRef):
        return f"@{_name(value.name)}"
    if isinstance(value, onnx.AttributeProto):
        return f"<{onnx.AttributeProto.AttributeType.Name(value.type).lower()}>"
    if isinstance(value, np.ndarray):
        return f"{_dtype(value.dtype)}{list(value.shape)}"
    if isinstance(value, list | tuple):
        shown = ",".join(_attribute(v) for v in value[:_SHOWN_ITEMS])
        return f"[{shown}{f',… {len(value)} in all' if len(value) > _SHOWN_ITEMS else ''}]"
    return _scalar(value)


def _quote(value: str | bytes) -> str:
    text = repr(value[:_SHOWN_TEXT])
    return f"{text}… {len(value)} in all" if len(value) > _SHOWN_TEXT else text


def _name(name: str) -> str:
    """Return a name as it is, unless it is overlong or would break its line."""
    if len(name) > _SHOWN_NAME:
        name = f"{name[:_SHOWN_NAME]}…"
    return name if name.isprintable() else repr(name)[1:-1]


# --- differences -----------------------------------------------------------------------------------------


def diff(before: str, after: str, *, context: int = 1) -> str:
    """Return a unified diff of two texts with `context` lines around each change; empty when they are equal.

    Lines that stand once in each text anchor the comparison (patience diff), so that texts of 100,000 lines
    take seconds; a gap too large for difflib counts as replaced whole.
    """
    a, b = before.splitlines(), after.splitlines()
    return "\n".join(_hunks(a, b, _changes(a, b), context))


def _changes(a: Sequence[str], b: Sequence[str]) -> list[tuple[int, int, int, int]]:
    """Return the spans (a from, a to, b from, b to) that differ, in order."""
    found: list[tuple[int, int, int, int]] = []
    at_a = at_b = 0
    for i, j in [*_anchors(a, b), (len(a), len(b))]:
        found.extend(_gap(a, b, (at_a, i, at_b, j)))
        at_a, at_b = i + 1, j + 1
    return found


def _gap(a: Sequence[str], b: Sequence[str], span: tuple[int, int, int, int]) -> Iterator[tuple[int, int, int, int]]:
    i, i_end, j, j_end = span
    while i < i_end and j < j_end and a[i] == b[j]:
        i, j = i + 1, j + 1
    while i < i_end and j < j_end and a[i_end - 1] == b[j_end - 1]:
        i_end, j_end = i_end - 1, j_end - 1
    if i == i_end and j == j_end:
        return
    if i == i_end or j == j_end or max(i_end - i, j_end - j) > _DIFFLIB_LINES:
        yield i, i_end, j, j_end
        return
    matcher = difflib.SequenceMatcher(None, a[i:i_end], b[j:j_end], autojunk=False)
    for tag, a0, a1, b0, b1 in matcher.get_opcodes():
        if tag != "equal":
            yield i + a0, i + a1, j + b0, j + b1


def _anchors(a: Sequence[str], b: Sequence[str]) -> list[tuple[int, int]]:
    """Return the longest run of pairs, rising on both sides, of lines that are unique in `a` and in `b`."""
    in_a, in_b = _once(a), _once(b)
    pairs = sorted((i, in_b[line]) for line, i in in_a.items() if line in in_b)
    tails: list[int] = []  # index of the pair that ends the best run of each length
    ends: list[int] = []  # its position in b
    previous: list[int] = []
    for index, (_, j) in enumerate(pairs):
        at = bisect.bisect_left(ends, j)
        previous.append(tails[at - 1] if at else -1)
        tails[at : at + 1] = [index]
        ends[at : at + 1] = [j]
    run: list[tuple[int, int]] = []
    index = tails[-1] if tails else -1
    while index >= 0:
        run.append(pairs[index])
        index = previous[index]
    return run[::-1]


def _once(lines: Sequence[str]) -> Mapping[str, int]:
    found: dict[str, int] = {}
    for i, line in enumerate(lines):
        found[line] = -1 if line in found else i
    return {line: i for line, i in found.items() if i >= 0}


def _hunks(
    a: Sequence[str], b: Sequence[str], changes: Sequence[tuple[int, int, int, int]], context: int
) -> Iterator[str]:
    hunk: list[tuple[int, int, int, int]] = []
    for change in changes:
        if hunk and change[0] - hunk[-1][1] > 2 * context:
            yield from _hunk(a, b, hunk, context)
            hunk = []
        hunk.append(change)
    if hunk:
        yield from _hunk(a, b, hunk, context)


def _hunk(a: Sequence[str], b: Sequence[str], hunk: list[tuple[int, int, int, int]], context: int) -> Iterator[str]:
    lead = min(context, hunk[0][0])
    tail = min(context, len(a) - hunk[-1][1])
    start_a, start_b = hunk[0][0] - lead, hunk[0][2] - lead
    end_a, end_b = hunk[-1][1] + tail, hunk[-1][3] + tail
    yield f"@@ -{start_a + 1},{end_a - start_a} +{start_b + 1},{end_b - start_b} @@"
    at = start_a
    for a0, a1, b0, b1 in hunk:
        yield from (f" {line}" for line in a[at:a0])
        yield from (f"-{line}" for line in a[a0:a1])
        yield from (f"+{line}" for line in b[b0:b1])
        at = a1
    yield from (f" {line}" for line in a[at:end_a])
