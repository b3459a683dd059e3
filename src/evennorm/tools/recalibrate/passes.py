"""Take the statistics of one stage in one pass over the data, and keep what later stages need.

The values that flow across the frontier between settled and unsettled layers stay in memory where they fit, so that each
part of a model is computed once, not once for each layer after it. Else passes start from an earlier frontier.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from evennorm.errors import EvennormError, InputError, first_line
from evennorm.models.program import Call, Halt, Key, Program
from evennorm.tools.data import Batch, Data
from evennorm.tools.data.batch import leaves
from evennorm.tools.recalibrate.population import Population
from evennorm.tools.recalibrate.schedule import Stage

Values = dict[Key, Any]
Sight = Callable[[str, np.ndarray, np.ndarray | None], None]


@dataclass
class _Frontier:
    """Values of every batch that need not be computed again."""

    done: frozenset[int] = frozenset()
    """The calls that these values replace."""
    batches: list[Values] = field(default_factory=list)


class Passes:
    """Passes over the same data, each from the last frontier that was kept.

    Args:
        program: the model.
        data, size, limit: the batches.
        room: bytes that a frontier may take.
        tick: called after each batch.
    """

    def __init__(self, program: Program, data: Data, size: int, limit: int | None, room: int, tick: Callable[[], None]):
        self._program, self._data = program, data
        self._size, self._limit, self._room = size, limit, room
        self._tick = tick
        self._frontier: _Frontier | None = None
        self.batches: int | None = None
        """How many there are, once they were counted."""
        self.samples = 0
        """In them."""
        self.made = self._order()
        """The normalizations that each call makes, in their order, as the first batch shows them."""

    def _order(self) -> list[list[str]]:
        seen: list[str] = []
        made: list[list[str]] = []
        batch = self._data.first(self._size)
        try:
            self._program.verify(batch.x)
            with self._watching(list(self._program.layers), lambda path, x, mask: seen.append(path)):
                values = self._program.begin(batch.x)
                for call in self._program.calls:
                    seen.clear()
                    _run(call, values)
                    made.append(list(seen))
        except EvennormError:
            raise
        except Exception as error:
            raise misfit(self._data, batch, error) from error
        return made

    def stage(self, stage: Stage, later: Sequence[Stage], population: Population) -> None:
        """Add the inputs of the stage's normalizations to the population; `later` are the stages after it."""
        done = frozenset() if self._frontier is None else self._frontier.done
        todo = [i for i in stage.calls if i not in done]
        # Outputs of layers whose own statistics are not settled, and of all layers after them, are not worth keeping.
        unsettled = set(todo) if stage.repeated else set(stage.stops)
        finished = done | (set(todo) - unsettled)
        keep = self._wanted([*later, *([stage] if stage.repeated else [])], finished)
        keep -= {key for i in unsettled for key in self._program.calls[i].outputs}

        def compute(values: Values) -> None:
            for i in todo:
                targets = [path for path in self.made[i] if path in stage.paths]
                self._compute(i, values, targets, population, i in stage.stops)

        self._over(compute, population, keep, finished)

    def at_once(self, population: Population, paths: Sequence[str]) -> None:
        """Add the inputs of these normalizations, where each normalizes by the statistics of its batch, as in training."""

        def see(path: str, x: np.ndarray, mask: np.ndarray | None) -> None:
            found = population.add(path, x, mask)
            if np.all(np.asarray(found.count) > 0):
                self._program.layers[path].write(found.mean + found.mean_low, found.variance)

        def compute(values: Values) -> None:
            with self._watching(paths, see):
                for call in self._program.calls:
                    _run(call, values)

        self._over(compute, population, set(), frozenset())

    def _wanted(self, stages: Sequence[Stage], finished: frozenset[int]) -> set[Key]:
        """Return the values that the unfinished calls of these stages read."""
        unfinished = {i for stage in stages for i in stage.calls} - finished
        return {key for i in unfinished for key in self._program.calls[i].inputs}

    def _compute(self, i: int, values: Values, targets: list[str], population: Population, stops: bool) -> None:
        """Make one call, and compute no more of it than is needed to see the inputs of its normalizations."""
        # A layer that is called twice for one batch may be called more often for another.
        left = set(targets) if stops and len(set(targets)) == len(targets) else set()

        def see(path: str, x: np.ndarray, mask: np.ndarray | None) -> None:
            population.add(path, x, mask)
            if left:
                left.discard(path)
                if not left:
                    raise Halt

        if not targets:
            with self._program.running():
                _run(self._program.calls[i], values)
            return
        with self._watching(list(dict.fromkeys(targets)), see):
            _run(self._program.calls[i], values)

    def _watching(self, paths: Sequence[str], see: Sight) -> Any:
        return _Watching(self._program, paths, see)

    def _over(
        self, compute: Callable[[Values], None], population: Population, keep: set[Key], finished: frozenset[int] | set[int]
    ) -> None:
        """Make one pass; where there is room, its frontier replaces the one before, batch by batch."""
        old, self._frontier = self._frontier, None
        new: list[Values] | None = None
        count = samples = 0
        for batch, values in self._starts(old):
            samples += 0 if batch is None else batch.samples
            population.batch = count
            try:
                compute(values)
            except EvennormError:
                raise
            except Exception as error:
                raise misfit(self._data, batch, error) from error
            if keep and (count == 0 or new is not None):
                packed = self._packed(values, keep)
                if count == 0:
                    new = [] if packed is not None and self._fits(packed) else None
                if new is not None and packed is not None:
                    new.append(packed)
                    if old is not None:
                        old.batches[count] = {}
            count += 1
            self._tick()
        self.batches, self.samples = count, samples or self.samples
        self._frontier = old if new is None else _Frontier(frozenset(finished), new)

    def _starts(self, frontier: _Frontier | None) -> Iterator[tuple[Batch | None, Values]]:
        """Yield the values that each batch starts from."""
        if frontier is not None:
            for kept in frontier.batches:
                yield None, {key: self._program.unpack(packed) for key, packed in kept.items()}
            return
        for batch in self._data.batches(self._size, self._limit):
            try:
                values = self._program.begin(batch.x)
            except Exception as error:
                raise misfit(self._data, batch, error) from error
            yield batch, values

    def _packed(self, values: Values, keep: set[Key]) -> Values | None:
        """Return the values of a batch to keep; None where one cannot be kept."""
        packed = {key: self._program.pack(values[key]) for key in keep if key in values}
        return None if any(value is None for value in packed.values()) else packed

    def _fits(self, packed: Values) -> bool:
        return self.batches is not None and self.batches * sum(value.nbytes for value in packed.values()) <= self._room


class _Watching:
    """A context in which calls may be made. An observer's error passes through them unchanged, and Halt ends them."""

    def __init__(self, program: Program, paths: Sequence[str], see: Sight):
        self._program, self._paths, self._see = program, paths, see
        self._error: EvennormError | None = None

    def __enter__(self) -> None:
        self._running = self._program.running()
        self._running.__enter__()
        self._watched = self._program.watched(self._paths, self._guarded)
        self._watched.__enter__()

    def __exit__(self, kind: Any, error: Any, trace: Any) -> bool:
        self._watched.__exit__(None, None, None)
        self._running.__exit__(None, None, None)
        if self._error is not None:
            raise self._error
        return kind is Halt

    def _guarded(self, path: str, x: np.ndarray, mask: np.ndarray | None) -> None:
        try:
            self._see(path, x, mask)
        except EvennormError as error:  # Keras would append the arguments of the layer's call to its text
            self._error = error
            raise Halt from error


def _run(call: Call, values: Values) -> None:
    values.update(zip(call.outputs, call.run(values), strict=True))


def misfit(data: Data, batch: Batch | None, error: Exception) -> InputError:
    """Return the error of a model that cannot take a batch, as one line."""
    shapes = "" if batch is None else ", whose batches have the shape " + ", ".join(str(x.shape) for x in leaves(batch.x))
    return InputError(f"the model cannot take {data.name}{shapes}: {first_line(error)}")
