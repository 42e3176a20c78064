"""What recovery by training is measured on: models with their tasks, and the commands that cut and train them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graphopt.models import zoo
from graphopt.models.benchmarks.peers import SHAPES
from graphopt.models.tasks import ocr_cls, ocr_rec

TASKS = "models/tasks/"
"""Where the tasks are, in commands as they are shown."""


@dataclass(frozen=True)
class Command:
    """A graphopt command.

    Attributes:
        words: its words, without `graphopt`.
        environment: variables that it needs.
    """

    words: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return " ".join([*(f"{name}={value}" for name, value in self.environment.items()), "graphopt", *self.words])


@dataclass(frozen=True)
class Case:
    """One model and its task.

    Attributes:
        title: heading.
        model: returns its file.
        commands: stage -> what makes its file out of those before: `original.onnx`, `cut.onnx` ...; the last is the
            result.
        metrics: name -> evaluation function on test items.
        feed: returns what is timed.
        aim: largest drop of each metric, in its units.
        latency: largest ratio of the trained model's time to the lossless one's; None: it is only shown.
        minutes: that training may take on two cores; None: it is only shown.
    """

    title: str
    model: Callable[[], Path]
    commands: Mapping[str, Command]
    metrics: Mapping[str, Callable[..., Any]]
    feed: Callable[[], Mapping[str, Any]]
    aim: float
    latency: float | None = None
    minutes: float | None = None

    @property
    def stages(self) -> tuple[str, ...]:
        """All models that are judged, the original first, the result last."""
        return ("original", *self.commands)


def commands(task: str, *, macs: float, fitting: str, right: str, trained: tuple[int, str]) -> dict[str, Command]:
    """Return the commands of a case: cut to a part of the MACs, then train on lines without labels.

    Args:
        task: module of the labelled task.
        macs: part that stays.
        fitting: function of the task that gives the samples to cut with.
        right: metric of the task that chooses the best weights.
        trained: lines that train, and options.
    """
    lines, options = trained
    cut = f"prune original.onnx --data {TASKS}{task}.py:{fitting} --target-macs {macs:g} --no-measure -o cut.onnx"
    train = (
        f"distill cut.onnx --teacher original.onnx --data {TASKS}{task}.py:training --held-out 0 "
        f"--select {TASKS}{task}.py:{right} {options} --no-measure --history history.json -o trained.onnx"
    )
    return {
        "cut": Command(tuple(cut.split())),
        "trained": Command(tuple(train.split()), {"GRAPHOPT_TASK_LIMIT": str(lines)}),
    }


def _timed(model: str) -> Callable[[], Mapping[str, Any]]:
    return lambda: next(zoo.feeds(model, 0, shapes=SHAPES.get(model)))


CASES: Mapping[str, Case] = {
    "cls": Case(
        "PP-OCR direction classifier, 50 % of MACs", lambda: zoo.fetch("ppocr-cls"),
        commands("ocr_cls", macs=0.5, fitting="calibration", right="rotation_right_selection",
                 trained=(8192, "--epochs 2")),
        {"directions right": ocr_cls.rotation_right}, _timed("ppocr-cls"), aim=0.005, latency=0.75, minutes=10.0,
    ),
    "rec": Case(
        "PP-OCR recogniser, 70 % of MACs", lambda: zoo.fetch("ppocr-rec"),
        commands("ocr_rec", macs=0.7, fitting="fitting", right="lines_right_selection",
                 trained=(8192, "--epochs 1 --evaluations 2")),
        {"Latin lines right": ocr_rec.lines_right_latin, "Chinese lines right": ocr_rec.lines_right_chinese},
        _timed("ppocr-rec"), aim=0.015,
    ),
}  # fmt: skip
"""Name -> case."""
