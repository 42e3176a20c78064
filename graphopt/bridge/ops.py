"""The operators that the bridge computes: one table, made of those of the `ops_*` modules.

`REFUSED` says of operators that are left out on purpose why, and what helps; `coverage` is the list in docs/bridge.md.
"""

from __future__ import annotations

from collections.abc import Mapping

from graphopt.bridge import (
    ops_activation,
    ops_conv,
    ops_index,
    ops_math,
    ops_norm,
    ops_quant,
    ops_reduce,
    ops_resize,
    ops_rnn,
    ops_shape,
)  # fmt: skip
from graphopt.bridge.table import Op, merged

_STANDARD = (
    ops_activation, ops_conv, ops_index, ops_math, ops_norm, ops_quant, ops_reduce, ops_resize,
    ops_rnn, ops_shape,
)  # fmt: skip

OPS: Mapping[tuple[str, str], tuple[Op, ...]] = merged([("", module.TABLE) for module in _STANDARD])
"""(domain, operator) -> its versions, oldest first."""

REFUSED: Mapping[str, tuple[str, str]] = {
    **ops_quant.REFUSED,
}
"""Operators that are left out on purpose: why, and what helps."""


def refusal(domain: str, op: str) -> tuple[str, str]:
    """Return why an operator that is not in the table is not, and what helps."""
    if op in REFUSED:
        return REFUSED[op]
    return "the bridge does not know it", "graphopt optimize may lower it; else cut the model before it"
