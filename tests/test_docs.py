"""Every example runs: docstrings of the package, Python blocks of the pages; every relative link leads somewhere."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import evennorm

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")])
MODULES = sorted(
    module.name for module in pkgutil.walk_packages(evennorm.__path__, "evennorm.") if not module.name.endswith("__main__")
)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name: str) -> None:
    module = importlib.import_module(name)
    failed, _ = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert failed == 0


def test_public_names_have_an_example() -> None:
    """Of those that a user calls first."""
    from evennorm import Geometry
    from evennorm.keras import BatchNormalization, convert, legacy, place, revert
    from evennorm.numpy import batch_norm, normalize
    from evennorm.tools.explain import explain

    for public in (
        Geometry,
        BatchNormalization,
        legacy.BatchNormalization,
        place,
        convert,
        revert,
        batch_norm,
        normalize,
        explain,
    ):
        assert ">>> " in (public.__doc__ or ""), public


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page, one after the other in one namespace; a block with >>> is compared with what it shows."""
    monkeypatch.chdir(tmp_path)
    namespace: dict = {"__name__": "__main__"}
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
        if ">>> " in block:
            example = doctest.DocTestParser().get_doctest(block, namespace, name_of(page), name_of(page), 0)
            assert doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(example).failed == 0
        else:
            exec(compile(block, name_of(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{name_of(page)} links to {target}"


def test_there_are_pages() -> None:
    assert {"README.md", "docs/architecture.md"} <= {name_of(page) for page in PAGES}
