"""Means over all places of an image, spelled as the pool that ORT computes where the tensor lies.

    ReduceMean(x, axes = all but the first two, keepdims=1)   ->   GlobalAveragePool(x)
    … keepdims=0                                              ->   Flatten(GlobalAveragePool(x))

Behind convolutions ORT keeps tensors in a blocked layout, which ReduceMean has to leave and GlobalAveragePool has not.
Measured (ORT 1.31, one thread): 0.93 to 0.99 of a convolution with its mean; where nothing is blocked 1.04 to 1.07, so
ReduceMean stays there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.ops import BLOCKED, BLOCKED_THROUGH, is_standard
from graphopt.pattern import Op, Value
from graphopt.registry import register
from graphopt.rewrite import Match, Rule, RulePass

BLOCK = 16
"""Channels from which on, in multiples, ORT's pools are blocked."""

REACH = 8
"""Operators that are looked through for the convolution."""


class MeanToPool(Rule):
    """ReduceMean(x, axes=[2, 3]) -> GlobalAveragePool(x)      flattened without keepdims; any number of places"""

    types: ClassVar = frozenset({"float32"})

    @staticmethod
    def pattern(op: Op, x: Value) -> Value:
        return op.ReduceMean(x, name="mean")

    @staticmethod
    def check(x: Value, m: Match) -> str | None:
        axes, rank = m["mean"].param("axes"), x.rank
        if rank is None or rank < 3 or axes is None:
            return "the rank or the axes are unknown"
        if not isinstance(axes, np.ndarray | list | tuple):
            return "the axes are computed"
        found = sorted(int(a) % rank for a in np.asarray(axes).reshape(-1))
        return None if found == list(range(2, rank)) else "the mean is not over all places of each channel"

    @staticmethod
    def worth(x: Value) -> str | None:
        channels = (x.shape or (None, None))[1]
        if not isinstance(channels, int) or channels % BLOCK:
            return f"{channels} channels are not in ORT's blocked layout"
        return None if _blocked(x.tensor) else "no convolution or pool before it"

    @staticmethod
    def rewrite(op: Op, x: Value, m: Match) -> Value:
        made = op.GlobalAveragePool(x)
        keeps = m["mean"].param("keepdims")
        return made if keeps is None or int(keeps) else op.Flatten(made, axis=1)

    @staticmethod
    def examples(rng: np.random.Generator) -> dict[str, Any]:
        """Images and sequences, axes from either side."""
        rank = int(rng.choice((3, 4, 5)))
        axes = [i - (rank if rng.random() < 0.5 else 0) for i in range(2, rank)]
        if rng.random() < 0.3:
            axes = [0, *axes]
        return {"x": (2, 4, 3, 5, 2)[:rank], "mean.axes": axes}


def _blocked(tensor: gs.Tensor) -> bool:
    """Tell whether a tensor comes from an operator with a blocked layout, through others that keep it."""
    for _ in range(REACH):
        node = tensor.inputs[0] if tensor.inputs else None
        if node is None or not is_standard(node):
            return False
        if node.op in BLOCKED:
            return True
        if node.op not in BLOCKED_THROUGH or not node.inputs:
            return False
        tensor = node.inputs[0]
    return False


@register
@dataclass(frozen=True)
class LowerPools(RulePass):
    """Write means over all places as GlobalAveragePool behind convolutions.

    Exact up to the order of sums, keeps the signature.
    """

    name: ClassVar[str] = "lower-pools"
    stage: ClassVar[Any] = "lowering"
    optional: ClassVar[bool] = True
    rules: ClassVar = (MeanToPool,)
