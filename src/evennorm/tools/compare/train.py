"""Train one run, and record its accuracies and times epoch by epoch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from evennorm.errors import ArgumentError
from evennorm.tools.compare.data import Data
from evennorm.tools.compare.drift import UnitInput
from evennorm.tools.compare.flat import is_flat
from evennorm.tools.compare.metrics import measured_by
from evennorm.tools.compare.models import Architecture, ends_in_logits
from evennorm.tools.compare.settings import Run, Settings
from evennorm.tools.compare.tasks import Judgement, chance, judged, predictions

if TYPE_CHECKING:
    import keras

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


class Trainer:
    """Trains runs one after the other on one data set; models stay compiled from run to run.

    Compiling takes longer than training on small data, so a placement is compiled once, and each run puts its own initial
    weights, random states and learning rate into that model. Nothing else is carried over: a run gives the same numbers
    whichever runs came before it.
    """

    def __init__(self, settings: Settings, data: Data, architecture: Architecture):
        check_batch(settings, data)
        self.settings = settings
        self.architecture = architecture
        self.unchanged = data
        self.data = data.binarized() if architecture.binarize else data
        self._compiled: dict[str, tuple[keras.Model, list[np.ndarray]]] = {}
        self._initial: dict[tuple[str, int], list[np.ndarray]] = {}
        self._probes: dict[str, UnitInput] = {}
        self.measured = measured_by(settings.measure, settings.task, "keras", data.y_test, data.classes)

    def train(self, run: Run, after_epoch: Callable[[], None] = lambda: None) -> Record:
        """Trains from the initial weights of the run's seed; calls `after_epoch` after every epoch."""
        import keras

        model = self._ready_model(run)
        seed = seed_of(self.settings.seed, run.repeat)
        keras.utils.set_random_seed(seed)
        random = np.random.default_rng(seed)
        epochs: dict[str, list[Any]] = {
            "train_accuracy": [],
            "train_loss": [],
            "test_accuracy": [],
            "test_loss": [],
            "seconds": [],
            "validation_loss": [],
            "unit_input": [],
        }
        finite, learned, flat = True, False, False
        while finite and not flat and len(epochs["seconds"]) < self.settings.epochs:
            loss, seconds = self._train_epoch(model, random)
            epochs["seconds"].append(seconds)
            for part, samples in (("train", self.data.training_sample), ("test", (self.data.x_test, self.data.y_test))):
                found = self.judge(model, *samples)
                epochs[f"{part}_accuracy"].append(found.value)
                epochs[f"{part}_loss"].append(found.loss)
                learned = found.learned if part == "train" else learned
            finite = math.isfinite(loss) and epochs["train_loss"][-1] is not None
            learned = finite and learned
            if self.settings.until_flat:
                epochs["validation_loss"].append(self.judge(model, self.data.x_validation, self.data.y_validation).loss)
                flat = is_flat(epochs["validation_loss"], learned, self.settings.epochs)
            if run.placement in self._probes and (percentiles := self._probes[run.placement]()):
                epochs["unit_input"].append(percentiles)
            after_epoch()
        validation = self.judge(model, self.data.x_validation, self.data.y_validation)
        return Record(**epochs, validation_accuracy=validation.value, diverged=not finite, learned=learned)

    def judge(self, model: keras.Model, x: np.ndarray, y: np.ndarray) -> Judgement:
        """Metric and loss in inference mode."""
        if self.settings.task == "classification" and self.settings.metric == "accuracy":
            accuracy, loss = _evaluate(model, x, y)
            return Judgement(accuracy, loss if math.isfinite(loss) else None, accuracy > chance(y))
        outputs = model.predict(x, batch_size=min(len(x), EVALUATION_BATCH), verbose=0)
        return judged(self.settings.task, self.measured, y, outputs, ends_in_logits(model))

    def predicted(self, model: keras.Model, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """What the metric takes, for samples `x` with labels `y`."""
        outputs = model.predict(x, batch_size=min(len(x), EVALUATION_BATCH), verbose=0)
        return predictions(self.settings.task, y, outputs, ends_in_logits(model))

    def trained(self, run: Run, after_epoch: Callable[[], None] = lambda: None) -> tuple[keras.Model, Record]:
        """The model, until the next run of its placement, and what it showed."""
        record = self.train(run, after_epoch)
        return self.model_of(run.placement), record

    def model_of(self, placement: str) -> keras.Model:
        """The model of a placement, as its last training left it."""
        return self._compiled[placement][0]

    def _train_epoch(self, model: keras.Model, random: np.random.Generator) -> tuple[float, float]:
        """Loss and seconds of one epoch of whole batches.

        The order is drawn here, not by `fit`, so that every placement and engine sees the same batches, and the samples
        over are left out: a last batch of one or two would have no statistics worth normalizing by.
        """
        batch = self.settings.batch_size
        order = random.permutation(len(self.data.x_train))
        order = order[: len(order) // batch * batch]
        x, y = self.data.x_train[order], self.data.y_train[order]
        begin = perf_counter()
        history = model.fit(x, y, batch_size=batch, epochs=1, shuffle=False, verbose=0)
        return float(history.history["loss"][0]), perf_counter() - begin

    def _ready_model(self, run: Run) -> keras.Model:
        """The compiled model of the placement, in the state that its seed starts from."""
        initial = self._initial_state(run.placement, run.repeat)
        model, optimizer_state = self._compiled[run.placement]
        for variable, value in zip(model.variables, initial, strict=True):
            is_kernel = variable.trainable and value.ndim > 1
            variable.assign(value * run.scale if is_kernel else value)
        for variable, value in zip(model.optimizer.variables, optimizer_state, strict=True):
            variable.assign(value)
        model.optimizer.learning_rate.assign(run.learning_rate)
        return model

    def _initial_state(self, placement: str, repeat: int) -> list[np.ndarray]:
        key = (placement, repeat)
        if key not in self._initial:
            # Runs come repeat by repeat, so the states of the others are not needed again.
            self._initial = {kept: state for kept, state in self._initial.items() if kept[1] == repeat}
            import keras

            keras.utils.set_random_seed(seed_of(self.settings.seed, repeat))
            model = self.architecture.place(placement)
            self._initial[key] = [np.array(variable) for variable in model.variables]
            if placement not in self._compiled:
                self._compile(model)
                if self.settings.advantages:
                    self._probes[placement] = UnitInput(model, self.data.x_train)
                self._compiled[placement] = model, [np.array(variable) for variable in model.optimizer.variables]
        return self._initial[key]

    def _compile(self, model: keras.Model) -> None:
        import keras

        optimizer = keras.optimizers.deserialize(self.architecture.optimizer)
        if self.settings.task == "classification":
            loss = keras.losses.SparseCategoricalCrossentropy(from_logits=ends_in_logits(model))
            model.compile(optimizer, loss, metrics=["accuracy"])
        elif self.settings.task == "multilabel":
            model.compile(optimizer, keras.losses.BinaryCrossentropy(from_logits=ends_in_logits(model)))
        else:
            model.compile(optimizer, "mean_squared_error")
        optimizer.build(model.trainable_variables)


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


def _evaluate(model: keras.Model, x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Accuracy and loss in inference mode."""
    measured = model.evaluate(x, y, batch_size=min(len(x), EVALUATION_BATCH), verbose=0, return_dict=True)
    right = round(float(measured["accuracy"]) * len(x))  # engines sum it in float32
    return right / len(x), float(measured["loss"])
