"""The search for the fastest choice that keeps the bound, on made-up costs; and why nothing was found, in words."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from graphopt import layer_choice
from graphopt.layer_choice import LayerChoice, unable_reason
from graphopt.quantization_report import LayerRow

SAVED = {"a": 3.0, "b": 2.0, "c": 1.0}


def cheapest(costs: Any, noise: dict[str, float], limit: float) -> Any:
    """Return what saves most within the noise, tried in order."""
    chosen: set[str] = set()
    for name in sorted(noise, key=lambda n: noise[n]):
        if sum(noise[n] for n in chosen) + noise[name] <= limit:
            chosen.add(name)
    return SimpleNamespace(
        int8=frozenset(chosen), noise=sum(noise[n] for n in chosen), seconds=10.0 - sum(SAVED[n] for n in chosen)
    )


def test_a_layer_that_misses_the_bound_by_itself_is_left_and_the_others_are_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its noise on the calibrating samples says that it is the quietest of all."""
    monkeypatch.setattr(layer_choice, "assign", cheapest)
    choice: Any = LayerChoice.__new__(LayerChoice)
    choice.refused, choice.tried = {}, []

    def tried(found: Any, _: Any) -> Any:
        ok = "a" not in found.int8
        choice.tried.append(SimpleNamespace(verdict="fine" if ok else "too loud"))
        return SimpleNamespace(ok=ok), SimpleNamespace(chosen=tuple(found.int8), predicted=found.seconds / 10.0)

    choice._tried = tried
    costs: Any = SimpleNamespace(predict=lambda _: 10.0)
    found = choice._search(costs, {"a": 0.001, "b": 0.01, "c": 0.02}, frozenset("abc"), float("inf"))
    assert found is not None
    assert set(found.chosen) == {"b", "c"}
    assert choice.refused == {"a": "it misses the bound by itself: too loud"}


def test_reasons_are_counted_and_the_rarest_left_out() -> None:
    whys = ["x", "y", "y", "z", "z", "z", "w"]
    rows = [LayerRow(str(i), "Conv", "float", why) for i, why in enumerate(whys)]
    assert unable_reason(rows) == "no layer can run on integers: z (3 layers); y (2 layers); x …"
    assert unable_reason([]) == "it has no layers that could run on integers"
