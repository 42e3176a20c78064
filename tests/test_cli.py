"""The command line as users meet it: documents, exit codes, errors, files that are never half written."""

from __future__ import annotations

import os
import shlex
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

Cli = Callable[..., Any]

MODEL = """
    <ir_version: 8, opset_import: ["": 17]>
    net (float[N, 4] x) => (float[N, 4] y)
    <float[4, 4] w = {1,2,3,4, 5,6,7,8, 9,10,11,12, 13,14,15,16}, float[4] b = {1, 2, 3, 4}>
    {
        one = Identity(x)
        product = MatMul(one, w)
        sum = Add(product, b)
        y = Relu(sum)
    }
"""

PLUGIN = '''
from dataclasses import dataclass
from typing import ClassVar

import graphopt


@graphopt.register
@dataclass(frozen=True)
class Shift(graphopt.Pass):
    """Adds `by` to every bias: a wrong pass of the user's own."""

    name: ClassVar[str] = "mine-shift"
    by: float = 0.5

    def run(self, graph, ctx):
        for constant in ctx.model.constants():
            if constant.name == "b":
                yield graphopt.Change("b", "shift", apply=lambda c=constant: setattr(c, "values", c.values + self.by))
'''


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "net.onnx"
    onnx.save(onnx.parser.parse_model(MODEL), path)
    return path


def error_lines(ran: Any, code: int = 2) -> list[str]:
    """The lines of the one error that a call must end with."""
    assert ran.code == code
    assert ran.err.startswith("error: ")
    assert "Traceback" not in ran.err
    lines: list[str] = ran.err.splitlines()
    return lines


def test_optimize_writes_the_result_and_reports(cli: Cli, model: Path, tmp_path: Path) -> None:
    ran = cli("optimize", model, "-o", tmp_path / "out.onnx", "--no-measure")
    assert ran.code == 0
    assert "verified on 2 random feeds (seed 0;" in ran.out
    assert "Identity" not in [n.op_type for n in onnx.load(tmp_path / "out.onnx").graph.node]


def test_json_is_one_document(cli: Cli, model: Path, tmp_path: Path) -> None:
    ran = cli("optimize", model, "-o", tmp_path / "out.onnx", "--no-measure", "--json", "--seed", "3")
    assert ran.json["seed"] == 3
    assert ran.json["output"] == str(tmp_path / "out.onnx")
    assert ran.json["verification"]["ok"] is True
    assert ran.json["before"]["nodes"] == 4
    assert ran.json["after"]["nodes"] < 4


def test_output_may_be_the_input(cli: Cli, model: Path) -> None:
    assert cli("optimize", model, "-o", model, "--no-measure").code == 0
    assert len(onnx.load(model).graph.node) < 4
    assert [p.name for p in model.parent.iterdir()] == ["net.onnx"]


def test_without_output_nothing_is_written(cli: Cli, model: Path) -> None:
    ran = cli("optimize", model, "--no-measure")
    assert "nothing written" in ran.out
    assert [p.name for p in model.parent.iterdir()] == ["net.onnx"]


def test_measured_run_reports_the_ratio(cli: Cli, model: Path) -> None:
    ran = cli("optimize", model, "--json")
    assert ran.json["timing"]["interval"][0] <= ran.json["timing"]["ratio"] <= ran.json["timing"]["interval"][1]


def test_validate_agrees_and_disagrees(cli: Cli, model: Path, tmp_path: Path) -> None:
    other = onnx.load(model)
    weights = onnx.numpy_helper.to_array(other.graph.initializer[0]).copy()
    weights[2, 1] += 0.01
    other.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(weights, "w"))
    onnx.save(other, tmp_path / "other.onnx")
    assert cli("validate", model, model).code == 0
    ran = cli("validate", model, tmp_path / "other.onnx", "--locate")
    assert ran.code == 1
    assert "do NOT agree" in ran.out
    assert "MatMul" in ran.out
    assert cli("validate", model, tmp_path / "other.onnx", "--tolerance", "0.5").code == 0


def test_bench_gives_ratio_and_interval(cli: Cli, model: Path) -> None:
    document = cli("bench", model, model, "--rounds", "3", "--json").json
    low, high = document["interval"]
    assert low <= document["ratio"] <= high
    assert document["environment"]["threads"] == 1


def test_bench_per_node(cli: Cli, model: Path) -> None:
    ran = cli("bench", model, "--per-node")
    assert ran.code == 0
    assert "MatMul" in ran.out or "Gemm" in ran.out


def test_inspect(cli: Cli, model: Path) -> None:
    document = cli("inspect", model, "--shape", "x=8,4", "--json").json
    assert document["macs"] == 8 * 4 * 4
    assert "MatMul" in cli("inspect", model).out


def test_passes_lists_options(cli: Cli) -> None:
    listed = {row["name"]: row for row in cli("passes", "--json").json["passes"]}
    assert listed["fold-constants"]["options"]["max_growth"] == 0.1
    assert all(row["summary"].endswith(".") for row in listed.values())


def test_run_takes_text_and_toml(cli: Cli, model: Path, tmp_path: Path) -> None:
    (tmp_path / "steps.toml").write_text('[[step]]\npass = "eliminate-identity"\n')
    for given in ("eliminate-identity", tmp_path / "steps.toml"):
        ran = cli("run", model, "-p", given, "-o", tmp_path / "out.onnx", "--json")
        assert ran.json["passes"][0]["changes"] == 1
        assert len(onnx.load(tmp_path / "out.onnx").graph.node) == 3


def test_print_after_goes_to_stderr(cli: Cli, model: Path) -> None:
    ran = cli("run", model, "-p", "eliminate-identity", "--print-after", "all", "--json")
    assert "Identity" in ran.err
    assert ran.json["passes"]


def test_plugin_beside_a_folder_called_passes(model: Path, tmp_path: Path) -> None:
    (tmp_path / "passes").mkdir()
    (tmp_path / "passes" / "__init__.py").write_text("raise RuntimeError('the wrong passes')\n")
    (tmp_path / "passes" / "mine.py").write_text(PLUGIN)
    command = [sys.executable, "-c", "from graphopt.cli import main; main()", "run", "net.onnx", "-o", "out.onnx"]
    spec = ["--plugin", "./passes/mine.py", "-p", "mine-shift{by=0.25},eliminate-identity", "--verify", "off"]
    ran = subprocess.run([*command, *spec], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    written = onnx.load(tmp_path / "out.onnx")
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(written.graph.initializer[1]), [1.25, 2.25, 3.25, 4.25])
    assert len(written.graph.node) == 3


def test_bisect_and_stop_on_failure(cli: Cli, model: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(PLUGIN.replace("mine-shift", "mine-shift-two"))
    common = ("run", model, "--plugin", tmp_path / "mine.py", "-p", "eliminate-identity,mine-shift-two")
    assert "change 2 of 2: mine-shift-two: b" in cli(*common, "--bisect").out
    ran = cli(*common, "-o", tmp_path / "out.onnx")
    assert "mine-shift-two" in error_lines(ran, code=1)[0]
    assert not (tmp_path / "out.onnx").exists()
    kept = cli(*common, "-o", tmp_path / "out.onnx", "--on-failure", "continue")
    assert kept.code == 0
    assert "mine-shift-two was rolled back" in kept.out
    reproducers = list((tmp_path / "out.onnx.reproducers").glob("*/README.txt"))
    assert len(reproducers) == 2  # one of each run above


@pytest.mark.parametrize(
    ("arguments", "what", "hint"),
    [
        (["optimize", "nowhere.onnx"], "no such model file", "check the path"),
        (["optimize", "."], "a folder", "name the .onnx file"),
        (["validate", "text.onnx", "text.onnx"], "not an ONNX model", "export"),
        (["inspect", "empty.onnx"], "empty", "again"),
        (["run", "net.onnx", "-p", "fold-constant"], "no pass 'fold-constant'", "did you mean 'fold-constants'?"),
        (["run", "net.onnx", "-p", "fold-constants{x=1}"], "no option 'x'", "max_growth"),
        (["run", "net.onnx", "-p", "steps.toml"], "cannot read the pipeline file", ""),
        (["optimize", "net.onnx", "--data", "nothing.npz"], "do not exist", ""),
        (["optimize", "net.onnx", "--data", "wrong.npz"], "", ""),
        (["optimize", "net.onnx", "--shape", "x"], "not understood", "--shape NAME="),
        (["optimize", "net.onnx", "--shape", "z=1,4"], "z", ""),
        (["optimize", "net.onnx", "--provider", "cuda"], "provider 'cuda' is not in", "pip install onnxruntime-gpu"),
        (["optimize", "net.onnx", "--provider", "cude"], "unknown provider", "cuda"),
        (["optimize", "net.onnx", "--plugin", "none.py"], "", ""),
        (["optimize", "net.onnx", "--print-after", "nothing"], "no pass 'nothing'", ""),
        (["optimize", "net.onnx", "-o", "missing/out.onnx", "--no-measure"], "folder does not exist", "create"),
        (["validate", "net.onnx", "net.onnx", "--eval", "f.py"], "", ""),
        (["bench", "net.onnx"], "two models", "--per-node"),
        (["optimize", "net.onnx", "-o", "/dev/null"], "not an ordinary file", "name a file"),
        (["validate", "net.onnx", "net.onnx", "--max-drop", "1"], "needs a metric", "--eval"),
        (["validate", "net.onnx", "net.onnx", "--tolerance", "-1"], "negative", ""),
        (["run", "net.onnx", "-p", ""], "no steps", ""),
        (["optimize", "net.onnx", "--opset", "99", "--no-measure"], "stays at opset 17", ""),
        (["run", "net.onnx", "-p", "bad.toml"], "must have one of", "bad.toml"),
    ],
)
def test_bad_input_is_one_clear_error(
    cli: Cli, model: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], what: str, hint: str
) -> None:
    monkeypatch.chdir(model.parent)
    Path("text.onnx").write_text("hello")
    Path("empty.onnx").touch()
    Path("bad.toml").write_text("[[step]]\nfoo = 1\n")
    np.savez("wrong.npz", y=np.zeros((2, 4), np.float32))
    before = model.read_bytes()
    lines = error_lines(cli(*arguments))
    assert what in lines[0]
    assert hint in "".join(lines)
    assert model.read_bytes() == before


def test_errors_are_documents_too(cli: Cli) -> None:
    ran = cli("optimize", "nowhere.onnx", "--json")
    assert ran.json["error"] == {
        "what": "no such model file", "at": "nowhere.onnx", "hint": "check the path", "exit_code": 2
    }  # fmt: skip


def test_output_through_a_link_keeps_the_link(cli: Cli, model: Path, tmp_path: Path) -> None:
    (tmp_path / "link.onnx").symlink_to("real.onnx")
    assert cli("optimize", model, "-o", tmp_path / "link.onnx", "--no-measure").code == 0
    assert (tmp_path / "link.onnx").is_symlink()
    assert len(onnx.load(tmp_path / "real.onnx").graph.node) < 4


def test_a_plugin_that_raises_is_located_and_its_reproducer_runs(cli: Cli, model: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        PLUGIN.replace("mine-shift", "mine-raises").replace("for constant", "1 / 0\n        for constant")
    )
    ran = cli("run", model, "--plugin", tmp_path / "mine.py", "-p", "mine-raises", "-o", tmp_path / "out.onnx")
    assert "ZeroDivisionError" in error_lines(ran, code=1)[0]
    assert "mine.py, line 17, in run" in ran.err
    readme = next((tmp_path / "out.onnx.reproducers").glob("*/README.txt"))
    command = next(line for line in readme.read_text().splitlines() if line.startswith("  graphopt "))
    words = shlex.split(command)[1:]
    again = subprocess.run(
        [sys.executable, "-m", "graphopt", *words], cwd=readme.parent, capture_output=True, text=True, check=False
    )
    assert again.returncode == 1
    assert "mine-raises" in again.stderr


def test_version(cli: Cli) -> None:
    assert "ONNX Runtime" in cli("--version").out


def test_usage_errors_exit_2(cli: Cli) -> None:
    for arguments in (
        ["optimize"],
        ["optimise"],
        ["bench", "a", "b", "--rounds", "x"],
        ["optimize", "m", "--verify", "x"],
    ):
        ran = cli(*arguments)
        assert ran.code == 2
        assert "Traceback" not in ran.err + ran.out


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root writes everywhere")
def test_unwritable_output(cli: Cli, model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "locked"
    folder.mkdir()
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    assert "cannot write" in error_lines(cli("optimize", model, "-o", folder / "out.onnx", "--no-measure"))[0]


def test_a_bug_exits_3_and_leaves_the_details(cli: Cli, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr("graphopt.optimizer.optimize", broken)
    ran = cli("optimize", model)
    assert ran.code == 3
    details = Path(ran.err.split("details: ")[1].splitlines()[0])
    assert "ZeroDivisionError: ours" in details.read_text()
    details.unlink()


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_interrupt_writes_nothing(model: Path, tmp_path: Path) -> None:
    slow = tmp_path / "slow.py"
    slow.write_text(
        PLUGIN.replace("for constant", "import time; print('now', flush=True); time.sleep(60)\n        for constant")
    )
    # a shell's background jobs, CI's among them, start with SIGINT ignored
    start = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from graphopt.cli import main; main()"
    )
    words = ["run", "net.onnx", "-o", "out.onnx", "--plugin", "slow.py", "-p", "mine-shift"]
    command = [sys.executable, "-c", start, *words]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "now\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted; nothing was written" in err
    assert "Traceback" not in err
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix == ".onnx" or p.name.startswith(".")) == ["net.onnx"]


def test_every_command_has_help(cli: Cli) -> None:
    for command in ("optimize", "run", "validate", "bench", "inspect", "explain", "passes", "demo", "zoo"):
        ran = cli(command, "--help")
        assert ran.code == 0
        assert "Usage" in ran.out
