"""The training loop: batches in, updates of the weights, the best model out.

One update is `accumulate` batches of every process: gradients are weighted by rows, so that however rows are cut into
batches, the step is that of one large batch.  Everything random is a function of the seed and the number of the update:
training that was killed goes on from its checkpoint to the very same weights.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from graphopt.bridge import checkpoints
from graphopt.bridge.averaging import Average, Tensors, array, copied, copy_into, shown
from graphopt.bridge.failure import broken_input, likely_reason
from graphopt.bridge.history import History, Row, Trial
from graphopt.bridge.parallel import Team, team
from graphopt.bridge.parts import Data, Judge, Loss, Progress, Trainable
from graphopt.bridge.plan import Plan
from graphopt.bridge.trials import Search
from graphopt.bridge.update import Update
from graphopt.errors import DataError, ModelError, SpecError
from graphopt.model import Model
from graphopt.training import TrainSettings

SHOWN_EVERY = 0.1
"""Seconds between two words about the progress."""


def train(
    bridge: Trainable,
    data: Data,
    objective: Loss,
    settings: TrainSettings,
    *,
    judge: Judge | None = None,
    teacher: Model | None = None,
    seed: int = 0,
    checkpoint: Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    checkpoint_seconds: float = 20.0,
) -> History:
    """Train a module in place; afterwards it holds the best weights (judged), the averaged or the last ones.

    With a judge, the model is judged before the first update too: training never leaves it worse than it was.  Of equal
    qualities the later one is kept.

    Args:
        bridge: the module, its parameters and their roles.
        data: what it is trained on.
        objective: gives the loss of a batch; parameters that it has of its own are trained too.
        settings: all options; without a rate, trials find one (`trials.py`).
        judge: quality of a model, higher is better; of averaged weights where there are any.
        teacher: what the objective learns from, if anything: a checkpoint belongs to it.
        seed: of everything random.
        checkpoint: folder that is kept up to date while training.
        resume: go on from that folder, where it holds a checkpoint.
        progress: is told updates done, of how many, and loss, rate and time left.
        checkpoint_seconds: time between two checkpoints; 0: after every update.

    Raises:
        ModelError: nothing can be trained, or no trained tensor has a part in the loss.
        DataError: there are no samples; the checkpoint is damaged.
        SpecError: the checkpoint belongs to another training, or its folder to something else; statistics of
            BatchNormalization cannot be trained by several processes.
    """
    group = team()
    _check(bridge, data, settings, group)
    keeper = None
    if checkpoint is not None:
        keeper = _Keeper(Path(checkpoint), checkpoint_seconds, group)
        keeper.check(resume=resume)
    with _repeatable(bridge.module):
        loop = Loop(bridge, data, objective, settings, judge, seed, group, progress)
        return loop.run(keeper, loop.identity(teacher) if keeper else {}, resume=resume)


def _check(bridge: Trainable, data: Data, settings: TrainSettings, group: Team) -> None:
    if not bridge.parameters:
        raise ModelError(
            "the model has no tensor that could be trained", at=f"graph '{bridge.model.graph.name}'",
            hint="weights are float initializers; only and freeze choose among them",
        )  # fmt: skip
    if not data.rows:
        raise DataError("there are no samples to train on", at="training data")
    if group.world > 1 and settings.batch_norm == "train":
        raise SpecError(
            f"{group.world} processes see different batches: statistics of BatchNormalization are not trained there",
            at="batch_norm", hint="batch_norm = frozen, or one process",
        )  # fmt: skip


@contextmanager
def _repeatable(module: Any) -> Iterator[None]:
    """Train with deterministic kernels; leave torch's state as it was found."""
    training, mode = module.training, torch.get_deterministic_debug_mode()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.set_deterministic_debug_mode("warn")
    torch.utils.deterministic.fill_uninitialized_memory = False  # it costs time, and nothing reads such memory
    try:
        with torch.random.fork_rng(devices=[]):
            module.train()
            yield
    finally:
        module.train(training)
        torch.set_deterministic_debug_mode(mode)
        torch.utils.deterministic.fill_uninitialized_memory = fill


class Loop:
    """Training as it stands between two updates."""

    def __init__(
        self, bridge: Trainable, data: Data, objective: Loss, settings: TrainSettings, judge: Judge | None, seed: int,
        group: Team, progress: Progress | None,
    ) -> None:  # fmt: skip
        self.bridge, self.data, self.settings, self.seed, self.group = bridge, data, settings, seed, group
        self.judge, self.progress = judge, progress
        self.plan = Plan.of(settings, data, fixed=data.batch or bridge.batch, world=group.world)
        self.update = Update(bridge, objective, settings, self.plan, seed, group)
        self.tensors = self.update.tensors
        self.average = Average(self.tensors, settings.ema) if settings.ema else None
        self.history = History()
        self.kept: Tensors | None = None
        self.step = self.epoch = self.place = self.waiting = 0
        self.quality = -math.inf
        self.came_with = math.inf
        self.sums: dict[str, float] = {}
        self.summed = 0
        self.before = 0.0
        self.started = self.trained_since = time.monotonic()
        self.told = -math.inf

    def run(self, keeper: _Keeper | None, belongs: dict[str, Any], *, resume: bool) -> History:
        """Train to the end; `belongs` is what a checkpoint is known by."""
        state = keeper.load(belongs) if keeper and resume else None
        if state is not None:
            try:
                self._restore(state)
            except (KeyError, TypeError, ValueError, RuntimeError) as error:
                raise DataError(f"the checkpoint is damaged: {error}", at="state.json", hint="remove it") from error
            self.history.resumed = self.step
            if state.numbers["finished"]:
                return self.history
        else:
            self._take_rate()
            if self.judge is not None:
                self._evaluate()
        self.update.take_rate(self.history.rate)
        if keeper and self.history.trials and not self.history.resumed:
            keeper.save(self, belongs, finished=False)
        first, self.trained_since = self.step, time.monotonic()
        for group in self._groups():
            if self.step >= self.plan.total or self.history.stopped:
                break
            self._advance(group, first)
            if keeper and keeper.due(self.step):
                keeper.save(self, belongs, finished=False)
        self._finish()
        if keeper:
            keeper.save(self, belongs, finished=True)
        return self.history

    def _take_rate(self) -> None:
        """Take the rate that was asked for, or look for one."""
        self.history.rate = self.settings.rate
        if self.settings.rate:
            return
        self.history.rate, found = self._search().run()
        self.history.trials = [Trial(rate, _or_none(loss)) for rate, loss in found.items()]

    def _search(self) -> Search:
        return Search(
            self.bridge, self.data, self.update.objective, self.settings, self.plan, self.seed, self.group, self._tries
        )

    def _tries(self, rate: float) -> None:
        if self.progress is not None and self.group.leads:
            self.progress(0, self.plan.total, f"trying rate {rate:g}")

    def _groups(self) -> Iterator[list[Any]]:
        """Yield the batches of each update; where it stands counts the group that was yielded."""
        while True:
            epoch = self.plan.groups(self.data, self.epoch, seed=self.seed, rank=self.group.rank, start=self.place)
            for group in epoch:
                self.place += 1
                yield group
            self.epoch, self.place = self.epoch + 1, 0

    def _advance(self, group: list[Any], first: int) -> None:
        """Make one update, and what is due after it."""
        terms = self.update.make(group, self.step)
        if not math.isfinite(terms["loss"]):
            self._fail(terms, group)
            return
        self.came_with = terms["loss"] if self.step == 0 else self.came_with
        if self.average is not None:
            self.average.update()
        self.step += 1
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.summed += 1
        if self.plan.evaluated(self.step):
            self._evaluate()
        elif self.plan.logged(self.step):
            self._row(None)
        self._tell(terms["loss"], first)

    def _fail(self, terms: dict[str, float], group: list[Any]) -> None:
        bad = broken_input(batch.feeds for batch in group)
        if self.group.any(bool(bad)):
            where = f"input '{bad}'" if bad else "an input of another process"
            why = f"{where} holds values that are no numbers: the data need cleaning"
        else:
            why = likely_reason(terms, self.tensors, self.settings, step=self.step)
        self.history.failed = True
        self.history.stopped = f"the loss of update {self.step + 1} is {terms['loss']}: {why}"

    def _evaluate(self) -> None:
        """Judge the model as it would be written now; keep it where it is the best."""
        values = self.average.values if self.average is not None else self.tensors
        judged = None if self.judge is None else self._judged(self.judge, values)
        mean = self.sums["loss"] / self.summed if self.summed else math.inf
        quality = -mean if judged is None else judged
        quality = -math.inf if math.isnan(quality) else quality
        self.waiting = 0 if quality > self.quality else self.waiting + 1
        if quality >= self.quality:
            self.kept = copied(values)
            self.history.best_step = self.step
            self.history.best = None if judged is None or not math.isfinite(judged) else judged
        self.quality = max(self.quality, quality)
        self._row(judged if judged is not None and math.isfinite(judged) else None)
        patience = self.settings.patience
        if patience and self.waiting >= patience and self.step < self.plan.total:
            what = "loss" if self.judge is None else "quality"
            self.history.stopped = f"no better {what} in {patience} evaluations"

    def _judged(self, judge: Judge, values: Tensors) -> float:
        if not self.group.leads:
            return self.group.told(0.0)
        with shown(self.tensors, values):
            return self.group.told(float(judge(self.bridge.write_back())))

    def _row(self, judged: float | None) -> None:
        terms = {name: value / max(1, self.summed) for name, value in self.sums.items()}
        epoch = self.step / self.plan.per_epoch
        self.history.rows.append(Row(self.step, round(epoch, 4), self.rate, terms, judged, round(self.seconds, 3)))
        self.sums, self.summed = {}, 0

    @property
    def seconds(self) -> float:
        """Time since training began, earlier runs included."""
        return self.before + time.monotonic() - self.started

    @property
    def rate(self) -> float:
        """The rate of the last update, 0 before the first."""
        return self.update.schedule.rate(self.step - 1) if self.step else 0.0

    def _tell(self, loss: float, first: int) -> None:
        now = time.monotonic()
        ended = self.step == self.plan.total or bool(self.history.stopped)
        if self.progress is None or not self.group.leads or (now - self.told < SHOWN_EVERY and not ended):
            return
        self.told = now
        left = (now - self.trained_since) / (self.step - first) * (self.plan.total - self.step)
        self.progress(self.step, self.plan.total, f"loss {loss:.4g}, rate {self.rate:.3g}, {duration(left)} left")

    def _finish(self) -> None:
        """Leave the weights that are to be written in the module."""
        self.history.steps = self.step
        if self.judge is not None or self.history.failed:
            lost = self.judge is None and -self.quality > self.came_with  # it only became worse
            if lost or self.kept is None:
                self.kept, self.history.best_step = self.update.initial, 0
            copy_into(self.tensors, self.kept)
            return
        self.history.best_step = self.step
        if self.average is not None:
            copy_into(self.tensors, self.average.values)
        before = next((trial.loss for trial in self.history.trials if not trial.rate), None)
        if before is not None and self._search().loss(self.update) > before:  # nobody asked for this rate
            copy_into(self.tensors, self.update.initial)
            self.history.best_step = 0

    def identity(self, teacher: Model | None) -> dict[str, Any]:
        """Return what a checkpoint of this training belongs to."""
        return checkpoints.identity(
            self.bridge.model, {name: array(tensor) for name, tensor in self.tensors.items()}, self.settings,
            teacher=teacher, data=self._first_batch(), rows=self.data.rows, seed=self.seed, world=self.group.world,
        )  # fmt: skip

    def _first_batch(self) -> dict[str, Any]:
        """Return what the first process is fed first."""
        first = next(self.plan.groups(self.data, 0, seed=self.seed, rank=0))[0]
        return {name: array(value) for name, value in first.feeds.items()}

    def state(self, belongs: dict[str, Any], *, finished: bool) -> checkpoints.State:
        """Return all that the next update depends on."""
        parts = {"weights": self.tensors, "kept": self.kept or {}, "optimizer": self.update.optimizer.state()}
        parts["average"] = self.average.values if self.average else {}
        arrays = {f"{part}\t{name}": array(value) for part, held in parts.items() for name, value in held.items()}
        numbers = {name: getattr(self, name) for name in COUNTED}
        numbers.update(
            quality=_or_none(self.quality), came_with=_or_none(self.came_with), seconds=self.seconds, finished=finished,
            averaged=self.average.updates if self.average else 0, history=self.history.to_dict(),
            scaler=self.update.scaler.state_dict(), belongs=belongs,
        )  # fmt: skip
        return checkpoints.State(arrays, numbers)

    def _restore(self, state: checkpoints.State) -> None:
        parts: dict[str, dict[str, np.ndarray[Any, Any]]] = {}
        for key, values in state.arrays.items():
            part, _, name = key.partition("\t")
            parts.setdefault(part, {})[name] = values
        numbers = state.numbers
        copy_into(self.tensors, parts["weights"])
        self.update.optimizer.restore(parts.get("optimizer", {}))
        self.update.scaler.load_state_dict(numbers["scaler"]) if numbers["scaler"] else None
        if "kept" in parts:
            self.kept = copied(self.tensors)
            copy_into(self.kept, parts["kept"])
        if self.average is not None:
            copy_into(self.average.values, parts["average"])
            self.average.updates = numbers["averaged"]
        for name in COUNTED:
            setattr(self, name, numbers[name])
        self.quality = -math.inf if numbers["quality"] is None else numbers["quality"]
        self.came_with = math.inf if numbers["came_with"] is None else numbers["came_with"]
        self.before, self.history = numbers["seconds"], History.from_dict(numbers["history"])

    def written(self) -> Any:
        """Return the model as it would be written now: the best, the averaged or the present one."""
        values = self.kept if self.judge is not None and self.kept is not None else None
        values = values or (self.average.values if self.average is not None else self.tensors)
        with shown(self.tensors, values):
            return self.bridge.write_back()


COUNTED = ("step", "epoch", "place", "waiting", "sums", "summed")
"""Numbers of a loop that a checkpoint holds."""


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


class _Keeper:
    """Writes checkpoints when they are due: never more than a fiftieth of the time."""

    def __init__(self, folder: Path, seconds: float, group: Team) -> None:
        self.folder, self.seconds, self.group = folder, seconds, group
        self.pause, self.last = seconds, time.monotonic()

    def check(self, *, resume: bool) -> None:
        """Refuse a folder that is not ours."""
        if self.group.leads:
            checkpoints.check_folder(self.folder, resume=resume)
        self.group.wait()

    def load(self, belongs: dict[str, Any]) -> checkpoints.State | None:
        """Return what there is to go on from."""
        return checkpoints.load(self.folder, belongs)

    def due(self, step: int) -> bool:
        """Tell whether it is time."""
        return time.monotonic() - self.last >= self.pause

    def save(self, loop: Loop, belongs: dict[str, Any], *, finished: bool) -> None:
        """Write one."""
        if not self.group.leads:
            return
        began = time.monotonic()
        checkpoints.save(self.folder, loop.written(), loop.state(belongs, finished=finished))
        self.last = time.monotonic()
        self.pause = max(self.seconds, 50 * (self.last - began)) if self.seconds else 0.0


def duration(seconds: float) -> str:
    """Return a time for people: `45 s`, `3 min 20 s`, `2 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"
