"""Train all missing runs of a study, in this process or in several."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from evennorm.errors import InputError
from evennorm.tools.compare.data import Data, load_data
from evennorm.tools.compare.engine import select_engine, share_of_cores, versions
from evennorm.tools.compare.layout import UNCHANGED
from evennorm.tools.compare.models import Architecture, load_model
from evennorm.tools.compare.racing import planned
from evennorm.tools.compare.search import resolved, search
from evennorm.tools.compare.settings import Run, Settings
from evennorm.tools.compare.study import Study
from evennorm.tools.compare.train import Record, Trainer
from evennorm.tools.without_tensorflow import leave_tensorflow_out

if TYPE_CHECKING:
    from evennorm.tools.compare.torch_models import TorchArchitecture

WAIT_SECONDS = 0.5
"""Seconds between two looks at runs that other processes train."""

Report = Callable[[float, int], None]
"""A callback that gets the number of runs done, parts of runs counted, and the number of all."""


class Progress:
    """The sum of what several workers have done."""

    def __init__(self, settings: Settings, finished: int, report: Report, notice: Callable[[str], None] = lambda text: None):
        self._epochs = settings.epochs
        self._total = 1 if settings.sequential else len(settings.runs)
        self._finished = finished
        self._partial: dict[int, float] = {}
        self._report = report
        self._lock = threading.Lock()
        self.notice = notice
        """Is told what the user should know meanwhile."""
        report(finished, self._total)

    def expect(self, total: int) -> None:
        """Set how many runs are worth training, as far as is known."""
        with self._lock:
            if total != self._total:
                self._total = total
                self._tell()

    def epoch(self, worker: int = 0) -> None:
        """Count one more epoch."""
        with self._lock:
            self._partial[worker] = self._partial.get(worker, 0) + 1 / self._epochs
            self._tell()

    def run(self, worker: int = 0) -> None:
        """Count one run as finished, after however many epochs."""
        with self._lock:
            self._partial[worker] = 0
            self._finished += 1
            self._tell()

    def _tell(self) -> None:
        self._report(min(self._finished + sum(self._partial.values()), self._total), self._total)


def prepare(settings: Settings, data: Data | None = None) -> tuple[Data, Architecture | TorchArchitecture, dict[str, Any]]:
    """Load data and model on the engine of the settings, and describe what decides the numbers.

    Raises:
        EvennormError: data or model cannot be used, or there is no such placement in the model.
    """
    data = data or prepare_data(settings, settings.task)
    if settings.framework == "torch":
        from evennorm.tools.compare.torch_models import load_torch_model

        architecture: Any = load_torch_model(settings.model, data)
    else:
        architecture = load_model(settings.model, data)
    fingerprint = {
        "data": f"{data.name} ({data.digest[:16]})",
        "model": f"{architecture.name} ({architecture.digest[:16]})",
        "optimizer": json.dumps(architecture.optimizer["config"], sort_keys=True, default=str)
        if settings.model not in ("article-cnn", "paper-mlp")
        else "SGD, momentum 0.9",
        "epochs": f"auto, {settings.epochs} at most" if settings.until_flat else settings.epochs,
        "batch size": settings.batch_size,
        "seed": settings.seed,
        "engine": settings.engine,
        "versions": ", ".join(
            f"{name} {version}" for name, version in versions(settings.engine, settings.framework).items()
        ),
    }
    if settings.framework == "torch":
        fingerprint |= {"optimizer": "SGD, momentum 0.9", "engine": f"torch on {settings.device}"}
    if (settings.task, settings.metric) != ("classification", "accuracy"):
        fingerprint |= {"task": settings.task, "metric": settings.metric}
    return data, architecture, fingerprint


def prepare_data(settings: Settings, task: str | None) -> Data:
    """Load the data, once the engine is chosen; their task is chosen from the labels where it is None."""
    if settings.framework == "keras":
        select_engine(settings.engine)
        leave_tensorflow_out()
    wanted = "channels_first" if settings.framework == "torch" else "channels_last"
    if settings.model.endswith(".keras") and settings.data_format is None:
        wanted = UNCHANGED  # a file says itself what it takes
    return load_data(settings.data, task, wanted, settings.data_format)


def trainer_for(settings: Settings, data: Data, architecture: Any) -> Trainer:
    """Return the trainer for the runs of a model."""
    if settings.framework == "keras":
        from evennorm.tools.compare.keras_train import KerasTrainer

        return KerasTrainer(settings, data, architecture)
    from evennorm.tools.compare.torch_train import TorchTrainer

    return TorchTrainer(settings, data, architecture)


def join_study(
    settings: Settings, data: Data, fingerprint: dict[str, Any], notice: Callable[[str], None] = lambda text: None
) -> Study:
    """Return the study of these settings, which hands out the runs that are worth training."""
    step = settings.measure.step(len(data.x_test))
    return Study(settings, fingerprint, notice, lambda records: _planned(settings, records, step))


def _planned(settings: Settings, records: Mapping[Run, Record], step: float) -> list[Run]:
    """Return the runs that are worth training: first those of a search, then those of the comparison with its result."""
    searching = search(settings, records).runs if settings.search else []
    known = resolved(settings, records)
    return searching if known is None else searching + planned(known, records, step)


def work(study: Study, trainer: Trainer, progress: Progress) -> None:
    """Train until no run is missing, and wait for those that other processes train."""

    def train(run: Run) -> Record:
        record = trainer.train(run, progress.epoch)
        progress.run()
        return record

    while study.enqueue_missing():
        progress.expect(study.planned)
        if not study.work_once(train):
            time.sleep(WAIT_SECONDS)


def work_in_processes(settings: Settings, jobs: int, progress: Progress) -> None:
    """Do the same by `jobs` new processes, each on its share of the cores; they end when this one does.

    Raises:
        InputError: a worker could not go on.
    """
    environment = os.environ | share_of_cores(jobs) | {"PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "evennorm.tools.compare.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches this process alone, which ends the workers
        )
        for _ in range(jobs)
    ]
    problems: list[str] = []
    readers = [
        threading.Thread(target=_read, args=(index, worker, progress, problems), daemon=True)
        for index, worker in enumerate(workers)
    ]
    try:
        for worker, reader in zip(workers, readers, strict=True):
            reader.start()
            assert worker.stdin is not None
            with suppress(BrokenPipeError):  # the reader of a worker that ended already reports it
                worker.stdin.write(settings.to_json() + "\n")
                worker.stdin.flush()
        for reader in readers:
            reader.join()
    finally:
        for worker, reader in zip(workers, readers, strict=True):
            if worker.poll() is None:
                worker.terminate()
            with suppress(BrokenPipeError), worker:  # waits, and closes its pipes
                if reader.is_alive():
                    reader.join()
    if problems:
        raise InputError(problems[0])


def _read(index: int, worker: subprocess.Popen[str], progress: Progress, problems: list[str]) -> None:
    """Follow one worker, which writes a line of JSON for each epoch, each run, and an error."""
    assert worker.stdout is not None
    problem = None
    for line in worker.stdout:
        event, detail = json.loads(line)
        if event == "epoch":
            progress.epoch(index)
        elif event == "run":
            progress.run(index)
        elif event == "total":
            progress.expect(detail)
        elif event == "notice":
            progress.notice(detail)
        else:
            problem = detail
    code = worker.wait()
    if code != 0:
        ended = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        problems.append(
            problem
            or f"a worker ended {ended}; what is trained is kept: repeat the command, with fewer --jobs if memory was short"
        )
