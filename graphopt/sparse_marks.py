"""Which weights of a model are sparse on purpose, written down at the layers as metadata.

A layer that was made sparse says so in its node's metadata, under `graphopt.sparse`, as JSON: input of the node ->

    share     part of the weight's elements that is zero
    pattern   N:M where at most N of every M inputs that follow each other are not zero (Conv: M channels at the same
              place of the kernel); empty otherwise
    request   amount, criterion and spread that were asked for: the same again does nothing
    storage   `sparse` lets the file hold the weight in sparse form where that is smaller, `dense` does not

    {"1": {"share": 0.8125, "pattern": "", "request": "0.8 magnitude global", "storage": "sparse"}}

The mask itself is not stored: it is where the weight is exactly zero.  Who trains on keeps those elements zero, at the
inputs that are named.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from graphopt.ops import SPARSE


@dataclass(frozen=True)
class Mark:
    """What was done to one weight; the attributes are those of the metadata."""

    share: float
    pattern: str
    request: str
    storage: str = "sparse"

    @property
    def amount(self) -> float:
        """The amount that was asked for."""
        try:
            return float(self.request.split()[0])
        except (IndexError, ValueError):
            return 0.0


def marks(metadata: Mapping[str, str]) -> dict[int, Mark]:
    """Return what a node's metadata says of its weights, by input; nothing where it cannot be read."""
    try:
        said = json.loads(metadata.get(SPARSE, "{}"))
        return {int(port): Mark(**entry) for port, entry in said.items()}
    except (ValueError, TypeError, AttributeError):
        return {}


def write_mark(metadata: dict[str, str], port: int, mark: Mark) -> None:
    """Put an entry into a node's metadata, in place of one of the same input."""
    known = {**marks(metadata), port: mark}
    metadata[SPARSE] = json.dumps({str(port): asdict(known[port]) for port in sorted(known)}, sort_keys=True)
