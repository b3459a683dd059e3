"""The study of a comparison: which runs it hands out, to whom, what it keeps of them, and where it lies."""

import os
import secrets
import sqlite3
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import optuna
import pytest
import sqlalchemy
from optuna.exceptions import StorageInternalError
from optuna.trial import TrialState

from evennorm.errors import InputError
from evennorm.tools.compare import compare, patience
from evennorm.tools.compare.process import is_gone
from evennorm.tools.compare.racing import planned
from evennorm.tools.compare.study import OURS, PROCESS, RECORD, STALE_SECONDS, Study
from tests.tools.comparing import ENGINE, SOURCES, command, record, refused, settings


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


def test_several_processes_come_to_the_runs_of_one(tmp_path):
    """A sequential study, whose next runs hang on finished ones: which process finishes them, and when, does not matter."""
    values = np.random.default_rng(0).normal(0.8, 0.02, (3, 20))

    def train(run):
        effect = {"none": -0.3, "before": 0.0, "after": 0.001}[run.placement]
        return record(float(values[given.placements.index(run.placement), run.repeat]) + effect)

    given = settings(tmp_path / "alone", placements=("none", "before", "after"), repeats=12, sequential=True)
    ended = []
    for name, processes in (("alone", 1), ("shared", 3)):
        here = replace(given, out=str(tmp_path / name))
        Path(here.out).mkdir()
        studies = [Study(here, {}, plan=lambda records: planned(here, records, 0.001)) for _ in range(processes)]  # noqa: B023
        turn = 0
        while studies[turn % processes].enqueue_missing():
            turn += 1
            studies[turn % processes].work_once(train)
        ended.append(studies[0].records())
    alone, shared = ended
    assert alone == shared
    assert len(alone) == 5 + 12 + 12


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


TOKEN = """
import sys
from evennorm.tools.compare.process import token
print(token(), flush=True)
sys.stdin.read()
"""


@contextmanager
def another_process():
    """One that lives, and its token."""
    environment = os.environ | {"PYTHONPATH": SOURCES}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", TOKEN], env=environment, **pipes) as process:
        yield process, process.stdout.readline().strip()
        process.kill()


def test_a_process_is_told_by_its_token():
    """Not by its number, nor by the name of its host: containers share both."""
    with another_process() as (process, token), another_process() as (other, of_other):
        assert token != of_other
        assert not is_gone(token)
        process.kill()
        process.wait()
        assert is_gone(token)
        assert not is_gone(of_other)
        other.stdin.close()
        other.wait()
    assert not is_gone(of_other), "one that ended by itself leaves nothing behind"
    assert not is_gone(secrets.token_hex(16)), "of another machine nothing is known"
    assert not is_gone("../../etc/passwd")


def test_a_run_of_a_dead_process_is_given_to_another(tmp_path, monkeypatch):
    """One process died before it said which it was; one was killed; one lives here, and one elsewhere."""
    study = Study(settings(tmp_path, placements=("none",), repeats=4), {"epochs": 2})
    study.enqueue_missing()
    with pytest.warns(UserWarning, match="Heartbeat"):  # meant for optimize
        _, dead, here, elsewhere = (study._study.ask() for _ in range(4))
    with another_process() as (process, token), another_process() as (_, of_here):
        dead.set_user_attr(PROCESS, {"token": token})
        here.set_user_attr(PROCESS, {"token": of_here})
        elsewhere.set_user_attr(PROCESS, {"token": secrets.token_hex(16), "host": os.uname().nodename, "pid": process.pid})
        process.kill()
        process.wait()
        now = 1000.0
        monkeypatch.setattr("evennorm.tools.compare.study.time.monotonic", lambda: now)
        study = Study(study.settings, {"epochs": 2})
        taken = []

        def work():
            while study.work_once(lambda run: taken.append(run.repeat) or record()):
                pass

        assert study.enqueue_missing() == 4
        work()
        assert taken == [dead.params.get("repeat", 1)] == [1]
        now += STALE_SECONDS - 1
        study.enqueue_missing()
        work()
        assert taken == [1], "it may be about to say who it is"
        now += 2
        study.enqueue_missing()
        work()
        assert taken == [1, 0]
        assert {trial.number for trial in study._study.get_trials(states=(TrialState.RUNNING,))} == {
            here.number,
            elsewhere.number,
        }


@pytest.mark.parametrize("zone", ["Pacific/Kiritimati", "Pacific/Pago_Pago"])
def test_clocks_of_other_time_zones(tmp_path, zone):
    """A run that another process trains, whose local time is a day away, is neither taken from it nor left for ever."""
    study = Study(settings(tmp_path, placements=("none",), repeats=1), {"epochs": 2})
    study.enqueue_missing()
    look = (
        "import sys; from evennorm.tools.compare.settings import Settings; from evennorm.tools.compare.study import Study; "
        "study = Study(Settings.from_json(sys.argv[1]), {'epochs': 2}); study.enqueue_missing(); "
        "print(study.work_once(lambda run: 1 / 0))"
    )

    def train(run):
        environment = os.environ | {"PYTHONPATH": SOURCES, "TZ": zone}
        done = subprocess.run(
            [sys.executable, "-c", look, study.settings.to_json()], env=environment, capture_output=True, text=True
        )
        assert (done.stdout, done.stderr) == ("False\n", "")
        return record()

    assert study.work_once(train)
    assert len(study.records()) == 1


OPEN = """
import sys
from evennorm.tools.compare.settings import Settings
from evennorm.tools.compare.study import Study
print("ready", flush=True)
sys.stdin.readline()
Study(Settings.from_json(sys.argv[1]), {"epochs": 2}).enqueue_missing()
"""


def test_processes_that_make_one_study_at_the_same_moment(tmp_path):
    """Tables, version and study are made once; who comes second waits, and takes what is there."""
    environment, pipes = os.environ | {"PYTHONPATH": SOURCES}, dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    given = settings(tmp_path, placements=("none",), repeats=1)
    started = [
        subprocess.Popen([sys.executable, "-c", OPEN, given.to_json()], env=environment, text=True, **pipes)
        for _ in range(4)
    ]
    for each in started:
        assert each.stdout.readline() == "ready\n"
    for each in started:
        each.stdin.write("go\n")
        each.stdin.flush()
    assert [each.communicate(timeout=120)[1] for each in started] == [""] * 4
    assert [each.returncode for each in started] == [0] * 4
    assert Study(given, {"epochs": 2}).enqueue_missing() == 1


def test_a_process_that_enqueues_while_another_opens_the_study(tmp_path, monkeypatch):
    """Its runs are not those of another program."""
    given = settings(tmp_path, placements=("none",), repeats=1)
    get_trials = optuna.Study.get_trials

    def after_the_other(study, *arguments, **options):
        monkeypatch.undo()
        assert Study(given, {"epochs": 2}).enqueue_missing() == 1
        return get_trials(study, *arguments, **options)

    monkeypatch.setattr(optuna.Study, "get_trials", after_the_other)
    assert Study(given, {"epochs": 2}).enqueue_missing() == 1


class GoneError(Exception):
    """What a driver of a server says."""


def lost(text="server closed the connection unexpectedly"):
    return sqlalchemy.exc.OperationalError("select 1", {}, GoneError(text), connection_invalidated=True)


@pytest.fixture
def hasty(monkeypatch):
    """Nobody waits; what was to be waited for is listed."""
    waits, now = [], [0.0]

    def sleep(seconds):
        waits.append(seconds)
        now[0] += seconds

    defaults = patience.patiently.__defaults__
    monkeypatch.setattr(patience.patiently, "__defaults__", (*defaults[:-2], sleep, lambda: now[0]))
    return waits


@pytest.mark.parametrize("away", ["get_trials", "ask", "tell"])
def test_a_database_that_comes_back(tmp_path, monkeypatch, hasty, away):
    told = []
    study = Study(settings(tmp_path, placements=("none",), repeats=2), {"epochs": 2}, told.append)
    study.enqueue_missing()
    real, failures = getattr(study._study, away), iter([lost(), StorageInternalError("wrapped")])

    def failing(*args, **kwargs):
        error = next(failures, None)
        if error is None:
            return real(*args, **kwargs)
        raise error from lost()

    monkeypatch.setattr(study._study, away, failing)
    taken = []
    while study.work_once(lambda run: taken.append(run) or record()):
        pass
    assert sorted(taken) == sorted(study.settings.runs), "what is trained once is not trained again"
    assert len(study.records()) == 2
    assert hasty == [0.25, 0.5]
    assert told == [f"{study.settings.place} does not answer; trying for 3 minutes to reach it"]


@pytest.mark.parametrize("raised", [lost, lambda: UnboundLocalError("cannot access local variable 'updated_state'")])
def test_a_database_that_stays_away(tmp_path, monkeypatch, hasty, raised):
    """One line, whatever Optuna makes of it, and after as long as was promised."""
    study = Study(settings(tmp_path, placements=("none",), repeats=1), {"epochs": 2})

    def failing(*args, **kwargs):
        try:
            raise lost()
        finally:
            raise raised()

    monkeypatch.setattr(study._study, "get_trials", failing)
    with pytest.raises(InputError) as refusal:
        study.enqueue_missing()
    text = str(refusal.value)
    assert "server closed the connection unexpectedly; it did not answer for 3 minutes; once it runs again, repeat" in text
    assert "\n" not in text
    assert "--out" not in text
    assert sum(hasty) == patience.PATIENCE_SECONDS == 180
    assert max(hasty) == patience.LONGEST_WAIT


def test_others_are_not_taken_for_dead_where_no_heart_could_beat(tmp_path, monkeypatch, hasty):
    study = Study(settings(tmp_path), {"epochs": 2})
    asked = []
    monkeypatch.setattr("evennorm.tools.compare.study.optuna.storages.fail_stale_trials", asked.append)
    failures = iter([lost()])
    real = study._study.get_trials

    def failing(*args, **kwargs):
        for error in failures:
            raise error
        return real(*args, **kwargs)

    study.enqueue_missing()
    assert len(asked) == 1
    monkeypatch.setattr(study._study, "get_trials", failing)
    study.enqueue_missing()
    assert len(asked) == 2, "the one before the connection was lost; none after it"


def test_a_disk_that_fills_while_a_run_is_trained(tmp_path, monkeypatch):
    """Optuna's assertion "Should not reach." is no traceback here."""
    study = Study(settings(tmp_path, placements=("none",), repeats=1), {"epochs": 2})
    study.enqueue_missing()

    def full(*args, **kwargs):
        try:
            raise StorageInternalError("wrapped") from sqlite3.OperationalError("database or disk is full")
        finally:
            raise AssertionError("Should not reach.")

    monkeypatch.setattr(study._study, "tell", full)
    with pytest.raises(InputError, match="disk is full; make room and repeat the command, which goes on where it stopped"):
        study.work_once(lambda run: record())


def test_an_error_of_the_training_is_none_of_the_database(tmp_path):
    study = Study(settings(tmp_path, placements=("none",), repeats=1), {"epochs": 2})
    study.enqueue_missing()
    for error in (ZeroDivisionError("mine"), KeyboardInterrupt()):

        def train(run, error=error):
            raise error

        with pytest.raises(type(error)):
            study.work_once(train)
        assert study.enqueue_missing() == 1, "others may train it at once"
    assert study.work_once(lambda run: record())


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


def test_a_record_of_before(tmp_path):
    """What stood at chance was called diverged, and a run had no scale: both are read as what they were."""
    study = Study(settings(tmp_path, placements=("none",), repeats=2), {"epochs": 2})
    new = ("learned", "validation_loss", "unit_input")
    old = {name: value for name, value in asdict(record()).items() if name not in new}
    for repeat, losses in enumerate(([1.0, 1.0], [1.0, None])):
        attributes = {OURS: ["none", 0.1, repeat], RECORD: old | {"train_loss": losses, "diverged": True}}
        study._study.add_trial(optuna.trial.create_trial(value=0.5, user_attrs=attributes))
    found = [(r.diverged, r.learned) for r in study.records().values()]
    assert found == [(False, False), (True, False)]


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
    written = sorted(os.listdir(comparison.settings.out))
    # In two epochs this network does not learn, and a model that did not learn is not handed over.
    assert written == ["curves.png", "report.html", "runs.csv", "summary.json"]
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
