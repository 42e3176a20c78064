"""What happened while training: rows of losses, rates and judgements; as JSON, and as a plot."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from graphopt.errors import ProviderError, SpecError


@dataclass(frozen=True)
class Row:
    """One line of a history.

    Attributes:
        step: updates of the weights so far.
        epoch: passes over the data so far.
        rate: learning rate of the last update, 0 before the first.
        terms: terms of the loss by name, `loss` among them: means since the row before.
        judged: quality of the written-back model, where it was judged here.
        seconds: since training began; over all runs, where it was resumed.
    """

    step: int
    epoch: float
    rate: float
    terms: dict[str, float]
    judged: float | None
    seconds: float


@dataclass(frozen=True)
class Trial:
    """A rate that was tried.

    Attributes:
        rate: the largest of a short training; 0: without training.
        loss: what it led to, on batches that it did not see; None: no number.
    """

    rate: float
    loss: float | None


@dataclass
class History:
    """What happened while training.

    Attributes:
        rows: in order; the first is before any update where a judge was given.
        best: the largest judged quality, None without a judge.
        best_step: updates after which the weights that were kept stood.
        stopped: why training ended early; empty where it did not.
        failed: it ended on a loss that is no number; the best so far was restored.
        steps: updates that were made.
        resumed: updates of earlier runs, where this one went on from a checkpoint.
        rate: the largest learning rate.
        trials: short trainings that found it, by rate; none where it was given.
    """

    rows: list[Row] = field(default_factory=list)
    best: float | None = None
    best_step: int = 0
    stopped: str = ""
    failed: bool = False
    steps: int = 0
    resumed: int = 0
    rate: float = 0.0
    trials: list[Trial] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Time that training took, judging included."""
        return self.rows[-1].seconds if self.rows else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can hold."""
        return {**asdict(self), "seconds": self.seconds}

    @staticmethod
    def from_dict(document: Mapping[str, Any]) -> History:
        """Return what `to_dict` was made of."""
        kept = {key: value for key, value in document.items() if key not in {"rows", "trials", "seconds"}}
        rows, trials = [Row(**row) for row in document["rows"]], [Trial(**trial) for trial in document["trials"]]
        return History(rows=rows, trials=trials, **kept)

    def save_json(self, path: str | Path) -> None:
        """Write the history as JSON.

        Raises:
            SpecError: the file cannot be written.
        """
        try:
            Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise SpecError(f"cannot write the history: {error.strerror or error}", at=str(path)) from error

    def save_plot(self, path: str | Path) -> None:
        """Draw loss, rate and quality over the updates; the ending says the format (png, svg, pdf).

        Raises:
            ProviderError: matplotlib is not installed.
            SpecError: the file cannot be written, or its ending is none that matplotlib knows.
        """
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415  (an extra)
            from matplotlib.figure import Figure  # noqa: PLC0415
        except ImportError as error:
            raise ProviderError(
                "a plot needs matplotlib, which is not installed", hint="pip install 'graphopt[report]'"
            ) from error
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        FigureCanvasAgg(figure)
        self._draw(figure)
        try:
            figure.savefig(path)
        except (OSError, ValueError) as error:
            raise SpecError(f"cannot write the plot: {error}", at=str(path)) from error

    def _draw(self, figure: Any) -> None:
        losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        names = dict.fromkeys(name for row in self.rows for name in row.terms)
        for name in names:
            points = [(row.step, row.terms[name]) for row in self.rows if name in row.terms]
            losses.plot(*zip(*points, strict=True), label=name, linewidth=1.6 if name == "loss" else 0.8)
        judged = [(row.step, row.judged) for row in self.rows if row.judged is not None]
        if judged:
            quality = losses.twinx()
            quality.plot(*zip(*judged, strict=True), "k.--", label="quality", linewidth=0.8)
            quality.axvline(self.best_step, color="0.7", linewidth=0.8)
            quality.set_ylabel("quality (dashed)")
        losses.set_ylabel("loss")
        if names:
            losses.legend(fontsize="small")
        rates.plot([row.step for row in self.rows if row.terms], [row.rate for row in self.rows if row.terms])
        rates.set_ylabel("rate")
        rates.set_xlabel("updates")
