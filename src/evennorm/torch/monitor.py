"""Log the batch normalizations of a torch model while it trains."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from evennorm.errors import ArgumentError
from evennorm.monitor import Recorder
from evennorm.monitor.recorder import EVERY, States
from evennorm.monitor.writers import To
from evennorm.torch.states import read_states


class Monitor:
    """Log until it is closed, or the `with` block ends; `monitor` makes one."""

    def __init__(self, model: nn.Module, to: To, every: int):
        self._model = model
        self._recorder = Recorder(self._read, to, every)
        before = torch.compiler.disable(self._before)
        after = torch.compiler.disable(self._after)
        self._hooks = [model.register_forward_pre_hook(before), model.register_forward_hook(after)]

    @property
    def step(self) -> int:
        """The number of forward passes in training mode that it has seen."""
        return self._recorder.step

    def close(self) -> None:
        """Leave the model as it was, and finish the files."""
        for hook in self._hooks:
            hook.remove()
        self._recorder.close()

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def _before(self, module: nn.Module, inputs: Any) -> None:
        if module.training:
            self._recorder.before()

    def _after(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if module.training:
            self._recorder.after()

    def _read(self) -> States:
        modules = dict(self._model.named_modules())
        return {path: (state, _skipped(modules[path])) for path, state in read_states(self._model).items()}


def monitor(model: nn.Module, to: To, every: int = EVERY) -> Monitor:
    """Log the batch normalizations of a model, torch's and evennorm's, from now on.

    A record is taken at the first forward pass in training mode and at every n-th one: per layer the minimum, median and
    maximum of gamma, beta and of the mean and variance of the batch and of the running ones; the drift of the running
    statistics; dead channels; and the batches that the layer has skipped. Between records nothing is read. A record copies
    the statistics to the CPU, which waits for a GPU.

    Args:
        model: any module; of a compiled one, what `torch.compile` has returned.
        to: a folder, for TensorBoard; a file that ends in `.csv`, which is appended to; or a function that is called with
            the step, the layer's path and a dict of numbers.
        every: forward passes between two records.

    Returns:
        A monitor, whose `close()` ends it; it is a context manager, too.

    Raises:
        ArgumentError: no module, or `every` below 1.
        InputError: a file that holds something else, or a place that cannot be written to.
        MissingExtra: logging to TensorBoard needs the package tensorboardX.

    Example:
        >>> import torch
        >>> from evennorm.torch import monitor
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
        >>> with monitor(model, lambda step, layer, found: print(step, layer, found["dead_channels"]), every=2):
        ...     for _ in range(4):
        ...         _ = model(torch.randn(8, 3))
        1 1 0
        2 1 0
        4 1 0
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"monitor takes a torch.nn.Module; received {type(model).__name__}")
    return Monitor(model, to, every)


def _skipped(module: nn.Module) -> int | None:
    skipped = getattr(module, "skipped_batches", None)
    return None if skipped is None else int(skipped)
