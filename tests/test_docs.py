"""The code in docs/ runs as written, page by page, with smaller numbers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"

# Assignments of a page that are made smaller; each must be found there.
SMALL = {
    "quickstart.md": {
        "epochs": 1,
        "num_train": 256,
        "num_images": 5,
        "num_samples": 4,
        "warmup_steps": 3,
    },
    "classifiers.md": {"num_images": 5, "warmup_steps": 2},
    "detect_attacks.md": {"num_images": 5, "warmup_steps": 2},
    "evaluate_robustness.md": {
        "num_images": 2,
        "num_steps": 2,
        "num_chains": 2,
        "warmup_steps": 2,
        "check_steps": 4,
    },
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


@pytest.mark.parametrize("page", PAGES)
def test_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = DOCS / page
    source = program(page, path.read_text())
    code = compile(source, str(path), "exec", dont_inherit=True)
    exec(code, {"__name__": "__main__"})


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
