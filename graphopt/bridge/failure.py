"""Why a loss is no number: the most likely reason, found in what is at hand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from graphopt.training import TrainSettings

CALMER = "a lower rate, clip or a longer warmup helps"


def broken_input(feeds: Iterable[Mapping[str, Any]]) -> str:
    """Return the name of an input that holds values that are no numbers, '' where none does."""
    return next((name for feed in feeds for name, value in feed.items() if not _finite(value)), "")


def likely_reason(
    terms: Mapping[str, float], weights: Mapping[str, Any], settings: TrainSettings, *, step: int
) -> str:  # fmt: skip
    """Return a clause that says what went wrong where the input is not to blame, and what may help.

    Args:
        terms: the loss and its terms, not all of them finite.
        weights: trained tensors as they were then.
        settings: what training was asked for.
        step: updates before.
    """
    broken = [name for name, weight in weights.items() if not _finite(weight)]
    if broken and step == 0:
        return f"'{broken[0]}' held values that are no numbers before training"
    if broken:
        return f"the update before made '{broken[0]}' no number: {CALMER}"
    if settings.autocast == "float16":
        return "float16 ends at 65504: autocast bfloat16 does not"
    if step == 0:
        named = [name for name, value in terms.items() if name != "loss" and not abs(value) < float("inf")]
        return f"so it is before any update{f' ({named[0]})' if named else ''}: outputs or labels do not suit the loss"
    return f"weights have grown too large: {CALMER}"


def _finite(values: Any) -> bool:
    tensor = torch.as_tensor(values)
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())
