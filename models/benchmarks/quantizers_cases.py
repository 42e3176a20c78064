"""What the quantizers are compared on: models of the zoo, calibration samples, and what judges the results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graphopt.models.tasks import crops, magika_files, minilm_pairs, ocr_cls, ocr_det, ocr_rec

TASKS = Path(__file__).parent.parent / "tasks"


@dataclass(frozen=True)
class Case:
    """One model and its task.

    Attributes:
        calibration: `limit -> feeds`, the same samples for every quantizer.
        items: how many of them: pictures, lines, sentences, files.
        metrics: name -> evaluation function on test items, at least 2,000 of them; the float model is the reference.
        bound: of graphopt, as its command line has it: option -> value.  Metrics here are on items that choose.
        transformer: whether NNCF is told that the model is one, and whether forms with weights only are made, too.
    """

    calibration: Callable[[int], Iterator[Mapping[str, Any]]]
    items: int
    metrics: Mapping[str, Callable[..., Any]]
    bound: Mapping[str, Any] = field(default_factory=dict)
    transformer: bool = False


def _metric(file: str, function: str) -> str:
    return f"{TASKS / file}.py:{function}"


CASES: Mapping[str, Case] = {
    "ppocr-rec": Case(
        ocr_rec.calibration, 128,
        {"Latin lines right": ocr_rec.lines_right_latin, "Chinese lines right": ocr_rec.lines_right_chinese},
        {"metric": _metric("ocr_rec", "lines_right_selection"), "max_drop": 0.005},
    ),
    "ppocr-cls": Case(
        ocr_cls.calibration, 256, {"directions right": ocr_cls.rotation_right},
        {"metric": _metric("ocr_cls", "rotation_right_selection"), "max_drop": 0.003},
    ),
    "ppocr-det": Case(
        ocr_det.calibration, 32, {"overlap of maps": ocr_det.map_iou},
        {"metric": _metric("ocr_det", "map_iou_selection"), "max_drop": 0.02},
    ),
    "efficientnet-lite0-torchscript": Case(
        crops.calibration, 64, {"largest logit kept": crops.top1_agreement, "SQNR, dB": crops.logits_sqnr},
        {"metric": _metric("crops", "top1_agreement_selection"), "max_drop": 0.05, "min_sqnr": 21.0},
    ),
    "minilm-torchscript": Case(
        minilm_pairs.calibration, 256,
        {"cosine": minilm_pairs.cosine, "neighbour kept": minilm_pairs.neighbours_kept,
         "neighbour right": minilm_pairs.neighbour_right},
        {"metric": _metric("minilm_pairs", "neighbours_kept_selection"), "max_drop": 0.06, "min_cosine": 0.996},
        transformer=True,
    ),
    "magika": Case(
        magika_files.calibration, 256, {"types right": magika_files.type_right},
        {"metric": _metric("magika_files", "type_right_selection"), "max_drop": 0.003},
    ),
}  # fmt: skip
"""Zoo name -> case."""
