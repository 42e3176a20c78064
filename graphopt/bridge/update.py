"""One update of the weights: gradients of some batches, of all processes, penalties, clipping, the optimizer."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch

from graphopt.bridge.averaging import copied
from graphopt.bridge.optimizers import Optimizer
from graphopt.bridge.parallel import Team
from graphopt.bridge.parts import Loss, Trainable
from graphopt.bridge.penalties import Penalties
from graphopt.bridge.plan import Plan
from graphopt.bridge.roles import DECAYING
from graphopt.bridge.schedules import Schedule
from graphopt.errors import ModelError
from graphopt.training import TrainSettings

LEAST_SCALE = 1e-3
"""Of gradients in float16: below, they are no numbers at any scale."""


class Update:
    """Makes updates.

    Attributes:
        tensors: all that updates change: parameters, the objective's own, statistics that are trained.
        initial: what they were.
    """

    def __init__(
        self, bridge: Trainable, objective: Loss, settings: TrainSettings, plan: Plan, seed: int, group: Team
    ) -> None:
        self.module, self.objective, self.settings = bridge.module, objective, settings
        self.plan, self.seed, self.group = plan, seed, group
        self.parameters = {**bridge.parameters, **_own(objective)}
        self.tensors = {**self.parameters, **bridge.statistics}
        self.initial = copied(self.tensors)
        weights = {name: p for name, p in bridge.parameters.items() if bridge.roles.get(name) in DECAYING}
        axes = {name: bridge.channel_axis(name) for name in weights} if settings.group_lasso else {}
        self.penalties = Penalties(weights, axes, settings)
        self.optimizer = Optimizer(self.parameters, frozenset(weights), bridge.coded, settings)
        self.schedule = Schedule(settings, settings.rate, plan.total, plan.per_epoch)
        self.device = next(iter(self.parameters.values())).device
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.autocast == "float16")
        self._held = list(self.parameters.values())

    def take_rate(self, rate: float) -> None:
        """Take this rate as the largest of the schedule."""
        self.schedule = replace(self.schedule, largest=rate)

    def loss(self, groups: Iterable[Sequence[Any]]) -> float:
        """Return the mean loss over some batches, of the module as it is when it is used."""
        training, rows, total = self.module.training, 0, 0.0
        self.module.eval()
        try:
            for batch in (batch for group in groups for batch in group if getattr(batch, "share", 1.0)):
                with torch.no_grad():
                    total += float(self._terms(batch)["loss"]) * len(batch.index)
                rows += len(batch.index)
        finally:
            self.module.train(training)
        both = torch.tensor([total, float(rows)])
        self.group.add_up([both])
        return float(both[0] / both[1])

    def gradients(self, group: Sequence[Any], step: int) -> dict[str, float]:
        """Compute the gradients of an update; return the terms of the loss, means over rows.

        Raises:
            ModelError: no trained tensor has a part in the loss.
        """
        self.optimizer.torch.zero_grad(set_to_none=True)
        rows = 0
        sums: dict[str, float] = {}
        for place, batch in enumerate(group):
            self._draw_by(step, place)
            terms = self._terms(batch)
            count = len(batch.index) if getattr(batch, "share", 1.0) else 0  # a row that only fills a place
            loss = terms["loss"]
            if not loss.requires_grad:
                raise ModelError("the loss depends on no tensor that is trained", hint="see only and freeze")
            loss = loss if count == self.plan.rows else loss * (count / self.plan.rows)
            self.scaler.scale(loss).backward()
            rows += count
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + float(value.detach()) * count
        rows = self._over_all(rows, sums)
        if rows != self.plan.rows:
            for parameter in self._with_gradients():
                parameter.grad.mul_(self.plan.rows / rows)
        return {name: value / rows for name, value in sums.items()}

    def make(self, group: Sequence[Any], step: int) -> dict[str, float]:
        """Make an update; return the terms of the loss, penalties included.

        Where float16 cannot hold the gradients, they are computed again at a smaller scale: no update is lost.  The
        loss that is returned is not finite where there was no update.
        """
        while True:
            terms = self.gradients(group, step)
            if not math.isfinite(terms["loss"]):
                return terms
            penalties = self._apply(step)
            if penalties is not None:
                return {**terms, **penalties, "loss": terms["loss"] + sum(penalties.values())}
            if self.scaler.get_scale() < LEAST_SCALE:
                return {**terms, "loss": math.nan}

    def _apply(self, step: int) -> dict[str, float] | None:
        """Change the weights by their gradients; return the penalties, None where some gradient is no number."""
        self.optimizer.set_rate(self.schedule.rate(step))
        self.scaler.unscale_(self.optimizer.torch) if self.scaler.is_enabled() else None
        penalties = self.penalties.add()
        if self.settings.clip:
            torch.nn.utils.clip_grad_norm_(self._held, self.settings.clip, foreach=True)
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer.torch)
        self.scaler.update()
        return penalties if self.scaler.get_scale() >= scale else None

    def _terms(self, batch: Any) -> Mapping[str, Any]:
        outputs = self._outputs(batch.feeds)
        return self.objective(outputs, batch)

    def _outputs(self, feeds: dict[str, Any]) -> dict[str, Any]:
        kind = self.settings.autocast
        cast = torch.autocast(self.device.type, dtype=getattr(torch, kind)) if kind else nullcontext()
        with cast:
            outputs = self.module(feeds)
        if not kind:
            return outputs  # type: ignore[no-any-return]
        return {name: out.float() if out.is_floating_point() else out for name, out in outputs.items()}

    def _with_gradients(self) -> list[Any]:
        return [parameter for parameter in self._held if parameter.grad is not None]

    def _over_all(self, rows: int, sums: dict[str, float]) -> int:
        """Add up rows, terms and gradients over all processes; a gradient that none of them has stays none."""
        if self.group.world == 1:
            return rows
        has = torch.tensor([float(p.grad is not None) for p in self._held])
        numbers = torch.tensor([float(rows), *sums.values()])
        for parameter in self._held:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.group.add_up([has, numbers, *(parameter.grad for parameter in self._held)])
        for parameter, count in zip(self._held, has.tolist(), strict=True):
            if not count:
                parameter.grad = None
        total, *values = numbers.tolist()
        sums.update(zip(sums, values, strict=True))
        return int(total)

    def _draw_by(self, step: int, place: int) -> None:
        """Make what is random in a forward pass (dropout) a function of the seed and the update."""
        text = f"{self.seed} {step} {place} {self.group.rank}"
        seed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
        if self.device.type == "cpu":
            torch.default_generator.manual_seed(
                seed
            )  # torch.manual_seed notes the whole stack for each GPU there may be
        else:
            torch.manual_seed(seed)


def _own(objective: Any) -> dict[str, Any]:
    """Return what an objective has to be trained itself (projections of taps)."""
    return {f"objective {i}": parameter for i, parameter in enumerate(getattr(objective, "parameters", ()))}
