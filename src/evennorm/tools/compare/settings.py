"""Check what the user asked for, and keep it in one immutable record with the runs it stands for."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from evennorm.errors import ArgumentError
from evennorm.tools.compare.confidence import LOOKS
from evennorm.tools.compare.layout import FORMATS
from evennorm.tools.compare.measure import TASKS, Metric, metric_named
from evennorm.tools.compare.variants import PLACEMENTS as PLACEMENTS
from evennorm.tools.compare.variants import variant

DEFAULT_PLACEMENTS = ("none", "before", "after", "input")
DEFAULT_REPEATS = 5
DEFAULT_EPOCHS = 10
SCALES = (0.25, 4.0)
"""Factors of the initial weights, to see how much these matter."""

SCALED_REPEATS = 3
DEFAULT_EQUIVALENT = 0.02
"""Two percentage points of accuracy."""

DEMO_EPOCHS = 5
DEMO_EQUIVALENT = 0.03
DEMO_LEARNING_RATES = (0.005, 0.2)
"""Rates of the articles' network on the digits: without normalization, one is too low and one too high."""


SEARCH_REPEAT = 10**6
"""The repeat whose seed all runs of a search have, and no run of a comparison."""


class Run(NamedTuple):
    """One training: what is trained, how fast it learns, and which seed it starts from."""

    placement: str
    learning_rate: float
    repeat: int
    scale: float = 1.0
    """The factor of the initial kernels."""


@dataclass(frozen=True)
class Settings:
    """Everything that decides the numbers of a comparison, and where they are kept.

    Args:
        data, model: as on the command line.
        placements, learning_rates: distinct, in the order they are reported in.
        repeats: trainings of each placement at each rate, with seeds 0, 1, ... that the placements share.
        epochs, batch_size, seed: of every training.
        engine: the Keras backend.
        out: the folder of the results.
        storage: URL of an Optuna storage; None is a SQLite file in `out`.
        sequential: whether `repeats` is a limit, and a pair is trained only until it is told apart (`racing`).
        until_flat: whether `epochs` is a limit, and a run ends where its validation loss is flat (`flat`).
        equivalent: a difference in accuracy, or in what else is measured, below counts as none.
        framework: of the model, "keras" or "torch".
        task, metric: what is learned, and by which number runs are judged.
        device: where torch models are trained.
        study: name of the study; None is `default_study`, or the only one that a file holds.
        advantages: whether runs from larger and smaller initial weights are trained too, and one unit's input recorded.
        search: runs to look for a mixture of places by, before it is compared with the placements; 0 is no search.
        sites: activations of the model, where one is looked for.
        data_format: where the images of an .npz file have their channels; None is what their sizes tell.

    Raises:
        ArgumentError: a value outside its range, named.
    """

    data: str
    model: str
    placements: tuple[str, ...]
    repeats: int
    learning_rates: tuple[float, ...]
    epochs: int
    batch_size: int
    engine: str
    seed: int
    out: str
    storage: str | None = None
    sequential: bool = False
    until_flat: bool = False
    equivalent: float = DEFAULT_EQUIVALENT
    study: str | None = None
    advantages: bool = False
    framework: str = "keras"
    task: str = "classification"
    metric: str = "accuracy"
    device: str | None = None
    search: int = 0
    sites: int = 0
    data_format: str | None = None

    def __post_init__(self) -> None:
        for placement in self.placements:
            variant(placement)
        for rate in self.learning_rates:
            if not (math.isfinite(rate) and rate > 0):
                raise ArgumentError(f"a learning rate is a number above 0; received {rate:g}")
        for name, values in (("placements", self.placements), ("learning rates", self.learning_rates)):
            if not values or len(set(values)) < len(values):
                raise ArgumentError(f"{name} are one or more, each named once; received {_listed(values) or 'none'}")
        # A batch of one has no variance to normalize by.
        for name, value, least in (
            ("number of repeats", self.repeats, LOOKS[0] if self.sequential else 1),
            ("number of epochs", self.epochs, 1),
            ("batch size", self.batch_size, 2),
            ("seed", self.seed, 0),
        ):
            if value < least:
                raise ArgumentError(f"the {name} must be at least {least}; received {value}")
        if self.task not in TASKS:
            raise ArgumentError(f"tasks are {', '.join(TASKS)}; received {self.task!r}")
        if self.data_format not in (None, *FORMATS):
            raise ArgumentError(f"data formats are {', '.join(FORMATS)}; received {self.data_format!r}")
        share = self.measure.is_share
        if not (0 < self.equivalent < 1 if share else 0 <= self.equivalent < math.inf):
            bounds = "lies between 0 and 100 points" if share else "is 0 or more and finite"
            received = 100 * self.equivalent if share else self.equivalent
            raise ArgumentError(f"a difference that counts as none {bounds}; received {received:g}")
        if self.study is not None and not (self.study.strip() and self.study.isprintable() and len(self.study) <= 200):
            raise ArgumentError(f"a study's name is 1 to 200 printable characters; received {self.study[:40]!r}")

    @property
    def runs(self) -> list[Run]:
        """All runs that may be trained, in this order: placements take turns, so that disturbances affect all timings
        alike."""
        return [
            Run(placement, rate, repeat)
            for repeat in range(self.repeats)
            for rate in self.learning_rates
            for placement in self.placements
        ]

    @property
    def scaled_runs(self) -> list[Run]:
        """Runs from other initial weights that may be trained besides."""
        if not self.advantages:
            return []
        repeats = range(min(self.repeats, SCALED_REPEATS))
        return [
            Run(placement, rate, repeat, scale)
            for repeat in repeats
            for scale in SCALES
            for rate in self.learning_rates
            for placement in self.placements
        ]

    def possible(self) -> Callable[[Run], bool]:
        """Return a function that tells whether a run may belong to this comparison."""
        every = {*self.runs, *self.scaled_runs}
        repeats = {*range(self.repeats), SEARCH_REPEAT}

        def is_ours(run: Run) -> bool:
            mixed = run.placement.startswith("mix:") or run.repeat == SEARCH_REPEAT
            return run in every or (
                self.search > 0 and mixed and run.repeat in repeats and run.learning_rate in self.learning_rates
            )

        return is_ours

    @property
    def default_study(self) -> str:
        """The name of a study that was given none, wherever its files are."""
        return f"{word(self.data)}-{word(self.model)}-{self.engine}"

    @property
    def measure(self) -> Metric:
        """The metric, with its direction."""
        return metric_named(self.metric)

    @property
    def place(self) -> str:
        """The place of the study, without the password of a database."""
        return str(Path(self.out, "study.sqlite3")) if self.storage is None else without_password(self.storage)

    def to_json(self) -> str:
        """Return one line that `from_json` reads back."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Settings:
        """Return the settings that `to_json` wrote."""
        values = json.loads(text)
        return cls(**values | {name: tuple(values[name]) for name in ("placements", "learning_rates")})


def word(source: str) -> str:
    """Return a data set or model as part of a name.

    Example:
        >>> word("digits"), word("networks:small")
        ('digits', 'networks-small')
    """
    return re.sub(r"[^\w.]+", "-", Path(source).resolve().stem if Path(source).exists() else source).strip("-.") or "data"


def without_password(url: str) -> str:
    """Return a URL that may be shown, without its password.

    Example:
        >>> without_password("postgresql://me:secret@host/x")
        'postgresql://me:***@host/x'
    """
    return re.sub(r"(?<=://)([^:/@]*):.*@", r"\1:***@", url)


def _listed(values: Sequence[object]) -> str:
    return ", ".join(str(value) for value in values)
