"""How long layers take whole and as two, at some ranks: each as a model of its own, timed side by side in ORT.

Layers of the same shapes and attributes are timed once.  What a layer's neighbours do to it (layouts, fused
activations) meets the whole layer and its factors alike, so that differences hold in the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import onnx
from onnx import helper, numpy_helper

from graphopt.analysis.factorable import Factorable
from graphopt.factors import first_form, second_form
from graphopt.kernel_times import Subject, run_all
from graphopt.low_rank import Split
from graphopt.model import Model, load
from graphopt.ops import is_standard
from graphopt.runtime import Session
from graphopt.samples import Feeds
from graphopt.tensors import onnx_dtype

Shape: TypeAlias = tuple[int, ...]
Key: TypeAlias = tuple[Any, ...]

OPSET = 17


@dataclass
class FactorTimes:
    """Seconds of layers.

    Attributes:
        whole: label -> seconds of the layer as it is.
        split: (label, way, rank) -> seconds of its factors.
    """

    whole: dict[str, float] = field(default_factory=dict)
    split: dict[tuple[str, str, int], float] = field(default_factory=dict)


def input_shapes(model: Model, layers: Sequence[Factorable], feed: Feeds) -> dict[str, Shape]:
    """Return the shape of each layer's input on a feed, by label.

    Raises:
        ModelError: ORT refuses the model.
        DataError: the feed does not fit.
    """
    fed = {name: np.shape(value) for name, value in feed.items() if isinstance(value, np.ndarray)}
    names = list(dict.fromkeys(layer.node.inputs[0].name for layer in layers))
    inner = [name for name in names if name not in fed]
    found = Session(model, extra_outputs=inner).run(feed, inner) if inner else {}
    shapes = {**fed, **{name: np.shape(value) for name, value in found.items()}}
    return {layer.label: tuple(map(int, shapes[layer.node.inputs[0].name])) for layer in layers}


def measure(
    asked: Sequence[tuple[Factorable, Mapping[Split, Sequence[int]]]],
    shapes: Mapping[str, Shape],
    *,
    provider: str = "cpu",
    threads: int = 1,
    budget: float = 20.0,
    progress: Callable[[str], None] | None = None,
) -> FactorTimes:
    """Time layers and their factors.

    Args:
        asked: layers, with the ranks to try of each way.
        shapes: of their inputs, by label.
        provider: short name of the execution provider.
        threads: ORT's intra-op threads.
        budget: seconds for all runs, about.
        progress: takes short sentences.
    """
    subjects: dict[Shape, dict[Key, Subject]] = {}
    places: list[tuple[Any, Shape, Key]] = []
    for layer, ways in asked:
        shape = shapes[layer.label]
        group = subjects.setdefault(shape, {})
        choices: list[tuple[Any, Split | None, int]] = [(layer.label, None, 0)]
        choices += [((layer.label, split.way, rank), split, rank) for split, ranks in ways.items() for rank in ranks]
        for name, split, rank in choices:
            key = _key(layer, split, rank)
            if key not in group:
                group[key] = Subject(load(alone(layer, shape, split, rank)), frozenset())
            places.append((name, shape, key))
    count = sum(map(len, subjects.values()))
    for shape, group in subjects.items():
        feed = {"x": _numbers(shape, next(layer for layer, _ in asked if shapes[layer.label] == shape))}
        run_all(
            list(group.values()), [feed], provider=provider, threads=threads, budget=budget * len(group) / count,
            progress=progress, profile=False,
        )  # fmt: skip
    found = FactorTimes()
    for name, shape, key in places:
        seconds = subjects[shape][key].seconds
        if isinstance(name, str):
            found.whole[name] = seconds
        else:
            found.split[name] = seconds
    return found


def _key(layer: Factorable, split: Split | None, rank: int) -> Key:
    attrs = tuple(sorted((name, str(value)) for name, value in layer.node.attrs.items()))
    biased = layer.bias is not None and layer.bias.tensor is not None
    return (layer.node.op, layer.shape, attrs, biased, None if split is None else split.way, rank)


def alone(layer: Factorable, shape: Shape, split: Split | None = None, rank: int = 0) -> onnx.ModelProto:
    """Return a model of one layer, or of its two factors; its weights are of the right shapes only.

    Args:
        layer: the layer.
        shape: of its input.
        split: how it is split; None for the layer as it is.
        rank: of the factors.
    """
    node = layer.node
    kind = onnx_dtype(layer.weight().dtype)
    made, held = _whole(layer) if split is None else _pair(layer, split, rank)
    constants = [numpy_helper.from_array(np.full(size, 0.01, layer.weight().dtype), name) for name, size in held]
    if layer.bias is not None and layer.bias.tensor is not None:
        constants.append(numpy_helper.from_array(np.full(layer.outputs, 0.01, layer.weight().dtype), "b"))
        if is_standard(node, "MatMul"):
            made[-1].output[0] = "product"
            made.append(helper.make_node("Add", ["product", "b"], ["y"]))
        else:
            made[-1].input.append("b")
    graph = helper.make_graph(
        made, "layer", [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info("y", kind, [None] * len(shape))], constants,
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)


def _whole(layer: Factorable) -> tuple[list[onnx.NodeProto], list[tuple[str, Shape]]]:
    return [helper.make_node(layer.node.op, ["x", "w"], ["y"], **layer.node.attrs)], [("w", layer.shape)]


def _pair(layer: Factorable, split: Split, rank: int) -> tuple[list[onnx.NodeProto], list[tuple[str, Shape]]]:
    op, attrs = first_form(layer.node, split)
    first, second = split.shapes(rank)
    nodes = [
        helper.make_node(op, ["x", "w"], ["z"], **attrs),
        helper.make_node(layer.node.op, ["z", "v"], ["y"], **second_form(layer, split)),
    ]
    return nodes, [("w", first), ("v", second)]


def _numbers(shape: Shape, layer: Factorable) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).standard_normal(shape).astype(layer.weight().dtype)
