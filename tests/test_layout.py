"""Imports point down only (docs/architecture.md), siblings do not know each other, and no modules
import each other in a circle."""

from __future__ import annotations

import ast
import configparser
import re
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "pyro_vae_defence"

LAYERS = [
    {"types"},
    {"ops", "diagnostics", "plots"},
    {"data", "models"},
    {"objectives", "mcmc", "attacks", "metrics"},
    {"training", "defence"},
    {"robustness"},
    {"experiments"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def modules(package: Path) -> dict[str, Path]:
    """Dotted name -> file of every module; a package goes by its own name."""
    found = {}
    for path in package.rglob("*.py"):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts).removesuffix(".__init__")] = path
    return found


def import_graph(package: Path) -> dict[str, set[str]]:
    """Module -> modules of the package that it names in an import, wherever that stands.

    Imports inside functions count: they hide a circle from Python, not from the reader. So do those
    under ``TYPE_CHECKING``: a module that names another's types cannot be understood without it.
    ``from package import name`` leads to the module ``name`` if there is one, else to what the
    package itself offers. That importing a module runs its packages' ``__init__`` does not count;
    every package would be a circle.
    """
    files = modules(package)
    graph = {}
    for module, path in files.items():
        named = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{module} has a relative import; write it out"
                inside = {f"{node.module}.{alias.name}" for alias in node.names}
                named |= {name if name in files else str(node.module) for name in inside}
            elif isinstance(node, ast.Import):
                named |= {alias.name for alias in node.names}
        graph[module] = {name for name in named if name in files} - {module}
    return graph


def find_circle(graph: dict[str, set[str]]) -> list[str] | None:
    """One circle of imports, its first module again at the end; ``None`` if there is none."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str] | None:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return None
        for other in sorted(graph[module]):
            if circle := visit(other, [*path, module]):
                return circle
        done.add(module)
        return None

    return next((circle for module in sorted(graph) if (circle := visit(module, []))), None)


def layer_of(module: str) -> str:
    return module.split(".")[1]


def test_imports_point_down():
    wrong = []
    for module, others in import_graph(PACKAGE).items():
        if module == PACKAGE.name:
            continue
        own = layer_of(module)
        assert own in LEVEL, f"{own} has no layer; add it to LAYERS"
        for other in others - {PACKAGE.name}:
            if layer_of(other) != own and LEVEL[layer_of(other)] >= LEVEL[own]:
                wrong.append(f"{module} imports {other}")
    assert not wrong, wrong


def test_no_circles():
    graph = import_graph(PACKAGE)
    graph[PACKAGE.name] = set()  # it names what is below, lazily; some below read its version
    circle = find_circle(graph)
    assert circle is None, " imports ".join(circle or ())


@pytest.fixture
def write(tmp_path):
    def files(**sources: str) -> Path:
        package = tmp_path / "toy"
        package.mkdir()
        for name, source in sources.items():
            (package / f"{name}.py").write_text(source)
        return package

    return files


def test_the_walk_sees_every_kind_of_import(write):
    package = write(
        __init__="from toy.a import thing\n",
        a="import toy.b\nfrom toy import c, thing\nimport os\n",
        b="def late():\n    from toy.c import x\n",
        c="if TYPE_CHECKING:\n    from toy.b import y\n",
    )
    expected = {"toy": {"toy.a"}, "toy.a": {"toy", "toy.b", "toy.c"}}
    expected |= {"toy.b": {"toy.c"}, "toy.c": {"toy.b"}}
    assert import_graph(package) == expected


def test_a_circle_is_named(write):
    package = write(
        __init__="",
        a="from toy import b\n",
        b="def late():\n    from toy.c import x\n",
        c="import toy.b\n",
        d="import toy.a\n",
    )
    graph = import_graph(package)
    assert find_circle(graph) == ["toy.b", "toy.c", "toy.b"]
    graph["toy.c"] = set()
    assert find_circle(graph) is None


# What is called otherwise in an import than in a requirement.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "art": "adversarial-robustness-toolbox",
    "pyro": "pyro-ppl",
    "pytorch_msssim": "pytorch-msssim",
}


def test_what_is_imported_is_declared_with_its_oldest_version():
    """No package is there only because others need it, perhaps in a version that lacks a part."""
    used = {
        name.partition(".")[0]
        for path in modules(PACKAGE).values()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and not node.level)
        for name in (
            [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
        )
    }
    used -= {PACKAGE.name, *sys.stdlib_module_names}
    settings = configparser.ConfigParser()
    settings.read(PACKAGE.parent / "setup.cfg")
    needed = settings["options"]["install_requires"].split()
    extras = " ".join(settings["options.extras_require"].values()).split()
    oldest = (PACKAGE.parent / "tests" / "lower-bounds.txt").read_text()
    declared = {re.split(r"[\[><=]", requirement)[0] for requirement in (*needed, *extras)}
    assert {DISTRIBUTIONS.get(name, name) for name in used} <= declared
    for requirement in needed:
        assert re.search(rf"(?m)^{requirement.replace('>=', '==')}\b", oldest), requirement
