"""Images moved and mixed: one resampling for all that moves pixels together, in NCHW or NHWC.

Each image has an affine map from places in the result to places in the source, in coordinates from -1 to 1
(`torch.nn.functional.affine_grid`); pixels beyond the edge repeat the edge, whatever the values stand for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (torch's own custom)

Array: TypeAlias = np.ndarray[Any, Any]
Strengths: TypeAlias = Mapping[str, float]

MIRRORS = ("flip", "vflip")
MOVES = (*MIRRORS, "rotate", "scale", "crop", "shift")
"""What moves pixels."""

_CHANNELS = range(1, 5)


def is_image(array: Array) -> bool:
    """Tell whether an array holds images: rank 4, of floats or bytes."""
    return array.ndim == 4 and (array.dtype.kind == "f" or array.dtype == np.uint8)


def channels_last(shape: Sequence[int]) -> bool:
    """Tell whether a batch of images is NHWC: axis 3 may be channels, axis 1 may not."""
    return shape[1] not in _CHANNELS and shape[3] in _CHANNELS


def sizes(shape: Sequence[int]) -> tuple[int, int]:
    """Return height and width."""
    return (shape[1], shape[2]) if channels_last(shape) else (shape[2], shape[3])


def draw_map(moves: Strengths, rng: np.random.Generator, height: int, width: int) -> Array:
    """Return a random map, float64 (3, 3), of an image of this size.

    Args:
        moves: name -> strength: probability of flip and vflip, degrees of rotate, largest change of scale, smallest
            side of crop, largest shift; the last three as parts of the size.
        rng: what draws.
        height: in pixels.
        width: in pixels.
    """
    found = np.eye(3)
    for name, strength in moves.items():
        found = found @ _DRAW[name](strength, rng, height, width)
    return found


def _flip(strength: float, rng: np.random.Generator, *_: int) -> Array:
    return np.diag([-1.0 if rng.random() < strength else 1.0, 1.0, 1.0])


def _vflip(strength: float, rng: np.random.Generator, *_: int) -> Array:
    return np.diag([1.0, -1.0 if rng.random() < strength else 1.0, 1.0])


def _rotate(strength: float, rng: np.random.Generator, height: int, width: int) -> Array:
    angle = math.radians(rng.uniform(-strength, strength))
    cos, sin = math.cos(angle), math.sin(angle)
    return np.array([[cos, -sin * height / width, 0.0], [sin * width / height, cos, 0.0], [0.0, 0.0, 1.0]])


def _scale(strength: float, rng: np.random.Generator, *_: int) -> Array:
    zoom = 1.0 / rng.uniform(1.0 - strength, 1.0 + strength)
    return np.diag([zoom, zoom, 1.0])


def _crop(strength: float, rng: np.random.Generator, *_: int) -> Array:
    side = rng.uniform(strength, 1.0)
    left, top = rng.uniform(-1.0, 1.0, 2) * (1.0 - side)
    return np.array([[side, 0.0, left], [0.0, side, top], [0.0, 0.0, 1.0]])


def _shift(strength: float, rng: np.random.Generator, height: int, width: int) -> Array:
    limits = (max(1, round(strength * size)) for size in (height, width))  # whole pixels, which stay sharp
    down, right = (int(rng.integers(-limit, limit + 1)) for limit in limits)
    return np.array([[1.0, 0.0, 2 * right / width], [0.0, 1.0, 2 * down / height], [0.0, 0.0, 1.0]])


_DRAW: Mapping[str, Callable[[float, np.random.Generator, int, int], Array]] = {
    "flip": _flip, "vflip": _vflip, "rotate": _rotate, "scale": _scale, "crop": _crop, "shift": _shift,
}  # fmt: skip


def moved(images: Array, maps: Array) -> Array:
    """Return images of the same shape and type, seen through maps, float64 (rows, 3, 3)."""
    last = channels_last(images.shape)
    values = np.moveaxis(images, 3, 1) if last else images
    linear = maps[:, :2, :2]
    if (np.abs(linear) == np.eye(2)).all() and not maps[:, :2, 2].any():  # mirrors alone: nothing is resampled
        out = np.stack([v[:, :: int(m[1, 1]), :: int(m[0, 0])] for v, m in zip(values, linear, strict=True)])
    else:
        source = torch.from_numpy(np.ascontiguousarray(values, np.float32))
        grid = F.affine_grid(torch.from_numpy(maps[:, :2].astype(np.float32)), list(source.shape), align_corners=False)
        found = F.grid_sample(source, grid, mode="bilinear", padding_mode="border", align_corners=False)
        out = as_type(found.numpy(), images.dtype)
    return np.ascontiguousarray(np.moveaxis(out, 1, 3) if last else out)


def as_type(values: Array, dtype: np.dtype[Any]) -> Array:
    """Return floats as a type, bytes rounded and kept in their range."""
    return np.clip(np.rint(values), 0, 255).astype(dtype) if dtype == np.uint8 else values.astype(dtype)


def cut_out(image: Array, side: float, rng: np.random.Generator, *, last: bool) -> Array:
    """Return one image (CHW or HWC, floats) with a rectangle of each channel's mean (DeVries and Taylor 2017).

    Args:
        image: of floats.
        side: of the rectangle, as a part of the image's sides; its centre may be anywhere.
        rng: what draws.
        last: whether channels are the last axis.
    """
    rows, columns = (0, 1) if last else (1, 2)
    out = image.copy()
    where: list[Any] = [slice(None)] * 3
    for axis in (rows, columns):
        size = image.shape[axis]
        centre, half = rng.integers(size), side * size / 2
        where[axis] = slice(max(0, round(centre - half)), min(size, round(centre + half)))
    out[tuple(where)] = image.mean(axis=(rows, columns), keepdims=True)
    return out
