"""`evennorm compare --tensorboard`: what stands in the event files, and that a repeated command writes nothing twice."""

import importlib.util
import json

import pytest

from evennorm.tools.compare.settings import Run
from evennorm.tools.compare.tensorboard import write_runs
from tests.events import events
from tests.tools.comparing import command, record, refused

pytest.importorskip("tensorboardX")


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_each_run_has_its_curves(tmp_path):
    values = record(0.75, 0.5, test_loss=[0.5, None], validation_loss=[2.0, 1.0])
    write_runs(str(tmp_path), {Run("before:layer", 0.1, 0): values, Run("none", 0.5, 1, 4.0): record()}, "accuracy")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["before-layer-0.1-0", "none-0.5-1-x4"]
    assert events(tmp_path / "before-layer-0.1-0") == pytest.approx(
        {("loss/train", 1): 1.0, ("loss/train", 2): 1.0, ("loss/test", 1): 0.5}
        | {("loss/validation", 1): 2.0, ("loss/validation", 2): 1.0}
        | {("accuracy/train", 1): 0.2, ("accuracy/train", 2): 0.85}
        | {("accuracy/test", 1): 0.1, ("accuracy/test", 2): 0.75, ("accuracy/validation", 2): 0.5}
    )


def test_nothing_is_written_twice_and_what_has_changed_is_exchanged(tmp_path):
    run = Run("none", 0.1, 0)
    write_runs(str(tmp_path), {run: record(0.5)}, "accuracy")
    before = files(tmp_path)
    write_runs(str(tmp_path), {run: record(0.5)}, "accuracy")
    assert files(tmp_path) == before
    write_runs(str(tmp_path), {run: record(0.7)}, "accuracy")
    assert events(tmp_path / "none-0.1-0")["accuracy/test", 2] == pytest.approx(0.7)
    assert len(files(tmp_path)) == 1
    (tmp_path / "none-0.1-0" / "events.out.tfevents.1.mine").write_bytes(b"mine")
    write_runs(str(tmp_path), {run: record(0.6)}, "accuracy")
    assert b"mine" in files(tmp_path).values()


def test_the_command(data, tmp_path):
    """The last test loss is that of runs.csv; a second command leaves the files as they are."""
    changes = {"placements": "none", "repeats": 1, "learning_rates": "0.5", "epochs": 2, "tensorboard": tmp_path / "curves"}
    result = command(data, tmp_path / "results", "--no-model", **changes)
    assert result.exit_code == 0, result.output
    before = files(tmp_path / "curves")
    [row] = json.loads((tmp_path / "results" / "summary.json").read_text())["table"]
    found = events(tmp_path / "curves" / "none-0.5-0")
    assert found["accuracy/test", 2] == pytest.approx(row["test_accuracy"])
    assert {step for _, step in found} == {1, 2}
    assert command(data, tmp_path / "results", "--no-model", **changes).exit_code == 0
    assert files(tmp_path / "curves") == before


def test_what_cannot_be_written_is_refused_before_training(data, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    message = refused(command(data, tmp_path / "results", tensorboard=tmp_path / "file"))
    assert "choose a folder that takes new files" in message
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "tensorboardX" else find(name, *rest)
    )
    assert "evennorm[tensorboard]" in refused(command(data, tmp_path / "results", tensorboard=tmp_path / "curves"))
    assert not (tmp_path / "results").exists()
