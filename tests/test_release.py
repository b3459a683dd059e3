"""What a release says about itself: one version everywhere, and a README and addresses that PyPI can show."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sysconfig
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from click.testing import CliRunner

import evennorm
from evennorm.cli import main

ROOT = Path(__file__).resolve().parents[1]
BASE, REF = "https://forge.example/owner/evennorm", "v1.2.3"


@pytest.fixture(scope="module")
def step() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pypi_readme", ROOT / ".ci" / "pypi_readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_one_version_everywhere() -> None:
    newest = re.findall(r"^## \[(?!Unreleased)([^]]+)\] - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[0]
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert newest == (cited["version"], str(cited["date-released"])) == (evennorm.__version__, newest[1])
    assert CliRunner().invoke(main, ["--version"]).output == f"evennorm, version {evennorm.__version__}\n"
    assert f"evennorm {evennorm.__version__}, Python" in (ROOT / "docs" / "install.md").read_text()


def test_wheels_of_the_stable_abi_can_be_compiled(tmp_path: Path) -> None:
    """From Python 3.12 on one wheel serves all: its bindings call what the limited API declares, and so do those of 3.11."""
    sources = (path for path in (ROOT / "native").glob("*.*") if not path.name.startswith(("torch_", "bind_torch")))
    called = {name for path in sources for name in re.findall(r"\b(_?Py[A-Z]\w*_\w+)\(", path.read_text())}
    assert "PyErr_Clear" in called
    uses = (f"#ifndef {name}\nauto* const use_{name} = &{name};\n#endif" for name in sorted(called))
    (tmp_path / "uses.cc").write_text("\n".join(["#define Py_LIMITED_API 0x030C0000", "#include <Python.h>", *uses]))
    command = [*os.environ.get("CXX", "g++").split(), "-std=c++20", "-fsyntax-only", "-I", sysconfig.get_path("include")]
    done = subprocess.run([*command, str(tmp_path / "uses.cc")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_link_of_the_readme_becomes_absolute(step: ModuleType) -> None:
    before = (ROOT / "README.md").read_text()
    after = step.readme(before, BASE, REF)
    links = [re.findall(r"(!?)\[[^\]]*\]\(([^)\s]+)\)", text) for text in (before, after)]
    assert len(links[0]) == len(links[1]) > 30
    for (picture, old), (_, new) in zip(*links, strict=True):
        if old.startswith("#") or "://" in old:
            assert new == old
        else:
            assert new == f"{BASE}/{'raw' if picture else 'blob'}/{REF}/{old}"
            assert (ROOT / old.split("#")[0]).exists()
    assert {kind for kind, _ in links[0]} == {"", "!"}
    assert any(new.startswith("#") for _, new in links[1])
    assert step.readme(after, BASE, REF) == after


def test_code_of_the_readme_stays(step: ModuleType) -> None:
    text = "[a](b.md#c), [d](#e)\n\n```python\ntable[0](x)\n```\n\n[f](https://g.example) ![h](i.png)\n"
    assert step.readme(text, BASE, REF) == (
        f"[a]({BASE}/blob/{REF}/b.md#c), [d](#e)\n\n```python\ntable[0](x)\n```\n\n"
        f"[f](https://g.example) ![h]({BASE}/raw/{REF}/i.png)\n"
    )


def test_the_project_gets_its_addresses(step: ModuleType) -> None:
    text = (ROOT / "pyproject.toml").read_text()
    before, after = tomllib.loads(text), tomllib.loads(step.pyproject(text, BASE, REF))
    assert "urls" not in before["project"]
    urls = after["project"].pop("urls")
    assert after == before
    assert urls["Source"] == BASE
    assert all(url.startswith(BASE) for url in urls.values())
    with pytest.raises(SystemExit, match="clean checkout"):
        step.pyproject(step.pyproject(text, BASE, REF), BASE, REF)


def test_releases_are_built_from_a_checkout_with_addresses() -> None:
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())["jobs"]
    for name in ("wheels", "source"):
        runs = [step.get("run", "") for step in jobs[name]["steps"]]
        made = next(number for number, run in enumerate(runs) if ".ci/pypi_readme.py" in run)
        built = next(number for number, run in enumerate(runs) if re.search(r"-m (cibuildwheel|build) ", run))
        assert made < built
