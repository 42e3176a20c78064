"""What operators never take: a node that gets it stops the model, so whatever leads there does not happen.

Ranks only, each of them held against ORT by a test.  Sizes are left out: an axis of size 0 or 1 is often taken where
the specification wants another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from graphopt.analysis.facts import Site

_RANKS: Mapping[str, Mapping[int, int]] = {
    **{op: {0: 3, 1: 3, 2: 3} for op in ("LSTM", "GRU", "RNN")},
    "Gemm": {0: 2, 1: 2},
}
"""Operator -> input -> the one rank that it may have."""


def _rank(site: Site, index: int) -> int | None:
    shape = site.inputs[index].shape if index < len(site.inputs) else None
    return None if shape is None else len(shape)


def _other_rank(site: Site) -> str | None:
    for index, wanted in _RANKS[site.node.op].items():
        rank = _rank(site, index)
        if rank is not None and rank != wanted:
            return f"input {index} has rank {rank}, not {wanted}"
    return None


def _unlike_weight(site: Site) -> str | None:
    x, w = _rank(site, 0), _rank(site, 1)
    return f"input 0 has rank {x}, the weight {w}" if None not in (x, w) and x != w else None


def _unlike_each_other(site: Site) -> str | None:
    ranks = {r for i in range(len(site.inputs)) if (r := _rank(site, i)) is not None}
    return f"inputs have ranks {sorted(ranks)}" if len(ranks) > 1 else None


def _unlike_perm(site: Site) -> str | None:
    perm, rank = site.node.attrs.get("perm"), _rank(site, 0)
    if perm is None or rank is None or not isinstance(perm, list) or len(perm) == rank:
        return None
    return f"input 0 has rank {rank}, not {len(perm)}"


RULES: Mapping[str, Callable[[Site], str | None]] = {
    **dict.fromkeys(_RANKS, _other_rank),
    "Conv": _unlike_weight,
    "ConvTranspose": _unlike_weight,
    "Concat": _unlike_each_other,
    "Transpose": _unlike_perm,
}
"""Operator -> why it cannot run on what it gets, None where it may."""


def impossible(site: Site) -> str | None:
    """Return why a standard node cannot run on what is known of its inputs, None where it may."""
    rule = RULES.get(site.node.op)
    reason = rule(site) if rule is not None else None
    return None if reason is None else f"{site.node.op} '{site.node.name or site.node.outputs[0].name}': {reason}"
