"""Wrong words of a command: one line that says the rule, what was received and where to read more, for every command."""

from __future__ import annotations

import click
import pytest
from click.testing import CliRunner

from evennorm.cli import main

COMMANDS = sorted(main.commands)
REQUIRED = {
    "check": ["m"],
    "fold": ["m", "-o", "f"],
    "migrate": ["m", "-o", "f"],
    "recalibrate": ["m", "--data", "d", "-o", "f"],
}


def line(*words: str) -> str:
    result = CliRunner().invoke(main, list(words), prog_name="evennorm")
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    assert result.stderr.startswith("evennorm: ")
    assert result.stderr.count("\n") == 1
    return result.stderr.removeprefix("evennorm: ").rstrip()


def options(name: str) -> list[tuple[str, click.Option]]:
    """The options of a command that take a value, by their longest names."""
    found = (each for each in main.commands[name].params if isinstance(each, click.Option))
    return [(max(each.opts, key=len), each) for each in found if not each.is_flag]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_says_in_one_line_what_is_wrong(name: str) -> None:
    given = REQUIRED.get(name, [])
    see = f"see `evennorm {name} --help`"
    assert line(name, *given, "--zzz") == f"there is no option --zzz; {see}"
    assert line(name, *given, "--jsn") == f"there is no option --jsn; write --json, or {see}"
    assert line(name, *given, "--quiet=3") == f"--quiet takes no value; {see}"
    extra = line(name, "m", *given, "n")
    assert extra.startswith(f"{name} takes ")
    assert extra.endswith(f" too; {see}")
    for option, parameter in options(name):
        if not parameter._flag_needs_value:
            assert line(name, *given, option) == f"{option} needs a value, which is missing; {see}"
        if parameter.type.name != "text":
            wrong = line(name, *given, option, "wrong")
            assert wrong.startswith(
                (f"{option} takes one of ", f"{option} takes a whole number", f"{option} takes a number")
            )
            assert wrong.endswith(f"; received 'wrong'; {see}")
    if given:
        assert line(name) == f"{name} needs {'OLD' if name == 'migrate' else 'MODEL'}, which is missing; {see}"
    if given[1:]:
        told = line(name, given[0])
        assert told.startswith(f"{name} needs --")
        assert told.endswith(f", which is missing; {see}")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("chek", "there is no command 'chek'; there are bench, check, compare, doctor, explain, fold, migrate, recalibrate; "
         "write check, or see `evennorm --help`"),
        ("--quite", "there is no option --quite; write --quiet, or see `evennorm --help`"),
        ("check", "check needs MODEL, which is missing; see `evennorm check --help`"),
        ("recalibrate m", "recalibrate needs --data DATA, which is missing; see `evennorm recalibrate --help`"),
        ("check a b", "check takes MODEL; received 'b' too; see `evennorm check --help`"),
        ("doctor a", "doctor takes options only; received 'a' too; see `evennorm doctor --help`"),
        ("check a --format xml", "--format takes one of text, json, sarif, github; received 'xml'; see `evennorm check "
         "--help`"),
        ("check a --batches 0", "--batches takes a whole number of 1 or more; received 0; see `evennorm check --help`"),
        ("check a --x\x1b[2J", r"there is no option --x\x1b[2J; see `evennorm check --help`"),
    ],
)  # fmt: skip
def test_lines(words: str, told: str) -> None:
    assert line(*words.split(" ")) == told


def test_a_value_from_the_configuration_is_told_as_one(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pyproject.toml").write_text("[tool.evennorm.check]\nbatches = 0\n")
    told = "--batches in pyproject.toml takes a whole number of 1 or more; received 0; see `evennorm check --help`"
    assert line("check", "m") == told
    assert "in pyproject.toml" not in line("check", "m", "--batches", "0")


def test_without_words_the_help_is_shown() -> None:
    result = CliRunner().invoke(main, [], prog_name="evennorm")
    assert "Commands:" in result.output
