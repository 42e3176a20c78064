"""NumPy arrays as torch tensors and back, types that NumPy lacks included."""

from __future__ import annotations

from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
import torch

from graphopt.errors import DataError

Array: TypeAlias = np.ndarray[Any, Any]


def to_tensor(array: Array) -> torch.Tensor:
    """Return an array as a tensor, which shares its memory where torch can write to it.

    Raises:
        DataError: text, which no tensor holds.
    """
    if array.dtype.kind in "OSU":
        raise DataError("torch has no tensors of text", hint="train the part of the model behind its text inputs")
    array = np.require(array, requirements=["C", "W"])
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def to_array(tensor: torch.Tensor) -> Array:
    """Return a tensor as an array."""
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        return np.asarray(tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16))
    return np.asarray(tensor.numpy())
