"""Read a model's batch normalizations before and after every n-th step of training, and write what has changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from numbers import Integral
from typing import Any

from evennorm.errors import ArgumentError
from evennorm.models.state import BatchNormState
from evennorm.monitor.summary import summary
from evennorm.monitor.writers import To, writer_to

EVERY = 100
"""Steps between two records, unless you say otherwise."""

States = Mapping[str, tuple[BatchNormState, int | None]]
"""State and number of skipped batches of each layer, by its path."""


class Recorder:
    """Counts steps; the first one and every n-th one is recorded.

    Args:
        read: returns the states of all layers.
        to: a folder for TensorBoard, a file .csv, or a function of step, layer and numbers.
        every: steps between two records.

    Raises:
        ArgumentError, InputError, MissingExtra: `every` is no number above 0, or `to` cannot be written to.
    """

    def __init__(self, read: Callable[[], States], to: To, every: int = EVERY):
        given: Any = every
        if isinstance(given, bool) or not isinstance(given, Integral) or given < 1:
            raise ArgumentError(f"every is a number of steps, 1 or more; received {every!r}")
        self.step = 0
        self._read, self._every = read, int(every)
        self._writer = writer_to(to)
        self._before: States | None = None

    def before(self, steps: int = 1) -> None:
        """Look at the model where the coming step is recorded; `steps` of them run at once."""
        due = self.step == 0 or self.step // self._every != (self.step + steps) // self._every
        self._before = self._read() if due else None

    def after(self, steps: int = 1) -> None:
        """Count the step, and write what it changed."""
        self.step += steps
        before, self._before = self._before, None
        if before is None:
            return
        found = {}
        for layer, (state, skipped) in self._read().items():
            if layer in before:
                found[layer] = summary(before[layer][0], state, steps)
                if skipped is not None:
                    found[layer]["skipped_batches"] = skipped
        self._writer.write(self.step, found)

    def close(self) -> None:
        """Finish the files."""
        self._writer.close()
