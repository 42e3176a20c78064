"""The shape of the repository: layers, one importer of ORT and of torch, packaging that matches the folders."""

from __future__ import annotations

import ast
import functools
import tomllib
from pathlib import Path

import networkx as nx

ROOT = Path(__file__).parent.parent
LAZY_ALLOWED = {("graphopt.base", "graphopt.analysis.shapes")}


def modules() -> dict[str, Path]:
    found = {}
    for folder, package in (("graphopt", "graphopt"), ("passes", "graphopt.passes"), ("models", "graphopt.models")):
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


MODULES = modules()


@functools.cache
def imports(path: Path, name: str) -> set[str]:
    """Every module that a file imports, at its top or inside functions, type-only imports left out."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    found: set[str] = set()
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            inner = {alias.name: f"{base}.{alias.name}" for alias in node.names}
            found.update(full if full in MODULES else base for full in inner.values())
    return found


@functools.cache
def dependency_graph() -> nx.DiGraph:
    known = MODULES
    graph = nx.DiGraph()
    graph.add_nodes_from(known)
    for name, path in known.items():
        if name in {"graphopt", "graphopt.__main__"}:
            continue
        targets = {t for t in imports(path, name) if t in known and t not in {name, "graphopt"}}
        graph.add_edges_from((name, t) for t in targets if (name, t) not in LAZY_ALLOWED)
    return graph


def test_modules_form_a_dag() -> None:
    cycles = list(nx.simple_cycles(dependency_graph()))
    assert not cycles, cycles


def test_framework_imports_no_pass_by_name() -> None:
    for name, path in MODULES.items():
        if name.startswith("graphopt.") and not name.startswith(("graphopt.passes", "graphopt.models")):
            named = {i for i in imports(path, name) if i.startswith("graphopt.passes.")}
            assert not named, f"{name} imports {named}"


def test_passes_stand_below_the_pipeline() -> None:
    graph = dependency_graph()
    above = {f"graphopt.{m}" for m in ("pipeline", "optimizer", "cli", "runtime", "validate", "timing", "data")}
    for name in graph:
        if name.startswith("graphopt.passes"):
            assert not above & set(nx.descendants(graph, name)), f"{name} reaches {above & nx.descendants(graph, name)}"


def test_pipeline_stands_above_what_it_uses() -> None:
    below = nx.descendants(dependency_graph(), "graphopt.pipeline")
    assert {"graphopt.validate", "graphopt.runtime", "graphopt.model", "graphopt.registry"} <= below
    assert not {"graphopt.cli", "graphopt.optimizer"} & below


def test_one_module_imports_onnxruntime_and_none_outside_bridge_torch() -> None:
    for name, path in MODULES.items():
        if name.startswith("graphopt.models"):
            continue
        roots = {i.partition(".")[0] for i in imports(path, name)}
        assert "onnxruntime" not in roots or name == "graphopt.runtime", name
        assert "torch" not in roots or name.startswith("graphopt.bridge"), name


def test_package_list_matches_the_folders() -> None:
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = {name for name, path in MODULES.items() if path.name == "__init__.py"}
    assert set(setup["packages"]) == packages


def test_no_file_over_500_lines() -> None:
    long = {str(p.relative_to(ROOT)): n for p in MODULES.values() if (n := len(p.read_text().splitlines())) > 500}
    assert not long, long
