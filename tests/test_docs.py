"""Every example runs: docstrings of the package, Python blocks of the pages; commands are understood, links lead on."""

from __future__ import annotations

import doctest
import importlib.util
import pkgutil
import re
import shlex
import tomllib
from pathlib import Path

import pytest

import evennorm
from evennorm.cli import main

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")])
NO_MODULES = ("__main__", "._tensorflow")  # the last one is a library that TensorFlow loads, with a module's ending
MODULES = sorted(
    name
    for name in ("evennorm", *(module.name for module in pkgutil.walk_packages(evennorm.__path__, "evennorm.")))
    if not name.endswith(NO_MODULES)
)
NEED_TRITON = {
    f"evennorm.kernels.triton.{name}"
    for name in (
        *("backward", "channels", "choices", "elements", "exchange", "forward", "in_halves", "kernel", "launch"),
        "running",
    )
}
"""Their examples run in the process of tests/contract/test_triton*.py."""

NEED_LIGHTNING = {"evennorm.torch.lightning"} if importlib.util.find_spec("lightning") is None else set()
"""Run where it is installed; tests/torch/test_lightning.py runs it on a stub as well."""


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("name", sorted(set(MODULES) - NEED_TRITON - NEED_LIGHTNING))
def test_docstring_examples(name: str) -> None:
    module = importlib.import_module(name)
    failed, _ = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert failed == 0


def test_public_names_have_an_example() -> None:
    """Of those that a user calls first."""
    from evennorm import Geometry, flax, torch
    from evennorm.keras import BatchNormalization, convert, legacy, place, revert
    from evennorm.numpy import batch_norm, batch_norm_gradient, merge, moments, normalize
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
        batch_norm_gradient,
        moments,
        merge,
        explain,
        flax.BatchNorm,
        flax.linen.BatchNorm,
        flax.convert,
        flax.revert,
        torch.SyncBatchNorm,
        torch.place,
        *(getattr(torch, f"{lazy}BatchNorm{d}d") for lazy in ("", "Lazy") for d in (1, 2, 3)),
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


def commands(page: Path) -> list[list[str]]:
    """What a page tells its reader to type, as words: the lines of sh blocks, those behind a prompt in console blocks."""
    lines: list[str] = []
    for language, block in re.findall(r"^```(sh|console)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
        whole = block.replace("\\\n", " ").splitlines()
        lines += whole if language == "sh" else [line[2:] for line in whole if line.startswith("$ ")]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_are_understood(page: Path) -> None:
    """Verbs and options, make targets, extras and paths are there; what a command answers is for its own tests."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    for words in commands(page):
        while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            words.pop(0)
        program, *arguments = words
        match program.removeprefix(".venv/bin/"):
            case "evennorm":
                # Under its group: click keeps the help option of the first context a command meets.
                group = main.make_context("evennorm", list(arguments))
                main.commands[arguments[0]].make_context(arguments[0], arguments[1:], parent=group)
            case "make":
                assert {word for word in arguments if "=" not in word} <= targets, words
            case "pip":
                asked = re.findall(r"\[([a-z,]+)\]", " ".join(arguments))
                assert {extra for group in asked for extra in group.split(",")} <= extras, words
            case "python":
                assert all((ROOT / word).exists() for word in arguments if "/" in word), words


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{name_of(page)} links to {target}"


def test_there_are_pages() -> None:
    assert {"README.md", "docs/architecture.md"} <= {name_of(page) for page in PAGES}


def test_the_architecture_names_files_that_are_there() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    paths = re.findall(r"`([a-z_/0-9]+(?:/|\.py|\.toml))`", text)
    assert len(paths) > 10
    missing = [path for path in paths if not any((home / path).exists() for home in (ROOT, ROOT / "src/evennorm"))]
    assert missing == []
