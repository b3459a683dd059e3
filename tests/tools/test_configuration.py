"""`[tool.evennorm]` in pyproject.toml: options of the commands, checked against what there is."""

from __future__ import annotations

from pathlib import Path

import keras
import pytest
from click.testing import CliRunner, Result

from evennorm.cli import main


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with a model that has two findings, BN201 and BN303, seen from a folder inside it."""
    layers = [keras.layers.Dense(4, name="dense"), keras.layers.BatchNormalization(momentum=0.1, name="bn")]
    layers += [keras.layers.ReLU(), keras.layers.Dense(2, name="out")]
    keras.Sequential([keras.Input((3,)), *layers]).save(tmp_path / "net.keras")
    inner = tmp_path / "inner"
    inner.mkdir()
    monkeypatch.chdir(inner)
    return tmp_path


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def codes(*arguments: str) -> list[str]:
    result = run("check", "../net.keras", *arguments)
    return [line.split()[0] for line in result.output.splitlines() if line.startswith("BN")]


def test_the_nearest_file_with_a_table_counts(folder: Path) -> None:
    assert codes() == ["BN201", "BN303"]
    (folder / "pyproject.toml").write_text('[tool.evennorm.check]\nselect = ["BN3", "dead-gamma"]\nbatch-size = 8\n')
    assert codes() == ["BN303"]
    (folder / "inner" / "pyproject.toml").write_text("[tool.other]\n")
    assert codes() == ["BN303"]
    (folder / "inner" / "pyproject.toml").write_text('[tool.evennorm.check]\nignore = "BN303"\nexit-zero = true\n')
    assert codes() == ["BN201"]
    assert run("check", "../net.keras").exit_code == 0


def test_the_command_line_wins(folder: Path) -> None:
    (folder / "pyproject.toml").write_text('[tool.evennorm.check]\nselect = ["BN3"]\njson = true\n')
    assert run("check", "../net.keras").output.startswith("{")
    (folder / "pyproject.toml").write_text('[tool.evennorm.check]\nselect = ["BN3"]\n')
    assert codes("--select", "BN2") == ["BN201"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[tool.evennorm.check\n", "pyproject.toml is not valid TOML: "),
        ("[tool]\nevennorm = 3\n", "[tool.evennorm] must be a table with one table per command; received 3"),
        ("[tool.evennorm]\nselect = 'BN2'\n", "holds one table per command, as [tool.evennorm.check]; received 'select'"),
        ("[tool.evennorm.chekc]\n", "received 'chekc'; there are bench, check, compare, "),
        (
            "[tool.evennorm.check]\nselct = 'BN2'\n",
            "[tool.evennorm.check]: no option 'selct' can be set here; there are batch-size",
        ),
        ("[tool.evennorm.check]\nforce = true\n", "no option 'force' can be set here"),
        (
            "[tool.evennorm.check]\nbatch-size = 'many'\n",
            "--batch-size in pyproject.toml takes a whole number of 1 or more; received 'many'",
        ),
    ],
)
def test_a_name_or_value_that_nothing_has_is_refused(folder: Path, text: str, words: str) -> None:
    (folder / "pyproject.toml").write_text(text)
    result = run("check", "../net.keras")
    assert result.exit_code == 2
    assert words in result.stderr
    assert result.stdout == ""
