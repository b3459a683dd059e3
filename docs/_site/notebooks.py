"""Run the cells of a notebook without Jupyter, and write it as a page.

`python docs/_site/notebooks.py docs/tutorial.ipynb` runs the tutorial and stores what its cells print.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Notebook = dict[str, Any]


def read(path: Path) -> Notebook:
    return json.loads(path.read_text(encoding="utf-8"))


def cells(notebook: Notebook, kind: str) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def shown(cell: dict[str, Any]) -> str:
    """What is stored below a cell, as text."""
    parts = ("".join(output.get("text") or output["data"]["text/plain"]) for output in cell["outputs"])
    return "".join(part if part.endswith("\n") else f"{part}\n" for part in parts)


def run(notebook: Notebook) -> Iterator[list[dict[str, Any]]]:
    """Run the code cells in one namespace, in the current folder; give the outputs of each as a notebook stores them."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(cells(notebook, "code"), 1):
        yield _outputs(source(cell), number, namespace)


def _outputs(code: str, number: int, namespace: dict[str, Any]) -> list[dict[str, Any]]:
    tree = ast.parse(code)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    value, printed = None, io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, f"cell {number}", "exec"), namespace)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), namespace)
    outputs: list[dict[str, Any]] = []
    if printed.getvalue():
        outputs.append({"name": "stdout", "output_type": "stream", "text": printed.getvalue().splitlines(keepends=True)})
    if value is not None:
        data = {"text/plain": repr(value).splitlines(keepends=True)}
        outputs.append({"data": data, "execution_count": number, "metadata": {}, "output_type": "execute_result"})
    return outputs


def markdown(notebook: Notebook) -> str:
    """The notebook as a page: its texts, its code, and below that what the code prints."""
    parts = []
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            parts.append(source(cell))
            continue
        parts.append(f"```python\n{source(cell)}\n```")
        if cell["outputs"]:
            parts.append(f"```text\n{shown(cell)}```")
    return "\n\n".join(parts) + "\n"


def main(path: Path) -> None:
    notebook = read(path)
    folder = os.getcwd()
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        try:
            results = list(run(notebook))
        finally:
            os.chdir(folder)
    for number, (cell, outputs) in enumerate(zip(cells(notebook, "code"), results, strict=True), 1):
        cell.update(execution_count=number, outputs=outputs)
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
