"""What `evennorm compare` refuses: one line says the rule, what arrived and what to do, and files stay as they were."""

import numpy as np
import optuna
import pytest

from tests.tools.comparing import ENGINE, command, process, refused


def test_other_settings_in_the_same_folder(finished, data):
    out, _ = finished
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    line = refused(command(data, out, epochs=4, seed=1))
    assert "made by other settings (epochs 3 there, 4 here; seed 0 there, 1 here); choose another --out" in line
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_other_data_under_the_same_name(finished, data, tmp_path):
    with np.load(data) as arrays:
        changed = dict(arrays)
    changed["x_train"] = changed["x_train"] + np.float32(1e-3)
    other = tmp_path / "points.npz"
    np.savez(other, **changed)
    assert "made by other settings (data points.npz (" in refused(command(other, finished[0]))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": "nonsense"}, "received 'nonsense', which is none of these"),
        ({"model": "nonsense"}, "received 'nonsense', which is none of these"),
        (
            {"placements": "none,nonsense"},
            "or before:layer and the like with layer, group or rms normalization; received 'nonsense'",
        ),
        ({"placements": "none,none"}, "placements are one or more, each named once; received none, none"),
        ({"placements": ","}, "placements are one or more, each named once; received none"),
        ({"engine": "nonsense"}, "engines that train are jax, torch, tensorflow; received 'nonsense'"),
        ({"engine": next(e for e in ("torch", "jax") if e != ENGINE)}, f"Keras runs on {ENGINE} in this process already"),
        ({"learning_rates": "0.1,x"}, "--learning-rates takes numbers, as in 0.02,0.1; received 'x'"),
        ({"learning_rates": "-1"}, "a learning rate is a number above 0; received -1"),
        ({"repeats": "0"}, "the number of repeats must be at least 1; received 0"),
        ({"repeats": None, "max_repeats": "2"}, "the number of repeats must be at least 3; received 2"),
        ({"equivalent": "0"}, "a difference that counts as none lies between 0 and 100 points; received 0"),
        ({"equivalent": "nan"}, "a difference that counts as none lies between 0 and 100 points; received nan"),
        ({"epochs": "0"}, "the number of epochs must be at least 1; received 0"),
        ({"epochs": "auto:0"}, "the number of epochs must be at least 1; received 0"),
        ({"epochs": "auto:x"}, "epochs are a number, auto or auto:BUDGET, as in auto:50; received 'auto:x'"),
        ({"epochs": "until:5"}, "epochs are a number, auto or auto:BUDGET, as in auto:50; received 'until:5'"),
        ({"batch_size": "1"}, "the batch size must be at least 2; received 1"),
        ({"batch_size": "81"}, "received a batch size of 81 for 80 samples; choose a smaller --batch-size"),
        ({"tensorboard": ""}, "--tensorboard is empty; give it a value, or leave it out"),
        ({"metric": ""}, "--metric is empty; give it a value, or leave it out"),
        ({"storage": ""}, "--storage is empty; give it a value, or leave it out"),
        ({"jobs": "0"}, "the number of jobs must be at least 1; received 0"),
        ({"storage": "nonsense"}, "a storage is a URL as in sqlite:///file.sqlite3"),
        ({"storage": "nonsense://host/x"}, "a storage is a URL as in sqlite:///file.sqlite3"),
        ({"model": "article-cnn"}, "article-cnn takes images; received samples of shape (2,)"),
    ],
)
def test_bad_input(data, tmp_path, changes, words):
    assert words in refused(command(changes.pop("data", data), tmp_path / "out", **changes))
    assert not (tmp_path / "out" / "study.sqlite3").exists()


@pytest.mark.parametrize("inside", ["a file", "a file/below it"])
def test_a_folder_that_cannot_be_written(data, tmp_path, inside):
    (tmp_path / "a file").write_text("mine")
    line = refused(command(data, tmp_path / inside))
    assert f"--out {tmp_path / inside} cannot be written to: " in line
    assert (tmp_path / "a file").read_text() == "mine"


def test_a_study_file_that_is_none(data, tmp_path):
    study = tmp_path / "study.sqlite3"
    study.write_bytes(b"my notes, not a database, long enough to be taken for one" * 40)
    before = study.read_bytes()
    line = refused(command(data, tmp_path))
    assert f"the study in {study} cannot be used: file is not a database; it is damaged or something else" in line
    assert study.read_bytes() == before


def test_a_study_of_another_program(data, tmp_path):
    url = f"sqlite:///{tmp_path / 'study.sqlite3'}"
    optuna.create_study(storage=url, study_name=tmp_path.name).optimize(
        lambda trial: trial.suggest_float("x", 0, 1), n_trials=1
    )
    assert f"holds a study {tmp_path.name!r} of another program; choose another --out" in refused(
        command(data, tmp_path, study=tmp_path.name)
    )


def test_a_full_disk(data, tmp_path):
    """No file may grow beyond 100 KB, which is less than an empty study needs."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))"
    running = process(data, tmp_path, first=limit)
    stdout, stderr = running.communicate()
    assert running.returncode == 2
    assert stdout == ""
    [line] = stderr.strip().splitlines()
    assert "make room and repeat the command, which goes on where it stopped" in line


def test_a_picture_that_cannot_be_written(finished, data, monkeypatch):
    """The older one stays, and nothing is left lying around."""
    out, _ = finished
    before = (out / "curves.png").read_bytes()

    def full(settings, records, title, path):
        path.write_bytes(b"the first half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("evennorm.tools.compare.curves.draw_curves", full)
    assert "curves.png: No space left on device; make room and repeat the command" in refused(command(data, out))
    assert (out / "curves.png").read_bytes() == before
    assert [path.name for path in out.iterdir() if path.name.startswith(".")] == []
