"""The comparison of quantizers: cache, failures, retries, judging and the table; no peer is needed."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from graphopt.models.benchmarks import quantizers
from graphopt.models.benchmarks.peers_timing import Plan
from graphopt.models.benchmarks.quantizers_cases import CASES, Case
from graphopt.models.benchmarks.quantizers_driver import ALL_METHODS, read_feeds, upgraded
from graphopt.models.benchmarks.quantizers_judge import Remembering, judge
from graphopt.models.benchmarks.quantizers_table import Row, document

SCALED = '<ir_version: 8, opset_import: ["": 11]> g (float[n] x) => (float[n] y) { y = Mul(x, x) }'
ROWS = {
    "graphopt quantize": Row(version="graphopt 1", size=0.25, seconds=3.0, memory=2e9),
    "ORT dynamic": Row("broken", "no kernel"),
}


def saved(text: str, path: Path) -> Path:
    onnx.save(onnx.parser.parse_model(text), path)
    return path


def script(path: Path, body: str) -> str:
    """Return an executable that stands for a peer's Python; its arguments are driver, method, source, feeds, target."""
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def feeds(limit: int) -> Iterator[dict[str, Any]]:
    for i in range(limit):
        yield {"x": np.full(3, i, np.float32)}


def sums(predict: Any, limit: int | None = None) -> Any:
    return np.array([predict(feed)["y"].sum() for feed in feeds(limit or 10)])


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> quantizers.Settings:
    path = saved(SCALED, tmp_path / "zoo.onnx")
    monkeypatch.setattr(quantizers.zoo, "fetch", lambda _: path)
    monkeypatch.setattr(quantizers, "shapes_of", lambda _: {"x": (3,)})
    monkeypatch.setitem(CASES, "squares", Case(feeds, 8, {"sum, dB": sums}))
    return quantizers.Settings("", tmp_path / "cache", plan=Plan(seconds=0.1, least=2, most=2))


OK = """cp "$3" "$5"; printf '{"version": "peer 1", "seconds": 1, "memory": 1, "done": "%s"}' "$7" > "$5.json" """


def test_the_cases_name_functions_that_exist() -> None:
    from graphopt.data import load_function
    from graphopt.quality import Bound

    for case in CASES.values():
        bound = Bound(**case.bound)
        assert isinstance(bound.metric, str)
        assert load_function(bound.metric).__name__.endswith("_selection")
        assert not any(metric.__name__.endswith("_selection") for metric in case.metrics.values())


def test_feeds_are_written_once_and_read_in_order(tmp_path: Path) -> None:
    case = Case(feeds, 9, {})
    quantizers.write_feeds(case, tmp_path / "feeds")
    quantizers.write_feeds(replace(case, items=3), tmp_path / "feeds")
    assert [int(feed["x"][0]) for feed in read_feeds(tmp_path / "feeds")] == list(range(9))
    assert [int(feed["x"][0]) for feed in read_feeds(tmp_path / "feeds", 4)] == [0, 4, 8]


def test_models_below_opset_13_are_raised(tmp_path: Path) -> None:
    path, done = upgraded(saved(SCALED, tmp_path / "a.onnx"), tmp_path)
    assert onnx.load(str(path)).opset_import[0].version == 17
    assert done == "opset 11 raised to 17"
    new = saved(SCALED.replace("11", "13"), tmp_path / "b.onnx")
    assert upgraded(new, tmp_path) == (new, "")


@pytest.mark.parametrize(
    ("body", "status", "why"),
    [
        (OK, "ok", ""),
        ("echo 'ValueError: not this one' >&2; exit 1", "failed", "exit 1: ValueError: not this one"),
        ("kill -9 $$", "failed", "more memory than 11 GB"),
        ("sleep 5", "failed", "longer than 1 s"),
    ],
)
def test_what_becomes_of_a_peer(
    body: str, status: str, why: str, settings: quantizers.Settings, tmp_path: Path
) -> None:
    settings = replace(settings, python=script(tmp_path / "peer", body), limit=1.0)
    quantizers.prepare("squares", settings)
    quantizers.make("squares", "ORT dynamic", settings)
    row = quantizers.rows("squares", settings)["ORT dynamic"]
    assert (row.status, row.why) == (status, why)
    settings = replace(settings, python=script(tmp_path / "other", OK if status != "ok" else "exit 1"))
    quantizers.make("squares", "ORT dynamic", settings)
    assert quantizers.rows("squares", settings)["ORT dynamic"].status == status  # out of the cache
    quantizers.forget(["ORT dynamic"], "squares", settings)
    assert quantizers.rows("squares", settings) == {}


def test_a_calibrator_that_runs_out_of_memory_gets_fewer_samples(settings: quantizers.Settings, tmp_path: Path) -> None:
    body = f'[ "$7" = 1 ] && {{ echo "MemoryError" >&2; exit 1; }}\n{OK}'
    settings = replace(settings, python=script(tmp_path / "peer", body))
    quantizers.prepare("squares", settings)
    quantizers.make("squares", "ORT static Entropy", settings)
    row = quantizers.rows("squares", settings)["ORT static Entropy"]
    assert row.status == "ok"
    assert row.done == "4, one sample in 4: all take more than 11 GB"


def test_scores_are_of_the_model_and_a_broken_one_is_told(settings: quantizers.Settings, tmp_path: Path) -> None:
    good, bad = saved(SCALED, tmp_path / "good.onnx"), tmp_path / "bad.onnx"
    assert judge("squares", good, 4) == {"status": "ok", "why": ""}
    with np.load(tmp_path / "good.scores.npz") as file:
        assert file["sum, dB"].tolist() == [0, 3, 12, 27]
    bad.write_bytes(good.read_bytes().replace(b"Mul", b"Nul"))
    found = judge("squares", bad, 4)
    assert found["status"] == "broken"
    assert "INVALID_GRAPH" in found["why"]


def test_a_feed_runs_once(tmp_path: Path) -> None:
    predict = Remembering(saved(SCALED, tmp_path / "a.onnx"))
    first, same, other = (predict({"x": np.full(3, value, np.float32)}) for value in (2, 2, 3))
    assert first is same
    assert other["y"].tolist() == [9, 9, 9]


def test_drops_are_paired() -> None:
    reference, candidate = np.array([1.0, 1, 0, 1]), np.array([1.0, 0, 0, 1])
    found = quantizers.compared({"right": reference}, {"right": candidate, "new": reference})
    assert list(found) == ["right"]
    assert found["right"]["drop"] == 0.25
    assert found["right"]["interval"][0] == 0.0


def test_a_model_that_takes_the_judge_down_is_told_and_the_others_go_on(
    settings: quantizers.Settings, tmp_path: Path
) -> None:
    settings = replace(settings, python=script(tmp_path / "peer", OK))
    quantizers.prepare("squares", settings)
    for method in ("ORT dynamic", "NNCF mixed"):
        quantizers.make("squares", method, settings)
    quantizers.judge_all("squares", settings)  # in its process there is no such case: each of the three takes it down
    found = quantizers.rows("squares", settings)
    assert {row.status for row in found.values()} == {"broken"}
    assert all("KeyError: 'squares'" in row.why for row in found.values())


def test_the_table_shows_every_number_and_every_reason() -> None:
    ROWS["graphopt quantize"].latency = {"unmodified": {"ratio": 0.5, "interval": (0.49, 0.51)}}
    ROWS["graphopt quantize"].metrics = {
        "lines right": {"reference": 0.98, "candidate": 0.97, "drop": 0.01, "interval": (0.005, 0.015)},
        "SQNR, dB": {"reference": 150.0, "candidate": 21.5, "drop": 128.5, "interval": None},
        "cosine": {"reference": 1.0, "candidate": 0.996, "drop": 0.004, "interval": (0.0, 0.005)},
    }
    text = document({"some-model": ROWS}, "a machine")
    for part in (
        "| unmodified | 1 |  | 98.00 % | 150.0 | 1.0000 |",
        "| graphopt quantize | 0.500 (0.490–0.510) | – | 97.00 %; -1.00 (-1.50 to -0.50) points | 21.5 "
        "| 0.9960; -0.0040 (-0.0050 to +0.0000) | 0.250 | 3 | 2.0 |",
        "| ORT dynamic (*broken*) |",
        "- ORT dynamic: broken: no kernel",
        "graphopt 1; a machine",
    ):
        assert part in text


def test_every_method_can_be_told_apart() -> None:
    assert len({quantizers.slug(method) for method in ALL_METHODS}) == len(ALL_METHODS)
    json.dumps({name: dict(case.bound) for name, case in CASES.items()})  # they cross to another process
