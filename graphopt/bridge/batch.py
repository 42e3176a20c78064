"""What one step of training sees."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch

Array: TypeAlias = np.ndarray[Any, Any]


@dataclass
class Batch:
    """What one step sees.

    Attributes:
        feeds: input name -> tensor.
        labels: one tensor, one for each output that has labels, or None.
        index: int64 (rows,), which samples these are.
        targets: what a teacher said of them, by name.
        share: what the mean over this batch counts for beside those of other processes at the same step: 1, but where
            a last batch does not come out even.
    """

    feeds: dict[str, torch.Tensor]
    labels: torch.Tensor | dict[str, torch.Tensor] | None
    index: Array
    targets: dict[str, torch.Tensor] = field(default_factory=dict)
    share: float = 1.0
