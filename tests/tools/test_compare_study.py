"""The study of a comparison: which runs it hands out, to whom, what it keeps of them, and where it lies."""

import os
import sqlite3
import subprocess
import sys

import optuna
import pytest

from evennorm.errors import InputError
from evennorm.tools.compare import compare
from evennorm.tools.compare.study import OURS, PROCESS, Study
from tests.tools.comparing import ENGINE, command, record, refused, settings


def test_a_run_is_handed_out_once(tmp_path):
    first, second = (Study(settings(tmp_path), {"epochs": 2}) for _ in range(2))
    taken = []

    def train(run):
        if len(taken) == 0:
            taken.append(run)
            assert second.work_once(train)  # another process comes by while this run is trained
        else:
            taken.append(run)
        return record()

    while first.enqueue_missing():
        second.enqueue_missing()
        first.work_once(train)
    assert sorted(taken) == sorted(settings(tmp_path).runs)


def test_a_run_that_was_enqueued_twice_is_trained_once(tmp_path):
    study = Study(settings(tmp_path, placements=("none",), repeats=1), {"epochs": 2})
    study.enqueue_missing()
    [run] = study.settings.runs
    study._study.enqueue_trial(run._asdict(), user_attrs={OURS: list(run)})
    taken = []
    for _ in range(2):
        study.work_once(lambda run: taken.append(run) or record())
    assert taken == [run]
    assert study.enqueue_missing() == 0


def test_a_run_of_a_dead_process_is_given_to_another(tmp_path):
    """One process died before it said which it was, long ago; one on this machine; one elsewhere lives."""
    study = Study(settings(tmp_path, placements=("none",), repeats=3), {"epochs": 2})
    study.enqueue_missing()
    with pytest.warns(UserWarning, match="Heartbeat"):  # meant for optimize
        unnamed, dead, alive = (study._study.ask() for _ in range(3))
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    host = os.uname().nodename
    dead.set_user_attr(PROCESS, {"host": host, "pid": gone.pid})
    alive.set_user_attr(PROCESS, {"host": "another machine", "pid": gone.pid})
    connection = sqlite3.connect(tmp_path / "study.sqlite3")
    connection.execute("update trials set datetime_start = '2020-01-01 00:00:00' where number = ?", [unnamed.number])
    connection.commit()
    connection.close()
    study = Study(study.settings, {"epochs": 2})
    assert study.enqueue_missing() == 3
    taken = []
    while study.work_once(lambda run: taken.append(run.repeat) or record()):
        pass
    assert sorted(taken) == [0, 1]


def test_a_process_that_was_taken_for_dead_keeps_nothing(tmp_path):
    study = Study(settings(tmp_path, placements=("none",), repeats=1), {"epochs": 2})
    study.enqueue_missing()

    def train(run):
        study._study.tell(0, state=optuna.trial.TrialState.FAIL)  # the machine slept, another one took over
        return record(test=0.25)

    study.work_once(train)
    assert study.records() == {}
    study.enqueue_missing()
    study.work_once(lambda run: record(test=0.75))
    assert [found.test_accuracy[-1] for found in study.records().values()] == [0.75]


def test_a_record_comes_back_as_it_was(tmp_path):
    study = Study(settings(tmp_path, placements=("none",), repeats=1), {"epochs": 2})
    study.enqueue_missing()
    given = record(train_loss=[0.1234567890123456, None])
    study.work_once(lambda run: given)
    assert Study(study.settings, {"epochs": 2}).records() == {study.settings.runs[0]: given}


def test_a_storage_that_machines_share(data, tmp_path, monkeypatch):
    """The study lies in the database under the folder's name; the files in the folder."""
    monkeypatch.chdir(tmp_path)
    seen = []
    comparison = compare(
        data,
        "paper-mlp",
        placements=["none"],
        repeats=1,
        learning_rates=[0.1],
        epochs=2,
        batch_size=16,
        engine=ENGINE,
        storage="sqlite:///shared.sqlite3",
        progress=lambda done, total: seen.append((done, total)),
    )
    assert comparison.settings.out == os.path.join("evennorm-runs", f"points-paper-mlp-{ENGINE}")
    assert sorted(os.listdir(comparison.settings.out)) == ["curves.png", "runs.csv", "summary.json"]
    assert os.path.exists("shared.sqlite3")
    assert seen == [(0, 1), (0.5, 1), (1, 1), (1, 1)]


def test_a_storage_without_its_driver(data, tmp_path):
    with pytest.raises(InputError, match="install the driver of that database"):
        Study(settings(tmp_path, storage="oracle+oracledb://user@host/x"), {})


def test_a_password_is_shown_nowhere(data, tmp_path):
    given = settings(tmp_path, storage="postgresql://me:se:cret@host/x")
    assert given.place == "postgresql://me:***@host/x"
    assert settings(tmp_path, storage="sqlite:///a:b@c.db").place == "sqlite:///a:b@c.db"
    line = refused(command(data, tmp_path, storage="nonsense://me:secret@host/x"))
    assert "secret" not in line
    assert "nonsense://me:***@host/x" in line
