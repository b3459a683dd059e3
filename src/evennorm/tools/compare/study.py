"""Settings and runs go in; an Optuna study that hands each run to one process, once, and keeps its record comes out."""

from __future__ import annotations

import logging
import os
import socket
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from optuna.exceptions import ExperimentalWarning, StorageInternalError, TrialPruned, UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from evennorm.errors import EvennormError, InputError
from evennorm.tools.compare.settings import PLACEMENTS, Run, Settings
from evennorm.tools.compare.train import Record

HEARTBEAT_SECONDS = 2
STALE_SECONDS = 20
"""A run whose process gave no sign of life for so long is given to another one."""

LOCK_SECONDS = 60
"""How long a process waits for another one to finish writing to a SQLite file."""

OURS = "evennorm run"
SETTINGS = "evennorm settings"
RECORD = "record"
PROCESS = "process"


class Study:
    """The runs of one comparison in an Optuna storage that several processes, on several machines, may share.

    A run is a trial that was enqueued with fixed parameters. Optuna hands each waiting trial to one process, and its
    heartbeat tells whether that process still lives; a trial whose process died is failed and its run enqueued again.

    Args:
        settings: name the storage and the study.
        fingerprint: whatever must be the same for runs to be comparable, in words a reader can compare.

    Raises:
        InputError: the storage cannot be used, or the study in it was made by other settings.
    """

    def __init__(self, settings: Settings, fingerprint: dict[str, Any]):
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        logging.getLogger("sqlalchemy.pool").setLevel(logging.CRITICAL)  # it logs a trace where Ctrl-C meets a statement
        self.settings = settings
        with self._storage_errors():
            self._storage = _storage(settings)
            self._study = optuna.create_study(
                study_name=settings.study_name,
                storage=self._storage,
                sampler=optuna.samplers.RandomSampler(),
                direction="maximize",
                load_if_exists=True,
            )
            self._check_settings(fingerprint)

    def records(self) -> dict[Run, Record]:
        """The records of all finished runs that the settings ask for; of one that was trained twice, the first."""
        asked = set(self.settings.runs)
        found: dict[Run, Record] = {}
        with self._storage_errors():
            for trial in self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
                run = _run_of(trial)
                if run in asked and run not in found:
                    found[run] = Record(**trial.user_attrs[RECORD])
        return found

    def enqueue_missing(self) -> int:
        """Fails the runs of dead processes, enqueues every run that nobody has trained or is training; how many are left."""
        with self._storage_errors():
            self._fail_dead()
            states: dict[Run | None, set[TrialState]] = {}
            for trial in self._study.get_trials(deepcopy=False):
                states.setdefault(_run_of(trial), set()).add(trial.state)
            left = [run for run in self.settings.runs if TrialState.COMPLETE not in states.get(run, ())]
            for run in left:
                if not states.get(run, set()) & {TrialState.WAITING, TrialState.RUNNING}:
                    self._study.enqueue_trial(run._asdict(), user_attrs={OURS: list(run)})
            return len(left)

    def work_once(self, train: Callable[[Run], Record]) -> bool:
        """Trains the next waiting run and keeps its record; False where none was waiting.

        Raises:
            InputError: the storage failed.
        """
        trained = False

        def objective(trial: optuna.Trial) -> float:
            nonlocal trained
            record = train(self._claimed(trial))
            trained = True
            trial.set_user_attr(RECORD, asdict(record))
            return record.test_accuracy[-1]

        with self._storage_errors():
            if not self._study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
                return False
            try:
                self._study.optimize(objective, n_trials=1)
            except (ValueError, UpdateFinishedTrialError):
                # The trial was taken for dead, as after a long sleep of the machine; who took it trains the run again.
                if not trained:
                    raise
            return True

    def _claimed(self, trial: optuna.Trial) -> Run:
        """The run of a trial that this process was handed; prunes the trial where it is not to be trained."""
        if OURS not in trial.user_attrs:  # another process was faster, and Optuna made up a trial of its own
            raise TrialPruned
        # Fixed parameters come back whatever the ranges; constant ranges keep trials of all settings comparable for Optuna.
        run = Run(
            str(trial.suggest_categorical("placement", PLACEMENTS)),
            trial.suggest_float("learning_rate", 1e-12, 1e12, log=True),
            trial.suggest_int("repeat", 0, 10**9),
        )
        if run not in self.settings.runs or self._taken(trial, run):
            raise TrialPruned
        trial.set_user_attr(PROCESS, {"host": socket.gethostname(), "pid": os.getpid()})
        return run

    def _taken(self, mine: optuna.Trial, run: Run) -> bool:
        """Whether an earlier trial has the same run: two processes may have enqueued it at the same moment."""
        return any(
            _run_of(trial) == run
            and (trial.state is TrialState.COMPLETE or (trial.state is TrialState.RUNNING and trial.number < mine.number))
            for trial in self._study.get_trials(deepcopy=False)
        )

    def _fail_dead(self) -> None:
        """Fails running trials whose process is gone.

        Optuna's heartbeat knows most. It does not know a trial whose process died before the first beat; and on this
        machine there is no need to wait for silence, since the process can be looked for.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            optuna.storages.fail_stale_trials(self._study)
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            process = trial.user_attrs.get(PROCESS)
            if process is None:
                dead = datetime.now() - (trial.datetime_start or datetime.now()) > timedelta(seconds=STALE_SECONDS)
            else:
                dead = process["host"] == socket.gethostname() and not _lives(process["pid"])
            if dead:
                self._study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)

    def _check_settings(self, fingerprint: dict[str, Any]) -> None:
        found = self._study.user_attrs.get(SETTINGS)
        if found is None:
            if self._study.get_trials(deepcopy=False):
                raise InputError(
                    f"{self.settings.place} holds a study {self.settings.study_name!r} of another program; "
                    "choose another --out"
                )
            self._study.set_user_attr(SETTINGS, fingerprint)
        elif found != fingerprint:
            names = [name for name in fingerprint | found if found.get(name) != fingerprint.get(name)]
            differences = "; ".join(f"{name} {found.get(name)} there, {fingerprint.get(name)} here" for name in names)
            raise InputError(
                f"{self.settings.place} was made by other settings ({differences}); choose another --out, "
                "or the settings it was made by"
            )

    @contextmanager
    def _storage_errors(self) -> Iterator[None]:
        """One line instead of the traces of a database; those of Optuna's heartbeat thread are left out."""
        shown = threading.excepthook
        threading.excepthook = lambda args: None if isinstance(args.exc_value, _STORAGE_ERRORS) else shown(args)
        try:
            yield
        except EvennormError:
            raise
        except _STORAGE_ERRORS as error:
            raise InputError(f"the study in {self.settings.place} cannot be used: {_reason(error)}") from error
        finally:
            threading.excepthook = shown


_STORAGE_ERRORS = (StorageInternalError, sqlalchemy.exc.SQLAlchemyError)


def _storage(settings: Settings) -> optuna.storages.RDBStorage:
    if settings.storage is None:
        url = sqlalchemy.URL.create("sqlite", database=str(Path(settings.out, "study.sqlite3").resolve()))
        address = url.render_as_string(hide_password=False)
    else:
        address = settings.storage
    is_sqlite = address.startswith("sqlite")
    arguments = {"connect_args": {"timeout": LOCK_SECONDS}} if is_sqlite else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        try:
            storage = optuna.storages.RDBStorage(
                address, arguments, heartbeat_interval=HEARTBEAT_SECONDS, grace_period=STALE_SECONDS
            )
        except (ImportError, ValueError, RuntimeError) as error:
            raise InputError(f"the storage {settings.place} cannot be used: {_reason(error)}") from error
    if is_sqlite:
        _lock_before_reading(storage.engine)
    return storage


def _lock_before_reading(engine: sqlalchemy.Engine) -> None:
    """Makes "read the state of a trial, then change it" one step on SQLite too.

    Optuna asks for that by SELECT ... FOR UPDATE, which SQLite does not know: two processes were handed the same trial
    (optuna#4621). The way is that of SQLAlchemy's page on SQLite, "Serializable isolation / Savepoints / Transactional DDL".
    """

    @sqlalchemy.event.listens_for(engine, "connect")
    def _leave_transactions_to_us(connection: Any, record: Any) -> None:
        connection.isolation_level = None

    @sqlalchemy.event.listens_for(engine, "begin")
    def _begin(connection: sqlalchemy.Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    engine.dispose()  # connections from before the change


def _reason(error: Exception) -> str:
    """The cause in one line, and what to do."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    text = " ".join(str(cause).split())
    if "full" in text or "disk I/O" in text:
        return f"{text}; make room and repeat the command, which goes on where it stopped"
    if "locked" in text:
        return f"{text} for {LOCK_SECONDS} seconds by another process; end that one, or wait, and repeat the command"
    if "not a database" in text or "malformed" in text:
        return f"{text}; it is damaged or something else; move it away or choose another --out"
    if isinstance(error, ImportError):
        return f"{text}; install the driver of that database"
    if isinstance(error, sqlalchemy.exc.ArgumentError | sqlalchemy.exc.NoSuchModuleError):
        return f"{text}; a storage is a URL as in sqlite:///file.sqlite3 or postgresql://user@host/database"
    return f"{text}; choose another --out or --storage"


def _run_of(trial: FrozenTrial) -> Run | None:
    """The run of a trial that was enqueued here; None for any other."""
    run = trial.user_attrs.get(OURS)
    return None if run is None else Run(*run)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
