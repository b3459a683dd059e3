"""Complete the documentation as a site: files outside docs/, the reference of the public API, a page to choose an axis on.

MkDocs calls these functions (https://www.mkdocs.org/dev-guide/plugins/#events).
"""

from __future__ import annotations

import ast
import html
import os
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parent))
import notebooks

DOCS = Path(__file__).resolve().parents[1]
ROOT = DOCS.parent
LINK = re.compile(r"(?<=\]\()((?:\.\./)+[^)#\s]+)")
MODULES = ("", "keras", "keras.legacy", "torch", "jax", "numpy", "tensorflow", "flax", "equinox", "haiku")
TOOLS = (
    "explain.explain",
    "explain.model.explain_model",
    "compare.compare",
    "check.check",
    "fold.fold",
    "recalibrate.recalibrate",
    "migrate.migrate",
    "bench.bench",
    "bench.bench_networks",
)
LAYOUTS = {
    "a table: samples, features": (32, 10),
    "sequences: samples, steps, features": (32, 20, 8),
    "images, channels last: samples, height, width, channels": (32, 28, 28, 3),
    "images, channels first: samples, channels, height, width": (32, 3, 28, 28),
    "volumes: samples, depth, height, width, channels": (8, 16, 16, 16, 4),
}


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made here, and the files outside docs/ that pages link to."""
    for page in [file for file in files if file.src_uri.endswith(".md")]:
        for target in LINK.findall(Path(page.abs_src_path).read_text(encoding="utf-8")):
            source = _source(page.src_uri, target)
            if source is not None and files.get_file_from_path(_uri(source)) is None:
                files.append(_outside(source, config))
    for module in MODULES:
        files.append(_made(config, f"reference/{module.replace('.', '_') or 'evennorm'}.md", reference(module)))
    files.append(_made(config, "reference/tools.md", reference_of_tools()))
    files.append(_made(config, "which-axis.md", which_axis()))
    files.append(_made(config, "tutorial.md", tutorial()))
    return files


def on_page_markdown(markdown: str, page: Any, **others: Any) -> str:
    """Turn links to files outside docs/ to their copies in the site, and links to the notebook to its page."""

    def turned(found: re.Match[str]) -> str:
        source = _source(page.file.src_uri, found[1])
        return found[1] if source is None else os.path.relpath(_uri(source), os.path.dirname(page.file.src_uri) or ".")

    return LINK.sub(turned, markdown.replace("(tutorial.ipynb)", "(tutorial.md)"))


def _source(page: str, target: str) -> Path | None:
    """The file outside docs/ that a page links to; None for any other link."""
    path = (DOCS / page).parent.joinpath(target).resolve()
    return path if path.is_file() and ROOT in path.parents and DOCS not in path.parents else None


def _uri(source: Path) -> str:
    path = source.relative_to(ROOT).as_posix()
    return path if path == "CHANGELOG.md" else f"source/{path}"


def _outside(source: Path, config: Any) -> File:
    return File.generated(config, _uri(source), content=source.read_bytes())


def _made(config: Any, uri: str, content: str) -> File:
    return File.generated(config, uri, content=content)


def reference(module: str) -> str:
    """The page of one public module: what its __all__ names, by its docstrings."""
    name = f"evennorm.{module}".rstrip(".")
    entries = [
        f"::: {defined}\n    options:\n      heading: {public}\n      toc_label: {public}\n"
        for public in _public(name)
        if (defined := _defined(name, public)) is not None
    ]
    return f"# {name}\n\n" + "\n".join(entries)


def _file(module: str) -> Path | None:
    path = ROOT / "src" / Path(*module.split("."))
    found = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return found if found.is_file() else None


def _tree(module: str) -> ast.Module | None:
    path = _file(module)
    return None if path is None else ast.parse(path.read_text(encoding="utf-8"))


def _public(module: str) -> list[str]:
    for node in _tree(module).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return [name for name in ast.literal_eval(node.value) if not name.startswith("_")]
    raise ValueError(f"{module} has no __all__")


def _defined(module: str, name: str) -> str | None:
    """Where a name is defined that a module may only import; None for a module, which has a page of its own."""
    tree = _tree(module)
    for node in [] if tree is None else tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return f"{module}.{name}"
        if isinstance(node, ast.Assign) and any(getattr(target, "id", "") == name for target in node.targets):
            return f"{module}.{name}"
        if isinstance(node, ast.ImportFrom):
            found = next((alias.name for alias in node.names if (alias.asname or alias.name) == name), None)
            if found is not None:
                return None if node.module == module else _defined(node.module, found)
    return None


def reference_of_tools() -> str:
    return "# Tools\n\n" + "\n".join(f"::: evennorm.tools.{name}\n" for name in TOOLS)


def tutorial() -> str:
    """The notebook as a page, and the notebook itself to download."""
    page = notebooks.markdown(notebooks.read(DOCS / "tutorial.ipynb"))
    title, rest = page.split("\n", 1)
    return f'{title}\n\n<a href="tutorial.ipynb" download>Download this page as a notebook.</a>\n{rest}'


def which_axis() -> str:
    """A page that shows each axis of some layouts, drawn and explained by the code of `evennorm explain`."""
    from evennorm.tools.explain import explain
    from evennorm.tools.explain.drawing import draw

    options, figures = [], []
    for number, (layout, shape) in enumerate(LAYOUTS.items()):
        options.append(f'<option value="{number}">{html.escape(layout)}, {shape}</option>')
        for axis in range(len(shape)):
            explanation = explain(shape, axis)
            svg = draw(explanation).split("?>", 1)[-1].strip()
            remedies = "".join(f"<p>{html.escape(found.remedy)}</p>" for found in explanation.findings)
            verdict = remedies or "<p>Nothing looks wrong.</p>"
            figures.append(
                f'<figure class="axis-figure" data-layout="{number}" data-axis="{axis}" hidden>{svg}'
                f"<figcaption>{verdict}</figcaption></figure>"
            )
    axes = "".join(f'<option value="{axis}">{axis}</option>' for axis in range(5))
    return f"""# Which axis?

Choose what your array looks like, and the axis of the batch normalization. Cells of one colour are normalized together.

<p><label>Array <select id="axis-layout">{"".join(options)}</select></label>
<label>axis <select id="axis-axis">{axes}</select></label></p>
<style>.axis-figure[hidden] {{ display: none }}</style>
<noscript><p>This page needs JavaScript. Without: <code>evennorm explain --shape 32,28,28,3 --axis -1</code></p></noscript>
<div id="axis-figures">{"".join(figures)}</div>
<script>{SCRIPT}</script>

`evennorm explain` does this for any shape, and for every layer of a model: [explain.md](explain.md).
"""


SCRIPT = """(() => {
const layout = document.getElementById("axis-layout"), axis = document.getElementById("axis-axis");
const figures = [...document.querySelectorAll(".axis-figure")];
function show() {
  const own = figures.filter(figure => figure.dataset.layout === layout.value);
  [...axis.options].forEach(option => { option.hidden = option.disabled = Number(option.value) >= own.length; });
  if (Number(axis.value) >= own.length) axis.value = own.length - 1;
  figures.forEach(figure => { figure.hidden = !(own.includes(figure) && figure.dataset.axis === axis.value); });
}
layout.value = "2"; axis.value = "3";
layout.addEventListener("change", show); axis.addEventListener("change", show); show();
})();""".replace("\n", " ")
