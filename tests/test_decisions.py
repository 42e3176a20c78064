"""Decisions: what a file holds, that it gives the same model again, and that it is refused where it does not fit."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import onnx
import onnx_graphsurgeon as gs
import pytest

import graphopt
from graphopt import Change, Context, Pass, Pipeline
from graphopt.decisions import Selection, read_decisions, save_decisions
from graphopt.errors import SpecError
from graphopt.models import zoo
from graphopt.ratio import Ratio
from graphopt.registry import register

Cli = Callable[..., Any]

MODEL = """
    <ir_version: 8, opset_import: ["": 17]>
    net (float[N, 4] x) => (float[N, 4] y)
    <float[4, 4] w = {1,2,3,4, 5,6,7,8, 9,10,11,12, 13,14,15,16}, float[4] s = {1, 2, 3, 4}>
    {
        one = Identity(x)
        product = Gemm(one, w)
        y = BatchNormalization(product, s, s, s, s)
    }
"""


@register
@dataclass(frozen=True)
class Rename(Pass):
    """Renames the graph, as if that were a family of rewrites (test pass)."""

    name: ClassVar[str] = "decisions-rename"
    optional: ClassVar[bool] = True

    def run(self, graph: gs.Graph, ctx: Context) -> Iterator[Change]:
        if graph.name != "other":
            yield Change("graph", "rename", apply=lambda: setattr(graph, "name", "other"))


def net() -> onnx.ModelProto:
    model = onnx.parser.parse_model(MODEL)
    onnx.checker.check_model(model, full_check=True)
    return model


def always(value: float) -> Callable[..., Ratio]:
    """Return a clock that always finds the same ratio."""

    def clock(*_: Any, **options: Any) -> Ratio:
        conditions = {"threads": options["threads"], "provider": "cpu", "clock": "wall"}
        return Ratio(value, value * 0.99, value * 1.01, options["confidence"], 12, 6, conditions)

    return clock


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Make every measurement give this ratio."""
    monkeypatch.setattr("graphopt.judge.runs_as", lambda *_, **__: None)
    return lambda value: monkeypatch.setattr("graphopt.judge.quick_ratio", always(value))


def no_clock(*_: Any, **__: Any) -> Ratio:
    raise AssertionError("a replay must not measure")


@pytest.mark.parametrize(("ratio", "decision"), [(0.5, "optimized"), (1.5, "input kept")])
def test_a_replay_gives_the_same_file(
    timed: Callable[[float], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ratio: float, decision: str
) -> None:
    timed(ratio)
    first = graphopt.optimize(net(), threads=1)
    assert first.report.decision == decision
    first.save(tmp_path / "first.onnx")
    save_decisions(tmp_path / "d.json", first.report.decisions or {})
    monkeypatch.setattr("graphopt.judge.quick_ratio", no_clock)
    again = graphopt.optimize(net(), decisions=tmp_path / "d.json")
    again.save(tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "first.onnx").read_bytes()
    assert again.report.decision == decision
    assert again.report.timing is None
    assert again.report.decisions == first.report.decisions
    assert graphopt.optimize(net(), decisions=read_decisions(tmp_path / "d.json")).proto == again.proto


def test_decisions_say_all_that_the_result_depends_on(timed: Callable[[float], None]) -> None:
    timed(0.5)
    report = graphopt.optimize(net(), threads=[2, 1], contrib=True, seed=7).report
    found = report.decisions
    assert found is not None
    assert found["graphopt"] == graphopt.__version__
    assert (found["threads"], found["contrib"], found["seed"], found["provider"]) == (2, True, 7, "cpu")
    assert found["pipeline"].startswith("upgrade-opset{to=17}, repeat(canonicalize")
    assert json.loads(json.dumps(report.to_dict()))["decisions"] == found


def test_unmeasured_runs_have_decisions_too(tmp_path: Path) -> None:
    first = graphopt.optimize(net(), measure=False)
    save_decisions(tmp_path / "d.json", first.report.decisions or {})
    assert graphopt.optimize(net(), decisions=tmp_path / "d.json").proto == first.proto


def test_other_weights_are_welcome_other_graphs_are_not(tmp_path: Path) -> None:
    save_decisions(tmp_path / "d.json", graphopt.optimize(net(), measure=False).report.decisions or {})
    retrained = onnx.parser.parse_model(MODEL.replace("{1,2,3,4, 5", "{9,9,9,9, 5"))
    assert len(graphopt.optimize(retrained, decisions=tmp_path / "d.json").proto.graph.node) < len(net().graph.node)
    other = onnx.parser.parse_model(MODEL.replace("Identity(x)", "Relu(x)"))
    with pytest.raises(SpecError, match="another structure") as caught:
        graphopt.optimize(other, decisions=tmp_path / "d.json")
    assert caught.value.at == str(tmp_path / "d.json")
    assert caught.value.hint


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"graphopt": "9.9"}, "of graphopt 9.9"),
        ({"pipeline": "fold-constantz"}, "no pass 'fold-constantz'"),
        ({"pipeline": "fold-constants{growth=1}"}, "no option 'growth'"),
        ({"skip": [["no-such-pass", "a", "b"]]}, "no pass 'no-such-pass'"),
        ({"skip": [["fold-constants", "a"]]}, "'skip' holds"),
        ({"skip": "fold-constants"}, "'skip' holds"),
        ({"result": "perhaps"}, "'result' is one of"),
        ({"extra": 1}, "unknown entry 'extra'"),
        ({"threads": "1"}, "'threads' in the decisions is not of type int"),
        ({"contrib": 1}, "'contrib' in the decisions is not of type bool"),
        ({"pipeline": None}, "'pipeline' in the decisions is not of type str"),
    ],
)
def test_a_file_that_does_not_fit_is_one_clear_error(tmp_path: Path, change: dict[str, Any], what: str) -> None:
    document = graphopt.optimize(net(), measure=False).report.decisions or {}
    path = tmp_path / "d.json"
    path.write_text(json.dumps({**document, **change}))
    with pytest.raises(SpecError) as caught:
        graphopt.optimize(net(), decisions=path)
    assert what in caught.value.what
    assert caught.value.at is not None
    assert caught.value.at.startswith(str(path))
    assert caught.value.hint


@pytest.mark.parametrize(
    ("content", "what"),
    [("{", "not JSON"), ("[]", "not a decisions file"), ("{}", "lack 'graphopt'"), (None, "cannot read")],
)
def test_what_is_no_decisions_file_is_refused(tmp_path: Path, content: str | None, what: str) -> None:
    path = tmp_path / "d.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SpecError, match=what) as caught:
        graphopt.optimize(net(), decisions=path)
    assert caught.value.at == str(path)


def test_selections_rewrite_a_pipeline() -> None:
    pipeline = Pipeline("upgrade-opset{to=17}, repeat(fold-constants, repeat{times=2}(eliminate-dead)), fold-if")
    chosen = Selection().without("eliminate-dead").with_("fold-constants", {"max_growth": 0.5})
    assert str(chosen.applied(pipeline)) == "upgrade-opset{to=17}, repeat(fold-constants{max_growth=0.5}), fold-if"
    assert str(chosen.with_("eliminate-dead").with_("fold-constants").applied(pipeline)) == str(pipeline)
    everything = Selection().without("upgrade-opset", "fold-constants", "eliminate-dead", "fold-if")
    assert everything.applied(pipeline) is None
    skipping = Selection().skipping([("a", "x", "y"), ("b", "x", "y")])
    assert skipping.without("a").skip == {("b", "x", "y")}
    assert skipping.with_("b").skip == {("a", "x", "y")}


def test_the_command_line_writes_and_replays(cli: Cli, tmp_path: Path, timed: Callable[[float], None]) -> None:
    timed(0.5)
    onnx.save(net(), tmp_path / "net.onnx")
    written, replayed = tmp_path / "a.onnx", tmp_path / "b.onnx"
    decisions = tmp_path / "d.json"
    ran = cli("optimize", tmp_path / "net.onnx", "-o", written, "--write-decisions", decisions, "--json")
    assert ran.code == 0
    assert ran.json["decisions"] == json.loads(decisions.read_text())
    (tmp_path / "report.json").write_text(ran.out)
    for source in (decisions, tmp_path / "report.json"):
        assert cli("optimize", tmp_path / "net.onnx", "-o", replayed, "--decisions", source).code == 0
        assert replayed.read_bytes() == written.read_bytes()
        replayed.unlink()


@pytest.mark.parametrize(
    ("option", "what"),
    [
        (["--opset", "18"], "decisions have their own opset"),
        (["--opset", "0"], "decisions have their own opset"),
        (["--stage", "canonical"], "decisions have their own stage"),
        (["--threads", "2"], "decisions have their own threads"),
        (["--contrib"], "decisions have their own contrib"),
        (["--budget", "5"], "decisions are replayed without measuring"),
    ],
)
def test_what_decisions_settle_is_not_asked_for(cli: Cli, tmp_path: Path, option: list[str], what: str) -> None:
    onnx.save(net(), tmp_path / "net.onnx")
    save_decisions(tmp_path / "d.json", graphopt.optimize(net(), measure=False).report.decisions or {})
    ran = cli("optimize", tmp_path / "net.onnx", "--decisions", tmp_path / "d.json", *option, "--json")
    assert ran.code == 2
    assert ran.json["error"]["what"] == what
    assert ran.json["error"]["at"] == option[0]
    assert ran.json["error"]["hint"] == f"leave out {option[0]} or --decisions"


def test_threads_and_shapes_of_the_command_line(cli: Cli, tmp_path: Path, timed: Callable[[float], None]) -> None:
    timed(0.5)
    path = tmp_path / "net.onnx"
    onnx.save(net(), path)
    words = ["--threads", "1,2", "--threads", "3", "--shape", "x=1,4", "--shape", "x=8,4"]
    ran = cli("optimize", path, *words, "--json")
    assert ran.json["measured"]["threads"] == [1, 2, 3]
    assert ran.json["measured"]["shapes"] == ["x[1,4]", "x[8,4]"]
    assert len(ran.json["timing"]["conditions"]) == 6
    shown = cli("optimize", path, *words, "-p", "decisions-rename").out
    assert "latency ratio 0.500 (95 % interval 0.495–0.505) of the input in ONNX Runtime, 3 threads" in shown
    assert shown.count("x[8,4]") == 3
    rows = [" ".join(line.split()) for line in shown.splitlines()]
    assert "decisions-rename 1 0.500 0.498–0.502 kept faster with it" in rows  # the mean of six conditions
    assert cli("optimize", path, "--threads", "two").code == 2
    assert cli("optimize", path, "--threads", "0").code == 2
    assert cli("optimize", path, "--elsewhere", "--measure").code == 2
    assert cli("optimize", path, "--elsewhere", "--json").json["timing"] is None
    assert cli("optimize", path, "--stage", "canonical", "--json").json["timing"] is None


def test_sets_of_shapes_begin_where_a_name_comes_again() -> None:
    from graphopt.cli import _settings

    assert _settings(None) is None
    assert _settings(["a=1", "b=2"]) == [{"a": (1,), "b": (2,)}]
    assert _settings(["a=1", "b=2", "a=3", "b=4", "a=5"]) == [
        {"a": (1,), "b": (2,)}, {"a": (3,), "b": (4,)}, {"a": (5,), "b": (4,)},
    ]  # fmt: skip


@pytest.mark.zoo
@pytest.mark.slow
def test_a_real_model_measured_then_replayed(tmp_path: Path) -> None:
    path = zoo.fetch("ppocr-cls")
    first = graphopt.optimize(path, budget=15)
    first.save(tmp_path / "first.onnx")
    report = first.report
    assert report.measured is not None
    assert report.measured["seconds"] < 90
    assert report.decisions is not None
    save_decisions(tmp_path / "d.json", report.decisions)
    again = graphopt.optimize(path, decisions=tmp_path / "d.json")
    again.save(tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "first.onnx").read_bytes()
    assert again.report.decision == report.decision
