"""Where a last-digit difference may become a whole step: Floor, comparisons, casts to integers."""

from __future__ import annotations

from collections import deque

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graphopt.ops import ARITHMETIC, MOVEMENT, STEPS, is_standard
from graphopt.tensors import is_float

LOOK_AHEAD = 64
"""Nodes that the search for a step visits."""


def step_behind(tensor: gs.Tensor) -> gs.Node | None:
    """Return a step function that a tensor reaches through arithmetic and data movement, if one is near."""
    waiting, seen = deque([tensor]), set[int]()
    while waiting and len(seen) < LOOK_AHEAD:
        for node in waiting.popleft().outputs:
            if id(node) in seen:
                continue
            seen.add(id(node))
            if is_standard(node, *STEPS) or (is_standard(node, "Cast") and not _casts_to_float(node)):
                return node
            if is_standard(node, *MOVEMENT, *ARITHMETIC, "Cast"):
                waiting.extend(node.outputs)
    return None


def _casts_to_float(node: gs.Node) -> bool:
    target = node.attrs.get("to")
    if not isinstance(target, int):
        return False
    return is_float(np.dtype(onnx.helper.tensor_dtype_to_np_dtype(target)))
