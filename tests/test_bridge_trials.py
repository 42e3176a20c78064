"""The rate that short trainings find: larger for longer trainings, none that destroys, the weights as they were."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from pathlib import Path  # noqa: E402  (after the check for torch)
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402

from graphopt.bridge.loop import train  # noqa: E402
from graphopt.bridge.parallel import Team  # noqa: E402
from graphopt.bridge.plan import Plan  # noqa: E402
from graphopt.bridge.trials import HIGHEST, Search  # noqa: E402
from graphopt.model import Model  # noqa: E402
from graphopt.training import TrainSettings  # noqa: E402
from tests.loop_parts import Bridge, Data, objective, weights  # noqa: E402


def settings(**options: Any) -> TrainSettings:
    return TrainSettings(**{"steps": 60, "batch": 8, **options})


def search(bridge: Any, data: Data | None = None, **options: Any) -> tuple[float, dict[float, float], list[float]]:
    torch.set_num_threads(1)
    asked, data, told = settings(**options), data or Data(), list[float]()
    plan = Plan.of(asked, data)
    rate, trials = Search(bridge, data, objective, asked, plan, 0, Team(), told.append).run()
    return rate, trials, told


@pytest.mark.parametrize("options", [{}, {"relative": False}, {"optimizer": "sgd"}, {"optimizer": "rmsprop"}])
def test_a_rate_is_found_that_trains(options: dict[str, Any]) -> None:
    bridge = Bridge()
    before = weights(bridge)
    rate, trials, told = search(bridge, **options)
    assert weights(bridge) == before
    assert sorted(told) == [tried for tried in trials if tried]
    assert len(told) == len(set(told)) <= 8
    assert min(trials.values()) < trials[0.0]
    history = train(bridge, Data(), objective, settings(**options))
    assert history.rate == rate
    assert [(t.rate, t.loss) for t in history.trials] == list(trials.items())
    assert max(row.rate for row in history.rows) <= rate
    losses = [row.terms["loss"] for row in history.rows]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


def test_what_judges_has_not_trained() -> None:
    """The batches that the loss is taken of are not those of the updates, in the first epoch."""
    seen: list[tuple[bool, frozenset[int]]] = []
    bridge = Bridge()

    def watched(outputs: dict[str, Any], batch: Any) -> dict[str, Any]:
        seen.append((bridge.module.training, frozenset(batch.index)))
        return objective(outputs, batch)

    asked, data = settings(), Data(400)
    plan = Plan.of(asked, data)
    assert plan.per_epoch == 50
    bridge.module.train()
    Search(bridge, data, watched, asked, plan, 0, Team(), lambda _: None).run()
    judged = frozenset().union(*(rows for training, rows in seen if not training))
    trained = frozenset().union(*(rows for training, rows in seen if training))
    assert judged
    assert trained
    assert not judged & trained


def test_longer_trainings_get_larger_rates_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Search, "_trials", lambda _: {0.0: 2.0, 3.2e-4: 1.5, 1e-3: 1.0})
    rates = [search(Bridge(), steps=steps)[0] for steps in (4, 16, 64, 160, 1536, 15360)]
    assert rates == [0.001, 0.001, 0.0025, 0.0046, 0.01, HIGHEST]
    monkeypatch.setattr(Search, "_trials", lambda _: {0.0: 2.0, 1e-3: 1.0, 3.2e-3: 1.9, 1e-2: 2.1})
    assert search(Bridge(), steps=15360)[0] == 0.01  # it did harm
    monkeypatch.setattr(Search, "_trials", lambda _: {0.0: 2.0, 0.01: 1.0})
    assert search(Bridge(), steps=1536)[0] == HIGHEST
    assert search(Bridge(), steps=1536, relative=False)[0] == 0.1
    monkeypatch.setattr(Search, "_trials", lambda _: {0.0: 2.0, 0.1: 1.0})
    assert search(Bridge(), steps=160)[0] == 0.1  # it was tried
    coded = Bridge()
    coded.coded = {"w1": 1 / 128}
    monkeypatch.setattr(Search, "_trials", lambda _: {0.0: 2.0, 0.01: 1.0})
    assert search(coded, steps=1536)[0] == 0.01


def test_rates_that_destroy_are_not_taken() -> None:
    """Where the first rate of the ladder ends in no number, lower ones are tried."""
    bridge = Bridge()

    def fragile(outputs: dict[str, Any], batch: Any) -> dict[str, Any]:
        moved = max(float((p.detach() - q).abs().max()) for p, q in zip(bridge.parameters.values(), start, strict=True))
        found = objective(outputs, batch)
        return found if moved < 2e-4 else {"loss": found["loss"] * float("nan")}

    start = [p.detach().clone() for p in bridge.parameters.values()]
    asked, data = settings(steps=16, relative=False), Data()
    rate, trials = Search(bridge, data, fragile, asked, Plan.of(asked, data), 0, Team(), lambda _: None).run()
    assert trials[3.2e-4] == np.inf
    assert rate < 3.2e-4
    assert np.isfinite(trials[rate])


def test_a_resumed_training_keeps_its_rate(tmp_path: Path) -> None:
    twin, left = Bridge(), [3]
    asked = settings(steps=60, evaluations=1.0)
    whole = train(twin, Data(), objective, asked, judge=lambda _: 0.0)

    class KilledError(Exception):
        pass

    def judge(_: Model) -> float:
        left[0] -= 1
        if not left[0]:
            raise KilledError
        return 0.0

    folder = tmp_path / "c"
    with pytest.raises(KilledError):
        train(Bridge(), Data(), objective, asked, judge=judge, checkpoint=folder, checkpoint_seconds=0)
    told: list[str] = []
    again = Bridge()
    history = train(
        again, Data(), objective, asked, judge=lambda _: 0.0, checkpoint=folder, resume=True,
        progress=lambda _done, _total, words: told.append(words),
    )  # fmt: skip
    assert history.resumed
    assert told
    assert not any("trying" in words for words in told)
    assert (history.rate, history.trials) == (whole.rate, whole.trials)
    assert weights(again) == weights(twin)


def test_of_rates_that_gain_nearly_as_much_the_highest_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    for untrained, taken in ((2.0, 1e-3), (1.21, 3.2e-4), (0.5, 3.2e-4), (np.inf, 3.2e-4)):
        trials = {0.0: untrained, 1e-4: 1.2, 3.2e-4: 1.0, 1e-3: 1.1, 3.2e-3: np.inf}
        monkeypatch.setattr(Search, "_trials", lambda _, found=trials: found)
        assert search(Bridge(), steps=16)[0] == taken, untrained


def test_rates_are_tried_upwards_while_they_do_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes flip at high rates only: where low ones change nothing, the search does not end at the lowest."""
    flat = {3.2e-4: 1.0001, 1e-3: 1.0002, 3.2e-3: 1.003, 1e-2: 1.2}
    monkeypatch.setattr(Search, "loss", lambda *_: 1.0)
    monkeypatch.setattr(Search, "_trial", lambda _, rate: flat[rate])
    assert search(Bridge(), steps=16)[:2] == (3.2e-3, {0.0: 1.0, **flat})
    monkeypatch.setattr(Search, "loss", lambda *_: -1.0)  # a loss of one's own may be negative
    monkeypatch.setattr(Search, "_trial", lambda _, rate: flat[rate] - 2.0)
    assert search(Bridge(), steps=16)[0] == 3.2e-3
    monkeypatch.setattr(Search, "loss", lambda *_: 1.0)
    monkeypatch.setattr(Search, "_trial", lambda _, rate: 1e-5 / rate)
    assert max(search(Bridge(), steps=16)[1]) == 0.1
    monkeypatch.setattr(Search, "_trial", lambda _, rate: 1.0 + rate * 1e6)
    assert sorted(search(Bridge(), steps=16)[1]) == [0.0, 1e-5, 3.2e-5, 1e-4, 3.2e-4]


def test_where_nothing_chooses_a_rate_that_was_found_leaves_no_model_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    bridge = Bridge()
    train(bridge, Data(), objective, settings(rate=0.05, relative=False))
    monkeypatch.setattr(Search, "_trials", lambda search: {0.0: search.loss(search._update(0.0)), 1e3: 0.0})
    before = weights(bridge)
    history = train(bridge, Data(), objective, settings(relative=False, optimizer="sgd", clip=1.0))
    assert history.steps == 60
    assert not history.stopped
    assert (history.best_step, weights(bridge)) == (0, before)
