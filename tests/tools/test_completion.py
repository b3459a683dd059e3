"""The shells' completion, as docs/install.md sets it up."""

import pytest
from click.testing import CliRunner

from evennorm.cli import main


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_is_given_its_script(shell: str) -> None:
    result = CliRunner().invoke(main, [], prog_name="evennorm", env={"_EVENNORM_COMPLETE": f"{shell}_source"})
    assert result.exit_code == 0
    assert "_EVENNORM_COMPLETE" in result.output
    assert f"{shell}_complete" in result.output


@pytest.mark.parametrize(
    ("words", "offered"),
    [("evennorm ch", "check"), ("evennorm check --ex", "--exit-zero"), ("evennorm check --format g", "github")],
)
def test_commands_options_and_choices_are_completed(words: str, offered: str) -> None:
    given = {"_EVENNORM_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    result = CliRunner().invoke(main, [], prog_name="evennorm", env=given)
    assert offered in {line.partition(",")[2] for line in result.output.splitlines()}
