"""The training loop: options obeyed, gradients weighted by rows, the best kept, a kill without a trace."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

import json  # noqa: E402  (after the check for torch)
import sys  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from dataclasses import replace  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402

from graphopt.bridge.history import History  # noqa: E402
from graphopt.bridge.loop import train  # noqa: E402
from graphopt.bridge.penalties import Penalties  # noqa: E402
from graphopt.bridge.schedules import Schedule  # noqa: E402
from graphopt.errors import DataError, ModelError, ProviderError, SpecError  # noqa: E402
from graphopt.model import Model, load  # noqa: E402
from graphopt.training import TrainSettings  # noqa: E402
from tests.loop_parts import Bridge, Data, Rows, objective, weights  # noqa: E402


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def settings(**options: Any) -> TrainSettings:
    return TrainSettings(**{"epochs": 3, "batch": 8, "rate": 0.02, "relative": False, **options})


def test_relative_rates_are_parts_of_the_scale_of_each_tensor() -> None:
    bridge = Bridge()
    with torch.no_grad():
        bridge.parameters["b1"].zero_()
        bridge.parameters["w1"].mul_(0.01)
    before = {name: p.detach().clone() for name, p in bridge.parameters.items()}
    train(bridge, Data(8), objective, settings(
        optimizer="adam", relative=True, rate=0.05, schedule="constant", warmup=0.0, steps=1, weight_decay=0.0,
    ))  # fmt: skip
    for name, value in bridge.parameters.items():  # the first step of Adam is as long as the rate, where there is one
        scale = max(1e-3, float(before[name].square().mean().sqrt()))
        assert float((value.detach() - before[name]).abs().max()) == pytest.approx(0.05 * scale, rel=1e-3), name


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "rmsprop"])
def test_loss_falls(optimizer: str) -> None:
    bridge, rate = Bridge(), 0.2 if optimizer == "sgd" else 0.02
    history = train(bridge, Data(), objective, settings(optimizer=optimizer, rate=rate, epochs=10))
    losses = [row.terms["loss"] for row in history.rows]
    assert losses[-1] < 0.6 * losses[0]
    assert history.steps == 50


@pytest.mark.parametrize(
    ("options", "made"),
    [
        (
            {"optimizer": "sgd", "momentum": 0.8, "nesterov": True},
            lambda p: torch.optim.SGD(p, 0.01, 0.8, nesterov=True),
        ),
        ({"optimizer": "sgd", "momentum": 0.0}, lambda p: torch.optim.SGD(p, 0.01)),
        ({"optimizer": "adam"}, lambda p: torch.optim.Adam(p, 0.01)),
        ({"optimizer": "adamw"}, lambda p: torch.optim.AdamW(p, 0.01)),
        ({"optimizer": "rmsprop", "momentum": 0.5}, lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.5)),
    ],
)  # fmt: skip
def test_steps_are_those_of_torch(options: dict[str, Any], made: Any) -> None:
    """Weight decay is for the weights and not for the bias."""
    plain = {"rate": 0.01, "schedule": "constant", "warmup": 0.0, "epochs": 2, "weight_decay": 0.1}
    bridge, other, data = Bridge(), Bridge(), Data(43)  # the last batch has three rows
    train(bridge, data, objective, settings(**plain, **options))
    held = other.parameters
    optimizer = made(
        [{"params": [held["w1"], held["w2"]], "weight_decay": 0.1}, {"params": [held["b1"]], "weight_decay": 0}]
    )
    for epoch in range(2):
        for batch in data.epoch(epoch, seed=0, batch=8):
            optimizer.zero_grad()
            objective(other.module(batch.feeds), batch)["loss"].backward()
            optimizer.step()
    for name, weight in bridge.parameters.items():  # fused kernels round differently: a few units in the last place
        assert torch.allclose(weight, held[name], rtol=0, atol=2e-6), name


def test_l1_and_group_lasso_are_gradients_of_their_terms() -> None:
    bridge = Bridge()
    with torch.no_grad():
        bridge.parameters["w1"][0] = 0.0  # a channel of zeros has no direction, and gets none
    asked = settings(l1=0.01, group_lasso=0.02)
    penalties = Penalties({n: bridge.parameters[n] for n in ("w1", "w2")}, {"w1": 0, "w2": 0}, asked)
    for weight in bridge.parameters.values():
        weight.grad = torch.zeros_like(weight)
    terms = penalties.add()
    found = {name: weight.grad.clone() for name, weight in bridge.parameters.items()}
    written = {"l1": torch.zeros(()), "group_lasso": torch.zeros(())}
    for name in ("w1", "w2"):
        weight = bridge.parameters[name]
        written["l1"] += 0.01 * weight.abs().sum()
        written["group_lasso"] += 0.02 * torch.linalg.vector_norm(weight, dim=1).sum()
    assert terms == pytest.approx({name: float(value.detach()) for name, value in written.items()}, rel=1e-6)
    gradients = torch.autograd.grad(sum(written.values()), [bridge.parameters["w1"], bridge.parameters["w2"]])
    assert torch.allclose(found["w1"], gradients[0], atol=1e-7)
    assert torch.allclose(found["w2"], gradients[1], atol=1e-7)
    assert not found["b1"].any()


def test_penalties_make_weights_smaller() -> None:
    sizes = {}
    for name, options in {"none": {}, "l1": {"l1": 0.02}, "groups": {"group_lasso": 0.05}}.items():
        bridge = Bridge()
        history = train(bridge, Data(), objective, settings(epochs=10, **options))
        sizes[name] = float(bridge.parameters["w1"].detach().abs().sum())
        assert history.rows[-1].terms.keys() == {
            "loss",
            "cross-entropy",
            *({"l1": ["l1"], "groups": ["group_lasso"]}.get(name, [])),
        }
    assert sizes["l1"] < 0.6 * sizes["none"]
    assert sizes["groups"] < 0.8 * sizes["none"]


@pytest.mark.parametrize("options", [{"batch": 4, "accumulate": 3}, {"batch": 6, "accumulate": 2}])
def test_accumulation_is_a_larger_batch(options: dict[str, Any]) -> None:
    """The last update has fewer rows, cut unevenly: 40 rows are three of 12, and 4."""
    whole, parts = Bridge(), Bridge()
    plain = {"optimizer": "sgd", "rate": 0.1, "clip": 0.5}
    train(whole, Data(), objective, settings(batch=12, **plain))
    history = train(parts, Data(), objective, settings(**{**plain, **options}))
    assert history.steps == 12
    for name, weight in whole.parameters.items():  # sums in another order: float32 noise of 12 updates
        assert torch.allclose(weight, parts.parameters[name], rtol=0, atol=2e-6), name


def test_a_prescribed_batch_is_made_up_by_accumulation() -> None:
    whole, parts = Bridge(), Bridge()
    parts.batch = 2
    train(whole, Data(), objective, settings(optimizer="sgd"))
    assert train(parts, Data(), objective, settings(optimizer="sgd")).steps == 15
    assert torch.allclose(whole.parameters["w1"], parts.parameters["w1"], rtol=0, atol=2e-6)


def test_clipping_bounds_the_step() -> None:
    bridge = Bridge()
    before = {name: weight.detach().clone() for name, weight in bridge.parameters.items()}
    plain = {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "schedule": "constant", "warmup": 0.0}
    train(bridge, Data(), objective, settings(**plain, steps=1, clip=1e-3, rate=1.0))
    moved = sum(float(((weight.detach() - before[name]) ** 2).sum()) for name, weight in bridge.parameters.items())
    assert moved**0.5 == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_autocast_trains_float32_weights(kind: str) -> None:
    bridge = Bridge()
    history = train(bridge, Data(), objective, settings(autocast=kind, epochs=10))
    assert history.rows[-1].terms["loss"] < 0.6 * history.rows[0].terms["loss"]
    assert {weight.dtype for weight in bridge.parameters.values()} == {torch.float32}
    exact = Bridge()
    train(exact, Data(), objective, settings(epochs=10))
    assert weights(exact) != weights(bridge)


def test_schedules() -> None:
    def rates(total: int = 11, **options: Any) -> list[float]:
        schedule = Schedule(settings(**{"warmup": 0.0, **options}), 1.0, total, 4)
        return [schedule.rate(update) for update in range(total)]

    assert rates(schedule="constant") == [1.0] * 11
    assert rates(schedule="exponential", decay=0.01)[::5] == pytest.approx([1.0, 0.1, 0.01])
    assert rates(schedule="cosine", decay=0.2)[::5] == pytest.approx([1.0, 0.6, 0.2])
    assert rates(schedule="step", decay=0.5, every=1.0) == [1.0] * 4 + [0.5] * 4 + [0.25] * 3
    assert rates(schedule="step", decay=0.5, every=0.5)[:5] == [1.0, 1.0, 0.5, 0.5, 0.25]
    cycle = rates(schedule="one-cycle", decay=0.1)
    assert cycle[0] == pytest.approx(1 / 25)
    assert cycle[3] == pytest.approx(1.0)
    assert cycle[10] == pytest.approx(0.1)
    assert rates(20, schedule="constant", warmup=0.2)[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_the_best_judged_is_kept_and_patience_ends() -> None:
    qualities = iter([0.5, 0.6, 0.9, 0.7, 0.8, 0.9, 0.1])
    judged: list[dict[str, bytes]] = []

    def judge(model: Model) -> float:
        judged.append({c.name: np.asarray(c.values).tobytes() for c in model.constants()})
        return next(qualities)

    bridge = Bridge()
    history = train(bridge, Data(), objective, settings(epochs=9, patience=3), judge=judge)
    assert history.stopped == "no better quality in 3 evaluations"
    assert (history.best, history.best_step, history.steps) == (0.9, 25, 25)  # of equals, the later one
    assert [row.judged for row in history.rows if row.judged is not None] == [0.5, 0.6, 0.9, 0.7, 0.8, 0.9]
    assert weights(bridge) == judged[5] != judged[2]


def test_training_that_makes_it_worse_gives_back_what_came() -> None:
    bridge = Bridge()
    before = weights(bridge)
    qualities = iter([0.9, 0.8, float("nan"), 0.7])
    history = train(bridge, Data(), objective, settings(), judge=lambda _: next(qualities))
    assert weights(bridge) == before
    assert (history.best, history.best_step) == (0.9, 0)


def test_patience_without_a_judge_is_about_the_loss() -> None:
    plain = {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "rate": 0.0, "epochs": 50, "patience": 2}
    history = train(Bridge(), Data(), objective, settings(**plain, evaluations=1.0))
    assert history.stopped == "no better loss in 2 evaluations"
    assert history.steps < 250


def test_averaged_weights_are_judged_and_kept() -> None:
    plain = {
        "optimizer": "sgd",
        "momentum": 0.0,
        "weight_decay": 0.0,
        "schedule": "constant",
        "warmup": 0.0,
        "epochs": 1,
    }
    seen: list[np.ndarray[Any, Any]] = []

    def judge(model: Model) -> float:
        seen.append(next(np.asarray(c.values) for c in model.constants() if c.name == "w2"))
        return float(len(seen))

    averaged, last = Bridge(), Bridge()
    expected = last.parameters["w2"].detach().clone()
    train(averaged, Data(), objective, settings(**plain, ema=0.5), judge=judge)
    for update in range(5):
        other = Bridge()
        train(other, Data(), objective, settings(**plain, steps=update + 1))
        decay = min(0.5, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * other.parameters["w2"].detach()
    assert torch.allclose(averaged.parameters["w2"], expected, atol=1e-6)
    assert np.array_equal(seen[-1], averaged.parameters["w2"].detach().numpy())


@pytest.mark.parametrize(("rate", "options"), [(1e4, {}), (1e4, {"ema": 0.9}), (1e4, {"autocast": "float16"})])
def test_a_loss_that_is_no_number_ends_with_the_best(rate: float, options: dict[str, Any]) -> None:
    bridge = Bridge()
    good = weights(bridge)

    def diverging(outputs: dict[str, Any], batch: Rows) -> dict[str, Any]:
        loss = (outputs["y"] ** 4).mean()
        return {"loss": loss}

    plain = {"optimizer": "sgd", "schedule": "constant", "warmup": 0.0, "evaluations": 0.0}
    history = train(bridge, Data(), diverging, settings(rate=rate, epochs=9, **plain, **options))
    assert history.failed
    assert history.stopped.startswith(f"the loss of update {history.steps + 1} is ")
    assert "lower rate" in history.stopped or "float16 ends" in history.stopped
    assert weights(bridge) == good
    assert all(np.isfinite(row.terms["loss"]) for row in history.rows)


def test_the_reason_is_the_input_where_it_holds_no_numbers() -> None:
    data, bridge = Data(), Bridge()
    data.x[17, 2] = np.nan
    qualities = iter(range(99))
    history = train(bridge, data, objective, settings(), judge=lambda _: float(next(qualities)))
    assert "input 'x' holds values that are no numbers" in history.stopped
    assert all(torch.isfinite(weight).all() for weight in bridge.parameters.values())


def test_nothing_to_train_nothing_to_train_on() -> None:
    with pytest.raises(DataError, match="no samples"):
        train(Bridge(), Data(0), objective, settings())
    empty = Bridge()
    empty.parameters.clear()
    with pytest.raises(ModelError, match="no tensor that could be trained"):
        train(empty, Data(), objective, settings())
    with pytest.raises(ModelError, match="depends on no tensor"):
        train(Bridge(), Data(), lambda *_: {"loss": torch.zeros(())}, settings())


def test_torch_is_left_as_it_was_found() -> None:
    bridge = Bridge(dropout=0.5)
    bridge.module.eval()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    train(bridge, Data(), objective, settings())
    assert torch.equal(torch.rand(3), expected)
    assert not torch.are_deterministic_algorithms_enabled()
    assert not bridge.module.training


def test_same_seed_same_bytes() -> None:
    runs = []
    for seed in (0, 0, 1):
        bridge = Bridge(dropout=0.3)
        train(bridge, Data(), objective, settings(ema=0.9), seed=seed)
        runs.append(weights(bridge))
    assert runs[0] == runs[1] != runs[2]


def test_progress_and_history(tmp_path: Path) -> None:
    said: list[tuple[int, int, str]] = []
    history = train(
        Bridge(), Data(), objective, settings(evaluations=2.0), judge=lambda _: 0.5, progress=lambda *a: said.append(a)
    )
    assert said[-1][:2] == (15, 15)
    assert said[-1][2].endswith("0 s left")
    assert [row.step for row in history.rows if row.judged is not None] == [0, 3, 5, 8, 10, 13, 15]
    assert [row.step for row in history.rows] == list(range(16))
    assert history.rows[-1].epoch == 3.0
    history.save_json(tmp_path / "h.json")
    document = json.loads((tmp_path / "h.json").read_text())
    assert History.from_dict(document) == history
    history.save_plot(tmp_path / "h.svg")
    assert "updates" in (tmp_path / "h.svg").read_text() or (tmp_path / "h.svg").stat().st_size > 5000


def test_a_plot_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ProviderError, match="matplotlib"):
        History().save_plot(tmp_path / "h.png")


class Killed(BaseException):
    """What ends a training in the middle without a word."""


class Dying(Data):
    """Data whose reader dies at a batch of an epoch."""

    def __init__(self, epoch: int, batch: int) -> None:
        super().__init__()
        self.at = epoch, batch

    def epoch(self, epoch: int, *, start: int = 0, **options: Any) -> Iterator[Rows]:
        for number, batch in enumerate(super().epoch(epoch, start=start, **options), start):
            if (epoch, number) == self.at:
                raise Killed
            yield batch


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "adamw", "ema": 0.9, "patience": 9},
        {"optimizer": "sgd", "nesterov": True, "accumulate": 2},
        {"optimizer": "rmsprop", "autocast": "float16", "epochs": 2.4},
        {"optimizer": "adam", "evaluations": 0.0},
    ],
)
@pytest.mark.parametrize("judged", [False, True])
def test_resumed_is_uninterrupted(tmp_path: Path, options: dict[str, Any], judged: bool) -> None:
    def quality(model: Model) -> float:
        return -abs(float(sum(np.asarray(c.values).sum() for c in model.constants())))

    judge = quality if judged else None
    whole, broken, resumed = (Bridge(dropout=0.2) for _ in range(3))
    asked = settings(**options)
    expected = train(whole, Data(), objective, asked, judge=judge, seed=3)
    folder: dict[str, Any] = {"checkpoint": tmp_path / "c", "checkpoint_seconds": 0.0}
    with pytest.raises(Killed):
        train(broken, Dying(1, 2), objective, asked, judge=judge, seed=3, **folder)
    found = train(resumed, Data(), objective, asked, judge=judge, seed=3, resume=True, **folder)
    assert weights(resumed) == weights(whole)
    untimed = [[replace(row, seconds=0.0) for row in history.rows] for history in (found, expected)]
    assert untimed[0] == untimed[1]
    again = Bridge(dropout=0.2)
    assert train(again, Data(), objective, asked, judge=judge, seed=3, resume=True, **folder).steps == expected.steps
    assert weights(again) == weights(whole)
    left = load(tmp_path / "c" / "model.onnx")
    assert {c.name: np.asarray(c.values).tobytes() for c in left.constants()} == weights(whole)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"settings": {"rate": 0.5}}, "rate was 0.02, is 0.5"),
        ({"settings": {"freeze": ("w*",)}}, r"freeze was none, is w\*"),
        ({"data": 39}, "rows was 40, is 39"),
        ({"seed": 1}, "seed was 0, is 1"),
        ({"model": 1}, "another model"),
    ],
)
def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    train(Bridge(), Data(), objective, settings(), checkpoint=tmp_path / "c")
    bridge, asked = Bridge(seed=change.get("model", 0)), settings(**change.get("settings", {}))
    with pytest.raises(SpecError, match=said):
        train(
            bridge, Data(change.get("data", 40)), objective, asked, seed=change.get("seed", 0),
            checkpoint=tmp_path / "c", resume=True,
        )  # fmt: skip


def test_folders_that_a_checkpoint_would_spoil(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(SpecError, match="other files"):
        train(Bridge(), Data(), objective, settings(), checkpoint=tmp_path / "mine")
    with pytest.raises(SpecError, match="this is none"):
        train(Bridge(), Data(), objective, settings(), checkpoint=tmp_path / "mine" / "thesis.txt")
    with pytest.raises(Killed):
        train(Bridge(), Dying(1, 0), objective, settings(), checkpoint=tmp_path / "c", checkpoint_seconds=0)
    with pytest.raises(SpecError, match="not finished"):
        train(Bridge(), Data(), objective, settings(), checkpoint=tmp_path / "c")
    train(Bridge(), Data(), objective, settings(), checkpoint=tmp_path / "c", resume=True)
    train(Bridge(), Data(), objective, settings(), checkpoint=tmp_path / "c")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "mine"]


def test_damaged_checkpoints(tmp_path: Path) -> None:
    train(Bridge(), Data(), objective, settings(), checkpoint=tmp_path / "c")
    state = tmp_path / "c" / "state.npz"
    whole = state.read_bytes()
    state.write_bytes(whole[:200])
    with pytest.raises(DataError, match="damaged"):
        train(Bridge(), Data(), objective, settings(), checkpoint=tmp_path / "c", resume=True)
    told = json.loads((tmp_path / "c" / "state.json").read_text())
    state.write_bytes(whole)
    for lacking in ("step", "history", "arrays", "belongs"):
        (tmp_path / "c" / "state.json").write_text(json.dumps({k: v for k, v in told.items() if k != lacking}))
        with pytest.raises(DataError, match=r"damaged|no checkpoint"):
            train(Bridge(), Data(), objective, settings(), checkpoint=tmp_path / "c", resume=True)
    (tmp_path / "c" / "state.json").write_text("{}")
    with pytest.raises(DataError, match="no checkpoint"):
        train(Bridge(), Data(), objective, settings(), checkpoint=tmp_path / "c", resume=True)


def test_a_kill_between_two_moves_leaves_the_one_before(tmp_path: Path) -> None:
    done = train(Bridge(), Data(), objective, settings(), checkpoint=tmp_path / "c")
    (tmp_path / "c").rename(tmp_path / "c.old")
    (tmp_path / "c.partial").mkdir()
    found = train(Bridge(), Data(), objective, settings(), checkpoint=tmp_path / "c", resume=True)
    assert found.to_dict() == {**done.to_dict(), "resumed": 15}


def test_samples_that_fill_no_batch_are_refused() -> None:
    data = Data(5)
    data.batches = lambda batch, world=1: data.rows // (batch * world)  # type: ignore[method-assign]
    bridge = Bridge()
    bridge.batch = 8
    with pytest.raises(DataError, match="5 samples do not fill a batch"):
        train(bridge, data, objective, settings())
