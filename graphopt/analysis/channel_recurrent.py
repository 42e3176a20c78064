"""LSTM, GRU and RNN: the hidden units, wherever they stand.

    X tbi   W d(gh)i   R d(gh)h   B d(2gh)   h0, c0 dbh   P d(3h)   ->   Y tdbh   Y_h, Y_c dbh      g gates

A hidden unit goes in every gate of W, R and B at once, in both directions; R reads it (it is contracted with the hidden
state of the step before), and so do the layers behind.  With `layout` 1 the batch comes first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from graphopt.analysis.channel_place import Place
from graphopt.analysis.channel_ties import OPEN

RECURRENT: Mapping[str, Mapping[int, int]] = {
    "RNN": {1: 1, 2: 1, 3: 2},
    "GRU": {1: 3, 2: 3, 3: 6},
    "LSTM": {1: 4, 2: 4, 3: 8, 7: 3},
}
"""Operator -> for inputs that hold all gates along axis 1, how many blocks there are."""

_LAYOUTS: Sequence[tuple[str, str, str]] = (("tbi", "tdbh", "dbh"), ("bti", "btdh", "bdh"))
"""Letters of the input, of the first output, and of states, by `layout`."""

_STEPS = {"t": "goes along it step by step", "d": "has a direction for each"}


def recurrent(place: Place) -> None:
    """Tie hidden units through all gates; the steps and the directions stay."""
    ties = place.ties
    hidden = ties.shapes.proved(place.node.inputs[2]).shape
    weight = place.into(2) or []
    if hidden is None or len(hidden) != 3 or not isinstance(hidden[2], int) or not place.weight(2):
        place.freeze(f"{place.name} has weights that are not constant")
        return
    ties.tag(weight[2], "hidden")
    ties.role(weight[2], "reads")
    for port, blocks in RECURRENT[place.node.op].items():
        if place.has(port):
            _gates(place, port, blocks * hidden[2], weight[2])
    _letters(place, weight[2])


def _gates(place: Place, port: int, size: int, units: int) -> None:
    """Tie the blocks of one constant along its axis 1 to the hidden units."""
    direction, gates = (place.into(port) or [])[:2]
    place.ties.freeze(direction, f"{place.name} {_STEPS['d']}")
    if gates == OPEN or (gates >= 0 and place.ties.axes[gates].size != size):
        place.freeze(f"{place.name} has gates of unknown size")
    elif units >= 0:
        hidden = place.ties.axes[units].size
        place.ties.merge(gates, [(units, np.arange(size) % hidden)], place.name)
        if port in (1, 2):
            place.ties.role(gates, "makes")


def _letters(place: Place, units: int) -> None:
    """Tie what goes in and comes out: hidden units, the batch, and what W reads."""
    ties, node = place.ties, place.node
    x, y, state = _LAYOUTS[int(place.attr("layout", 0))]
    tensors = [(x, place.into(0)), *((state, place.into(port)) for port in (5, 6) if place.has(port))]
    tensors += [(text, place.out(port)) for port, text in enumerate((y, state, state)[: len(node.outputs)])]
    batch: int | None = None
    for text, axes in tensors:
        for letter, axis in zip(text, axes or (), strict=False):
            if letter in _STEPS:
                ties.freeze(axis, f"{place.name} {_STEPS[letter]}")
            elif letter == "h":
                ties.tie(units, axis, f"{place.name} has two sizes along it")
            elif letter == "i":
                read = (place.into(1) or [])[2]
                ties.tie(axis, read, f"{place.name} has two sizes along it")
                ties.role(read, "reads")
                if not place.weight(1):
                    place.freeze(f"{place.name} has weights that are not constant")
            elif batch is None:
                batch = axis
            else:
                ties.tie(batch, axis, f"{place.name} has two sizes along it")
    if place.has(4):
        ties.freeze_all(place.into(4), f"{place.name} reads lengths from it")
