"""Narrow terminals, logs and NO_COLOR: every command stays readable, and no figure is lost."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner

from evennorm.cli import main
from evennorm.tools.doctor import Diagnosis, Framework
from tests.migration.building import layer, sequential
from tests.migration.keras1 import Keras1
from tests.tools.comparing import importable
from tests.tools.test_bench_networks import benchmark as networks
from tests.tools.test_bench_report import arrays
from tests.tools.test_compare_page import fabricated

COMMANDS = sorted(main.commands)
BENCH, COMPARE = (sys.modules[f"evennorm.cli.{name}"] for name in ("bench", "compare"))
"""The modules, whose names in the package are those of the commands."""
COLOUR = re.compile(r"\x1b\[(?:\d+;)*(?:3\d|4\d|9\d|10\d)(?:;\d+)*m")
ESCAPE = re.compile(r"\x1b\[[0-9;]*m")
NETS = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    norms = nn.BatchNorm1d(5), nn.BatchNorm1d(5, eps=1e-9)
    return nn.Sequential(nn.Linear(4, 5), norms[0], nn.ReLU(), nn.Linear(5, 5), norms[1], nn.Linear(5, 2)).eval()
"""
WORDS = {
    "check": "check narrow:net --data x.npz",
    "page": "check --explain BN201",
    "explain": "explain --shape 32,28,28,3 --axis 1,3",
    "explain a model": "explain narrow:net --shape 8,4",
    "fold": "fold narrow:net -o out.pt --force --no-speed",
    "migrate": "migrate old.h5 -o new.keras --force",
    "recalibrate": "recalibrate narrow:net --data x.npz -o out.pt --force",
    "doctor": "doctor",
}
"""Commands that run here; compare and bench print what others have measured."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("narrow")
    (path / "narrow.py").write_text(NETS)
    np.savez(path / "x.npz", x=np.random.default_rng(0).normal(3, 2, size=(40, 4)).astype("float32"))
    old, model = Keras1(), sequential((4,), layer("Dense", output_dim=3), layer("BatchNormalization"))
    old.predict(model, np.zeros((2, 4)))
    old.save(path / "old.h5", model)
    with importable(path):
        yield path


@pytest.fixture
def shown(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Run a command with a number of columns; with colours, as on a terminal."""
    monkeypatch.chdir(folder)
    row = {"device": "CPU, a long name of one", "training": {"float32": "cpu"}, "inference": {"float32": "reference"}}
    frameworks = (Framework("tensorflow", "2.21.0", rows=(row,), problems=(("it is too old", "install another"),)),)
    known = Diagnosis("1.0", "3.12.1", "Linux", "AMD EPYC", 2, "avx2", 2, frameworks)
    monkeypatch.setattr("evennorm.tools.doctor.diagnose", lambda: known)

    def run(words: str, columns: int, colours: bool = True, **environment: str) -> str:
        variables: dict[str, str | None] = {
            "COLUMNS": str(columns),
            "FORCE_COLOR": "1" if colours else None,
            "NO_COLOR": None,
        }
        result = CliRunner().invoke(main, words.split(), prog_name="evennorm", env={**variables, **environment})
        assert result.exit_code in (0, 1), result.output
        assert result.stderr == ""
        return result.stdout

    return run


def figures(text: str) -> set[str]:
    return set(re.findall(r"[^\s]*\d[^\s]*", ESCAPE.sub("", text)))


def same_figures(narrow: str, wide: str) -> None:
    assert "…" not in narrow
    together = "".join(ESCAPE.sub("", narrow).split())
    assert {figure for figure in figures(wide) if figure not in together} == set()


@pytest.mark.parametrize("name", WORDS)
def test_no_figure_is_lost_where_the_terminal_is_narrow(name: str, shown) -> None:
    wide = shown(WORDS[name], 200)
    for columns in (40, 60):
        same_figures(shown(WORDS[name], columns), wide)


@pytest.mark.parametrize("name", WORDS)
def test_colours_are_for_terminals_that_want_them(name: str, shown) -> None:
    assert "\x1b" not in shown(WORDS[name], 80, colours=False)
    assert not COLOUR.search(shown(WORDS[name], 80, NO_COLOR="1"))


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """What compare, bench and bench --network print of results that are there."""
    comparison = fabricated(tmp_path_factory.mktemp("compared"))
    return {
        "compare": lambda: COMPARE._print(comparison),
        "bench": lambda: BENCH._print(arrays()),
        "bench --network": lambda: BENCH._print(networks()),
    }


@pytest.mark.parametrize("name", ["compare", "bench", "bench --network"])
def test_no_figure_of_a_measurement_is_lost(name: str, measured, capsys, monkeypatch) -> None:
    texts = {}
    monkeypatch.delenv("NO_COLOR", raising=False)
    for columns, forced in ((200, "1"), (40, "1"), (60, "1"), (80, None)):
        monkeypatch.setenv("COLUMNS", str(columns))
        if forced is None:
            monkeypatch.delenv("FORCE_COLOR", raising=False)
        else:
            monkeypatch.setenv("FORCE_COLOR", forced)
        measured[name]()
        texts[columns] = capsys.readouterr().out
        same_figures(texts[columns], texts[200])
    assert "\x1b" in texts[40]
    assert "\x1b" not in texts[80]
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    measured[name]()
    assert not COLOUR.search(capsys.readouterr().out)


@pytest.mark.parametrize("columns", [40, 60])
@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_fits(name: str, columns: int) -> None:
    result = CliRunner().invoke(main, [*name.split(), "--help"], prog_name="evennorm", env={"COLUMNS": str(columns)})
    assert result.exit_code == 0
    command = main.commands[name] if name else main
    for option in (each for each in command.params if isinstance(each, click.Option)):
        assert max(option.opts, key=len) in result.stdout
    long = [line for line in result.stdout.splitlines() if len(line) > columns and not line.startswith("  evennorm ")]
    assert long == []
