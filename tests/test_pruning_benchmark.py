"""The figures of pruning: points of curves, cache, failures, and the page with its plots."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from graphopt.models.benchmarks import pruning
from graphopt.models.benchmarks.pruning import Bench, Plan
from graphopt.models.benchmarks.pruning_cases import BEST, CASES, REPAIRS, Aim, Case, Point, points
from graphopt.models.benchmarks.pruning_page import Curves, Made, document, write_plots
from graphopt.pipeline import Pipeline
from graphopt.spec import pass_steps

FULL = {
    "reference": 0.99,
    "candidate": 0.98,
    "drop": 0.01,
    "allowed": None,
    "items": 600,
    "interval": [0.0, 0.02],
    "ok": True,
}
RATIO = {"ratio": 0.6, "interval": [0.59, 0.61]}


def small(name: str = "digits", **changes: Any) -> Case:
    """Return a case with two points: cut by norms, with and without what repairs."""
    case = CASES[name]
    kept = {"title", "model", "calibration", "metrics", "feed"}
    given = {key: getattr(case, key) for key in kept}
    return Case(**{**given, "items": 64, "ratios": (0.3,), "criteria": ("l2",), **changes})


@pytest.fixture
def _two(monkeypatch: pytest.MonkeyPatch) -> None:
    set_two(monkeypatch)


def set_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the digits be the only case, with two points."""
    monkeypatch.setitem(pruning.CASES, "digits", small())
    monkeypatch.setattr(pruning, "points", lambda case: [p for p in points(case) if p.repair != "bias"])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a cache with both points made and judged, not timed."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        set_two(patch)
        Bench("digits", Plan(folder, quick=True, timing=0)).run()
    return folder


@pytest.fixture
def cache(made: Path, tmp_path: Path) -> Path:
    """Return a copy of that cache."""
    return Path(shutil.copytree(made, tmp_path / "cache"))


def test_every_point_of_every_case_is_a_pipeline() -> None:
    for case in CASES.values():
        found = points(case)
        assert len(found) == len({p.slug for p in found})
        for point in found:
            steps = [step.name for step in pass_steps(Pipeline(point.steps).steps)]
            assert steps[0] == ("drop-blocks" if point.of_blocks else "prune-channels")
            assert ("reconstruct-weights" in steps) == (point.repair != "nothing")


def test_points_with_an_aim_come_first_and_are_judged_on_all_items() -> None:
    for case in CASES.values():
        found = points(case)
        aimed = [p for p in found if p.aim is not None]
        assert aimed == found[: len(aimed)]
        assert {p.amount for p in aimed} == {aim.ratio for aim in case.aims}
        assert all(p.repair == BEST and not p.items for p in aimed)
    assert set(REPAIRS) == {p.repair for p in points(CASES["digits"])}


def test_aims() -> None:
    assert Aim(0.3, drop=0.01).met(FULL)
    assert not Aim(0.3, drop=0.009).met(FULL)
    assert Aim(0.3, least=0.98).met(FULL)
    assert not Aim(0.3, least=0.981).met(FULL)
    assert str(Aim(0.3, drop=0.015)) == "≤ 1.5 points lost"
    assert str(Aim(0.3, least=0.8)) == "≥ 80 %"


@pytest.mark.usefixtures("_two")
def test_points_are_made_judged_and_timed_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench("digits", Plan(cache, quick=True, timing=0.05))
    before = bench.results()
    assert not any(m.latency for m in before.made), "timing can follow later"
    monkeypatch.setattr(Bench, "_scores", lambda *_: pytest.fail("nothing is judged anew"))
    bench.run()
    repaired, raw = bench.results().made
    assert (repaired.point.repair, raw.point.repair) == (BEST, "nothing")
    assert 0.4 < repaired.macs < 0.9
    assert repaired.macs == raw.macs
    good, bad = (m.metrics["digits right"] for m in (repaired, raw))
    assert good["items"] == 100
    assert good["drop"] <= 0.05  # 30 % of the MACs: measured 0.00, and three times a standard error of 100 items
    assert good["candidate"] >= bad["candidate"]
    assert repaired.latency["ratio"] > 0
    assert not raw.latency, "the same model but for its weights"
    assert not list((cache / "digits").glob("channels-l2-*-least-squares.onnx")), "models go when they are timed"
    assert [m.metrics for m in bench.results().made] == [m.metrics for m in before.made]


@pytest.mark.usefixtures("_two")
def test_a_run_ends_early_and_criteria_are_forgotten(cache: Path) -> None:
    bench = Bench("digits", Plan(cache, quick=True, timing=0, until=time.monotonic()))
    bench.forget(["obs"])
    assert len(bench.results().made) == 2
    bench.forget(["l2"])
    bench.run()
    assert not bench.results().made, "it is late: nothing is made"


def test_failures_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(_: int) -> Iterator[dict[str, Any]]:
        yield from ()

    case = small(calibration=nothing, criteria=("wanda",), title="No samples")
    monkeypatch.setitem(pruning.CASES, "digits", case)
    bench = Bench("digits", Plan(tmp_path, quick=True, timing=0.05))
    bench.run()
    curves = bench.results()
    assert curves.made
    assert all(m.why and not m.metrics for m in curves.made)
    page = document({"digits": curves}, "here", 100)
    assert f"- {curves.made[0].point.steps}: {curves.made[0].why}" in page


def curves() -> Curves:
    """All kinds of points of one case."""
    aim = Aim(0.5, drop=0.015)
    made = [
        Made(Point("obs", 0.5, aim=aim), {"right": FULL}, 0.52, 0.4, 3.0, RATIO),
        Made(Point("obs", 0.5, "nothing"), {"right": {**FULL, "candidate": 0.2}}, 0.52, 0.4, 2.0),
        Made(Point("obs", 0.3), {"right": FULL}, 0.7, 0.6, 3.0, RATIO),
        Made(Point("l2", 0.3), {}, why="no samples"),
        Made(Point("cosine", 1.0, of_blocks=True), {"right": FULL}, 0.8, 0.8, 1.0, RATIO),
        Made(Point("cosine", 1.0, "nothing", of_blocks=True), {"right": FULL}, 0.8, 0.8, 1.0),
    ]
    return Curves("Some model", ("right",), made)


def test_the_page() -> None:
    text = document({"some": curves()}, "a machine", 500)
    assert (
        "| Some model | 48% | obs | right 99.00 → 98.00 % | -1.00 (-2.00 to +0.00) | ≤ 1.5 points lost | yes |" in text
    )
    assert "| obs | nothing | – | 20.0 % |" in text
    assert "| obs | least squares | 98.0 % | 98.0 % |" in text
    assert "| obs | 0.70 → 0.60 | 0.52 → 0.60 |" in text
    assert "| cosine | 1 | 0.80 | 0.600 (0.590–0.610) | 98.0 % / 98.0 % |" in text
    assert "![Some model](pruning-some.svg)" in text
    for table in text.split("\n\n"):
        if table.startswith("|"):
            assert len({line.count("|") for line in table.strip().splitlines()}) == 1, table


def test_plots_are_the_same_every_time(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    seen = set()
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_plots({"some": curves()}, tmp_path / folder / "page.md")
        seen.add((tmp_path / folder / "pruning-some.svg").read_text())
    assert len(seen) == 1
    assert "obs, least squares" in seen.pop()


def test_unknown_cases_end_the_program(capsys: pytest.CaptureFixture[str]) -> None:
    parser = pruning.argparse.ArgumentParser()
    assert pruning.chosen("cls,rec", CASES, parser) == ["cls", "rec"]
    assert pruning.chosen(None, CASES, parser) == list(CASES)
    with pytest.raises(SystemExit):
        pruning.chosen("ocr", CASES, parser)
    assert "no such case: ocr" in capsys.readouterr().err
