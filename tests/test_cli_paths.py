"""The command line on files, plugins and near misses: nothing is overwritten, and what is not done is said."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import onnx
import onnx_graphsurgeon as gs
import pytest

from graphopt import Change, Context, Pass
from graphopt.errors import SpecError
from graphopt.external import check_writable
from graphopt.optimizer import default_pipeline, parse_pipeline
from graphopt.registry import register
from graphopt.report import NO_TIME, unmeasured_lines

Cli = Callable[..., Any]

MODEL = """
    <ir_version: 8, opset_import: ["": 17]>
    net (float[N, 4] x) => (float[N, 4] y) { one = Identity(x)  y = Relu(one) }
"""


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    onnx.save(onnx.parser.parse_model(MODEL), tmp_path / "net.onnx")
    return tmp_path / "net.onnx"


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(*_: Any, **__: Any) -> None:
        raise AssertionError("refused too late")

    monkeypatch.setattr("graphopt.optimizer.optimize", work)
    monkeypatch.setattr("graphopt.pipeline.Pipeline.run", work)


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("command", "options", "names"),
    [
        ("optimize", ["--write-decisions", "net.onnx"], "MODEL and --write-decisions"),
        ("optimize", ["--write-decisions", "./a/../net.onnx"], "MODEL and --write-decisions"),
        ("optimize", ["--write-decisions", "link"], "MODEL and --write-decisions"),
        ("optimize", ["--write-decisions", "hard"], "MODEL and --write-decisions"),
        ("optimize", ["-o", "new", "--write-decisions", "a/../new"], "--output and --write-decisions"),
        ("optimize", ["--decisions", "d", "--write-decisions", "d"], "--decisions and --write-decisions"),
        ("optimize", ["--decisions", "d", "-o", "d"], "--decisions and --output"),
        ("optimize", ["--data", "d", "-o", "d"], "--data and --output"),
        ("optimize", ["--data", "d.py:feeds", "-o", "d.py"], "--data and --output"),
        ("run", ["-p", "d.toml", "-o", "d.toml"], "--pipeline and --output"),
        ("run", ["-p", "eliminate-dead", "--data", "d", "-o", "d"], "--data and --output"),
    ],
)
def test_no_file_overwrites_another(cli: Cli, model: Path, command: str, options: list[str], names: str) -> None:
    before = model.read_bytes()
    Path("a").mkdir()
    Path("link").symlink_to("net.onnx")
    os.link("net.onnx", "hard")
    ran = cli(command, "net.onnx", *options, "--json")
    assert ran.code == 2
    error = ran.json["error"]
    assert error["what"] == f"{names} are the same file"
    assert error["at"]
    assert error["hint"]
    assert model.read_bytes() == before


def test_the_result_may_replace_the_model_and_the_decisions_are_named(cli: Cli, model: Path) -> None:
    ran = cli("optimize", model, "-o", model, "--write-decisions", "d.json", "--no-measure")
    assert ran.code == 0
    assert ran.out.splitlines()[-2:] == [f"wrote {model}", "wrote d.json"]
    assert sorted(path.name for path in model.parent.iterdir()) == ["d.json", "net.onnx"]
    assert cli("optimize", model, "--write-decisions", "d.json", "--no-measure").out.splitlines()[-2:] == [
        "no model written: give -o OUT", "wrote d.json",
    ]  # fmt: skip


@pytest.mark.usefixtures("no_work")
@pytest.mark.skipif(sys.platform != "linux", reason="/proc takes no files, not even root's")
@pytest.mark.parametrize("option", ["-o", "--write-decisions"])
def test_unwritable_folders_are_found_before_the_work(cli: Cli, model: Path, option: str) -> None:
    Path("link").symlink_to("/proc/new.onnx")
    for target in ("/proc/new.onnx", "link"):
        ran = cli("optimize", model, option, target, "--json")
        assert ran.code == 2
        assert ran.json["error"]["what"].startswith("cannot write the file")
        assert ran.json["error"]["hint"] == "check the folder and its permissions"


def test_trying_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("as it was")
    for name in ("old", "new"):
        check_writable(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert (tmp_path / "old").read_text() == "as it was"


PLUGIN = '''
from dataclasses import dataclass
from typing import ClassVar

import graphopt


@graphopt.register
@dataclass(frozen=True)
class {title}(graphopt.Pass):
    """Does nothing."""

    name: ClassVar[str] = "cli-{name}"

    def run(self, graph, ctx):
        return iter(())
'''


def test_a_plugin_that_no_pipeline_names_is_told_of(cli: Cli, model: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.py").write_text(PLUGIN.format(title=name.title(), name=name))
    plugins = ["--plugin", "one.py", "--plugin", "two.py"]
    start = ["optimize", model, "--no-measure", "--plugin", "one.py"]
    said = "! pass 'cli-one' is loaded, but the pipeline does not name it: -p \"default, cli-one\""
    assert said in cli(*start).out.splitlines()
    assert cli(*start, "--json").json["unnamed_passes"] == ["cli-one"]
    assert cli(*start, "-p", "default, cli-one", "--json").json["unnamed_passes"] == []
    both = cli(*start, "--plugin", "two.py").out
    assert "! passes 'cli-one', 'cli-two' are loaded" in both
    assert 'does not name them: -p "default, cli-one, cli-two"' in both
    ran = cli("run", model, "-p", "repeat(cli-two, fold-if)", *plugins)
    assert '-p "repeat(cli-two, fold-if), cli-one"' in ran.out
    assert cli("optimize", model, "--no-measure", "--json").json["unnamed_passes"] == []


@pytest.mark.parametrize("command", ["optimize", "run"])
def test_default_stands_for_the_default_pipeline(cli: Cli, model: Path, command: str) -> None:
    words = ["--no-measure"] if command == "optimize" else []
    ran = cli(command, model, "-p", "fold-if, default, eliminate-dead", *words, "--json")
    assert ran.json["pipeline"] == f"fold-if, {default_pipeline()}, eliminate-dead"


@pytest.mark.parametrize("text", ["repeat(default)", "default{opset=3}"])
def test_default_stands_alone(text: str) -> None:
    with pytest.raises(SpecError, match="'default' stands for steps of the default pipeline") as caught:
        parse_pipeline(text)
    assert caught.value.at == text
    assert caught.value.hint


@register
@dataclass(frozen=True)
class Misses(Pass):
    """Never fires (test pass)."""

    name: ClassVar[str] = "cli-misses"
    count: int = 1

    def run(self, graph: gs.Graph, ctx: Context) -> Iterator[Change]:
        for number in range(self.count):
            yield Change(f"node{number}", "rewrite", "it is [bold] today")


@register
@dataclass(frozen=True)
class Rename(Pass):
    """Renames the graph, as if that were a family of rewrites (test pass)."""

    name: ClassVar[str] = "cli-rename"
    optional: ClassVar[bool] = True

    def run(self, graph: gs.Graph, ctx: Context) -> Iterator[Change]:
        if graph.name != "other":
            yield Change("graph", "rename", apply=lambda: setattr(graph, "name", "other"))


@pytest.mark.parametrize(("count", "more"), [(1, None), (6, "1 near miss more"), (7, "2 near misses more")])
def test_run_tells_why_nothing_changed(cli: Cli, model: Path, count: int, more: str | None) -> None:
    lines = cli("run", model, "-p", f"cli-misses{{count={count}}}, fold-if").out.splitlines()
    assert any(line.startswith("cli-misses") and line.endswith(f"{count} blocked") for line in lines)
    assert "1 other pass found nothing to change" in lines
    said = [line for line in lines if line.startswith("near miss at ")]
    assert said == [f"near miss at node{number}: it is [bold] today" for number in range(min(count, 5))]
    assert [line for line in lines if line.startswith("and ")] == (
        [f"and {more}, with reasons in --json"] if more else []
    )


def test_long_pipelines_count_their_near_misses(cli: Cli, model: Path) -> None:
    out = cli("optimize", model, "--no-measure", "-p", "default, cli-misses{count=3}").out
    assert "near misses: 3, with reasons in `graphopt explain MODEL` or --json\n" in out
    assert "near miss at" not in out
    assert "near miss" not in cli("optimize", model, "--no-measure").out


def test_families_without_time_are_counted() -> None:
    families = [{"reason": reason} for reason in (NO_TIME, "faster with it", NO_TIME)]
    assert unmeasured_lines(families) == ["2 families not measured: --budget SECONDS gives more time"]
    assert unmeasured_lines(families[:1]) == ["1 family not measured: --budget SECONDS gives more time"]
    assert unmeasured_lines(families[1:2]) == []


def test_a_budget_of_nothing_is_told_of(cli: Cli, model: Path) -> None:
    ran = cli("optimize", model, "--budget", "0", "--threads", "1", "-p", "cli-rename")
    assert ran.code == 0
    assert "1 family not measured: --budget SECONDS gives more time" in ran.out.splitlines()


def test_several_shapes_are_said_as_one_set_of_feeds(cli: Cli, model: Path) -> None:
    ran = cli("optimize", model, "--no-measure", "--shape", "x=1,4", "--shape", "x=8,4", "--json")
    assert ran.json["samples"] == "4 random feeds (seed 0; x 1x4, then x 8x4)"


def test_shapes_of_no_input_name_their_option(cli: Cli, model: Path) -> None:
    ran = cli("optimize", model, "--no-measure", "--shape", "z=1,4", "--json")
    assert ran.code == 2
    assert (ran.json["error"]["at"], ran.json["error"]["hint"]) == ("--shape", "its inputs: x")


def test_explaining_what_can_be_cut_takes_no_word_on_how(cli: Cli, model: Path) -> None:
    assert cli("prune", model, "--explain", "--json").json["decision"] == "explained"
    for words in (["--ratio", "0.3"], ["--criterion", "l1"], ["-o", "out.onnx"], ["--no-measure"]):
        ran = cli("prune", model, "--explain", *words)
        assert ran.code == 2
        assert words[0].removeprefix("--no") in ran.err.replace("--output", "-o").replace("--measure", "-measure")
