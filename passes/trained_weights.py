"""Weights that training found, put into the graph; and what was asked for, written down at the model.

The model's metadata say, under `graphopt.trained`, which requests its weights answer and what they were then:

    {"requests": ["distill steps=100"], "weights": "2b9c…"}

The same request does nothing as long as no weight has changed since, whatever the graph around them looks like.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import fields
from typing import Any, TypeAlias, TypeVar

import numpy as np

from graphopt.base import Change, Context, Pass
from graphopt.errors import ModelError
from graphopt.model import Model
from graphopt.slots import Slot, slots_of
from graphopt.tensors import is_float
from graphopt.training import TrainSettings

Array: TypeAlias = np.ndarray[Any, Any]
S = TypeVar("S", bound=TrainSettings)

KEY = "graphopt.trained"
"""Metadata of the model."""

WHERE = "the model"


def learning(model: Model) -> dict[str, Slot]:
    """Return the constants of a model that training may change, by key: floats, and the codes of quantized weights."""
    return {key: slot for key, slot in slots_of(model).items() if _learns(slot)}


def _learns(slot: Slot) -> bool:
    return is_float(slot.dtype) or (len(slot.shape) > 1 and slot.dtype.kind in "iuV")


def put(trained: Model, model: Model) -> int:
    """Give a model the weights of a trained copy; return how many tensors that changes.

    Raises:
        ModelError: it is no copy.
    """
    changed = 0
    found = learning(trained)
    for key, slot in learning(model).items():
        other = found.get(key)
        if other is None or (slot.shape, slot.dtype) != (other.shape, other.dtype):
            raise ModelError("training gave another graph back", at=f"constant '{key}'")
        old, new = slot.read(), other.read()
        if old.tobytes() != new.tobytes():
            slot.write(new)
            changed += 1
    return changed


def weights_of(model: Model) -> str:
    """Return a hash of all weights, by their values alone: names, order, and how often one is held do not count."""
    each = sorted({_hash(slot.read()) for slot in learning(model).values()})
    return hashlib.sha256(b"".join(each)).hexdigest()[:32]


def _hash(values: Array) -> bytes:
    return hashlib.sha256(f"{values.dtype} {values.shape}".encode() + np.ascontiguousarray(values).tobytes()).digest()


def answers(model: Model, request: str) -> bool:
    """Tell whether a model's weights are those that a request gave."""
    said = _read(model)
    return request in said["requests"] and said["weights"] == weights_of(model)


def record(model: Model, request: str) -> None:
    """Write down that the weights, as they are now, answer a request too."""
    requests = [*(other for other in _read(model)["requests"] if other != request), request]
    text = json.dumps({"requests": requests, "weights": weights_of(model)}, separators=(",", ":"))
    entries = model.shell.metadata_props
    for entry in entries:
        if entry.key == KEY:
            entry.value = text
            return
    entries.add(key=KEY, value=text)


def _read(model: Model) -> dict[str, Any]:
    held = {entry.key: entry.value for entry in model.shell.metadata_props}.get(KEY, "{}")
    try:
        said = json.loads(held)
        return {"requests": [str(text) for text in said["requests"]], "weights": str(said["weights"])}
    except (ValueError, KeyError, TypeError):
        return {"requests": [], "weights": ""}


def settings_of(kind: type[S], step: S) -> S:
    """Return the settings alone of a pass that is also settings."""
    return kind(**{option.name: getattr(step, option.name) for option in fields(kind)})


def request_of(step: Pass) -> str:
    """Return what a pass asks for, as the metadata have it."""
    return f"{step.name} {json.dumps(step.options(), sort_keys=True, default=list)}"


def trained(
    step: Pass, ctx: Context, settings: TrainSettings, data: str, teacher: str = "", *, labels: bool
) -> Iterator[Change]:
    """Propose to train all weights, as one change; what cannot be trained is a near miss.

    Args:
        step: the pass.
        ctx: of the pass.
        settings: of the training.
        data: samples that the pass names, '' for those of the pipeline.
        teacher: a model's file, '' for the model that the pipeline was given.
        labels: whether there must be labels.

    Raises:
        ProviderError: torch is not installed.
        DataError: there is nothing to train on.
    """
    what, request = "train its weights", request_of(step)
    if answers(ctx.model, request):
        yield Change(WHERE, what, "they were trained so already, and have not changed since")
        return
    ctx.training.check(data, labels=labels)
    if why := ctx.training.refusal(settings):
        yield Change(WHERE, what, why)
        return

    def apply() -> None:
        found, course = ctx.training.train(settings, data, teacher)
        changed = put(found, ctx.model)
        said = f"{changed} tensors trained" if changed else "no weights were better than those that were there"
        ctx.notes.append(f"{said}: {course}")
        record(ctx.model, request)

    updates = f"{settings.steps} updates" if settings.steps else f"{settings.epochs:g} epochs"
    yield Change(WHERE, what, f"{settings.optimizer}, {updates}", apply)
