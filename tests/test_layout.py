"""Imports point down only (docs/architecture.md); siblings do not know each other."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "pyro_vae_defence"

LAYERS = [
    {"types", "ops"},
    {"data", "models"},
    {"objectives", "mcmc", "attacks", "metrics"},
    {"training", "defence", "diagnostics", "plots", "robustness"},
    {"experiments"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# Neighbours that may use each other: the lowest layer, a defence's chains and their form for ArviZ,
# a defence and its evaluation.
SAME_LAYER = {("ops", "types"), ("defence", "diagnostics"), ("robustness", "defence")}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "pyro_vae_defence" and len(parts) > 1 and parts[1] in LEVEL:
                found.add(parts[1])
    return found


def test_imports_point_down():
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        assert own in LEVEL, f"{own} has no layer; add it to LAYERS"
        for other in imports(path):
            down = LEVEL[other] < LEVEL[own]
            if not (down or other == own or (own, other) in SAME_LAYER):
                wrong.append(f"{path.relative_to(PACKAGE)} imports {other}")
    assert not wrong, wrong


def test_the_walk_sees_an_upward_import(tmp_path):
    path = tmp_path / "x.py"
    path.write_text("from pyro_vae_defence.attacks import PGD\nimport pyro_vae_defence.defence\n")
    assert imports(path) == {"attacks", "defence"}
