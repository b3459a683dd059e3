"""Train Keras models, compiled once for each placement."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from evennorm.tools.compare.data import Data
from evennorm.tools.compare.drift import UnitInput
from evennorm.tools.compare.models import Architecture, ends_in_logits
from evennorm.tools.compare.settings import Run, Settings
from evennorm.tools.compare.tasks import Judgement, chance
from evennorm.tools.compare.train import EVALUATION_BATCH, Trainer, seed_of

if TYPE_CHECKING:
    import keras


class KerasTrainer(Trainer):
    """Keep models compiled from run to run.

    Compiling takes longer than training on small data, so a placement is compiled once, and each run puts its own initial
    weights, random states and learning rate into that model. Nothing else is carried over.
    """

    framework = "keras"
    architecture: Architecture

    def __init__(self, settings: Settings, data: Data, architecture: Architecture):
        super().__init__(settings, data, architecture)
        self._compiled: dict[str, tuple[keras.Model, list[np.ndarray]]] = {}
        self._initial: dict[tuple[str, int], list[np.ndarray]] = {}
        self._probes: dict[str, UnitInput] = {}

    def start(self, run: Run) -> tuple[keras.Model, Callable[[np.ndarray], float]]:
        model = self._ready_model(run)
        return model, partial(self._train_on, model)

    def set_seed(self, seed: int) -> None:
        import keras

        keras.utils.set_random_seed(seed)

    def outputs(self, model: keras.Model, x: np.ndarray) -> np.ndarray:
        return np.asarray(model.predict(x, batch_size=min(len(x), EVALUATION_BATCH), verbose=0))

    def from_logits(self, model: keras.Model) -> bool:
        return ends_in_logits(model)

    def unit_input(self, run: Run, model: keras.Model) -> list[float] | None:
        return self._probes[run.placement]()

    def judge(self, model: keras.Model, x: np.ndarray, y: np.ndarray) -> Judgement:
        """Metric and loss in inference mode; accuracy as Keras's own, which needs no second compiled program."""
        if (self.settings.task, self.settings.metric) != ("classification", "accuracy"):
            return super().judge(model, x, y)
        found = model.evaluate(x, y, batch_size=min(len(x), EVALUATION_BATCH), verbose=0, return_dict=True)
        accuracy = round(float(found["accuracy"]) * len(x)) / len(x)  # engines sum it in float32
        loss = float(found["loss"])
        return Judgement(accuracy, loss if math.isfinite(loss) else None, accuracy > chance(y))

    def _train_on(self, model: keras.Model, chosen: np.ndarray) -> float:
        x, y = self.data.x_train[chosen], self.data.y_train[chosen]
        history = model.fit(x, y, batch_size=self.settings.batch_size, epochs=1, shuffle=False, verbose=0)
        return float(history.history["loss"][0])

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
            self.set_seed(seed_of(self.settings.seed, repeat))
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
