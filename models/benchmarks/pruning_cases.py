"""What pruning is measured on: models with their tasks, and the points of their curves."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graphopt.models import digits, zoo
from graphopt.models.benchmarks.peers import SHAPES
from graphopt.models.digits import task as digits_task
from graphopt.models.tasks import crops, minilm_pairs, ocr_cls, ocr_rec

REPAIRS: Mapping[str, str] = {
    "nothing": "",
    "bias": "reconstruct-weights{method=bias}",
    "least squares": "reconstruct-weights",
}
"""What follows the cut -> step of the pipeline."""

BEST = "least squares"
CRITERIA = ("random", "l2", "wanda", "activation", "obs")
BLOCK_CRITERIA = ("cosine", "output")
RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)

CURVE, NAMED = 500, 0
"""Test items for a point of a curve, and for a point with a target (0: all)."""


@dataclass(frozen=True)
class Aim:
    """A point that is to be reached: MACs removed, and quality kept.

    Attributes:
        ratio: part of the MACs that is removed.
        drop: of each metric at most, or
        least: of each metric.
    """

    ratio: float
    drop: float | None = None
    least: float | None = None

    def __str__(self) -> str:
        if self.drop is not None:
            return f"≤ {100 * self.drop:.1f} points lost"
        return f"≥ {100 * (self.least or 0.0):.0f} %"

    def met(self, found: Mapping[str, Any]) -> bool:
        """Tell whether a metric (`Evaluation.to_dict`) is as good as asked."""
        if self.drop is not None:
            return bool(found["drop"] <= self.drop + 1e-12)
        return bool(found["candidate"] >= (self.least or 0.0) - 1e-12)


@dataclass(frozen=True)
class Case:
    """One model and its task.

    Attributes:
        title: heading.
        model: returns its file.
        calibration: `limit -> feeds`: all that pruning sees.
        items: how many of them.
        metrics: name -> evaluation function on test items; the first is plotted.
        feed: returns what is timed.
        aims: points of the curve that are to be reached.
        ratios: of the curve: parts of the MACs removed.
        criteria: of channels.
        blocks: most residual blocks that are left out; 0 for no curve of them.
    """

    title: str
    model: Callable[[], Path]
    calibration: Callable[[int], Iterator[Mapping[str, Any]]]
    items: int
    metrics: Mapping[str, Callable[..., Any]]
    feed: Callable[[], Mapping[str, Any]]
    aims: tuple[Aim, ...] = ()
    ratios: tuple[float, ...] = RATIOS
    criteria: tuple[str, ...] = CRITERIA
    blocks: int = 0


@dataclass(frozen=True)
class Point:
    """One model that is made: how, and how much is taken out (`amount`: part of the MACs, or number of blocks)."""

    criterion: str
    amount: float
    repair: str = BEST
    of_blocks: bool = False
    aim: Aim | None = field(default=None, compare=False)

    @property
    def steps(self) -> str:
        """The lossy part of the pipeline, as text."""
        if self.of_blocks:
            cut = f"drop-blocks{{amount={self.amount:.0f},criterion={self.criterion}}}"
        else:
            cut = f"prune-channels{{ratio={self.amount:g},of=macs,criterion={self.criterion}}}"
        return ", ".join(filter(None, (cut, REPAIRS[self.repair], "eliminate-dead")))

    @property
    def slug(self) -> str:
        """Name of its files."""
        kind = "blocks" if self.of_blocks else "channels"
        return re.sub(r"[^a-z0-9.]+", "-", f"{kind}-{self.criterion}-{self.amount:g}-{self.repair}")

    @property
    def items(self) -> int:
        """Test items at most, 0 for all."""
        return NAMED if self.aim is not None else CURVE


def points(case: Case) -> list[Point]:
    """Return the points of a case, those with an aim first, then the curves with the repair that is best."""
    found: list[Point] = []
    for aim in case.aims:
        found += [Point(criterion, aim.ratio, aim=aim) for criterion in case.criteria]
    for repair in reversed(list(REPAIRS)):
        found += [Point(c, ratio, repair) for ratio in case.ratios if case.criteria for c in case.criteria]
        found += [Point(c, float(k), repair, of_blocks=True) for k in range(1, case.blocks + 1) for c in BLOCK_CRITERIA]
    return list(dict.fromkeys(found))


def _timed(model: str) -> Callable[[], Mapping[str, Any]]:
    return lambda: next(zoo.feeds(model, 0, shapes=SHAPES.get(model)))


CASES: Mapping[str, Case] = {
    "digits": Case(
        "Digits CNN", digits.demo_model, digits_task.calibration, 200, {"digits right": digits_task.accuracy},
        lambda: next(digits_task.calibration(8)), (Aim(0.5, drop=0.015),),
    ),
    "cls": Case(
        "PP-OCR direction classifier", lambda: zoo.fetch("ppocr-cls"), ocr_cls.calibration, 256,
        {"directions right": ocr_cls.rotation_right}, _timed("ppocr-cls"), (Aim(0.3, drop=0.01),),
    ),
    "rec": Case(
        "PP-OCR recogniser", lambda: zoo.fetch("ppocr-rec"), ocr_rec.calibration, 512,
        {"Latin lines right": ocr_rec.lines_right_latin, "Chinese lines right": ocr_rec.lines_right_chinese},
        _timed("ppocr-rec"), (Aim(0.2, drop=0.02),), (0.1, 0.2, 0.3, 0.4),
    ),
    "efficientnet": Case(
        "EfficientNet-Lite0", lambda: zoo.fetch("efficientnet-lite0-torchscript"), crops.calibration, 128,
        {"largest logit kept": crops.top1_agreement}, _timed("efficientnet-lite0-torchscript"),
        (Aim(0.15, least=0.8),), (0.05, 0.1, 0.15, 0.2, 0.3, 0.4), blocks=9,
    ),
    "minilm": Case(
        "all-MiniLM-L6", lambda: zoo.fetch("minilm-torchscript"), minilm_pairs.calibration, 256,
        {"neighbour kept": minilm_pairs.neighbours_kept, "neighbour right": minilm_pairs.neighbour_right,
         "cosine": minilm_pairs.cosine},
        _timed("minilm-torchscript"), criteria=(), blocks=8,
    ),
}  # fmt: skip
"""Name -> case."""
