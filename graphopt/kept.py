"""Which channels of a layer are left of those that the model once had, written down at the layer as metadata.

Pruning counts from the original widths, so that the same request again asks for nothing more, and reconstruction
compares what is left with what was there.  Indices are kept as runs: `{"width": 64, "kept": "0-3,7,9-63"}`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graphopt.importer import NodeOrigin, origin

Array: TypeAlias = np.ndarray[Any, Any]

KEY = "graphopt.kept"
"""Metadata of a node: the channels of its first output that are left."""

GROUPS = "graphopt.kept.groups"
"""Metadata of the node that a channel group is called after: name of the group -> channels of the node that it had."""

REQUESTS = "graphopt.kept.requests"
"""Metadata of the same nodes: what was asked for when they were cut, so that asking for it again cuts nothing more."""


@dataclass(frozen=True)
class Kept:
    """What is left of a layer's output channels.

    Attributes:
        width: how many there were at first.
        indices: int64, which of those are left, in order.
    """

    width: int
    indices: Array


def kept(node: gs.Node) -> Kept | None:
    """Return what is left of a node's output channels; None where nothing was cut, or the note cannot be read."""
    held = _metadata(node).get(KEY)
    if held is None:
        return None
    try:
        said = json.loads(held)
        return Kept(int(said["width"]), _indices(said["kept"]))
    except (ValueError, KeyError, TypeError):
        return None


def record(node: gs.Node, width: int, indices: Array) -> None:
    """Write down that of a node's `width` output channels these are left; what was cut before still counts."""
    before = kept(node)
    if before is not None and len(before.indices) == width:
        width, indices = before.width, before.indices[indices]
    said = {"width": int(width), "kept": _runs(np.asarray(indices, np.int64))}
    _metadata(node, make=True)[KEY] = json.dumps(said, separators=(",", ":"))


def positions(before: gs.Node, after: gs.Node, size: int) -> Array:
    """Return which of the output channels of `before` each channel of `after` is.

    Args:
        before: a layer.
        after: the same layer after a cut, or the same one where there was none.
        size: output channels of `before`.
    """
    first, last = kept(before), kept(after)
    if last is None or (first is not None and first.width != last.width):
        return np.arange(size)
    if first is None:
        return last.indices
    return np.searchsorted(first.indices, last.indices)


def width_before(node: gs.Node, group: str, width: int) -> int:
    """Return how many channels of `node` a group called after it had at first; it has `width` now."""
    return max(width, groups(node).get(group, width))


def record_group(node: gs.Node, group: str, width: int) -> None:
    """Write down how many channels of a node a group has before it is cut; the first note stays."""
    held = groups(node)
    if group not in held:
        _metadata(node, make=True)[GROUPS] = json.dumps({**held, group: int(width)}, sort_keys=True)


def groups(node: gs.Node) -> dict[str, int]:
    """Return the groups called after a node that were cut, with the channels that they had at first."""
    try:
        said = json.loads(_metadata(node).get(GROUPS, "{}"))
        return {str(name): int(size) for name, size in said.items()}
    except (ValueError, TypeError, AttributeError):
        return {}


def requests(node: gs.Node) -> list[str]:
    """Return what was asked for when groups called after a node were cut."""
    try:
        return [str(text) for text in json.loads(_metadata(node).get(REQUESTS, "[]"))]
    except (ValueError, TypeError):
        return []


def record_request(node: gs.Node, text: str) -> None:
    """Write down what was asked for at a node that a group is called after."""
    held = requests(node)
    if text not in held:
        _metadata(node, make=True)[REQUESTS] = json.dumps([*held, text])


def _metadata(node: gs.Node, *, make: bool = False) -> dict[str, str]:
    held: NodeOrigin | None = origin(node)
    if held is None:
        if not make:
            return {}
        held = node.origin = NodeOrigin(onnx.NodeProto(), {})
    return held.metadata


def _runs(indices: Array) -> str:
    """Return sorted indices as text: runs of neighbours by their first and last."""
    if not len(indices):
        return ""
    cuts = np.flatnonzero(np.diff(indices) != 1) + 1
    runs = ((int(run[0]), int(run[-1])) for run in np.split(indices, cuts))
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _indices(text: str) -> Array:
    found: list[Array] = [np.empty(0, np.int64)]
    for run in text.split(",") if text else ():
        first, _, last = run.partition("-")
        found.append(np.arange(int(first), int(last or first) + 1))
    return np.concatenate(found)
