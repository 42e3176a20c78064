"""`graphopt demo`: the main job on the committed digits model, judged on its held-out labelled set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from graphopt.model import load
from graphopt.optimizer import optimize
from graphopt.pipeline import Result
from graphopt.runtime import Session
from graphopt.samples import Samples

IMAGES = 32


@dataclass(frozen=True)
class Demonstration:
    """The demo's result: accuracies are fractions of the held-out images."""

    model: str
    optimized: Result
    images: int
    accuracy_before: float
    accuracy_after: float

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        return {
            "model": self.model, "images": self.images, "accuracy_before": self.accuracy_before,
            "accuracy_after": self.accuracy_after, "report": self.optimized.report.to_dict(),
        }  # fmt: skip


def run_demo(seed: int = 0) -> Demonstration:
    """Optimize the digits model, verified and timed on samples of its own data, and score both on held-out images."""
    from graphopt.models import digits  # noqa: PLC0415
    from graphopt.models.digits import task  # noqa: PLC0415

    path = digits.demo_model()
    samples = Samples(lambda: task.calibration(limit=IMAGES), f"{IMAGES} calibration images")
    result = optimize(path, data=samples, seed=seed)
    before = task.accuracy(Session(load(path)).run)
    after = task.accuracy(Session(result.model).run)
    return Demonstration(path.name, result, int(np.size(before)), float(np.mean(before)), float(np.mean(after)))
