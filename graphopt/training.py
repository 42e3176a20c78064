"""What may be asked of training: options of fine-tuning and of distillation, and which of them go together.

Nothing here needs torch: passes and commands hold these, `graphopt.bridge` does what they say.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from graphopt.errors import SpecError, did_you_mean

OPTIMIZERS = ("sgd", "adam", "adamw", "rmsprop")
SCHEDULES = ("constant", "exponential", "step", "cosine", "one-cycle")
AUTOCASTS = ("", "bfloat16", "float16")
BATCH_NORMS = ("frozen", "train")
SAMPLINGS = ("random", "stratified")
LOSSES = ("auto", "cross-entropy", "binary-cross-entropy", "mse", "l1", "smooth-l1", "ctc")
DISTILLING = ("auto", "kl", "mse", "cosine")
TAP_LOSSES = ("mse", "cosine")

HALF = 0.5
"""`alpha` where there are both a teacher and labels, and nothing else is asked for."""

_CHOICES = {
    "optimizer": OPTIMIZERS, "schedule": SCHEDULES, "autocast": AUTOCASTS, "batch_norm": BATCH_NORMS,
    "sampling": SAMPLINGS, "output_loss": DISTILLING, "tap_loss": TAP_LOSSES,
}  # fmt: skip

_AT_LEAST = {
    **dict.fromkeys(("epochs", "rate", "weight_decay", "warmup", "clip", "l1", "group_lasso", "decay", "every"), 0.0),
    **dict.fromkeys(("evaluations", "tap_weight"), 0.0), **dict.fromkeys(("steps", "patience", "subset"), 0),
    **dict.fromkeys(("accumulate", "batch"), 1),
}  # fmt: skip

_PART = ("momentum", "ema", "label_smoothing", "alpha")
"""Options between 0 and 1; `momentum`, `ema` and `label_smoothing` below 1."""


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How weights are trained.

    Attributes:
        epochs: passes over the data; may be a fraction.
        steps: updates of the weights, in place of `epochs`; 0: as many as the epochs hold.
        batch: rows per forward pass; where a model has a fixed batch, that one is taken and `accumulate` makes up.
        accumulate: batches whose gradients make one update.
        optimizer: sgd, adam, adamw, rmsprop.
        rate: the largest learning rate; 0: short trainings find it.
        relative: the rate is a part of each tensor's root mean square (of codes: a part of one code), so that one
            rate suits tensors of any scale.
        momentum: of sgd and rmsprop.
        nesterov: of sgd.
        weight_decay: not for norms, biases and scales.
        schedule: constant, exponential, step, cosine, one-cycle.
        decay: what the rate is multiplied by: in all (exponential, cosine: at the end), every `every` epochs (step).
        every: epochs between two steps of the schedule `step`.
        warmup: part of all updates during which the rate rises linearly from 0.
        clip: largest norm of all gradients together; 0: none.
        ema: decay of the exponential moving average of the weights that is kept in their place; 0: none.
        label_smoothing: part of the probability that is spread evenly over all classes.
        l1: weight of the sum of absolute weights (as `weight_decay`, not norms, biases, scales).
        group_lasso: weight of the sum of the norms of output channels.
        autocast: type that forward passes compute in; empty: float32.
        only: globs of initializers that are trained; without, all.
        freeze: globs of initializers that are not trained.
        batch_norm: whether statistics of BatchNormalization are trained on, or frozen.
        learn_scales: whether scales of QuantizeLinear are trained (LSQ).
        patience: evaluations without a better one after which training ends; 0: never before its end.
        evaluations: how often an epoch the model is evaluated, in ORT; 0: once at the end.
        subset: samples drawn from all; 0: all.
        sampling: how they are drawn: random, or stratified by label.
        augment: names of augmentations with their strength (`flip`, `rotate=10`, `noise=0.05` …) or
            file.py:function.
        loss: of labels against outputs; auto is by the kind of labels; or file.py:function.
    """

    epochs: float = 5.0
    steps: int = 0
    batch: int = 32
    accumulate: int = 1
    optimizer: str = "adamw"
    rate: float = 0.0
    relative: bool = True
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4
    schedule: str = "cosine"
    decay: float = 0.01
    every: float = 1.0
    warmup: float = 0.05
    clip: float = 0.0
    ema: float = 0.0
    label_smoothing: float = 0.0
    l1: float = 0.0
    group_lasso: float = 0.0
    autocast: str = ""
    only: tuple[str, ...] = ()
    freeze: tuple[str, ...] = ()
    batch_norm: str = "frozen"
    learn_scales: bool = True
    patience: int = 0
    evaluations: float = 1.0
    subset: int = 0
    sampling: str = "random"
    augment: tuple[str, ...] = ()
    loss: str = "auto"

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class DistillSettings(TrainSettings):
    """How a student learns from a teacher.

    Attributes:
        temperature: that soft labels are taken at.
        alpha: weight of what the teacher says; 1 - alpha is that of the labels: at 1 they are left out.
        output_loss: kl (of probabilities, per row or step of a sequence), mse, cosine; auto: kl where an output comes
            from a Softmax or Sigmoid, or is called logits, mse (over the teacher's variance) elsewhere.
        taps: tensors of both models that are to be alike; `student=teacher` where their names differ.
        tap_loss: mse (over the teacher's variance), cosine.
        tap_weight: weight of the mean of the taps' losses.
    """

    temperature: float = 2.0
    alpha: float = 1.0
    output_loss: str = "auto"
    taps: tuple[str, ...] = ()
    tap_loss: str = "mse"
    tap_weight: float = 1.0


def check(settings: TrainSettings) -> None:
    """Refuse options out of range.

    Raises:
        SpecError: says which, and what would do.
    """
    values = {f.name: getattr(settings, f.name) for f in fields(settings)}
    for name, choices in _CHOICES.items():
        if name in values and values[name] not in choices:
            shown = ", ".join(choice or "''" for choice in choices)
            raise SpecError(
                f"unknown {name.replace('_', ' ')} '{values[name]}'", at=name,
                hint=did_you_mean(str(values[name]), choices) or f"one of: {shown}",
            )  # fmt: skip
    for name, least in _AT_LEAST.items():
        if name in values:
            _number(name, values[name], low=least)
    for name in _PART:
        if name in values:
            _number(name, values[name], low=0.0, high=1.0, below=name != "alpha")
    if "temperature" in values and not 0.0 < values["temperature"] < float("inf"):
        raise SpecError(f"a temperature is above 0, not {values['temperature']}", at="temperature")
    if not settings.steps and not settings.epochs:
        raise SpecError("nothing to train: 0 epochs", at="epochs", hint="say how many epochs, or steps")
    if settings.warmup > 1.0:
        raise SpecError(f"the warm-up is a part of all updates, not {settings.warmup:g}", at="warmup")
    if settings.nesterov and (settings.optimizer != "sgd" or not settings.momentum):
        raise SpecError("nesterov is a momentum of sgd", at="nesterov", hint="optimizer = sgd, momentum above 0")
    if settings.loss not in LOSSES and ":" not in settings.loss:
        hint = did_you_mean(settings.loss, LOSSES) or f"one of: {', '.join(LOSSES)}, or file.py:function"
        raise SpecError(f"unknown loss '{settings.loss}'", at="loss", hint=hint)


def _number(name: str, value: Any, *, low: float, high: float = float("inf"), below: bool = True) -> None:
    if not (low <= value < high or (not below and value == high)):
        bounds = f"at least {low:g}" if high == float("inf") else f"between {low:g} and {high:g}"
        raise SpecError(f"{name.replace('_', ' ')} is {bounds}, not {value}", at=name)
