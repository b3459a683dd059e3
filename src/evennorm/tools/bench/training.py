"""Measure whole training steps of networks on the CPU, in a process of its own: their first step, or all in turns."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from evennorm.errors import EvennormError, reason_of
from evennorm.tools.bench import clock
from evennorm.tools.bench.contestants import OURS
from evennorm.tools.bench.network_cases import NetworkCase
from evennorm.tools.bench.networks import build, without_normalization
from evennorm.tools.bench.on_torch import saved_bytes
from evennorm.tools.bench.steps import COMPILED, EAGER, OURS_COMPILED, WITHOUT, NetworkSettings, Step
from evennorm.tools.bench.worker import answer
from evennorm.torch import convert, report

TURN = 0.02
"""The least seconds of a turn: a program trains one network, whose weights then stay in the cache."""

SECONDS = 6.0
"""Seconds for the rounds of one network, where their number is chosen."""

Change = Callable[[nn.Module, Tensor], nn.Module]
"""A function that changes a network with torch's layers before it trains; the tensor is a batch of its input."""

CHANGES: Mapping[str, Change] = {
    EAGER: lambda model, x: model,
    OURS: lambda model, x: convert(model),
    WITHOUT: without_normalization,
    COMPILED: lambda model, x: torch.compile(model),
    OURS_COMPILED: lambda model, x: torch.compile(convert(model)),
}


class Training:
    """The training of a model on one batch; each call takes a step.

    The learning rate is 0: each step does all the work of one, and all of them work on the same numbers. Without
    normalization a network might otherwise diverge, and infinities and denormal numbers take time of their own.

    Args:
        model: in training mode, on the device of the batch.
        x: its input.
        labels: a class for each sample.
        momentum: of the optimizer, SGD.
        autocast: whether operations that may take bfloat16 do.
    """

    def __init__(self, model: nn.Module, x: Tensor, labels: Tensor, momentum: float = 0.0, autocast: bool = False):
        self.model, self.x, self.labels, self.autocast = model, x, labels, autocast
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=momentum)

    def __call__(self) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def loss(self) -> Tensor:
        if not self.autocast:
            return nn.functional.cross_entropy(self.model(self.x), self.labels)
        with torch.autocast(self.x.device.type, torch.bfloat16):
            return nn.functional.cross_entropy(self.model(self.x), self.labels)

    def kept_bytes(self) -> int:
        """Return the bytes that autograd keeps for the backward pass, without parameters, buffers and the batch."""
        return saved_bytes(self.loss, [*self.model.parameters(), *self.model.buffers(), self.x, self.labels])


def batch_of(case: NetworkCase) -> tuple[Tensor, Tensor]:
    """Return random input and labels, the same ones each time."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(case.shape, generator=generator)
    return x, torch.randint(case.network.classes, (case.batch,), generator=generator)


def training(case: NetworkCase, contestant: str) -> Training:
    """Return the training of a contestant's model, whose weights are those of all the others, on its batch.

    Raises:
        EvennormError: the model cannot be changed so.
    """
    torch.manual_seed(0)
    x, labels = batch_of(case)
    try:
        return Training(CHANGES[contestant](build(case)[0].train(), x), x, labels)
    except Exception as error:  # of frameworks, which raise what they like
        raise EvennormError(f"{contestant} failed on {case}: {reason_of(error)}") from error


def first_step(case: NetworkCase, contestant: str) -> Step:
    """Time the first step in seconds, and count the bytes that a later one keeps. Called in a fresh process.

    Compilers may use what they have on disk: `TORCHINDUCTOR_CACHE_DIR` is empty where `evennorm bench` calls this.
    """
    from time import perf_counter

    train = training(case, contestant)
    begin = perf_counter()
    _checked(case, contestant, train)
    first = perf_counter() - begin
    # A compiler would compile the hooks that look at what is kept.
    compiled = contestant in (COMPILED, OURS_COMPILED)
    return Step(case, contestant, first=round(first, 6), memory=None if compiled else train.kept_bytes())


def in_turns(case: NetworkCase, contestants: list[str], rounds: int | None) -> dict[str, tuple[float, ...]]:
    """Time each contestant's steps in milliseconds, one sample per round.

    Raises:
        EvennormError: a contestant failed, or its numbers were not finite.
    """
    trainings = {name: training(case, name) for name in contestants}
    for name, train in trainings.items():
        _checked(case, name, train)
    times = clock.in_turns(trainings, rounds, SECONDS, turn=TURN)
    for name, train in trainings.items():
        _checked(case, name, train)
    return {name: tuple(round(1000 * seconds, 5) for seconds in samples) for name, samples in times.items()}


def _checked(case: NetworkCase, contestant: str, train: Training) -> None:
    """Take a step, and check that its numbers are finite: others take a different time."""
    try:
        loss = float(train())
    except Exception as error:  # of frameworks, which raise what they like
        raise EvennormError(f"{contestant} failed on {case}: {reason_of(error)}") from error
    if not math.isfinite(loss):
        raise EvennormError(f"{contestant} on {case}: the loss is {loss}, and such numbers take a time of their own")


def fused(case: NetworkCase) -> dict[str, int]:
    """Return what `convert` fuses with the normalizations of a network, and how often; the most frequent first.

    Example:
        >>> fused(NetworkCase("article", 2, 24))
        {'': 3}
    """
    counts = Counter(" + ".join(layer.steps) for layer in report(convert(build(case)[0])).layers)
    return dict(counts.most_common())


def _measured(task: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the first step of one contestant, or all steps of everyone in turns."""
    settings, case = NetworkSettings.from_dict(task["settings"]), NetworkCase(**task["network"])
    if task["first"] is not None:
        yield "first", first_step(case, task["first"]).as_dict()
        return
    yield "fused", fused(case)
    yield "times", in_turns(case, settings.contestants, settings.rounds)


if __name__ == "__main__":
    answer(_measured)
