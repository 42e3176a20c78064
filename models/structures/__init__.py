"""Structures: exported networks of a few KB without their weights, which are drawn anew for each test.

The files beside this one are written by `generate.py`, by both of torch's exporters; `handmade.py` has more, of what
exporters seldom write.  `get` fills the weights in: each is drawn evenly from the interval that its file states, so
that activations neither die out nor explode.

>>> from graphopt.models import structures
>>> model = structures.get("resnet18-dynamo", seed=1)
>>> structures.feeds("resnet18-dynamo", second=True)["image"].shape
(3, 3, 48, 40)
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from graphopt.errors import SpecError, did_you_mean

from .handmade import MODELS
from .spec import Input

_FOLDER = Path(__file__).parent


def names() -> list[str]:
    """Return the names of all structures."""
    return sorted([path.stem for path in _FOLDER.glob("*.onnx")] + list(MODELS))


def get(name: str, seed: int = 0) -> onnx.ModelProto:
    """Return a structure with weights drawn from `seed`, a model like any other.

    Raises:
        SpecError: no such structure.
    """
    if name in MODELS:
        return MODELS[name](np.random.default_rng([seed, zlib.crc32(name.encode())])).proto
    model = _structure(name)
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    for tensor in [*model.graph.initializer, *_constants(model.graph)]:
        if tensor.doc_string:
            _fill(tensor, rng)
    del model.metadata_props[:]
    return model


def norm(name: str) -> str:
    """Return `batch` where every parameter lies on some axis that can be cut, `layer` where most do, else `none`."""
    if name in MODELS:
        return "none"
    return _metadata(_structure(name))["norm"]


def inputs(name: str) -> dict[str, Input]:
    """Return what a structure takes, by input name."""
    if name in MODELS:
        return MODELS[name](np.random.default_rng(0)).inputs
    rows = json.loads(_metadata(_structure(name))["feeds"])
    return {key: Input(*(tuple(shape) for shape in row["shapes"]), row["high"]) for key, row in rows.items()}


def feeds(name: str, seed: int = 0, *, second: bool = False) -> dict[str, npt.NDArray[Any]]:
    """Return one feed: float32 of a standard normal distribution, or int64 ids.

    Args:
        name: of a structure.
        seed: of the values.
        second: at the structure's other shape; the same shape where nothing is dynamic.
    """
    rng = np.random.default_rng([seed, 7])
    found: dict[str, npt.NDArray[Any]] = {}
    for key, spec in inputs(name).items():
        shape = spec.second if second else spec.shape
        whole = rng.integers(1, spec.high, shape) if spec.high else None
        found[key] = rng.standard_normal(shape, dtype=np.float32) if whole is None else whole
    return found


def _structure(name: str) -> onnx.ModelProto:
    path = _FOLDER / f"{name}.onnx"
    if not path.exists():
        hint = did_you_mean(name, names()) or f"there are: {', '.join(names())}"
        raise SpecError(f"there is no structure '{name}'", hint=hint)
    return onnx.load(path)


def _metadata(model: onnx.ModelProto) -> dict[str, str]:
    return {row.key: row.value for row in model.metadata_props}


def _constants(graph: onnx.GraphProto) -> list[onnx.TensorProto]:
    attributes = [a for node in graph.node if node.op_type == "Constant" for a in node.attribute]
    return [attribute.t for attribute in attributes if attribute.name == "value"]


def _fill(tensor: onnx.TensorProto, rng: np.random.Generator) -> None:
    low, high = (float(word) for word in tensor.doc_string.split())
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    values = rng.uniform(low, high, tuple(tensor.dims)).astype(dtype)
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
