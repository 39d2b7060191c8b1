"""The code in docs/ runs as written, page by page, with smaller numbers.

``python tests/test_docs.py PAGE DIRECTORY`` runs a page with its own numbers, in a directory where
the pictures that it draws are kept.
"""

from __future__ import annotations

import ast
import os
import re
import sys
from pathlib import Path

import pytest

from pyro_vae_defence.experiments.defences import KINDS

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"

# Assignments of a page that are made smaller; each must be found there.
SMALL = {
    "quickstart.md": {
        "epochs": 1,
        "num_train": 256,
        "num_images": 5,
        "num_samples": 4,
        "warmup_steps": 3,
    },
    "anomaly_detection.md": {
        "epochs": 1,
        "num_pictures": 95,
        "num_samples": 2,
        "warmup_steps": 2,
    },
    "classifiers.md": {"num_images": 5},
    "detect_attacks.md": {"num_images": 10},
    "evaluate_robustness.md": {
        "num_images": 2,
        "num_steps": 2,
    },
    "inspecting_chains.md": {"num_images": 2, "num_samples": 8, "warmup_steps": 2},
}


def program(page: str, text: str) -> str:
    """The page's python blocks as one program whose line numbers are those of the page."""
    code = []
    inside = False
    for line in text.splitlines():
        bare = line.lstrip()
        if bare.startswith("```"):
            inside = bare == "```python"
            indent = line[: len(line) - len(bare)]  # of a block in a definition list
            code.append("")
        else:
            code.append(line.removeprefix(indent) if inside else "")
    source = "\n".join(code) + "\n"
    for name, value in SMALL.get(page, {}).items():
        source, count = re.subn(rf"(?m)^{name} = \d+", f"{name} = {value}", source)
        assert count == 1, f"{page} must assign {name} exactly once, found {count}"
    return source


PAGES = sorted(path.name for path in DOCS.glob("*.md") if "```python" in path.read_text())


def test_quickstart_is_tested():
    assert "quickstart.md" in PAGES


def run(page: str, small: bool) -> None:
    path = DOCS / page
    source = program(page if small else "", path.read_text())
    code = compile(source, str(path), "exec", dont_inherit=True)
    exec(code, {"__name__": "__main__"})


@pytest.mark.filterwarnings("ignore::matplotlib.MatplotlibDeprecationWarning")  # ArviZ's
@pytest.mark.filterwarnings("ignore:Estimated shape parameter of Pareto")  # few draws
@pytest.mark.parametrize("page", PAGES)
def test_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "to_zarr(" in (DOCS / page).read_text():
        pytest.importorskip("zarr")
    run(page, small=True)
    # What it draws is what it shows, and lies beside it.
    for picture in tmp_path.glob("*.png"):
        assert f"](images/{picture.name})" in (DOCS / page).read_text()
        assert (DOCS / "images" / picture.name).exists()


def test_blocks_of_definition_lists_are_run():
    text = "term\n: text\n\n  ```python\n  if True:\n      x = 1\n  ```\n"
    assert program("other.md", text).splitlines()[4:6] == ["if True:", "    x = 1"]


def test_blocks_keep_their_lines_and_small_numbers_are_used():
    text = "# Title\n```python\nx = 1\n```\ntext\n```bash\nls\n```\n```python\ny = x / 0\n```\n"
    assert program("other.md", text).splitlines()[2] == "x = 1"
    with pytest.raises(ZeroDivisionError):
        exec(program("other.md", text), {})
    with pytest.raises(AssertionError, match="epochs"):
        program("quickstart.md", text)


def test_glossary_has_the_labels_of_all_defences():
    rows = re.findall(r"(?m)^\| `(\w+)` \| (.+) \|$", (DOCS / "glossary.md").read_text())
    assert dict(rows) == {name: kind.label for name, kind in KINDS.items()}


def tests_of(file: Path) -> set[str]:
    """What pytest collects of a file, without parameters."""
    names = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.ClassDef):
            inside = (part.name for part in node.body if isinstance(part, ast.FunctionDef))
            names |= {f"{node.name}::{name}" for name in inside}
        elif isinstance(node, ast.FunctionDef):
            names.add(node.name)
    return {name for name in names if name.split("::")[-1].startswith("test_")}


def test_every_fault_that_is_survived_names_its_test():
    text = (DOCS / "what_it_survives.md").read_text()
    rows = [line for line in text.splitlines() if re.match(r"\| (?!Fault \|)", line)]
    assert len(rows) > 50
    named = [re.fullmatch(r"\| .+ \| .+ \| `(tests/\w+\.py)::([\w:]+)` \|", row) for row in rows]
    assert all(named), [row for row, found in zip(rows, named) if not found]
    missing = [row for row, found in zip(rows, named) if found[2] not in tests_of(ROOT / found[1])]
    assert not missing


if __name__ == "__main__":
    os.chdir(sys.argv[2])
    run(sys.argv[1], small=False)
