"""The comparison with the peers: counting, judging, what becomes of crashes, the tables; no peer is needed."""

from __future__ import annotations

import json
import math
import re
import stat
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from graphopt.models.benchmarks import peers
from graphopt.models.benchmarks.peers_judge import count_nodes, judge, largest_error
from graphopt.models.benchmarks.peers_table import Row, document
from graphopt.models.benchmarks.peers_timing import Plan, ratios

RELU = '<ir_version: 8, opset_import: ["": 17]> g (float[2] x) => (float[2] y) { y = Relu(x) }'
BRANCHES = """<ir_version: 8, opset_import: ["": 17, "own": 1]>
g (float[2] x, bool c) => (float[2] y) {
    k = Constant<value = float[2] {1.0, 2.0}>()
    s = own.twice(x)
    y = If(c) <then_branch = a () => (float[2] p) { h = Constant<value = float {2.0}>()  p = Mul(s, h) },
               else_branch = b () => (float[2] q) { q = Add(s, k) }>
}
<domain: "own", opset_import: ["": 17]> twice (v) => (w) { w = Add(v, v) }
"""


@pytest.fixture
def relu(tmp_path: Path) -> Path:
    return saved(RELU, tmp_path / "relu.onnx")


def saved(text: str, path: Path) -> Path:
    onnx.save(onnx.parser.parse_model(text), path)
    return path


def script(path: Path, body: str) -> str:
    """Return an executable that stands for a peer's Python."""
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_nodes_of_subgraphs_and_functions_count_and_constant_nodes_do_not() -> None:
    assert count_nodes(onnx.parser.parse_model(BRANCHES)) == 5  # twice, If, Mul, Add, and Add in the function


def test_largest_error_is_a_part_of_the_largest_element() -> None:
    reference = {"y": np.array([1.0, -4.0], np.float32), "i": np.array([3])}
    assert largest_error(reference, reference) == (0.0, "")
    assert largest_error(reference, {**reference, "y": np.array([1.5, -4.0], np.float32)}) == (0.125, "")


@pytest.mark.parametrize(
    ("found", "why"),
    [
        ({}, "outputs"),
        ({"y": np.zeros((2, 1), np.float32)}, r"float32\[2, 1\] instead of float32\[2\]"),
        ({"y": np.zeros(2, np.float64)}, "float64"),
        ({"y": np.array([np.nan, 0], np.float32)}, "not finite"),
    ],
)
def test_other_shapes_types_and_infinities_are_infinitely_wrong(found: dict[str, Any], why: str) -> None:
    error, reason = largest_error({"y": np.zeros(2, np.float32)}, found)
    assert math.isinf(error)
    assert re.search(why, reason)


@pytest.mark.parametrize(
    ("text", "status"),
    [
        (RELU, "ok"),
        (RELU.replace("y = Relu(x)", "y = Neg(x)"), "wrong outputs"),
        (RELU.replace("float[2] y", "float[1,2] y").replace("Relu(x)", "Flatten<axis = 0>(x)"), "wrong outputs"),
        (RELU.replace("y = Relu(x)", "y = Relu(x, x)"), "invalid"),
        (RELU.replace("float[2] x", "float[2] z").replace("(x)", "(z)"), "broken"),
        (RELU.replace('"": 17', '"": 17, "own": 1').replace("Relu", "own.Relu"), "broken"),
    ],
)
def test_judge_tells_what_is_wrong(tmp_path: Path, text: str, status: str) -> None:
    feed = {"x": np.array([-1.0, 2.0], np.float32)}
    path = saved(text, tmp_path / "candidate.onnx")
    found = judge(str(path), [feed], [{"y": np.array([0.0, 2.0], np.float32)}], valid=True)
    assert found["status"] == status
    assert found["nodes"] == 1
    assert bool(found["why"]) == (status != "ok" and found["error"] is None)


def test_what_the_checker_refuses_and_ort_runs_is_invalid_and_timed(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(RELU)
    model.ir_version = 3
    model.graph.node[0].op_type = "Max"
    model.graph.node[0].input.append("zero")
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(2, np.float32), "zero"))
    onnx.save(model, tmp_path / "old.onnx")
    feed = {"x": np.array([-1.0, 2.0], np.float32)}
    found = judge(str(tmp_path / "old.onnx"), [feed], [{"y": np.array([0.0, 2.0], np.float32)}], valid=True)
    assert found["status"] == "invalid"
    assert found["error"] == 0.0
    assert Row(status="invalid", error=0.0).runs_right
    assert not Row(status="invalid").runs_right


def test_a_crash_and_a_hang_are_rows(relu: Path, tmp_path: Path) -> None:
    fails = script(tmp_path / "fails", "echo 'no such pass' >&2; exit 3")
    hangs = script(tmp_path / "hangs", "exec sleep 30")
    assert peers.drive(fails, "onnxslim", relu, tmp_path / "out", 20) == {
        "status": "crash",
        "why": "exit 3: no such pass",
    }
    assert peers.drive(hangs, "onnxslim", relu, tmp_path / "out", 0.2)["status"] == "time limit"


def test_the_driver_times_graphopt(relu: Path, tmp_path: Path) -> None:
    found = peers.drive(sys.executable, "graphopt", relu, tmp_path / "out.onnx", 100)
    assert 1 <= len(found["calls"]) <= 5  # none is begun after two seconds
    assert [call["first"] for call in found["calls"]] == [1, 0, 0, 0, 0][: len(found["calls"])]
    assert all(call["wall"] > 0 for call in found["calls"])
    assert onnx.load(tmp_path / "out.onnx").graph.node[0].op_type == "Relu"


def test_what_takes_the_judge_down_is_broken_and_the_others_are_judged(
    relu: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "judge.py"
    fake.write_text(
        "import json, sys\n"
        "for name in json.load(open(sys.argv[1]))['candidates']:\n"
        "    if name == 'bad': sys.exit('down it goes')\n"
        "    print(json.dumps({'name': name, 'status': 'ok'}), flush=True)\n"
    )
    monkeypatch.setattr(peers, "JUDGE", [str(fake)])
    monkeypatch.setattr(peers.zoo, "fetch", lambda _: relu)
    monkeypatch.setattr(peers, "shapes_of", lambda _: {"x": (2,)})
    found = peers.judge_all("relu", tmp_path, ["first", "bad", "last"])
    assert found["first"] == found["last"] == {"status": "ok"}
    assert found["bad"]["status"] == "broken"
    assert "down it goes" in found["bad"]["why"]


def test_every_model_is_timed_in_every_sweep(relu: Path) -> None:
    found = ratios({"": relu, "a": relu, "b": relu}, {"x": np.ones(2, np.float32)}, 1, Plan(0.05, least=2, most=3))
    assert list(found) == ["a", "b"]
    assert found["a"].pairs == found["b"].pairs >= 4
    assert found["a"].rounds == found["b"].rounds >= 2
    assert found["a"].conditions["clock"] == "cpu"


def test_finished_models_come_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {"graphopt": row(nodes=3)}
    monkeypatch.setattr(peers, "run_model", lambda *_: rows)
    settings = peers.Settings("python")
    assert peers.finished("relu", settings, tmp_path) == rows
    monkeypatch.setattr(peers, "run_model", lambda *_: pytest.fail("made again"))
    assert peers.finished("relu", settings, tmp_path) == rows
    assert json.loads((tmp_path / "relu.json").read_text())["graphopt"]["nodes"] == 3


def row(*, nodes: int = 5, seconds: float = 0.1, ratio: float = 1.0, **others: Any) -> Row:
    calls = [{"wall": seconds, "cpu": seconds, "first": 1.0}]
    latency = {1: {"ratio": ratio, "interval": [ratio - 0.01, ratio + 0.01]}}
    return Row(**{"version": "1", "nodes": nodes, "error": 0.0, "calls": calls, "latency": latency, **others})


def section(text: str, title: str) -> list[list[str]]:
    """Return the cells of the table under a heading, without its head."""
    part = text.split(f"## {title}\n")[1].split("\n## ", maxsplit=1)[0]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in part.splitlines() if line[:2] == "| "][1:]


def test_the_page_marks_the_best_and_counts() -> None:
    results = {
        "m": {"graphopt": row(nodes=3, seconds=0.05, ratio=0.5), "onnxslim": row(nodes=4, ratio=1.05)},
        "n": {
            "graphopt": row(nodes=3, seconds=0.4),
            "onnxslim": row(nodes=2, status="wrong outputs", why="too much", latency={}, error=0.2),
        },
    }
    text = document(results, "here")
    assert section(text, "Nodes") == [["m", "**3**", "4"], ["n", "**3**", "2 (wrong outputs)"]]
    assert section(text, "Latency, 1 thread")[1] == ["n", "1.000 (0.990–1.010)", "–"]
    assert section(text, "Errors")[1] == ["n", "0.0e+00", "*wrong outputs* 2.0e-01"]
    assert "- n, onnxslim: wrong outputs: too much" in text
    assert section(text, "The optimizers' own time") == [
        ["m", "**50 (50; 50)**", "100 (100; 100)"],
        ["n", "400 (400; 400)", "100 (100; 100)"],
    ]
    ours, theirs = section(text, "In short")
    assert ours == ["graphopt", "2 of 2", "2", "0.707", "1 of 2", "0", "1.00 (1.00–1.00)"]
    assert theirs == ["onnxslim", "1 of 2", "0", "1.050", "0 of 1", "1", "0.71 (0.25–2.00)"]


def test_a_page_of_crashes_only_is_still_made() -> None:
    text = document({"m": {name: Row("crash", "exit 1") for name in ("graphopt", "onnxslim")}}, "here")
    assert section(text, "Nodes") == [["m", "–", "–"]]
    assert "- m, onnxslim: crash: exit 1" in text


def test_rows_come_back_from_json_as_they_were() -> None:
    one = row(ratio=0.7)
    assert Row.from_dict(json.loads(json.dumps(one.to_dict()))) == one
