"""Keep the runs of a comparison in an Optuna study that hands each to one process, once."""

from __future__ import annotations

import logging
import re
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict
from itertools import count
from typing import Any, TypeVar

import optuna
from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError
from optuna.storages import BaseStorage, RDBStorage
from optuna.trial import FrozenTrial, TrialState

from evennorm.errors import InputError
from evennorm.tools.compare.named import COMPARISON, SETTINGS, description, name_of
from evennorm.tools.compare.patience import PATIENCE_SECONDS, RACE_SECONDS, is_lost, is_race, patiently
from evennorm.tools.compare.process import is_gone, token
from evennorm.tools.compare.settings import Run, Settings
from evennorm.tools.compare.storage import HEARTBEAT_SECONDS, STALE_SECONDS, connected, storage_errors, url_of
from evennorm.tools.compare.train import Record
from evennorm.tools.compare.variants import choices, parameters

OURS = "evennorm run"
RECORD = "record"
PROCESS = "process"
"""Attribute of a trial that is being trained: the token of the process."""
TURN = "evennorm enqueues"
"""Attribute of a study: the token of the process that enqueues runs."""
TURN_SECONDS = 0.3
BEAT = "beat"
"""Attribute of a trial that is trained through a proxy, which passes on no heartbeats of Optuna: a number that grows."""

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
        self._turn: tuple[Any, float] = None, 0.0
        """Who asked last to enqueue, and since when that is known here."""
        self._seen: dict[int, tuple[Any, float]] = {}
        """The last beats of running trials, and when they were first seen: no clock of another machine is asked."""
        with self._storage_errors():
            # Two processes may be the first ones at the same moment.
            self._storage, self._study = patiently(lambda: _opened(settings, fingerprint), is_race, RACE_SECONDS)
            self.name = self._study.study_name
            self._call(lambda: self._check_settings(fingerprint))

    def records(self) -> dict[Run, Record]:
        """Return the records of all finished runs that the settings ask for; the first record of a run that was trained
        twice."""
        with self._storage_errors():
            return self._records(self._call(lambda: self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))))

    def _records(self, trials: Sequence[FrozenTrial]) -> dict[Run, Record]:
        possible = self.settings.possible()
        found: dict[Run, Record] = {}
        for trial in trials:
            run = _run_of(trial)
            if trial.state is TrialState.COMPLETE and run is not None and possible(run) and run not in found:
                found[run] = Record.kept(trial.user_attrs[RECORD])
        return found

    def enqueue_missing(self) -> int:
        """Fail the runs of dead processes, and enqueue every planned run that nobody trains; return how many are left to
        finish."""
        with self._storage_errors():
            return self._call(self._enqueue_missing)

    def _enqueue_missing(self) -> int:
        self._fail_dead()
        left, missing, some_wait = self._missing()
        if missing and self.settings.storage is not None:
            if some_wait or not self._has_turn():
                return len(left)
            left, missing, some_wait = self._missing()
            if some_wait:  # another process had the turn before
                return len(left)
        for run in missing:
            self._study.enqueue_trial(_parameters(run), user_attrs={OURS: list(run)})
        return len(left)

    def _missing(self) -> tuple[list[Run], list[Run], bool]:
        """Return planned runs that are not finished, those among them that nobody has, and whether any run waits for a
        process."""
        states: dict[Run | None, set[TrialState]] = {}
        trials = self._study.get_trials(deepcopy=False)
        for trial in trials:
            states.setdefault(_run_of(trial), set()).add(trial.state)
        planned = self._plan(self._records(trials))
        self.planned = len(planned)
        left = [run for run in planned if TrialState.COMPLETE not in states.get(run, ())]
        missing = [run for run in left if not states.get(run, set()) & {TrialState.WAITING, TrialState.RUNNING}]
        return left, missing, any(TrialState.WAITING in found for run, found in states.items() if run is not None)

    def _has_turn(self) -> bool:
        """Return whether this process may enqueue: of several that ask at the same moment, the last one may.

        Twenty that begin together would enqueue every run twenty times. None is trained twice for that, but a hundred runs
        took minutes to sort out.
        """
        turn = self._study.user_attrs.get(TURN)
        if turn not in (None, token()):  # give the process that asked last some time, or all ask for ever
            if self._turn[0] != turn:
                self._turn = turn, time.monotonic()
            if time.monotonic() - self._turn[1] < 3 * TURN_SECONDS:
                return False
        self._study.set_user_attr(TURN, token())
        time.sleep(TURN_SECONDS)
        return bool(self._study.user_attrs.get(TURN) == token())

    def work_once(self, train: Callable[[Run], Record]) -> bool:
        """Train the next waiting run and keep its record; return False where none was waiting.

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
        """Return the next waiting trial, now running; None where there is none."""
        if not self._study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that heartbeats are for optimize, which could not be repeated in parts
            return self._study.ask()

    def _claimed(self, trial: optuna.Trial) -> Run | None:
        """Return the run of a trial that this process was given; None where it is not to be trained."""
        trial.set_user_attr(PROCESS, {"token": token()})
        if OURS not in trial.user_attrs:  # another process was faster, and Optuna made up a trial of its own
            return None
        run = Run(*trial.user_attrs[OURS])
        # For Optuna's pages: constant ranges keep trials of all settings comparable.
        for name in parameters(run.placement):
            trial.suggest_categorical(name, choices(name))
        trial.suggest_float("learning_rate", 1e-12, 1e12, log=True)
        trial.suggest_int("repeat", 0, 10**9)
        if run.scale != 1:
            trial.suggest_float("scale", 1e-12, 1e12, log=True)
        return None if not self.settings.possible()(run) or self._taken(trial, run) else run

    def _end(self, trial: optuna.Trial, record: Record | None) -> None:
        """Store the record, except for a trial that was taken for dead, as after a long sleep: its run is trained again."""
        with suppress(ValueError, UpdateFinishedTrialError):
            if record is None:
                self._study.tell(trial, state=TrialState.PRUNED)
            else:
                trial.set_user_attr(RECORD, asdict(record))
                self._study.tell(trial, record.test_accuracy[-1])

    @contextmanager
    def _beating(self, trial: optuna.Trial) -> Iterator[None]:
        """Show others that the process of a trial lives; a beat that fails is left out."""
        done = threading.Event()

        def beat() -> None:
            for number in count():
                with suppress(Exception):
                    if isinstance(self._storage, RDBStorage):
                        self._storage.record_heartbeat(trial._trial_id)
                    else:
                        self._storage.set_trial_user_attr(trial._trial_id, BEAT, number)
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
        """Return whether an earlier trial has the same run: two processes may have enqueued it at the same moment."""
        return any(
            _run_of(trial) == run
            and (trial.state is TrialState.COMPLETE or (trial.state is TrialState.RUNNING and trial.number < mine.number))
            for trial in self._study.get_trials(deepcopy=False)
        )

    def _fail_dead(self) -> None:
        """Fail running trials whose process is gone.

        Optuna's heartbeat knows most, unless the database was away, when nobody's heart could beat. On this machine there is
        no need to wait for silence, since a process that ended left its lock. One that died before it said who it was, or
        that is behind a proxy, is known by what is seen here: that it says nothing new for as long. Another process may
        have failed a trial in the meantime, which is as good.
        """
        if self._lost_at is None or time.monotonic() - self._lost_at > STALE_SECONDS:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ExperimentalWarning)
                with suppress(UpdateFinishedTrialError):
                    optuna.storages.fail_stale_trials(self._study)
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            process = trial.user_attrs.get(PROCESS)
            dead = self._is_silent(trial) if process is None or BEAT in trial.user_attrs else False
            dead = dead or (process is not None and is_gone(str(process.get("token", ""))))
            if dead:
                with suppress(UpdateFinishedTrialError):
                    self._study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)

    def _is_silent(self, trial: FrozenTrial) -> bool:
        """Return whether a running trial has shown no new beat for long, although the database was there to show it."""
        beat, now = trial.user_attrs.get(BEAT), time.monotonic()
        if trial.number not in self._seen or self._seen[trial.number][0] != beat:
            self._seen[trial.number] = beat, now
        since = self._seen[trial.number][1]
        return now - (since if self._lost_at is None else max(since, self._lost_at)) > STALE_SECONDS

    def _call(self, call: Callable[[], T]) -> T:
        """Call the database, and repeat the call for some minutes where the connection was lost."""
        told = False

        def notice(error: BaseException) -> None:
            nonlocal told
            self._lost_at = time.monotonic()
            if not told:
                told = True
                self._tell(f"{self.settings.place} does not answer; trying for {PATIENCE_SECONDS // 60} minutes to reach it")

        return patiently(call, is_lost, PATIENCE_SECONDS, notice)

    def _check_settings(self, fingerprint: dict[str, Any]) -> None:
        other = "another --out" if self.settings.storage is None else "another --study"
        # In this order: another process sets it before it enqueues trials, and may do both just now.
        trials, found = self._study.get_trials(deepcopy=False), self._study.user_attrs.get(SETTINGS)
        if found is None:
            if trials:
                raise InputError(f"{self.settings.place} holds a study {self.name!r} of another program; choose {other}")
            self._study.set_user_attr(SETTINGS, fingerprint)
            found = self._study.user_attrs.get(SETTINGS)  # another process may have been first
        names = [name for name in fingerprint | found if _content(found.get(name)) != _content(fingerprint.get(name))]
        if names:
            differences = "; ".join(f"{name} {found.get(name)} there, {fingerprint.get(name)} here" for name in names)
            raise InputError(
                f"{self.settings.place} was made by other settings ({differences}); choose {other}, "
                "or the settings it was made by"
            )
        if self.settings.out and self._study.user_attrs.get(COMPARISON) != description(self.settings):
            self._study.set_user_attr(COMPARISON, description(self.settings))

    def _storage_errors(self) -> AbstractContextManager[None]:
        return storage_errors(self.settings.place, lambda: hasattr(self, "_study"))


def _content(value: Any) -> Any:
    """Return a part of a fingerprint without file names, which may differ between machines."""
    digest = re.search(r"\([0-9a-f]{16}\)$", value) if isinstance(value, str) else None
    return value if digest is None else digest.group()


def _opened(settings: Settings, fingerprint: dict[str, Any]) -> tuple[BaseStorage, optuna.Study]:
    storage = connected(url_of(settings))
    study = optuna.create_study(
        study_name=name_of(storage, settings, fingerprint),
        storage=storage,
        sampler=optuna.samplers.RandomSampler(),
        direction="maximize",
        load_if_exists=True,
    )
    return storage, study


def _parameters(run: Run) -> dict[str, Any]:
    """Return the run as parameters of a trial."""
    named = {name: value for name, value in run._asdict().items() if name != "placement"}
    return parameters(run.placement) | named


def _run_of(trial: FrozenTrial) -> Run | None:
    """Return the run of a trial that was enqueued here; None for any other."""
    run = trial.user_attrs.get(OURS)
    return None if run is None else Run(*run)
