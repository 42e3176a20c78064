"""Facts about operators, as data.  Nothing here decides anything: passes and analyses look things up."""

from __future__ import annotations

import onnx_graphsurgeon as gs

STANDARD_DOMAINS = frozenset({None, "", "ai.onnx"})

NONDETERMINISTIC = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"}
)
"""Each run may give another result."""

CONTROL_FLOW = frozenset({"If", "Loop", "Scan", "SequenceMap"})
"""Operators that run subgraphs."""

QUANTIZE = frozenset({"QuantizeLinear", "DynamicQuantizeLinear"})
DEQUANTIZE = frozenset({"DequantizeLinear"})


def is_standard(node: gs.Node, *ops: str) -> bool:
    """Tell whether a node is of the standard domain and, when `ops` are given, one of them."""
    return node.domain in STANDARD_DOMAINS and (not ops or node.op in ops)
