"""Train runs one after the other, and record metric, loss and times epoch by epoch; a framework says what differs."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any, ClassVar

import numpy as np

from evennorm.errors import ArgumentError
from evennorm.tools.compare.data import Data
from evennorm.tools.compare.flat import is_flat
from evennorm.tools.compare.metrics import measured_by
from evennorm.tools.compare.settings import Run, Settings
from evennorm.tools.compare.tasks import Judgement, judged, predictions

EVALUATION_BATCH = 500


@dataclass(frozen=True)
class Record:
    """What one run showed. Lists have one entry per epoch; a run whose loss stopped being finite has fewer.

    Of another metric than accuracy, its values stand where accuracies do.
    """

    test_accuracy: list[float]
    test_loss: list[float | None]
    train_accuracy: list[float]
    """Of the first training samples, as many as there are test samples, in inference mode like the test."""

    train_loss: list[float | None]
    seconds: list[float]
    """Of training alone. The first epoch may include compilation."""

    validation_accuracy: float
    """After the last epoch."""

    diverged: bool
    """The loss stopped being finite."""

    learned: bool = True
    """Training ended better than by always naming the commonest class."""

    validation_loss: list[float | None] = field(default_factory=list)
    """Where it decides when training ends: of the validation samples."""

    unit_input: list[list[float]] = field(default_factory=list)
    """Where it is recorded: percentiles of one hidden unit's input after each epoch (`drift`)."""

    @classmethod
    def kept(cls, values: dict[str, Any]) -> Record:
        """The record that a study keeps as `values`; studies of before called runs at chance diverged too."""
        if "learned" not in values:
            finite = values["train_loss"][-1] is not None
            values = values | {"learned": not values["diverged"], "diverged": values["diverged"] and not finite}
        return cls(**values)


class Trainer(ABC):
    """Train runs on one data set. A run gives the same numbers whichever runs came before it."""

    framework: ClassVar[str]

    def __init__(self, settings: Settings, data: Data, architecture: Any):
        check_batch(settings, data)
        self.settings = settings
        self.architecture = architecture
        self.unchanged = data
        self.data = data.binarized() if architecture.binarize else data
        self.measured = measured_by(settings.measure, settings.task, self.framework, data.y_test, data.classes)

    @abstractmethod
    def start(self, run: Run) -> tuple[Any, Callable[[np.ndarray], float]]:
        """Return a model in the state that the run's seed starts from, and a function that trains it batch after batch.

        The function takes indices of training samples, a whole number of batches, and returns the mean loss.
        """

    @abstractmethod
    def set_seed(self, seed: int) -> None:
        """Seed what the framework draws: initial weights and dropout."""

    @abstractmethod
    def outputs(self, model: Any, x: np.ndarray) -> np.ndarray:
        """Return what the model gives for samples, in inference mode."""

    @abstractmethod
    def from_logits(self, model: Any) -> bool:
        """Say whether its outputs are scores, rather than probabilities."""

    @abstractmethod
    def unit_input(self, run: Run, model: Any) -> list[float] | None:
        """Return percentiles of one hidden unit's input now (`drift`); None where the model has no such unit."""

    def train(self, run: Run, after_epoch: Callable[[], None] = lambda: None) -> Record:
        """Train from the initial weights of the run's seed; call `after_epoch` after every epoch."""
        return self.trained(run, after_epoch)[1]

    def trained(self, run: Run, after_epoch: Callable[[], None] = lambda: None) -> tuple[Any, Record]:
        """Return the model, as it is until the next run, and what it showed.

        The order is drawn here, so that all placements and engines see the same batches, and the samples over are left out:
        a last batch of one or two would have no statistics worth normalizing by.
        """
        settings, data = self.settings, self.data
        model, train_on = self.start(run)
        seed = seed_of(settings.seed, run.repeat)
        self.set_seed(seed)
        random = np.random.default_rng(seed)
        record = Record([], [], [], [], [], math.nan, diverged=False, learned=False)
        flat = False
        while not (record.diverged or flat or len(record.seconds) == settings.epochs):
            order = random.permutation(len(data.x_train))
            begin = perf_counter()
            loss = train_on(order[: len(order) // settings.batch_size * settings.batch_size])
            record.seconds.append(perf_counter() - begin)
            train, test = self.judge(model, *data.training_sample), self.judge(model, data.x_test, data.y_test)
            record.train_accuracy.append(train.value)
            record.train_loss.append(train.loss)
            record.test_accuracy.append(test.value)
            record.test_loss.append(test.loss)
            diverged = not math.isfinite(loss) or train.loss is None
            record = replace(record, diverged=diverged, learned=train.learned and not diverged)
            if settings.until_flat:
                record.validation_loss.append(self.judge(model, data.x_validation, data.y_validation).loss)
                flat = is_flat(record.validation_loss, record.learned, settings.epochs)
            if settings.advantages and (percentiles := self.unit_input(run, model)):
                record.unit_input.append(percentiles)
            after_epoch()
        validation = self.judge(model, data.x_validation, data.y_validation)
        return model, replace(record, validation_accuracy=validation.value)

    def judge(self, model: Any, x: np.ndarray, y: np.ndarray) -> Judgement:
        """Metric and loss in inference mode."""
        return judged(self.settings.task, self.measured, y, self.outputs(model, x), self.from_logits(model))

    def predicted(self, model: Any, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """What the metric takes, for samples `x` with labels `y`."""
        return predictions(self.settings.task, y, self.outputs(model, x), self.from_logits(model))


def seed_of(seed: int, repeat: int) -> int:
    """The seed of a repeat in every placement and at every rate: of initial weights, dropout and the order of samples."""
    return int(np.random.SeedSequence([seed, repeat]).generate_state(1)[0])


def check_batch(settings: Settings, data: Data) -> None:
    """
    Raises:
        ArgumentError: there are fewer training samples than a batch takes.
    """
    if len(data.x_train) < settings.batch_size:
        raise ArgumentError(
            f"a batch must fit into the training samples; received a batch size of {settings.batch_size} for "
            f"{len(data.x_train)} samples; choose a smaller --batch-size"
        )
