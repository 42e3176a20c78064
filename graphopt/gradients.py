"""Gradients of a task's loss by the weights of a model, as a file: what `taylor` and `gradient` rank by.

The file is an `.npz` with one float array per initializer, under its name and of its shape, and `__model__`: the
`identity` of the model that they were taken of: what `save_gradients` writes.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from graphopt.errors import DataError
from graphopt.fingerprint import structure_of
from graphopt.model import Model
from graphopt.tensors import LazyTensor

Array: TypeAlias = np.ndarray[Any, Any]

OWNER = "__model__"
"""The entry that names the model."""


def identity(model: Model) -> str:
    """Return a hash of a model's graph and of the values of its initializers."""
    found = hashlib.sha256(structure_of(model).encode())
    for constant in sorted(model.constants(), key=lambda c: c.name):
        held = constant._values
        found.update(constant.name.encode() + b"\0")
        found.update(held.raw() if isinstance(held, LazyTensor) else np.ascontiguousarray(constant.values).tobytes())
    return found.hexdigest()[:32]


def save_gradients(path: str | Path, model: Model, gradients: Mapping[str, Array]) -> None:
    """Write gradients of a model's initializers, by name."""
    np.savez(path, **{OWNER: np.array(identity(model)), **gradients})  # type: ignore[arg-type]  # stub of savez


def read_gradients(path: str | Path, model: Model) -> dict[str, Array]:
    """Return the gradients of a file that belong to a model.

    Raises:
        DataError: no such file, not gradients, of another model, or of another shape than the initializer.
    """
    where = str(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            if OWNER not in file.files:
                raise DataError(f"the file does not say whose gradients it holds ('{OWNER}')", at=where, hint=_MADE)
            owner, names = str(file[OWNER]), [name for name in file.files if name != OWNER]
            if owner != identity(model):
                raise DataError("the gradients were taken of another model", at=where, hint=_MADE)
            found = {name: np.asarray(file[name]) for name in names}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no .npz of arrays"
        raise DataError(f"the gradients cannot be read: {why}", at=where, hint=_MADE) from error
    shapes = {constant.name: tuple(constant.shape) for constant in model.constants()}
    for name, values in found.items():
        if shapes.get(name) != values.shape or not np.isfinite(values).all():
            raise DataError(
                f"'{name}' is no finite gradient of an initializer of shape {shapes.get(name)}", at=where, hint=_MADE
            )
    return found


_MADE = "an .npz with a gradient per initializer name and '__model__', see graphopt.gradients"
