"""The operators that the bridge computes: one table, made of those of the `ops_*` modules.

`find` gives what computes a node; `REFUSED` says of operators that are left out on purpose why, and what helps.
`coverage` is the list in docs/bridge.md.
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
    ops_shape,
)  # fmt: skip
from graphopt.bridge.table import Op, merged
from graphopt.ops import STANDARD_DOMAINS

_STANDARD = (
    ops_activation, ops_conv, ops_index, ops_math, ops_norm, ops_quant, ops_reduce, ops_shape,
)  # fmt: skip

OPS: Mapping[tuple[str, str], tuple[Op, ...]] = merged([("", module.TABLE) for module in _STANDARD])
"""(domain, operator) -> its versions, oldest first."""


def find(domain: str | None, op: str, opset: int) -> Op | None:
    """Return what computes an operator at an opset, None where the bridge has nothing."""
    versions = OPS.get(("" if domain in STANDARD_DOMAINS else domain or "", op), ())
    return next((version for version in reversed(versions) if version.since <= opset), None)
