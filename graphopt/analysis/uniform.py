"""Tensors that hold one value everywhere, though their size may be open."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.analysis.constants import array_of
from graphopt.ops import is_standard

_PROBED = 1 << 16
"""Elements of a constant that are read to see whether they are all equal."""

_DEEPEST = 8
"""Nodes between a tensor and the constant that it repeats."""

_SPREADS = frozenset({"Expand", "Reshape", "Squeeze", "Unsqueeze", "Tile", "Transpose", "Identity", "Flatten", "Slice"})
"""Operators whose output holds elements of their first input only."""


def uniform_of(tensor: gs.Tensor) -> Any:
    """Return the value that all elements of a tensor have, as Python's own; None where they differ or are open.

    A tensor that is empty may have any.
    """
    for _ in range(_DEEPEST):
        values = array_of(tensor, limit=_PROBED)
        if values is not None:
            return _only(values)
        if len(tensor.inputs) != 1:
            return None
        node = tensor.inputs[0]
        if is_standard(node, "ConstantOfShape"):
            value = node.attrs.get("value")
            if value is None:
                return 0.0
            return _only(np.asarray(value.values)) if isinstance(value, gs.Constant) else None
        if not is_standard(node, *_SPREADS):
            return None
        tensor = node.inputs[0]
    return None


def _only(values: np.ndarray[Any, Any]) -> Any:
    if values.size == 0 or values.dtype.kind in "OSU":
        return None
    first = values.reshape(-1)[0]
    return first.item() if bool((values == first).all()) else None
