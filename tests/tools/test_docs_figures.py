"""`make docs-figures`: one run of the command goes into every page that shows it, and nothing else is touched."""

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, with the pages in a folder of their own."""
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    import _docs_figures

    (tmp_path / "docs").mkdir()
    for figure in _docs_figures.FIGURES.values():
        for page in figure.pages:
            (tmp_path / page).write_text((ROOT / page).read_text())
    monkeypatch.setattr(_docs_figures, "ROOT", tmp_path)
    return _docs_figures


def stub(monkeypatch: pytest.MonkeyPatch, figures: ModuleType, code: int) -> None:
    def run(command: list[str], cwd: str, **options: object) -> subprocess.CompletedProcess[str]:
        out = Path(cwd, "evennorm-runs", "x")
        out.mkdir(parents=True)
        (out / "summary.json").write_text(json.dumps({"device": "a device", "fingerprint": {"versions": "keras 3"}}))
        (out / "curves.png").write_bytes(b"picture")
        return subprocess.CompletedProcess(command, code, "a table  \na verdict\n")

    monkeypatch.setattr(figures.subprocess, "run", run)


@pytest.mark.parametrize("name", ["demo", "fashion-mnist"])
def test_the_pages_of_a_run(figures, tmp_path, monkeypatch, name):
    stub(monkeypatch, figures, 0)
    assert figures.main(name) == 0
    figure = figures.FIGURES[name]
    for page in figure.pages:
        text, before = (tmp_path / page).read_text(), (ROOT / page).read_text()
        begin, end = f"<!-- {name}: written by make docs-figures -->\n", f"\n<!-- end of {name} -->"
        assert text.split(begin)[0] == before.split(begin)[0]
        assert text.split(end)[1] == before.split(end)[1]
        command = " ".join(("evennorm compare", *figure.arguments))
        expected = f"It took 0 seconds: a device; keras 3.\n\n```console\n$ {command}\na table\na verdict\n```"
        assert text.split(begin)[1].split(end)[0] == expected
    assert (tmp_path / figure.picture).read_bytes() == b"picture"


def test_a_run_that_fails_changes_nothing(figures, tmp_path, monkeypatch):
    stub(monkeypatch, figures, 2)
    assert figures.main("demo") == 2
    assert (tmp_path / "README.md").read_text() == (ROOT / "README.md").read_text()


def test_a_page_without_its_place_is_told_before_anything_is_trained(figures, tmp_path):
    (tmp_path / "README.md").write_text("nothing")
    with pytest.raises(SystemExit, match=r"README.md has 0 places for demo"):
        figures.main("demo")
