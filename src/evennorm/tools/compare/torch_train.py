"""Train torch models by a plain loop: one run goes in, its record comes out."""

from __future__ import annotations

import math
from collections.abc import Callable
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from evennorm.errors import ArgumentError
from evennorm.tools.compare.data import Data
from evennorm.tools.compare.flat import is_flat
from evennorm.tools.compare.metrics import measured_by
from evennorm.tools.compare.settings import Run, Settings
from evennorm.tools.compare.tasks import Judgement, judged, predictions
from evennorm.tools.compare.torch_models import TorchArchitecture
from evennorm.tools.compare.train import EVALUATION_BATCH, Record, check_batch, seed_of

DEVICES = ("cpu", "cuda", "mps")


def choose_device(asked: str | None) -> str:
    """The device that was asked for, else the best there is.

    Raises:
        ArgumentError: there is no such device.

    Example:
        >>> choose_device("cpu")
        'cpu'
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if asked is None:
        return next(device for device, found in there.items() if found)
    if not there.get(asked.partition(":")[0], False):
        raise ArgumentError(
            f"devices here are {', '.join(device for device, found in there.items() if found)}; received --device {asked}"
        )
    return asked


class TorchTrainer:
    """Trains runs one after the other on one data set: stochastic gradient descent with momentum 0.9, in whole batches.

    A run gives the same numbers whichever runs came before it, and the same bits on one machine.
    """

    def __init__(self, settings: Settings, data: Data, architecture: TorchArchitecture):
        check_batch(settings, data)
        self.settings = settings
        self.architecture = architecture
        self.data = self.unchanged = data
        self.device = torch.device(settings.device or "cpu")
        self.measured = measured_by(settings.measure, settings.task, "torch", data.y_test, data.classes)
        if self.device.type == "cuda":  # on the processor all operations are
            torch.use_deterministic_algorithms(True, warn_only=True)

    def initial(self, run: Run) -> nn.Module:
        """The model of a placement with the weights of the repeat's seed, on the device."""
        torch.manual_seed(seed_of(self.settings.seed, run.repeat))
        model = self.architecture.place(run.placement)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(run.scale)
        return model.to(self.device)

    def train(self, run: Run, after_epoch: Callable[[], None] = lambda: None) -> Record:
        """Trains from the initial weights of the run's seed; calls `after_epoch` after every epoch."""
        return self.trained(run, after_epoch)[1]

    def trained(self, run: Run, after_epoch: Callable[[], None] = lambda: None) -> tuple[nn.Module, Record]:
        """The model, and what it showed."""
        model = self.initial(run)
        optimizer = torch.optim.SGD(model.parameters(), run.learning_rate, momentum=0.9)
        seed = seed_of(self.settings.seed, run.repeat)
        torch.manual_seed(seed)
        random = np.random.default_rng(seed)
        epochs: dict[str, list[Any]] = {
            "train_accuracy": [],
            "train_loss": [],
            "test_accuracy": [],
            "test_loss": [],
            "seconds": [],
            "validation_loss": [],
        }
        finite, learned, flat = True, False, False
        while finite and not flat and len(epochs["seconds"]) < self.settings.epochs:
            loss, seconds = self._train_epoch(model, optimizer, random)
            epochs["seconds"].append(seconds)
            train = self.judge(model, *self.data.training_sample)
            test = self.judge(model, self.data.x_test, self.data.y_test)
            for part, found in (("train", train), ("test", test)):
                epochs[f"{part}_accuracy"].append(found.value)
                epochs[f"{part}_loss"].append(found.loss)
            finite = math.isfinite(loss) and train.loss is not None
            learned = finite and train.learned
            if self.settings.until_flat:
                epochs["validation_loss"].append(self.judge(model, self.data.x_validation, self.data.y_validation).loss)
                flat = is_flat(epochs["validation_loss"], learned, self.settings.epochs)
            after_epoch()
        validation = self.judge(model, self.data.x_validation, self.data.y_validation)
        return model, Record(**epochs, validation_accuracy=validation.value, diverged=not finite, learned=learned)

    def example(self, count: int) -> torch.Tensor:
        """The first training samples as the model takes them, on the processor."""
        return self._batch(self.data.x_train[:count]).cpu()

    def judge(self, model: nn.Module, x: np.ndarray, y: np.ndarray) -> Judgement:
        """Metric and loss in inference mode."""
        return judged(self.settings.task, self.measured, y, self._outputs(model, x), self.architecture.from_logits)

    def predicted(self, model: nn.Module, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """What the metric takes, for samples `x` with labels `y`."""
        return predictions(self.settings.task, y, self._outputs(model, x), self.architecture.from_logits)

    def _outputs(self, model: nn.Module, x: np.ndarray) -> np.ndarray:
        model.eval()
        with torch.no_grad():
            parts = [model(self._batch(x[i : i + EVALUATION_BATCH])) for i in range(0, len(x), EVALUATION_BATCH)]
        return torch.cat([part.double().cpu() for part in parts]).numpy()

    def _train_epoch(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, random: np.random.Generator
    ) -> tuple[float, float]:
        """Mean loss and seconds of one epoch of whole batches, in an order that all placements share."""
        size = self.settings.batch_size
        order = random.permutation(len(self.data.x_train))
        total = torch.zeros((), device=self.device, dtype=torch.float64 if self.device.type != "mps" else torch.float32)
        count = len(order) // size
        begin = perf_counter()
        model.train()
        for i in range(count):
            chosen = order[i * size : (i + 1) * size]
            y = torch.from_numpy(self.data.y_train[chosen]).to(self.device)
            optimizer.zero_grad(set_to_none=True)
            loss = self._loss(model(self._batch(self.data.x_train[chosen])), y)
            loss.backward()
            optimizer.step()
            total += loss.detach()
        mean = float(total) / count  # waits for the device
        return mean, perf_counter() - begin

    def _loss(self, outputs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        logits = self.architecture.from_logits
        match self.settings.task:
            case "classification" if logits:
                return functional.cross_entropy(outputs, y)
            case "classification":
                return functional.nll_loss(outputs.clamp(1e-7, 1 - 1e-7).log(), y)
            case "multilabel" if logits:
                return functional.binary_cross_entropy_with_logits(outputs, y)
            case "multilabel":
                return functional.binary_cross_entropy(outputs.clamp(1e-7, 1 - 1e-7), y)
        return functional.mse_loss(outputs, y)

    def _batch(self, x: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(self.data.for_torch(x)).to(self.device)
