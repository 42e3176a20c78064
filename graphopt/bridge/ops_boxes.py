"""Choice of boxes, as functions of torch: indices without gradients, so that what a detector ends with can stay."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphopt.bridge.operands import number
from graphopt.bridge.table import Op, Table


def _corners(boxes: Tensor, *, by_center: bool) -> Tensor:
    """Return boxes (count, 4) as lower and upper corners."""
    if by_center:
        middle, size = boxes[:, :2], boxes[:, 2:]
        return torch.cat([middle - size / 2, middle + size / 2], 1)
    a, b = boxes[:, :2], boxes[:, 2:]
    return torch.cat([torch.minimum(a, b), torch.maximum(a, b)], 1)


def _overlaps(box: Tensor, others: Tensor) -> Tensor:
    """Return the intersection over the union of a box (4,) with others (count, 4)."""
    low, high = torch.maximum(box[:2], others[:, :2]), torch.minimum(box[2:], others[:, 2:])
    shared = (high - low).clamp(min=0).prod(1)
    union = (box[2:] - box[:2]).prod() + (others[:, 2:] - others[:, :2]).prod(1) - shared
    return torch.where(union > 0, shared / union, torch.zeros_like(union))


def _kept(corners: Tensor, scores: Tensor, most: int, overlap: float, least: float | None) -> list[int]:
    """Return the boxes of one class by falling score, without those that overlap a better one too much."""
    order = torch.argsort(scores, descending=True, stable=True)
    order = order if least is None else order[scores[order] > least]
    kept: list[int] = []
    while order.numel() and len(kept) < most:
        best = int(order[0])
        kept.append(best)
        order = order[1:]
        order = order[_overlaps(corners[best], corners[order]) <= overlap]
    return kept


def non_max_suppression(
    boxes: Tensor, scores: Tensor, max_output_boxes_per_class: Any = None, iou_threshold: Any = None,
    score_threshold: Any = None, *, center_point_box: int = 0,
) -> Tensor:  # fmt: skip
    """Return the boxes that stay, (count, 3): row of the batch, class, box.

    Args:
        boxes: (batch, boxes, 4), corners in any order, or middle and size.
        scores: (batch, classes, boxes).
        max_output_boxes_per_class: none by default, which leaves nothing.
        iou_threshold: overlap above which the worse box goes.
        score_threshold: boxes that do not exceed it go.
        center_point_box: whether boxes are given by middle and size.
    """
    boxes, scores = boxes.detach(), scores.detach()
    most = 0 if max_output_boxes_per_class is None else number(max_output_boxes_per_class)
    overlap = 0.0 if iou_threshold is None else number(iou_threshold)
    least = None if score_threshold is None else number(score_threshold)
    corners = [_corners(row, by_center=bool(center_point_box)) for row in boxes]
    rows = [
        (row, kind, box)
        for row in range(boxes.shape[0])
        for kind in range(scores.shape[1])
        for box in _kept(corners[row], scores[row, kind], most, overlap, least)
    ]
    return torch.tensor(rows, dtype=torch.int64, device=boxes.device).reshape(-1, 3)


TABLE: Table = {"NonMaxSuppression": Op(1, non_max_suppression, numbers=(2, 3, 4))}
