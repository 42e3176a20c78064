"""Did the layers that were to run on integers end up so?  ONNX Runtime (ORT) decides when it loads a model.

What it makes of the graph is read, kernel by kernel, and traced back to the layers; a layer that it left in float comes
with the reason.  Layers are told apart by label, so the answer fits the model before codes went in.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from graphopt.analysis.quantized import why_float
from graphopt.edit import label
from graphopt.kernels import FLOAT_KERNELS, is_integer
from graphopt.model import Model, load
from graphopt.profile import optimized_graph
from graphopt.trace import Trace


@dataclass(frozen=True)
class Compiled:
    """What became of layers in ORT's graph.

    Attributes:
        integer: labels of those that run on integers.
        left_float: label -> why ORT runs it in float.
        readable: whether ORT could write its graph; if not, nothing is known.
    """

    integer: frozenset[str]
    left_float: dict[str, str]
    readable: bool = True


def inspect_layers(model: Model, layers: Collection[str], provider: str = "cpu") -> Compiled:
    """Return which of the layers run on integers once ORT has compiled the model.

    Raises:
        ModelError: ORT refuses the model.
    """
    copy = load(model)
    trace = Trace(copy)  # names every node, so that ORT's graph can be traced back
    optimized = optimized_graph(copy, provider=provider)
    if optimized is None:
        return Compiled(frozenset(), {}, readable=False)
    original = list(load(model).nodes())
    wanted = set(layers)
    integer: set[str] = set()
    left: dict[str, str] = {}
    for kernel in trace.match(optimized).kernels:
        for i in kernel.stands:
            node = original[i]
            name = label(node)
            if name not in wanted:
                continue
            if is_integer(kernel.node.op_type):
                integer.add(name)
            elif kernel.node.op_type in FLOAT_KERNELS.get(node.op, {node.op}):
                left[name] = why_float(node, original[max(kernel.stands)])
    return Compiled(frozenset(integer), {name: why for name, why in left.items() if name not in integer})
