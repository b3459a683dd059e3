"""Train torch models by a plain loop."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from evennorm.errors import ArgumentError
from evennorm.tools.compare.data import Data
from evennorm.tools.compare.drift import SAMPLES
from evennorm.tools.compare.settings import Run, Settings
from evennorm.tools.compare.torch_drift import UnitInput
from evennorm.tools.compare.torch_models import TorchArchitecture
from evennorm.tools.compare.train import EVALUATION_BATCH, Trainer, seed_of
from evennorm.torch.namespace import WITHOUT_FLOAT64

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
    kind, colon, index = asked.partition(":")
    count = torch.cuda.device_count() if kind == "cuda" else 1
    if not there.get(kind, False) or (colon and not (index.isdecimal() and int(index) < count)):
        found = ", ".join(device for device, is_there in there.items() if is_there)
        raise ArgumentError(f"devices here are {found}; received --device {asked or repr(asked)}")
    return asked


class TorchTrainer(Trainer):
    """Train by stochastic gradient descent with momentum 0.9; the same bits on one machine."""

    framework = "torch"
    architecture: TorchArchitecture

    def __init__(self, settings: Settings, data: Data, architecture: TorchArchitecture):
        super().__init__(settings, data, architecture)
        self.device = torch.device(settings.device or "cpu")
        self._probe: tuple[nn.Module, UnitInput] | None = None
        if self.device.type == "cuda":  # on the processor all operations are
            torch.use_deterministic_algorithms(True, warn_only=True)

    def start(self, run: Run) -> tuple[nn.Module, Callable[[np.ndarray], float]]:
        model = self.initial(run)
        optimizer = torch.optim.SGD(model.parameters(), run.learning_rate, momentum=0.9)
        return model, partial(self._train_on, model, optimizer)

    def set_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def initial(self, run: Run) -> nn.Module:
        """The model of a placement with the weights of the repeat's seed, on the device."""
        self.set_seed(seed_of(self.settings.seed, run.repeat))
        model = self.architecture.place(run.placement)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad and parameter.dim() > 1:
                    parameter.mul_(run.scale)
        return model.to(self.device)

    def example(self, count: int) -> torch.Tensor:
        """The first training samples as the model takes them, on the processor."""
        return self._batch(self.data.x_train[:count]).cpu()

    def outputs(self, model: nn.Module, x: np.ndarray) -> np.ndarray:
        model.eval()
        with torch.no_grad():
            parts = [model(self._batch(x[i : i + EVALUATION_BATCH])) for i in range(0, len(x), EVALUATION_BATCH)]
        return torch.cat([part.cpu().double() for part in parts]).numpy()

    def from_logits(self, model: nn.Module) -> bool:
        return self.architecture.from_logits

    def unit_input(self, run: Run, model: nn.Module) -> list[float] | None:
        if self._probe is None or self._probe[0] is not model:
            self._probe = model, UnitInput(model, self._batch(self.data.x_train[:SAMPLES]))
        return self._probe[1]()

    def _train_on(self, model: nn.Module, optimizer: torch.optim.Optimizer, order: np.ndarray) -> float:
        wide = torch.float32 if self.device.type in WITHOUT_FLOAT64 else torch.float64
        total = torch.zeros((), device=self.device, dtype=wide)
        batches = order.reshape(-1, self.settings.batch_size)
        model.train()
        for chosen in batches:
            y = torch.from_numpy(self.data.y_train[chosen]).to(self.device)
            optimizer.zero_grad(set_to_none=True)
            loss = self._loss(model(self._batch(self.data.x_train[chosen])), y)
            loss.backward()
            optimizer.step()
            total += loss.detach()
        return float(total) / len(batches)  # waits for the device

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
        return torch.from_numpy(x).to(self.device)
