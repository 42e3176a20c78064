"""Files of the command line: none overwrites another, and what cannot be written is found before the work."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from graphopt.external import check_writable

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
