"""What long commands show of their progress: on stderr, on a terminal alone, with the time left, not with --quiet."""

from __future__ import annotations

import io

import numpy as np
import pytest
from click.testing import CliRunner
from rich.console import Console

from evennorm.cli import main, progress
from tests.migration.building import layer, sequential
from tests.migration.keras1 import Keras1
from tests.tools.comparing import importable

NETS = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2)).eval()
"""
COMMANDS = {
    "check": (("check", "barred:net", "--data", "x.npz", "--batches", "3", "--batch-size", "8"), ["24 samples"]),
    "fold": (("fold", "barred:net", "-o", "out.pt", "--data", "x.npz", "--force", "--no-speed"), ["comparing", "writing"]),
    "recalibrate": (
        ("recalibrate", "barred:net", "--data", "x.npz", "-o", "out.pt", "--force"),
        ["outputs after"],
    ),
    "explain": (("explain", "barred:net", "--shape", "8,4"), ["loading"]),
    "migrate": (("migrate", "old.h5", "-o", "new.keras", "--force"), ["migrating old", "building", "writing"]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("progress")
    (path / "barred.py").write_text(NETS)
    old, model = Keras1(), sequential((4,), layer("Dense", output_dim=3), layer("BatchNormalization"))
    old.predict(model, np.zeros((2, 4)))
    old.save(path / "old.h5", model)
    np.savez(path / "x.npz", x=np.random.default_rng(0).normal(size=(40, 4)).astype("float32"))
    with importable(path):
        yield path


@pytest.fixture
def screen(folder, monkeypatch):
    """What a terminal of 40 columns is sent."""
    monkeypatch.chdir(folder)
    file = io.StringIO()
    terminal = Console(file=file, force_terminal=True, force_interactive=True, width=40, height=20)
    monkeypatch.setattr(progress, "terminal", lambda: terminal)
    return file


def lines(screen: io.StringIO) -> list[str]:
    """The frames that were drawn, without codes."""
    from rich.text import Text

    return [
        line for part in screen.getvalue().split("\r") for line in Text.from_ansi(part).plain.splitlines() if line.strip()
    ]


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_show_progress_on_a_terminal_only(name, screen, monkeypatch) -> None:
    words, stages = COMMANDS[name]
    moved: list[str] = []
    plain = progress.Progress.__call__
    monkeypatch.setattr(
        progress.Progress, "__call__", lambda self, what, *rest: (moved.append(what), plain(self, what, *rest))[1]
    )
    result = CliRunner().invoke(main, list(words))
    seen = "\n".join([*moved, *lines(screen)])
    for stage in stages:
        assert stage in seen, (seen, result.output)
    assert all(len(line) <= 40 for line in lines(screen))
    assert "\\n" not in result.stdout
    drawn = len(screen.getvalue())
    quiet = CliRunner().invoke(main, [*words, "--quiet"])
    assert len(screen.getvalue()) == drawn
    assert (quiet.exit_code, quiet.stdout, quiet.stderr) == (result.exit_code, result.stdout, result.stderr)


def test_nothing_is_drawn_where_stderr_is_no_terminal(folder, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    result = CliRunner().invoke(main, list(COMMANDS["check"][0]))
    assert result.exit_code == 1
    assert result.stderr == ""


@pytest.mark.parametrize("width", [40, 80])
def test_the_time_left_is_told_where_the_end_is_known(width, monkeypatch) -> None:
    file, now = io.StringIO(), [0.0]
    terminal = Console(file=file, force_terminal=True, width=width, height=20, get_time=lambda: now[0], no_color=True)
    monkeypatch.setattr(progress, "terminal", lambda: terminal)
    with progress.bar() as move:
        move("a long name of what is being done", 0, 10)
        for done in range(1, 6):
            now[0] += 2.0
            move("a long name of what is being done", done, 10)
        move._shown.refresh()
        told = lines(file)[-1]
        assert "00:10 left" in told
        assert len(told) <= width
        assert ("a long name of what is being done" in told) == (width == 80)
        move("counting", 7)
        move._shown.refresh()
        assert "counting" in lines(file)[-1]
        assert "left" not in lines(file)[-1]
    assert "\x1b[3" not in file.getvalue()  # no colours where NO_COLOR asks for none
