"""Registry: what may be registered, and plugins from files and folders."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import onnx
import onnx.parser
import pytest

from graphopt import registry
from graphopt.base import Pass
from graphopt.errors import SpecError

TINY = onnx.parser.parse_model(
    '<ir_version: 8, opset_import: ["": 17]> g (float[2] x) => (float[2] y) { i = Identity(x) y = Neg(i) }'
)

PLUGIN = """
from __future__ import annotations
from dataclasses import dataclass
from typing import ClassVar
from graphopt.base import Pass
from graphopt.registry import register
{extra}

@register
@dataclass(frozen=True)
class Mine(Pass):
    \"\"\"Does nothing.\"\"\"
    name: ClassVar[str] = "{name}"
    depth: int = 2
    def run(self, graph, ctx):
        yield from ()
"""


@pytest.fixture(autouse=True)
def _registry_restored() -> Iterator[None]:
    registry.all_passes()  # built-ins register when they are first imported, once in a process
    passes, plugins = dict(registry._passes), dict(registry._plugins)
    yield
    registry._passes.clear()
    registry._passes.update(passes)
    registry._plugins.clear()
    registry._plugins.update(plugins)


def write(path: Path, name: str, extra: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(PLUGIN.format(name=name, extra=extra))
    return path


def test_plugin_file_is_found_and_can_be_loaded_again(tmp_path: Path) -> None:
    file = write(tmp_path / "mine.py", "my-pass")
    assert registry.load_plugin(file) == ["my-pass"]
    first = registry.get("my-pass")
    assert registry.load_plugin(file) == ["my-pass"]
    assert registry.get("my-pass") is first
    file.write_text(file.read_text().replace("depth: int = 2", "depth: int = 3"))
    assert registry.load_plugin(file) == ["my-pass"]
    assert registry.get("my-pass").option_defaults() == {"depth": 3}


def test_plugin_folder_called_passes_with_relative_imports(tmp_path: Path) -> None:
    folder = tmp_path / "passes"
    write(folder / "a.py", "first-of-mine", "from ._shared import NUMBER\nfrom . import b")
    write(folder / "b.py", "second-of-mine")
    (folder / "_shared.py").write_text("NUMBER = 1\n")
    assert registry.load_plugin(folder) == ["first-of-mine", "second-of-mine"]
    assert registry.load_plugin(folder) == ["first-of-mine", "second-of-mine"]


def test_plugin_folder_with_init(tmp_path: Path) -> None:
    folder = tmp_path / "passes"
    write(folder / "one.py", "first-of-mine")
    (folder / "__init__.py").write_text("from . import one\n")
    assert registry.load_plugin(folder) == ["first-of-mine"]
    (folder / "one.py").write_text((folder / "one.py").read_text() + "\nNUMBER = 2\n")
    assert registry.load_plugin(folder) == ["first-of-mine"]


def test_two_files_of_one_name_in_different_folders(tmp_path: Path) -> None:
    registry.load_plugin(write(tmp_path / "a" / "mine.py", "from-a"))
    registry.load_plugin(write(tmp_path / "b" / "mine.py", "from-b"))
    assert {"from-a", "from-b"} <= set(registry.all_passes())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def broken(:\n", "SyntaxError"),
        ("\nraise ValueError('no')\n", "ValueError: no"),
        ("x = 1\n", "registers no pass"),
        ("from .other import y\n", "relative import"),
    ],
)
def test_bad_plugins(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "bad.py"
    file.write_text(text)
    with pytest.raises(SpecError, match=message) as caught:
        registry.load_plugin(file)
    assert "bad.py" in str(caught.value)


def test_error_names_the_line(tmp_path: Path) -> None:
    file = tmp_path / "bad.py"
    file.write_text("x = 1\ny = 1 / 0\n")
    with pytest.raises(SpecError, match="ZeroDivisionError") as caught:
        registry.load_plugin(file)
    assert caught.value.at == f"{file}, line 2"


def test_failed_plugin_leaves_nothing_registered(tmp_path: Path) -> None:
    file = write(tmp_path / "bad.py", "half-loaded")
    file.write_text(file.read_text() + "\nraise RuntimeError\n")
    with pytest.raises(SpecError):
        registry.load_plugin(file)
    assert "half-loaded" not in registry.all_passes()


def test_missing_and_empty(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="no such plugin"):
        registry.load_plugin(tmp_path / "nothing.py")
    with pytest.raises(SpecError, match=r"no \.py file"):
        registry.load_plugin(tmp_path)
    (tmp_path / "pass.txt").write_text("")
    with pytest.raises(SpecError, match=r"a plugin is a \.py file"):
        registry.load_plugin(tmp_path / "pass.txt")


def test_taken_name_is_refused(tmp_path: Path) -> None:
    registry.load_plugin(write(tmp_path / "a.py", "same-name"))
    with pytest.raises(SpecError, match="two passes are called 'same-name'"):
        registry.load_plugin(write(tmp_path / "b.py", "same-name"))


def test_what_register_refuses() -> None:
    class Plain(Pass):
        """Has a docstring."""

        name: ClassVar[str] = "plain"

    @dataclass(frozen=True)
    class Silent(Pass):
        name: ClassVar[str] = "silent"

    @dataclass(frozen=True)
    class Shouting(Pass):
        """Has a docstring."""

        name: ClassVar[str] = "SHOUTING_PASS"

    @dataclass(frozen=True)
    class Demanding(Pass):
        """Has a docstring."""

        name: ClassVar[str] = "demanding"
        ratio: float

    for cls, message in (
        (Plain, "frozen dataclass"),
        (Silent, "needs a docstring"),
        (Shouting, "not a pass name"),
        (Demanding, "has no default"),
    ):
        with pytest.raises(SpecError, match=message):
            registry.register(cls)
    with pytest.raises(SpecError, match="only subclasses"):
        registry.register(int)  # type: ignore[type-var]


def test_unknown_name_suggests() -> None:
    with pytest.raises(SpecError, match="did you mean 'fold-constants'"):
        registry.get("fold-constant")


def test_works_from_a_folder_with_its_own_passes(tmp_path: Path) -> None:
    write(tmp_path / "passes" / "mine.py", "my-own")
    (tmp_path / "passes" / "__init__.py").write_text("raise RuntimeError('never imported by name')\n")
    code = (
        "from graphopt import registry; print(registry.load_plugin('passes/mine.py'));"
        "print('fold-constants' in registry.all_passes())"
    )
    env = {**os.environ, "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert done.stdout.split("\n")[:2] == ["['my-own']", "True"], done.stderr


def test_source_tree_without_its_passes_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr("graphopt.registry.importlib.import_module", missing)
    with pytest.raises(SpecError, match="its passes are missing"):
        registry.all_passes()


def test_plugin_beside_built_in_passes_from_the_command_line(tmp_path: Path) -> None:
    write(tmp_path / "passes" / "mine.py", "my-own")
    (tmp_path / "model.onnx").write_bytes(TINY.SerializeToString())
    command = [
        sys.executable, "-m", "graphopt", "run", "model.onnx", "--plugin", "./passes/mine.py",
        "-p", "my-own{depth=3}, eliminate-identity", "-o", "out.onnx",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [n.op_type for n in onnx.load(tmp_path / "out.onnx").graph.node] == ["Neg"]
