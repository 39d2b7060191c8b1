"""The code in docs/ runs as written, page by page, with smaller numbers.

``python tests/test_docs.py PAGE DIRECTORY`` runs a page with its own numbers, in a directory where
the pictures that it draws are kept, and writes what its blocks print into the page, where it shows
that.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import io
import itertools
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from pyro_vae_defence.defence.mcmc import RECOMMENDED_KERNEL, RECOMMENDED_LENGTHS
from pyro_vae_defence.experiments.defences import KINDS
from pyro_vae_defence.models.nvae import PUBLISHED
from pyro_vae_defence.robustness import KNOWLEDGE, Budget

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
    "detect_attacks.md": {"num_images": 10, "num_calibration": 10},
    "evaluate_robustness.md": {
        "num_images": 2,
        "num_steps": 2,
    },
    "inspecting_chains.md": {"num_images": 2, "num_samples": 8, "warmup_steps": 2},
}
# So are recommended chains where a page does not say how long they are.
SHORT = {"num_samples": 2, "warmup_steps": 1, "num_chains": 2}
SHORT_KERNEL = {"burn_in": 1, "num_steps": 1}
# And what a page leaves to the budget for seeing that everything runs.
LEAST = {
    "num_chains": 2,
    "num_iterations": 1,
    "num_directions": 1,
    "scoring_draws": 2,
    "check_images": 2,
    "check_steps": 4,
    "check_draws": 2,
}


class Block(NamedTuple):
    """A python block: its code on the lines it has in the page, and the output shown below it."""

    code: str
    shown: str | None
    place: slice  # of the shown output, in lines


def blocks(page: str, text: str) -> list[Block]:
    """The python blocks of a page, one program; a text block right below one is its output."""
    lines = text.splitlines()
    fences = [number for number, line in enumerate(lines) if line.lstrip().startswith("```")]
    found: list[Block] = []
    small = dict(SMALL.get(page, {}))
    below = None  # the line behind a python block and what is empty after it
    for first, last in zip(fences[::2], fences[1::2]):
        bare = lines[first].lstrip()
        if bare == "```python":
            indent = lines[first][: -len(bare)]  # of a block in a definition list
            code = "\n".join(line.removeprefix(indent) for line in lines[first + 1 : last])
            for name in list(small):
                code, count = re.subn(rf"(?m)^{name} = \d+", f"{name} = {small[name]}", code)
                assert count <= 1, f"{page} must assign {name} exactly once, found {count}"
                if count:
                    del small[name]
            found.append(Block("\n" * (first + 1) + code + "\n", None, slice(0)))
            below = next((n for n in range(last + 1, len(lines)) if lines[n]), None)
        elif bare == "```text" and first == below:
            shown = "\n".join(lines[first + 1 : last])
            found[-1] = found[-1]._replace(shown=shown, place=slice(first + 1, last))
    assert not small, f"{page} must assign {' and '.join(small)} exactly once"
    return found


PAGES = sorted(path.name for path in DOCS.glob("*.md") if "```python" in path.read_text())


def test_quickstart_is_tested():
    assert "quickstart.md" in PAGES


def run(page: str, small: bool) -> list[tuple[Block, str]]:
    """The blocks of a page with what each prints."""
    path, printed = DOCS / page, []
    namespace = {"__name__": "__main__"}
    for block in blocks(page if small else "", path.read_text()):
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(compile(block.code, str(path), "exec", dont_inherit=True), namespace)
        printed.append((block, output.getvalue().rstrip()))
        print(output.getvalue(), end="")
    return printed


NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d*)?(?:e[-+]?\d+)?")


def words(text: str) -> list[list[str]]:
    """The words of each line, without numbers and what stands around them."""
    return [re.findall(r"[A-Za-z_]\w*", NUMBER.sub(" ", line)) for line in text.splitlines()]


def differences(shown: str, printed: str, tolerance: float = 0.25) -> list[str]:
    """Pairs of lines that differ by more than the end of their numbers."""
    found = []
    for one, other in itertools.zip_longest(shown.splitlines(), printed.splitlines(), fillvalue=""):
        a, b = ([float(number) for number in NUMBER.findall(line)] for line in (one, other))
        alike = NUMBER.sub("#", one).split() == NUMBER.sub("#", other).split()
        if not (alike and np.allclose(a, b, rtol=tolerance, atol=1e-9)):
            found.append(f"shown:   {one}\nprinted: {other}")
    return found


@pytest.mark.filterwarnings("ignore::matplotlib.MatplotlibDeprecationWarning")  # ArviZ's
@pytest.mark.filterwarnings("ignore:Estimated shape parameter of Pareto")  # few draws
@pytest.mark.parametrize("page", PAGES)
def test_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for settings, short in ((RECOMMENDED_LENGTHS, SHORT), (RECOMMENDED_KERNEL, SHORT_KERNEL)):
        for name, length in short.items():
            monkeypatch.setitem(settings, name, length)
    # A published network of the same kind with fewer groups.
    fewer = dataclasses.replace(
        PUBLISHED["celeba_64"], num_groups_per_scale=5, min_groups_per_scale=2
    )
    monkeypatch.setitem(PUBLISHED, "celeba_64", fewer)
    least = dataclasses.replace(Budget.quick(), **LEAST)
    monkeypatch.setattr(Budget, "quick", lambda: least)
    if "to_zarr(" in (DOCS / page).read_text():
        pytest.importorskip("zarr")
    for block, printed in run(page, small=True):
        if block.shown is not None and page in SMALL:
            assert words(block.shown) == words(printed)
        elif block.shown is not None:
            assert differences(block.shown, printed) == []
    # What it draws is what it shows, and lies beside it.
    for picture in tmp_path.glob("*.png"):
        assert f"](images/{picture.name})" in (DOCS / page).read_text()
        assert (DOCS / "images" / picture.name).exists()


@pytest.mark.slow
def test_outputs_shown_in_the_quickstart_are_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = [(b.shown, text) for b, text in run("quickstart.md", small=False) if b.shown]
    assert len(shown) >= 4
    assert [difference for pair in shown for difference in differences(*pair)] == []


def test_outputs_may_differ_in_their_last_digits_alone():
    shown = "error 1.50 [1.2, 2]\nshape torch.Size([3])"
    assert differences(shown, "error 1.51 [1.21, 2.0]\nshape torch.Size([3])") == []
    for other in ("error 3.0 [1.2, 2]", "mean 1.50 [1.2, 2]", "error 1.50 [1.2]"):
        assert len(differences(shown, f"{other}\nshape torch.Size([3])")) == 1
    assert len(differences(shown, "error 1.50 [1.2, 2]")) == 1
    assert words(shown) == [["error"], ["shape", "torch", "Size"]]


def test_blocks_of_definition_lists_are_run():
    text = "term\n: text\n\n  ```python\n  if True:\n      x = 1\n  ```\n"
    (block,) = blocks("other.md", text)
    assert block.code.splitlines()[4:6] == ["if True:", "    x = 1"]


def test_blocks_keep_their_lines_and_small_numbers_are_used():
    text = "# Title\n```python\nx = 1\n```\ntext\n```bash\nls\n```\n```python\ny = x / 0\n```\n"
    first, second = blocks("other.md", text)
    assert first.code.splitlines()[2] == "x = 1"
    assert second.code.splitlines()[9] == "y = x / 0"
    with pytest.raises(AssertionError, match="epochs"):
        blocks("quickstart.md", text)


def test_a_text_block_below_a_python_block_is_its_output():
    python, shown = "```python\nprint(1)\n```\n", "```text\n1\n2\n```\n"
    assert [b.shown for b in blocks("", f"{python}\n{shown}")] == ["1\n2"]
    assert [b.shown for b in blocks("", f"{python}\nwords\n\n{shown}")] == [None]
    assert [b.shown for b in blocks("", f"{shown}\n{python}\n{python}{shown}")] == [None, "1\n2"]


def test_glossary_has_the_labels_of_all_defences():
    section = (DOCS / "glossary.md").read_text().split("\n## Defences")[1]
    rows = re.findall(r"(?m)^\| `(\w+)` \| (.+) \|$", section)
    assert dict(rows) == {name: kind.label for name, kind in KINDS.items()}


def test_glossary_has_the_attacks_of_the_suite():
    section = (DOCS / "glossary.md").read_text().split("## Attacks of the suite")[1]
    rows = re.findall(r"(?m)^\| `(\w+)` \|", section.split("\n## ")[0])
    assert rows == list(KNOWLEDGE)


SOURCES = [*ROOT.glob("*.md"), *DOCS.glob("*.md"), *DOCS.glob("api/*.md")]


@pytest.mark.parametrize("page", SOURCES, ids=lambda page: page.name)
def test_pages_can_be_read_as_sources(page):
    """GitHub knows neither links without a text, nor roles that link, nor includes."""
    text = page.read_text()
    assert re.findall(r"\[\]\(.*?\)|\{(?:doc|download|ref)\}`.*?`", text) == []
    for included in re.findall(r"(?m)^```\{include\} (\S+)", text):
        assert (page.parent / included).exists()
        assert f"]({included}):\n\n```{{include}} {included}\n" in text, included


def collected(file: Path) -> set[str]:
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
    missing = [row for row, found in zip(rows, named) if found[2] not in collected(ROOT / found[1])]
    assert not missing


if __name__ == "__main__":
    os.chdir(sys.argv[2])
    text = (DOCS / sys.argv[1]).read_text().splitlines()
    for ran, output in reversed(run(sys.argv[1], small=False)):
        if ran.shown is not None:
            text[ran.place] = output.splitlines()
    (DOCS / sys.argv[1]).write_text("\n".join(text) + "\n")
