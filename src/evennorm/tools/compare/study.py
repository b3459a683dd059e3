"""Settings and runs go in; an Optuna study that hands each run to one process, once, and keeps its record comes out."""

from __future__ import annotations

import logging
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import optuna
import sqlalchemy
from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from evennorm.errors import EvennormError, InputError
from evennorm.tools.compare.patience import (
    PATIENCE_SECONDS,
    RACE_SECONDS,
    chain,
    is_lost,
    is_of_storage,
    is_race,
    patiently,
)
from evennorm.tools.compare.process import is_gone, token
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
"""Of a trial that is being trained: the token of the process."""

Plan = Callable[[Mapping[Run, Record]], list[Run]]

T = TypeVar("T")


class Study:
    """The runs of one comparison in an Optuna storage that several processes, on several machines, may share.

    A run is a trial that was enqueued with fixed parameters. Optuna hands each waiting trial to one process, and its
    heartbeat, by the clock of the database in UTC, tells whether that process still lives; a trial whose process died is
    failed and its run enqueued again. A database that was there and does not answer any more is waited for.

    Args:
        settings: name the storage and the study.
        fingerprint: whatever must be the same for runs to be comparable, in words a reader can compare.
        notice: is told, once, that a database is being waited for.
        plan: the runs that are worth training, by the records of those that finished; None is all of the settings.

    Raises:
        InputError: the storage cannot be used, or the study in it was made by other settings.
    """

    def __init__(
        self,
        settings: Settings,
        fingerprint: dict[str, Any],
        notice: Callable[[str], None] = lambda text: None,
        plan: Plan | None = None,
    ):
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        logging.getLogger("sqlalchemy.pool").setLevel(logging.CRITICAL)  # it logs a trace where Ctrl-C meets a statement
        self.settings = settings
        self.planned = 0
        """Runs that are worth training, finished ones included, as far as was known at the last `enqueue_missing`."""
        self._plan = plan or (lambda records: settings.runs)
        self._tell = notice
        self._lost_at: float | None = None
        self._unnamed: dict[int, float] = {}
        """When running trials were first seen that say nothing of their process."""
        with self._storage_errors():
            # Two processes may be the first ones at the same moment.
            self._storage, self._study = patiently(lambda: _opened(settings), is_race, RACE_SECONDS)
            self._call(lambda: self._check_settings(fingerprint))

    def records(self) -> dict[Run, Record]:
        """The records of all finished runs that the settings ask for; of one that was trained twice, the first."""
        with self._storage_errors():
            return self._records(self._call(lambda: self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))))

    def _records(self, trials: Sequence[FrozenTrial]) -> dict[Run, Record]:
        asked = set(self.settings.runs)
        found: dict[Run, Record] = {}
        for trial in trials:
            run = _run_of(trial)
            if trial.state is TrialState.COMPLETE and run in asked and run not in found:
                found[run] = Record.kept(trial.user_attrs[RECORD])
        return found

    def enqueue_missing(self) -> int:
        """Fails the runs of dead processes, enqueues every planned run that nobody trains; how many are left to finish."""
        with self._storage_errors():
            return self._call(self._enqueue_missing)

    def _enqueue_missing(self) -> int:
        self._fail_dead()
        states: dict[Run | None, set[TrialState]] = {}
        trials = self._study.get_trials(deepcopy=False)
        for trial in trials:
            states.setdefault(_run_of(trial), set()).add(trial.state)
        planned = self._plan(self._records(trials))
        self.planned = len(planned)
        left = [run for run in planned if TrialState.COMPLETE not in states.get(run, ())]
        for run in left:
            if not states.get(run, set()) & {TrialState.WAITING, TrialState.RUNNING}:
                self._study.enqueue_trial(run._asdict(), user_attrs={OURS: list(run)})
        return len(left)

    def work_once(self, train: Callable[[Run], Record]) -> bool:
        """Trains the next waiting run and keeps its record; False where none was waiting.

        Raises:
            InputError: the storage failed.
        """
        with self._storage_errors():
            trial = self._call(self._next)
        if trial is None:
            return False
        try:
            with self._beating(trial):
                with self._storage_errors():
                    run = self._call(lambda: self._claimed(trial))
                record = None if run is None else train(run)
                with self._storage_errors():
                    self._call(lambda: self._end(trial, record))
        except BaseException:  # also Ctrl-C: others may train the run at once
            with suppress(Exception):
                self._study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)
            raise
        return True

    def _next(self) -> optuna.Trial | None:
        """The next waiting trial, now running; None where there is none."""
        if not self._study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that heartbeats are for optimize, which could not be repeated in parts
            return self._study.ask()

    def _claimed(self, trial: optuna.Trial) -> Run | None:
        """The run of a trial that this process was handed; None where it is not to be trained."""
        trial.set_user_attr(PROCESS, {"token": token()})
        if OURS not in trial.user_attrs:  # another process was faster, and Optuna made up a trial of its own
            return None
        # Fixed parameters come back whatever the ranges; constant ranges keep trials of all settings comparable for Optuna.
        run = Run(
            str(trial.suggest_categorical("placement", PLACEMENTS)),
            trial.suggest_float("learning_rate", 1e-12, 1e12, log=True),
            trial.suggest_int("repeat", 0, 10**9),
        )
        return None if run not in self.settings.runs or self._taken(trial, run) else run

    def _end(self, trial: optuna.Trial, record: Record | None) -> None:
        """Keeps the record; nothing of a trial that was taken for dead, as after a long sleep: its run is trained again."""
        with suppress(ValueError, UpdateFinishedTrialError):
            if record is None:
                self._study.tell(trial, state=TrialState.PRUNED)
            else:
                trial.set_user_attr(RECORD, asdict(record))
                self._study.tell(trial, record.test_accuracy[-1])

    @contextmanager
    def _beating(self, trial: optuna.Trial) -> Iterator[None]:
        """Shows others that the process of a trial lives; a beat that fails is left out."""
        done = threading.Event()

        def beat() -> None:
            while True:
                with suppress(Exception):
                    self._storage.record_heartbeat(trial._trial_id)
                if done.wait(HEARTBEAT_SECONDS):
                    return

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join(HEARTBEAT_SECONDS)  # a database that hangs is not waited for here

    def _taken(self, mine: optuna.Trial, run: Run) -> bool:
        """Whether an earlier trial has the same run: two processes may have enqueued it at the same moment."""
        return any(
            _run_of(trial) == run
            and (trial.state is TrialState.COMPLETE or (trial.state is TrialState.RUNNING and trial.number < mine.number))
            for trial in self._study.get_trials(deepcopy=False)
        )

    def _fail_dead(self) -> None:
        """Fails running trials whose process is gone.

        Optuna's heartbeat knows most, unless the database was away, when nobody's heart could beat. On this machine there is
        no need to wait for silence, since a process that ended left its lock. One that died before it said who it was is
        known by what is seen here: that it says nothing for as long.
        """
        if self._lost_at is None or time.monotonic() - self._lost_at > STALE_SECONDS:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ExperimentalWarning)
                optuna.storages.fail_stale_trials(self._study)
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            process = trial.user_attrs.get(PROCESS)
            if process is None:
                first = self._unnamed.setdefault(trial.number, time.monotonic())
                dead = time.monotonic() - first > STALE_SECONDS
            else:
                dead = is_gone(str(process.get("token", "")))
            if dead:
                self._study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)

    def _call(self, call: Callable[[], T]) -> T:
        """A call to the database, repeated for some minutes where the connection was lost."""
        told = False

        def notice(error: BaseException) -> None:
            nonlocal told
            self._lost_at = time.monotonic()
            if not told:
                told = True
                self._tell(f"{self.settings.place} does not answer; trying for {PATIENCE_SECONDS // 60} minutes to reach it")

        return patiently(call, is_lost, PATIENCE_SECONDS, notice)

    def _check_settings(self, fingerprint: dict[str, Any]) -> None:
        found = self._study.user_attrs.get(SETTINGS)
        if found is None:
            if self._study.get_trials(deepcopy=False):
                raise InputError(
                    f"{self.settings.place} holds a study {self.settings.study_name!r} of another program; "
                    "choose another --out"
                )
            self._study.set_user_attr(SETTINGS, fingerprint)
            found = self._study.user_attrs.get(SETTINGS)  # another process may have been first
        if found != fingerprint:
            names = [name for name in fingerprint | found if found.get(name) != fingerprint.get(name)]
            differences = "; ".join(f"{name} {found.get(name)} there, {fingerprint.get(name)} here" for name in names)
            raise InputError(
                f"{self.settings.place} was made by other settings ({differences}); choose another --out, "
                "or the settings it was made by"
            )

    @contextmanager
    def _storage_errors(self) -> Iterator[None]:
        """One line instead of the traces of a database, and of what Optuna makes of it."""
        try:
            yield
        except EvennormError:
            raise
        except Exception as error:
            if not is_of_storage(error):
                raise
            raise InputError(
                f"the study in {self.settings.place} cannot be used: {_reason(error, was_there=hasattr(self, '_study'))}"
            ) from error


def _opened(settings: Settings) -> tuple[optuna.storages.RDBStorage, optuna.Study]:
    storage = _storage(settings)
    study = optuna.create_study(
        study_name=settings.study_name,
        storage=storage,
        sampler=optuna.samplers.RandomSampler(),
        direction="maximize",
        load_if_exists=True,
    )
    return storage, study


def _storage(settings: Settings) -> optuna.storages.RDBStorage:
    if settings.storage is None:
        url = sqlalchemy.URL.create("sqlite", database=str(Path(settings.out, "study.sqlite3").resolve()))
        address = url.render_as_string(hide_password=False)
    else:
        address = settings.storage
    is_sqlite = address.startswith("sqlite")
    # pool_pre_ping: a connection that was lost while a run was trained is made anew.
    arguments: dict[str, Any] = {"connect_args": {"timeout": LOCK_SECONDS}} if is_sqlite else {"pool_pre_ping": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        try:
            storage = optuna.storages.RDBStorage(
                address, arguments, heartbeat_interval=HEARTBEAT_SECONDS, grace_period=STALE_SECONDS
            )
        except (ImportError, ValueError, RuntimeError) as error:
            if is_race(error):
                raise
            raise InputError(f"the storage {settings.place} cannot be used: {_reason(error)}") from error
    if is_sqlite:
        _lock_before_reading(storage.engine)
    else:
        _in_utc(storage.engine)
    return storage


_UTC = {"postgresql": "SET TIME ZONE 'UTC'", "mysql": "SET time_zone = '+00:00'", "mariadb": "SET time_zone = '+00:00'"}


def _in_utc(engine: sqlalchemy.Engine) -> None:
    """Lets all processes read the clock of the database in one time zone: Optuna compares heartbeats without theirs."""
    statement = _UTC.get(engine.dialect.name)
    if statement is None:
        return

    @sqlalchemy.event.listens_for(engine, "connect")
    def _set(connection: Any, record: Any) -> None:
        cursor = connection.cursor()
        cursor.execute(statement)
        cursor.close()
        connection.commit()

    engine.dispose()  # connections from before the change


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


def _reason(error: Exception, was_there: bool = False) -> str:
    """The cause in one line, and what to do."""
    *_, cause = chain(error)
    cause = getattr(cause, "orig", None) or cause  # what the driver said
    text = " ".join(str(cause).split()) or type(cause).__name__
    if is_lost(error) and was_there:
        return (
            f"{text}; it did not answer for {PATIENCE_SECONDS // 60} minutes; once it runs again, repeat the command, which "
            "goes on where it stopped"
        )
    if is_lost(error):
        return f"{text}; start that database, or correct --storage, and repeat the command"
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
