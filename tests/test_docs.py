"""What the documentation shows, runs: the python blocks of each page in order, and the notebooks; every file that is linked is there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(p for p in DOCS.rglob("*.md") if "```python" in p.read_text())
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.py"))
LINK = re.compile(r"\]\(([^)#\s]+\.(?:md|py|yaml))(?:#[\w-]*)?\)")


def blocks(page: Path) -> str:
    """The python of a page, with everything else blank, so that line numbers stay."""
    lines, inside = [], False
    for line in page.read_text().splitlines():
        if line.startswith("```"):
            inside = line == "```python"
            lines.append("")
        else:
            lines.append(line if inside else "")
    return "\n".join(lines)


def run(path: Path, text: str, folder: Path) -> None:
    script = folder / path.with_suffix(".py").name
    script.write_text(text)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    found = subprocess.run([sys.executable, str(script)], cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    assert found.returncode == 0, f"{path.relative_to(ROOT)}:\n{found.stdout[-2000:]}\n{found.stderr[-4000:]}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(DOCS)))
def test_a_page_runs(page: Path, tmp_path: Path) -> None:
    run(page, blocks(page), tmp_path)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_runs(notebook: Path, tmp_path: Path) -> None:
    run(notebook, notebook.read_text(), tmp_path)


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))], ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    missing = [link for link in LINK.findall(page.read_text()) if not link.startswith("http") and not (page.parent / link).exists()]
    assert not missing, missing


def test_every_page_is_in_the_navigation() -> None:
    listed = (ROOT / "mkdocs.yml").read_text()
    assert not [p for p in DOCS.rglob("*.md") if str(p.relative_to(DOCS)) not in listed]
