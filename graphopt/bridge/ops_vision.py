"""Sampling of images at computed places, patches, boxes, as functions of torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from graphopt.bridge.host import total
from graphopt.bridge.operands import along, number, numbers, positive
from graphopt.bridge.ops_conv import padded
from graphopt.bridge.ops_resize import pad
from graphopt.bridge.table import Op, Table

_SAMPLING = {"linear": "bilinear", "cubic": "bicubic"}
"""Names of opset 20 -> those of opset 16, which torch has."""


def grid_sample(
    x: Tensor, grid: Tensor, *, align_corners: int = 0, mode: str = "linear", padding_mode: str = "zeros"
) -> Tensor:
    how = _SAMPLING.get(mode, mode)
    return functional.grid_sample(x, grid.to(x.dtype), how, padding_mode, align_corners=bool(align_corners))


def affine_grid(theta: Tensor, size: Any, align_corners: int = 0) -> Tensor:
    return functional.affine_grid(theta, list(numbers(size)), align_corners=bool(align_corners))


def center_crop_pad(x: Tensor, shape: Any, axes: Sequence[int] | None = None) -> Tensor:
    """Return the middle of x, or x in the middle of zeros."""
    chosen = range(x.ndim) if axes is None else [positive(axis, x.ndim) for axis in axes]
    for axis, wanted in zip(chosen, numbers(shape), strict=True):
        more = wanted - x.shape[axis]
        before = more // 2 if more > 0 else -(-more // 2)
        x = pad(x, (before, more - before), axes=(axis,))
    return x


def col2im(
    x: Tensor, image_shape: Any, block_shape: Any, *, dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None, strides: Sequence[int] | None = None,
) -> Tensor:  # fmt: skip
    """Return images (batch, channels, …) as sums of blocks (batch, channels · block, places)."""
    image, block = numbers(image_shape), numbers(block_shape)
    count = len(image)
    strides, dilations = strides or (1,) * count, dilations or (1,) * count
    pads = tuple(pads or (0,) * (2 * count))
    wide = [n + p + q for n, p, q in zip(image, pads[:count], pads[count:], strict=True)]
    flat = torch.zeros(1, dtype=torch.long, device=x.device)
    for length, k, s, d in zip(wide, block, strides, dilations, strict=True):
        starts = torch.arange((length - (k - 1) * d - 1) // s + 1, device=x.device) * s
        places = torch.arange(k, device=x.device)[:, None] * d + starts
        flat = (flat.reshape(-1, 1, *flat.shape[1:], 1) * length + _opened(places, flat)).flatten(0, 1)
        flat = flat.flatten(1) if flat.ndim > 2 else flat
    rows = x.reshape(x.shape[0], -1, total(block) * flat.shape[1])
    out = rows.new_zeros(*rows.shape[:2], total(wide)).index_add(2, flat.flatten(), rows)
    return padded(out.reshape(*out.shape[:2], *wide), [-n for n in pads[:count]], [-n for n in pads[count:]])


def _opened(places: Tensor, flat: Tensor) -> Tensor:
    """Return (taps, starts) shaped to be added to places of the axes before: (before, taps, starts before, starts)."""
    return places.reshape(1, places.shape[0], *[1] * (flat.ndim - 1), places.shape[1])


def _bilinear(x: Tensor, y_at: Tensor, x_at: Tensor) -> tuple[Tensor, Tensor]:
    """Return the four neighbours of places in an image (channels, height, width), and their weights.

    Both are (4, …, places); places more than one element outside count nothing, the others are moved inside.
    """
    height, width = x.shape[-2:]
    inside = (y_at >= -1) & (y_at <= height) & (x_at >= -1) & (x_at <= width)
    y_at, x_at = y_at.clamp(0, height - 1), x_at.clamp(0, width - 1)
    y0, x0 = y_at.floor(), x_at.floor()
    y1, x1 = (y0 + 1).clamp(max=height - 1), (x0 + 1).clamp(max=width - 1)
    dy, dx = y_at - y0, x_at - x0
    weights = torch.stack([(1 - dy) * (1 - dx), (1 - dy) * dx, dy * (1 - dx), dy * dx]) * inside
    places = torch.stack([y0 * width + x0, y0 * width + x1, y1 * width + x0, y1 * width + x1]).long()
    return x.flatten(-2)[..., places].movedim(-places.ndim, 0), weights


def roi_align_10(
    x: Tensor, rois: Tensor, batch_indices: Tensor, *, mode: str = "avg", output_height: int = 1,
    output_width: int = 1, sampling_ratio: int = 0, spatial_scale: float = 1.0,
) -> Tensor:  # fmt: skip
    """Return boxes of images resized, coordinates not moved by half a pixel."""
    return roi_align(
        x, rois, batch_indices, mode=mode, output_height=output_height, output_width=output_width,
        sampling_ratio=sampling_ratio, spatial_scale=spatial_scale,
        coordinate_transformation_mode="output_half_pixel",
    )  # fmt: skip


def roi_align(
    x: Tensor, rois: Tensor, batch_indices: Tensor, *, mode: str = "avg", output_height: int = 1,
    output_width: int = 1, sampling_ratio: int = 0, spatial_scale: float = 1.0,
    coordinate_transformation_mode: str = "half_pixel",
) -> Tensor:  # fmt: skip
    """Return the boxes (count, 4: x1 y1 x2 y2) of images, each resized: averages or maxima of samples of each bin."""
    half = coordinate_transformation_mode == "half_pixel"
    corners = rois * spatial_scale - (0.5 if half else 0.0)
    sizes = corners[:, 2:] - corners[:, :2]
    sizes = sizes if half else sizes.clamp(min=1.0)
    images, made, bins = numbers(batch_indices), [], (output_width, output_height)
    for i, image in enumerate(images):
        columns, rows = (_spots(corners[i, axis], sizes[i, axis], bins[axis], sampling_ratio) for axis in (0, 1))
        y_at, x_at = torch.broadcast_tensors(rows[:, None, :, None], columns[None, :, None, :])
        taken, weights = _bilinear(x[image], y_at, x_at)
        weighted = taken * weights.unsqueeze(1)
        if mode == "avg":
            made.append(weighted.sum(0).flatten(-2).sum(-1) / max(y_at.shape[-1] * y_at.shape[-2], 1))
        else:
            made.append(weighted.amax(0).flatten(-2).amax(-1))
    empty = x.new_zeros(0, x.shape[1], output_height, output_width)
    return torch.stack(made) if made else empty


def _spots(start: Tensor, size: Tensor, bins: int, ratio: int) -> Tensor:
    """Return where the samples of each bin of a box lie along an axis, (bins, samples)."""
    samples = ratio or max(math.ceil(number(size.detach()) / bins), 0)
    offsets = (torch.arange(samples, device=size.device) + 0.5) / max(samples, 1)
    return start + (torch.arange(bins, device=size.device)[:, None] + offsets) * size / bins


def deform_conv(
    x: Tensor, w: Tensor, offset: Tensor, b: Tensor | None = None, mask: Tensor | None = None, *,
    dilations: Sequence[int] = (1, 1), group: int = 1, kernel_shape: Sequence[int] | None = None,
    offset_group: int = 1, pads: Sequence[int] = (0, 0, 0, 0), strides: Sequence[int] = (1, 1),
) -> Tensor:  # fmt: skip
    """Return a convolution whose taps are moved by computed offsets; images of two axes, zeros outside."""
    rows, (high, wide) = x.shape[0], w.shape[2:]
    out_h, out_w = offset.shape[2:]
    moved = offset.reshape(rows, offset_group, high, wide, 2, out_h, out_w)
    grid = []
    for axis, (taps, length, out) in enumerate(((high, x.shape[2], out_h), (wide, x.shape[3], out_w))):
        base = torch.arange(out, device=x.device) * strides[axis] - pads[axis]
        reach = torch.arange(taps, device=x.device) * dilations[axis]
        base = along(base, 2 + axis, 4) + along(reach, axis, 4)
        grid.append((moved[:, :, :, :, axis] + base) * 2 / max(length - 1, 1) - 1)
    grid = torch.stack(grid[::-1], -1).reshape(rows * offset_group, high * wide, out_h * out_w, 2)
    parts = x.reshape(rows * offset_group, -1, *x.shape[2:])
    taken = functional.grid_sample(parts, grid.to(x.dtype), "bilinear", "zeros", align_corners=True)
    if mask is not None:
        taken = taken * mask.reshape(rows * offset_group, 1, high * wide, out_h * out_w)
    taken = taken.reshape(rows, group, -1, high * wide, out_h * out_w).flatten(2, 3)
    result = w.reshape(group, w.shape[0] // group, -1) @ taken
    result = result.reshape(rows, w.shape[0], out_h, out_w)
    return result if b is None else result + along(b, 1, 4)


TABLE: Table = {
    "GridSample": grid_sample, "AffineGrid": Op(1, affine_grid, host=True),
    "CenterCropPad": Op(1, center_crop_pad, host=True), "Col2Im": Op(1, col2im, host=True),
    "RoiAlign": (Op(1, roi_align_10), Op(16, roi_align)), "DeformConv": deform_conv,
}  # fmt: skip
