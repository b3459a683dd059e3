"""`evennorm compare` as users meet it: the command, its files, interruptions, bad input, and the same numbers every time."""

import csv
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import keras
import numpy as np
import optuna
import pytest
from click.testing import CliRunner

import evennorm
from evennorm.cli import main
from evennorm.errors import InputError
from evennorm.tools.compare import compare
from evennorm.tools.compare.settings import Run, Settings
from evennorm.tools.compare.statistics import differences
from evennorm.tools.compare.study import OURS, PROCESS, Study
from evennorm.tools.compare.table import epochs_to_reach, rows, verdict
from evennorm.tools.compare.train import Record, seed_of

ENGINE = keras.config.backend()
TINY = """
import keras
from keras import layers as L

def network(input_shape, classes):
    return keras.Sequential([keras.Input(input_shape), L.Dense(4, "tanh"), L.Dropout(0.1), L.Dense(classes, "softmax")])
"""
SOURCES = str(Path(evennorm.__file__).parents[1])


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Points in the plane, in two classes that a small network tells apart."""
    path = tmp_path_factory.mktemp("data") / "points.npz"
    random = np.random.default_rng(0)
    x = random.normal(size=(120, 2)).astype("float32")
    y = (x[:, 0] > x[:, 1]).astype(int)
    np.savez(path, x_train=x[:100], y_train=y[:100], x_test=x[100:], y_test=y[100:])
    (path.parent / "tiny_network.py").write_text(TINY)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(path.parent)
        patch.setenv("PYTHONPATH", os.pathsep.join([SOURCES, str(path.parent)]))
        yield str(path)


def options(data, out, **changes):
    values = {
        "data": data,
        "model": "tiny_network:network",
        "placements": "none,before",
        "repeats": 3,
        "learning-rates": "0.1,0.5",
        "epochs": 3,
        "batch-size": 16,
        "engine": ENGINE,
        "out": out,
    }
    values |= {name.replace("_", "-"): value for name, value in changes.items()}
    return [part for name, value in values.items() if value is not None for part in (f"--{name}", str(value))]


def command(data, out, *flags, **changes):
    return CliRunner().invoke(main, ["compare", *options(data, out, **changes), *flags], prog_name="evennorm")


def process(data, out, first="pass", **changes):
    """The same command in a process of its own, which can be killed."""
    if ENGINE != "tensorflow":
        first += "; import sys; sys.modules['tensorflow'] = None"  # Keras would load it, for seconds, only to seed it
    program = f"{first}\nfrom evennorm.cli import main; main(prog_name='evennorm')"
    return subprocess.Popen(
        [sys.executable, "-c", program, "compare", *options(data, out, **changes)],
        env=os.environ | {"KERAS_BACKEND": ENGINE},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def table_of(out):
    """runs.csv without what a clock says."""
    with open(Path(out, "runs.csv"), encoding="utf-8", newline="") as file:
        return [{name: value for name, value in row.items() if name != "seconds_per_epoch"} for row in csv.DictReader(file)]


def selected(out, *values):
    """The rows that begin with these values: placement, rate, repeat."""
    return [row for row in table_of(out) if tuple(row.values())[: len(values)] == values]


def trials(out, state=None):
    """How many trials are in a state, read while others write."""
    try:
        connection = sqlite3.connect(f"file:{Path(out, 'study.sqlite3')}?mode=ro", uri=True, timeout=10)
        try:
            return connection.execute("select count(*) from trials where state like ?", [state or "%"]).fetchone()[0]
        finally:
            connection.close()
    except sqlite3.OperationalError:  # not there yet
        return 0


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.05)


def refused(result):
    """The one line that a refused command prints."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    [line] = result.stderr.strip().splitlines()
    assert line.startswith("evennorm: ")
    return line


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """One comparison that ran through, with what it printed."""
    out = tmp_path_factory.mktemp("finished") / "results"
    result = command(data, out)
    assert result.exit_code == 0, result.output
    return out, result


def test_it_prints_a_table_and_a_verdict(finished):
    out, result = finished
    lines = result.stdout.splitlines()
    assert lines[0] == "tiny_network:network on points.npz: 80 training, 20 validation and 20 test samples of 2, 2 classes"
    assert lines[1].startswith("repeats: 3, epochs: 3, batches of 16; " + ENGINE)
    assert [line.split()[0] for line in lines if line.startswith(("none ", "before "))] == [
        "none",
        "none",
        "before",
        "before",
    ]
    assert max(map(len, lines[3:9])) <= 80
    assert (
        sum(line.startswith("In 3 paired repeats, each placement at the rate that validation chose, ") for line in lines)
        == 1
    )
    assert lines[-1] == f"runs.csv, summary.json and curves.png are in {out}"
    assert result.stderr.strip() == ""


def test_it_writes_every_run(finished):
    out, _ = finished
    table = table_of(out)
    assert [(row["placement"], row["learning_rate"], row["repeat"]) for row in table] == [
        (placement, rate, repeat) for placement in ("none", "before") for rate in ("0.1", "0.5") for repeat in "012"
    ]
    assert {(row["repeat"], row["seed"]) for row in table} == {(str(repeat), str(seed_of(0, repeat))) for repeat in range(3)}
    for row in table:
        assert (float(row["test_accuracy"]) * 20).is_integer()
        assert (float(row["validation_accuracy"]) * 20).is_integer()
        assert row["epochs"] == "3"


def test_the_summary_agrees_with_the_runs(finished):
    out, _ = finished
    summary = json.loads((out / "summary.json").read_text())
    runs = table_of(out)
    for row in summary["table"]:
        mine = [r for r in runs if (r["placement"], float(r["learning_rate"])) == (row["placement"], row["learning_rate"])]
        test = np.array([float(r["test_accuracy"]) for r in mine])
        train = np.array([float(r["train_accuracy"]) for r in mine])
        assert row["test_accuracy"] == pytest.approx(test.mean())
        assert row["curve"][-1] == pytest.approx(test.mean())
        assert row["high"] - row["test_accuracy"] == pytest.approx(4.302653 * test.std(ddof=1) / 3**0.5, rel=1e-6)
        assert row["gap"] == pytest.approx((train - test).mean())
        assert row["diverged"] == sum(int(r["diverged"]) for r in mine)
        assert row["seconds_per_epoch"] > 0
    assert sum(row["chosen"] for row in summary["table"]) == 2 * 3
    assert summary["settings"]["batch_size"] == 16
    assert summary["fingerprint"]["versions"].startswith(f"evennorm {evennorm.__version__}, keras {keras.__version__}")
    assert ENGINE in summary["device"]


def test_the_picture_is_a_picture(finished):
    from PIL import Image

    with Image.open(finished[0] / "curves.png") as picture:
        picture.load()
        assert picture.size[0] > 800
        colours = {colour for _, colour in picture.convert("RGB").getcolors(maxcolors=2**24)}
    assert {(0, 0, 0), (0, 0x72, 0xB2)} <= colours  # the lines of none and before
    assert [path.name for path in finished[0].iterdir() if path.name.startswith(".")] == []


def test_the_same_command_trains_nothing_again(finished, data):
    out, first = finished
    files = {name: (out / name).read_bytes() for name in ("runs.csv", "summary.json", "study.sqlite3")}
    again = command(data, out)
    assert again.exit_code == 0
    assert again.stdout == first.stdout
    assert {name: (out / name).read_bytes() for name in files} == files


def test_json_is_all_there_is_on_stdout(finished, data):
    out, _ = finished
    result = command(data, out, "--json")
    assert json.loads(result.stdout) == json.loads((out / "summary.json").read_text())


def test_fewer_or_more_runs_give_the_same_numbers(finished, data, tmp_path):
    """Another folder, other runs before each run: the numbers of a run depend on the run alone."""
    out, _ = finished
    assert command(data, tmp_path / "part", placements="before", repeats=1, learning_rates="0.5").exit_code == 0
    assert table_of(tmp_path / "part") == selected(out, "before", "0.5", "0")
    # More repeats in the same folder train only those that are missing.
    assert command(data, tmp_path / "part", placements="before", repeats=3, learning_rates="0.5").exit_code == 0
    assert table_of(tmp_path / "part") == selected(out, "before", "0.5")
    assert trials(tmp_path / "part", "COMPLETE") == trials(tmp_path / "part") == 3


def test_another_seed_gives_other_numbers(finished, data, tmp_path):
    command(data, tmp_path, placements="none", repeats=1, learning_rates="0.5", seed=1)
    [row] = table_of(tmp_path)
    [other] = selected(finished[0], "none", "0.5", "0")
    assert row["seed"] != other["seed"]
    assert row["test_loss"] != other["test_loss"]


def test_after_kill_9_the_same_command_trains_what_is_missing(finished, data, tmp_path):
    killed = process(data, tmp_path, placements="before")
    wait_for(lambda: trials(tmp_path, "COMPLETE") >= 2)
    killed.kill()
    killed.communicate()
    assert trials(tmp_path, "COMPLETE") < 6
    result = command(data, tmp_path, placements="before")
    assert result.exit_code == 0, result.output
    assert table_of(tmp_path) == selected(finished[0], "before")
    assert trials(tmp_path, "COMPLETE") == 6
    assert trials(tmp_path, "RUNNING") == trials(tmp_path, "WAITING") == 0


def test_ctrl_c_keeps_what_is_finished(data, tmp_path):
    running = process(data, tmp_path, placements="none", repeats=50)
    wait_for(lambda: trials(tmp_path, "COMPLETE") >= 1)
    running.send_signal(signal.SIGINT)
    stdout, stderr = running.communicate(timeout=60)
    assert running.returncode == 130
    assert stdout == ""
    assert stderr.strip() == "evennorm: interrupted; finished runs are kept, the same command goes on from there"
    assert 1 <= trials(tmp_path, "COMPLETE") < 100


def test_two_processes_share_the_runs(finished, data, tmp_path):
    result = command(data, tmp_path, placements="none", jobs=2)
    assert result.exit_code == 0, result.output
    assert table_of(tmp_path) == selected(finished[0], "none")
    assert trials(tmp_path, "COMPLETE") == trials(tmp_path) == 6


def test_workers_that_end_are_told_of(data, tmp_path, monkeypatch):
    from evennorm.tools.compare import work

    monkeypatch.setattr(work.sys, "executable", "/bin/false")
    assert "a worker ended with exit code 1; what is trained is kept" in refused(command(data, tmp_path, jobs=2))


def settings(out, **changes):
    values = {
        "data": "points",
        "model": "paper-mlp",
        "placements": ("none", "before"),
        "repeats": 2,
        "learning_rates": (0.1,),
        "epochs": 2,
        "batch_size": 16,
        "engine": ENGINE,
        "seed": 0,
        "out": str(out),
    }
    return Settings(**values | changes)


def record(test=0.5, validation=0.5, **changes):
    values = {"test_accuracy": [0.1, test], "test_loss": [1.0, 1.0], "train_accuracy": [0.2, test + 0.1]}
    values |= {"train_loss": [1.0, 1.0], "seconds": [9.0, 2.0], "validation_accuracy": validation, "diverged": False}
    return Record(**values | changes)


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


HURRY = """
import sys
from evennorm.tools.compare.settings import Settings
from evennorm.tools.compare.study import Study
from evennorm.tools.compare.train import Record

study = Study(Settings.from_json(sys.argv[1]), {"epochs": 2})
print("ready", flush=True)
sys.stdin.readline()
taken = []
while study.work_once(lambda run: taken.append(run) or Record([0.5], [1.0], [0.5], [1.0], [1.0], 0.5, False)):
    pass
print(taken)
"""


def test_processes_that_hurry_get_different_runs(tmp_path):
    """Without a lock, SQLite hands out about one run in ten twice."""
    given = settings(tmp_path, repeats=20)
    Study(given, {"epochs": 2}).enqueue_missing()
    hurried = [
        subprocess.Popen(
            [sys.executable, "-c", HURRY, given.to_json()],
            env=os.environ | {"PYTHONPATH": SOURCES},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for each in hurried:
        assert each.stdout.readline() == "ready\n"
    for each in hurried:
        each.stdin.write("go\n")
        each.stdin.flush()
    runs = [run for each in hurried for run in eval(each.communicate()[0], {"Run": Run})]
    assert [each.returncode for each in hurried] == [0, 0]
    assert sorted(runs) == sorted(given.runs)


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


def made_records(given, accuracies):
    """{placement: (test, validation) as (rates, repeats)}"""
    return {
        Run(placement, rate, repeat): record(test[i][repeat], validation[i][repeat])
        for placement, (test, validation) in accuracies.items()
        for i, rate in enumerate(given.learning_rates)
        for repeat in range(given.repeats)
    }


def test_rows_by_hand(tmp_path):
    given = settings(tmp_path, learning_rates=(0.1, 0.5))
    records = made_records(
        given,
        {
            "none": ([[0.5, 0.7], [0.2, 0.2]], [[0.6, 0.6], [0.2, 0.2]]),
            "before": ([[0.5, 0.6], [0.8, 0.9]], [[0.5, 0.5], [0.8, 0.8]]),
        },
    )
    found = {(row.placement, row.learning_rate): row for row in rows(given, records)}
    none = found["none", 0.1]
    assert none.test_accuracy == pytest.approx(0.6)
    assert none.curve == pytest.approx([0.1, 0.6])
    assert (none.chosen, found["none", 0.5].chosen, found["before", 0.1].chosen, found["before", 0.5].chosen) == (2, 0, 0, 2)
    # t(0.975, 1 degree of freedom) = 12.7062; standard deviation of 0.5 and 0.7 is 0.1 * sqrt(2)
    assert (none.high - none.low) / 2 == pytest.approx(12.7062 * 0.1, rel=1e-5)
    assert none.epochs_to_reference == 2
    assert found["before", 0.1].epochs_to_reference is None  # 0.55 never reaches 0.6
    assert found["before", 0.5].epochs_to_reference == 2
    assert none.gap == pytest.approx(0.1)
    assert none.seconds_per_epoch == 2  # the first epoch, 9 seconds, includes compilation


def test_epochs_to_reach():
    assert epochs_to_reach(np.array([0.1, 0.5, 0.4, 0.6]), 0.5) == 2
    assert epochs_to_reach(np.array([0.1, 0.5]), 0.6) is None
    assert epochs_to_reach(np.array([0.1, 0.1 + 0.2]), 0.3) == 2


def test_the_verdict_claims_what_is_shown(tmp_path):
    given = settings(tmp_path, placements=("none", "before", "after"), repeats=4)
    none = np.array([0.70, 0.71, 0.72, 0.73])
    scores = {
        "none": none,
        "before": none + np.array([0.10, 0.11, 0.10, 0.11]),
        "after": none + np.array([0.11, 0.09, 0.10, 0.14]),
    }
    assert verdict(given, differences(scores, 0.001)) == (
        "In 4 paired repeats, each placement at the rate that validation chose, test accuracy is higher "
        "with after than with none by 11.0 (5.8 to 16.2) and with before than with none by 10.5 (9.1 to 11.9) percentage "
        "points; no difference could be shown between after and before, which would probably need 185 repeats."
    )


def test_the_verdict_where_nothing_can_be_claimed(tmp_path):
    scores = {"none": np.array([0.7]), "before": np.array([0.9])}
    one = settings(tmp_path, repeats=1)
    assert verdict(one, differences(scores, 0.01)) == (
        "One repeat tells nothing about chance, so no difference can be claimed: use --repeats 5 or more."
    )
    alone = settings(tmp_path, placements=("none",))
    assert verdict(alone, []) == "Only none was trained, so there is nothing to compare it with."


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
        ({"placements": "none,nonsense"}, "placements are none, before, after, input, as-is; received 'nonsense'"),
        ({"placements": "none,none"}, "placements are one or more, each named once; received none, none"),
        ({"placements": ","}, "placements are one or more, each named once; received none"),
        ({"engine": "nonsense"}, "engines that train are jax, torch, tensorflow; received 'nonsense'"),
        ({"engine": next(e for e in ("torch", "jax") if e != ENGINE)}, f"Keras runs on {ENGINE} in this process already"),
        ({"learning_rates": "0.1,x"}, "--learning-rates takes numbers, as in 0.02,0.1; received 'x'"),
        ({"learning_rates": "-1"}, "a learning rate is a number above 0; received -1"),
        ({"repeats": "0"}, "the number of repeats must be at least 1; received 0"),
        ({"epochs": "0"}, "the number of epochs must be at least 1; received 0"),
        ({"batch_size": "1"}, "the batch size must be at least 2; received 1"),
        ({"batch_size": "81"}, "received a batch size of 81 for 80 samples; choose a smaller --batch-size"),
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
    assert f"holds a study {tmp_path.name!r} of another program; choose another --out" in refused(command(data, tmp_path))


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
