"""Layers in letters: equal letters go together, a letter that no output has is contracted by the weight that reads it.

Conv  X nc..  W oc..  B o -> Y no..        MatMul  A …mk  B …kn -> Y …mn        Gemm  A mk  B kn -> Y mn
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from graphopt.analysis.channel_place import Place, broadcast
from graphopt.analysis.channel_ties import ONE


def letters(place: Place, inputs: Mapping[int, str], outputs: Sequence[str], biases: Sequence[int] = ()) -> None:
    """Tie axes of equal letters; a letter that no output has is contracted.

    A dot is no letter, and neither is a dash: something else is said about that axis.

    Args:
        place: the node.
        inputs: port -> a letter for each axis.
        outputs: the same of each output.
        biases: ports that are only added.
    """
    inside: dict[str, list[tuple[int, int]]] = {}
    outside: dict[str, list[int]] = {}
    for port, text in inputs.items():
        for letter, axis in zip(text, place.into(port) or (), strict=True):
            inside.setdefault(letter, []).append((port, axis))
    for port, text in enumerate(outputs):
        for letter, axis in zip(text, place.out(port) or (), strict=True):
            outside.setdefault(letter, []).append(axis)
    for port, text in inputs.items():
        for letter, axis in zip(text, place.into(port) or (), strict=True):
            if letter == ".":
                kernel = place.weight(port)
                place.ties.freeze(axis, "kernels lie along it" if kernel else f"{place.name} slides along it")
    for letter in sorted({*inside, *outside} - {".", "_"}):
        _tie_all(place, [*(axis for _, axis in inside.get(letter, [])), *outside.get(letter, [])])
        if letter not in outside:
            _contract(place, inside[letter])
            continue
        for port, axis in inside.get(letter, []):
            if port not in biases and place.weight(port):
                place.ties.role(axis, "makes")


def _tie_all(place: Place, axes: Sequence[int]) -> None:
    """Tie axes of one letter; one of size 1 broadcasts."""
    first = max(axes)
    for axis in axes:
        if axis != first:
            place.ties.tie(first, axis, f"{place.name} has two sizes along it")
    place.ties.touched.add(first)


def _contract(place: Place, found: Sequence[tuple[int, int]]) -> None:
    """Note the weight that reads an axis; an axis with none stays."""
    weights = [axis for port, axis in found if place.weight(port)]
    if len(found) == 2 and len(weights) == 1:
        place.ties.role(weights[0], "reads")
        return
    what = "contracts it between two computed tensors" if len(found) > 1 and not weights else "sums over it"
    for _, axis in found:
        place.ties.freeze(axis, f"{place.name} {what}")


def conv(place: Place) -> None:
    """X nc.. W oc.. B o -> Y no..; groups as an implicit reshape to (group, channel)."""
    found = _grouped(place, "oc", "o_")
    if found is None:
        return
    x, weight, _, (made, width), group = found
    _groups(place, x[1], (weight[1], width), weight[0], (None, made // group), group)
    place.ties.role(weight[1], "reads")


def conv_transpose(place: Place) -> None:
    """X nc.. W co.. B o -> Y no..; groups as an implicit reshape to (group, channel)."""
    found = _grouped(place, "co", "__")
    if found is None:
        return
    x, weight, y, (read, width), group = found
    place.ties.tie(x[1], weight[0], f"{place.name} has two sizes along it")
    _groups(place, weight[0], (None, read // group), y[1], (weight[1], width), group)
    place.ties.role(weight[0], "makes" if read == group else "reads")
    place.ties.role(weight[1], "makes")


def _grouped(
    place: Place, whole: str, split: str
) -> tuple[Sequence[int], Sequence[int], Sequence[int], tuple[int, int], int] | None:
    """Say in letters what a convolution ties, and return what is left to say of one with groups.

    Args:
        place: the node.
        whole: letters of the first two axes of its weight, with one group.
        split: with several.

    Returns:
        Axes of X, W and Y, the sizes of the first two of W, and the groups; None where nothing is left to say.
    """
    x, weight, y = place.into(0), place.into(1), place.out(0)
    if x is None or weight is None or y is None:
        place.freeze(f"the rank of an operand of {place.name} is unknown")
        return None
    group, rest = int(place.attr("group", 1)), "." * (len(x) - 2)
    read, told = ("nc", whole) if group == 1 else ("n_", split)
    letters(place, {0: read + rest, 1: told + rest, **_bias(place)}, ["no" + rest], biases=(2,))
    if group == 1:
        return None
    first, second = (place.ties.shapes.proved(place.node.inputs[1]).shape or (None, None))[:2]
    if not isinstance(first, int) or not isinstance(second, int):
        place.freeze(f"the weight of {place.name} has no fixed shape")
        return None
    return x, weight, y, (first, second), group


def _bias(place: Place) -> dict[int, str]:
    return {2: "o"} if place.has(2) else {}


def _groups(
    place: Place, read: int, inner: tuple[int | None, int], made: int, outer: tuple[int | None, int], group: int
) -> None:
    """Tie the channels that a grouped layer reads and makes, both (group, channel), through the group.

    Args:
        place: the node.
        read: axis of the channels that it reads.
        inner: axis of the weight for those of one group, None where there is none, and its size.
        made: axis of the channels that it makes.
        outer: as `inner`, for those.
        group: number of groups.
    """
    shared = place.ties.virtual(group)
    if inner[1] > 1:  # else each channel is a group
        place.ties.tag(shared, "groups")
    for fine, (axis, size) in ((read, inner), (made, outer)):
        if fine == ONE:
            continue
        inside = place.ties.virtual(size) if axis is None else axis
        at = np.arange(group * size)
        if fine < 0 or place.ties.axes[fine].size != len(at):
            place.freeze(f"{place.name} has two sizes along its channels")
            return
        place.ties.merge(fine, [(shared, at // size), (inside, at % size)], f"{place.name} has groups of channels")


def gemm(place: Place) -> None:
    """A mk B kn -> Y mn, C is added."""
    a = "km" if place.attr("transA", 0) else "mk"
    b = "nk" if place.attr("transB", 0) else "kn"
    letters(place, {0: a, 1: b}, ["mn"])
    if place.has(2):
        broadcast(place, [2])


def matmul(place: Place) -> None:
    """A …mk B …kn -> Y …mn, the axes before right-aligned; vectors have k alone."""
    a, b, y = place.into(0), place.into(1), place.out(0)
    if a is None or b is None or y is None:
        place.freeze(f"the rank of an operand of {place.name} is unknown")
        return
    matrix = "" + ("m" if len(a) > 1 else "") + ("n" if len(b) > 1 else "")
    batch = len(y) - len(matrix)
    names = [chr(0x100 + i) for i in range(batch)]
    texts = ["mk" if len(a) > 1 else "k", "kn" if len(b) > 1 else "k"]
    found = ["".join(names[batch - (len(axes) - len(text)) :]) + text for axes, text in zip((a, b), texts, strict=True)]
    letters(place, {0: found[0], 1: found[1]}, ["".join(names) + matrix])
    if not place.weight(0) and not place.weight(1):
        for axis in y[:batch]:
            place.ties.tag(axis, "heads")


def einsum(place: Place) -> None:
    """Letters as given; none for axes under an ellipsis."""
    equation = place.attr("equation", "")
    text = (equation.decode() if isinstance(equation, bytes) else str(equation)).replace(" ", "")
    left, arrow, right = text.partition("->")
    terms = left.split(",")
    if "." in text or any(len(set(term)) < len(term) for term in terms) or len(terms) != len(place.node.inputs):
        place.freeze(f"{place.name} has an ellipsis or a diagonal")
        return
    if not arrow:
        right = "".join(sorted(c for c in set(left) - {","} if left.count(c) == 1))
    letters(place, dict(enumerate(terms)), [right])


def attention(place: Place) -> None:
    """Q nhld K nksd V nksv -> Y nhlv, each k for equally many h in a row; of rank 4 only, and without a cache."""
    q, k, v, y = place.into(0), place.into(1), place.into(2), place.out(0)
    held = [port for port in (4, 5) if place.has(port)] or [t for t in place.node.outputs[1:] if not t.is_empty()]
    if any(axes is None or len(axes) != 4 for axes in (q, k, v, y)) or held:
        place.freeze(f"{place.name} has heads that its inputs do not show, or keeps keys")
        return
    assert q is not None and k is not None and v is not None and y is not None  # noqa: PT018  (one fact)
    why = f"{place.name} has two sizes along it"
    for a, b in ((q[0], y[0]), (k[0], y[0]), (v[0], y[0]), (v[1], k[1]), (q[1], y[1]), (v[3], y[3])):
        place.ties.tie(a, b, why)
    many, few = (place.ties.axes[axis].size if axis >= 0 else 1 for axis in (q[1], k[1]))
    place.ties.tag(y[1], "heads")
    place.ties.merge(q[1], [(k[1], np.arange(many) // max(many // few, 1))], place.name)
    for axis in (q[2], q[3], k[2], k[3], v[2], y[2]):
        place.ties.freeze(axis, f"{place.name} works along it")
    mask = place.into(3) if place.has(3) else None
    if mask is not None and len(mask) >= 3:
        place.ties.tie(mask[-3], y[1], why)
