"""The tutorial runs from top to bottom, and what it shows is what its code prints."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"
sys.path.append(str(DOCS / "_site"))
try:
    import notebooks
finally:
    sys.path.pop()  # which has modules of names that others use: examples


def words(text: str) -> list[str]:
    """What a cell that trains prints on every machine: the words, but neither numbers nor which placement is better."""
    masked = re.sub(r"\bafter\b|\bbefore\b", "PLACE", re.sub(r"\d+(\.\d+)?", "N", text))
    return sorted(masked.split())


def test_the_tutorial_shows_what_its_code_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    notebook = notebooks.read(DOCS / "tutorial.ipynb")
    cells = notebooks.cells(notebook, "code")
    assert len(cells) > 8
    for cell, outputs in zip(cells, notebooks.run(notebook), strict=True):
        found, stored = notebooks.shown({"outputs": outputs}), notebooks.shown(cell)
        if "trained" in cell["metadata"].get("tags", ()):
            assert words(found) == words(stored), notebooks.source(cell)
        else:
            assert found == stored, notebooks.source(cell)
    assert {path.name for path in tmp_path.iterdir()} == {"network.keras", "runs", "folded.keras"}


def test_a_notebook_is_written_as_a_page() -> None:
    printing = {"cell_type": "code", "metadata": {}, "source": ["x = 20\n", "print(x)\n", "x + 1"], "outputs": []}
    notebook = {"cells": [{"cell_type": "markdown", "source": ["# Title\n", "Text."]}, printing]}
    (printing["outputs"],) = notebooks.run(notebook)
    assert [output["output_type"] for output in printing["outputs"]] == ["stream", "execute_result"]
    assert notebooks.markdown(notebook) == (
        "# Title\nText.\n\n```python\nx = 20\nprint(x)\nx + 1\n```\n\n```text\n20\n21\n```\n"
    )


def test_the_notebook_is_one_that_jupyter_reads() -> None:
    notebook = notebooks.read(DOCS / "tutorial.ipynb")
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    identifiers = [cell["id"] for cell in notebook["cells"]]
    assert len(set(identifiers)) == len(identifiers)
    assert [cell["execution_count"] for cell in notebooks.cells(notebook, "code")] == list(
        range(1, len(notebooks.cells(notebook, "code")) + 1)
    )
