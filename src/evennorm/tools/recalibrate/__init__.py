"""Set the moving statistics of a model to those of data, and change nothing else.

Layer by layer, so that each normalization is measured on the outputs of the recalibrated ones before it; or in one pass, in
which each normalizes by the batch, as in training (Wu & Johnson 2021, arXiv 2105.07576, "precise batch norm").
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from evennorm.errors import InputError
from evennorm.models.program import Program
from evennorm.monitor.measures import drift
from evennorm.tools.data import Data, check_fit, open_data
from evennorm.tools.models import Opened, open_model
from evennorm.tools.recalibrate.effect import Effect, effect, outputs
from evennorm.tools.recalibrate.passes import Passes
from evennorm.tools.recalibrate.population import Population, distance
from evennorm.tools.recalibrate.report import Layer, Recalibration
from evennorm.tools.recalibrate.schedule import Stage, stages

__all__ = ["Effect", "Layer", "Recalibration", "recalibrate"]

Progress = Callable[[str, int, int | None], None]
"""A callback that gets the name of the stage, how many of its batches are done, and of how many, where that is known."""

_ROUNDS, _SETTLED = 40, 1e-7
"""The most passes over layers that depend on themselves; and the distance, in standard deviations, at which they
converge."""


def recalibrate(
    model: Any,
    data: Any,
    *,
    batches: int | None = None,
    batch_size: int = 128,
    one_pass: bool = False,
    keep_frozen: bool = False,
    measure: bool = True,
    cache: int | None = None,
    progress: Progress | None = None,
) -> Recalibration:
    """Set the moving statistics of a model to the exact ones of the data; the model is changed in place.

    Mean and variance of each channel over all values that reach the layer: moments merged in float64, each batch counting by
    its values, masked ones left out. The variance divides by the number of values, in every framework. A layer that is
    called at several places gets the statistics of all its inputs together. Weights, optimizer and settings stay as they
    are; so does everything where an error is raised.

    Args:
        model: a keras.Model, a torch.nn.Module, an nnx module of Flax, or whatever `evennorm.tools.models.open_model` takes.
        data: whatever `evennorm.tools.data.open_data` takes; labels are needed for accuracies only.
        batches: how many to take; all by default. Of arrays they are from all over; a note says where there are fewer.
        batch_size: of arrays and files; iterables have their own.
        one_pass: take all statistics in one pass, each layer normalizing by the batch meanwhile: faster, and exact for the
            first layers only.
        keep_frozen: leave layers alone that are not trainable.
        measure: run the model before and after, for accuracies and differences: on the same data, as a note says.
        cache: bytes of memory for values between layers; half of what is free by default.
        progress: is told how far it is.

    Raises:
        InputError: a model or data that cannot be used, data that the model cannot take, values that are not finite.

    Example:
        >>> import numpy as np, torch
        >>> from evennorm.tools.recalibrate import recalibrate
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(1))
        >>> done = recalibrate(model, np.array([[1.0], [3.0], [5.0]], "float32"))
        >>> model[0].running_mean.item(), round(model[0].running_var.item(), 4), done.layers[0].values
        (3.0, 2.6667, 3)
    """
    if (batches is not None and batches < 1) or batch_size < 1:
        raise InputError(f"batches and their size are 1 or more; received batches={batches} and batch_size={batch_size}")
    opened = open_model(model)
    source = open_data(data, opened.framework)
    check_fit(source, opened)
    work = _Work(opened, source, batch_size, batches, cache, progress)
    chosen = work.chosen(keep_frozen)
    snapshots = {path: layer.snapshot() for path, layer in work.program.layers.items()}
    try:
        return work.run(chosen, one_pass, measure)
    except BaseException:
        for path, layer in work.program.layers.items():
            layer.restore(snapshots[path])
        raise


class _Work:
    """One recalibration: the program, its data, and its progress."""

    def __init__(
        self, opened: Opened, data: Data, size: int, limit: int | None, cache: int | None, progress: Progress | None
    ):
        self.program = program_of(opened)
        self._opened, self._data = opened, data
        self._size, self._limit = size, limit
        self._room = free_memory() // 2 if cache is None else cache
        self._progress = progress
        self._what, self._count, self._total = "", 0, None if data.samples is None else -(-data.samples // size)
        if limit is not None:
            self._total = limit if self._total is None else min(limit, self._total)
        self._left = dict(self.program.skipped)

    def chosen(self, keep_frozen: bool) -> list[str]:
        """Return the layers to recalibrate.

        Raises:
            InputError: there are none.
        """
        frozen = [path for path, layer in self.program.layers.items() if layer.frozen]
        if keep_frozen:
            self._left |= dict.fromkeys(frozen, "it is frozen")
        chosen = [path for path in self.program.layers if path not in self._left]
        if not chosen:
            why = f": {', '.join(f'{path} ({why})' for path, why in self._left.items())}" if self._left else ""
            raise InputError(f"{self._opened.name} has no batch normalization whose moving statistics could be set{why}")
        return chosen

    def run(self, chosen: Sequence[str], one_pass: bool, measure: bool) -> Recalibration:
        before = {path: self.program.layers[path].state() for path in chosen}
        population = Population(before)
        passes = Passes(self.program, self._data, self._size, self._limit, self._room, self._tick)
        made = [[path for path in called if path in before] for called in passes.made]
        for path in set(chosen) - {path for called in made for path in called}:
            self._left[path] = "nothing calls it"
        first = self._outputs("outputs before") if measure else None
        if first is not None:
            passes.batches = first.batches
        notes = list(self._opened.notes)
        if one_pass:
            taken = self._at_once(passes, made, population)
        else:
            taken = self._by_layer(passes, made, before, population, notes)
        layers = tuple(self._layer(path, before, population) for path in chosen if path in population)
        for path in chosen:
            if path not in population:
                self._left.setdefault(path, "no value reaches it")
        final = {layer.name: population.statistics(layer.name) for layer in layers}
        last = self._outputs("outputs after") if measure else None
        for path, statistics in final.items():  # a layer that updates at inference too has moved meanwhile
            self.program.layers[path].write(*statistics)
        changed = None if first is None or last is None else effect(first, last)
        if self._limit is not None and passes.batches is not None and passes.batches < self._limit:
            notes.append(
                f"{self._limit} batches were asked for, and {self._data.name} holds {_batches(passes.batches)}: "
                "the statistics are of all of them"
            )
        if changed is not None and changed.measure is not None:
            notes.append(
                f"the {changed.measure} is measured on the data of the statistics, which makes it too good; "
                "judge the model by other data"
            )
        left = tuple(self._left.items())
        return Recalibration(self._opened.name, self._data.name, passes.samples, taken, layers, left, changed, tuple(notes))

    def _by_layer(
        self,
        passes: Passes,
        made: list[list[str]],
        before: dict[str, Any],
        population: Population,
        notes: list[str],
    ) -> int:
        plan = stages(self.program.calls, made)
        taken = 0
        for number, stage in enumerate(plan):
            for round_ in range(_ROUNDS if stage.repeated else 1):
                self._begin(
                    f"layers {number + 1} of {len(plan)}" + (f", round {round_ + 1}" if stage.repeated else ""), passes
                )
                population.forget(stage.paths)
                passes.stage(stage, plan[number + 1 :], population)
                taken += 1
                moved = self._write(stage, population)
                if moved < _SETTLED:
                    break
            else:
                if stage.repeated:
                    notes.append(
                        f"{', '.join(stage.repeated)} get their own outputs as inputs, and still moved by {moved:.1g} "
                        f"standard deviations after {_ROUNDS} passes"
                    )
        return taken

    def _at_once(self, passes: Passes, made: list[list[str]], population: Population) -> int:
        self._begin("all layers", passes)
        called = list(dict.fromkeys(path for paths in made for path in paths))
        passes.at_once(population, called)
        self._write(Stage(tuple(called), (), ()), population)
        return 1

    def _write(self, stage: Stage, population: Population) -> float:
        """Write the new statistics, and return their largest distance from the old ones, in standard deviations."""
        moved = 0.0
        for path in stage.paths:
            if path in population:
                layer, found = self.program.layers[path], population.statistics(path)
                old = layer.state()
                moved = max(moved, distance(found, (old.mean, old.variance), old.epsilon))
                layer.write(*found)
        return moved

    def _layer(self, path: str, before: dict[str, Any], population: Population) -> Layer:
        old, layer = before[path], self.program.layers[path]
        mean, variance = population.statistics(path)
        shift, stretch = change(mean, variance, old)
        off = drift(mean, old.mean, old.variance, old.epsilon)
        return Layer(path, population.count(path), shift, stretch, off, layer.frozen, old, layer.state())

    def _outputs(self, what: str) -> Any:
        self._begin(what, None)
        return outputs(self.program.predict, self._data, self._size, self._limit, self._tick)

    def _begin(self, what: str, passes: Passes | None) -> None:
        self._what, self._count = what, 0
        if passes is not None and passes.batches is not None:
            self._total = passes.batches
        if self._progress is not None:
            self._progress(what, 0, self._total)

    def _tick(self) -> None:
        self._count += 1
        if self._progress is not None:
            self._progress(self._what, self._count, self._total)


def _batches(number: int) -> str:
    return f"{number} batch{'es' * (number != 1)}"


def program_of(opened: Opened) -> Program:
    """Return the calls of an opened model."""
    if opened.framework == "keras":
        from evennorm.keras import program as keras_program

        return keras_program.Program(opened.model)
    if opened.framework == "flax":
        from evennorm.flax import program as flax_program

        return flax_program.Program(opened.model)
    from evennorm.torch import program as torch_program

    return torch_program.Program(opened.model)


def change(mean: np.ndarray, variance: np.ndarray, old: Any) -> tuple[float, float]:
    """Return the largest shift of a mean, in new standard deviations, and the ratio of deviations that is furthest from
    1."""
    deviation = np.sqrt(variance + old.epsilon + np.finfo("float32").tiny)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        shift = np.abs(mean - np.asarray(old.mean, "float64").reshape(mean.shape)) / deviation
        ratio = deviation / np.sqrt(np.asarray(old.variance, "float64").reshape(mean.shape) + old.epsilon)
        furthest = np.argmax(np.where(np.isfinite(ratio), np.abs(np.log(ratio)), np.inf))
    return float(np.max(np.where(np.isfinite(shift), shift, np.inf))), float(ratio.flat[furthest])


def free_memory() -> int:
    """Return the bytes of free memory, or 4 GiB where the system does not say."""
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 4 << 30
