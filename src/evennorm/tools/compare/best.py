"""Train the best placement once more, on training and validation samples together, and hand that model over as a file.

The mean of the metric on validation samples over the repeats decides placement and rate; the length is decided by their
epochs. So test samples have no part in the choice, and what they show of the model is what to expect of new samples. A copy
of the best repeat would be picked for its luck, and have learned from fewer samples.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from evennorm.errors import EvennormError, first_line
from evennorm.tools.compare import handed
from evennorm.tools.compare.intervals import bootstrap_interval, share_interval
from evennorm.tools.compare.measure import Metric, metric_named
from evennorm.tools.compare.racing import Race, cell
from evennorm.tools.compare.settings import Run, Settings
from evennorm.tools.compare.verdict import leaders
from evennorm.tools.interrupts import stop_if_interrupted

if TYPE_CHECKING:
    from evennorm.tools.compare.data import Data
    from evennorm.tools.compare.train import Record, Trainer

CLOPPER_PEARSON = "Clopper and Pearson"
BOOTSTRAP = "percentile bootstrap over test samples"

TRIES = 3
"""Seeds that are tried, one after the other, until a training ends better than guessing."""

CHECKED_BATCHES = 16
"""Training batches that `evennorm check` compares the moving statistics with."""


@dataclass(frozen=True)
class Choice:
    """Which model is handed over, how it is trained, and why this one."""

    placement: str
    learning_rate: float
    epochs: int
    validation_accuracy: float
    """Mean over the repeats: of another metric than accuracy, its values stand where accuracies do."""

    why: str


@dataclass(frozen=True)
class Best:
    """The model that was handed over."""

    files: tuple[str, ...]
    choice: Choice
    seed_of_repeat: int
    """The repeat from whose seed it starts."""

    samples: int
    """The number of samples that it was trained on: training and validation samples."""

    test_accuracy: float
    low: float
    high: float
    """95 % interval for the metric of this one model on new samples like those of the test, by `interval`."""

    test_samples: int
    findings: list[dict[str, Any]] = field(default_factory=list)
    """The findings of `evennorm check`."""

    unchecked: str | None = None
    """Why it could not be checked; None where it was."""

    metric: str = "accuracy"
    """The name of the metric in `test_accuracy`."""

    interval: str = CLOPPER_PEARSON

    @property
    def measure(self) -> Metric:
        """The metric with its direction."""
        return metric_named(self.metric)

    @property
    def measured(self) -> str:
        """The metric on the test samples, with its interval, in words."""
        metric = self.measure
        value, low, high = (metric.text(each) for each in (self.test_accuracy, self.low, self.high))
        if metric.name == "accuracy" and self.interval == CLOPPER_PEARSON:
            return f"{value} % of {self.test_samples} test samples right ({low} to {high})"
        return f"{metric.title} {value}{' %' * metric.is_share} ({low} to {high}) on {self.test_samples} test samples"

    def as_dict(self) -> dict[str, Any]:
        """Return the record for summary.json."""
        found = asdict(self)
        return {**found.pop("choice"), **found, "files": list(self.files)}

    def lines(self, out: str | Path) -> list[str]:
        """Return lines that say what the check found, why it is this model, and where it is."""
        if self.unchecked is not None:
            checked = [f"could not look at the model: {self.unchecked}"]
        else:
            checked = [
                f"{each['code']} {each['level']}: {each['layer'] or 'model'}: {each['what']}" for each in self.findings
            ]
        return [
            *(f"evennorm check: {line}" for line in checked or ["nothing looks wrong with the model"]),
            f"It was chosen {self.choice.why}. It was trained on {self.samples} training and validation samples, "
            f"epochs: {self.choice.epochs}",
            f"The model is in {' and '.join(str(Path(out, name)) for name in self.files)}: {self.choice.placement} at "
            f"learning rate {self.choice.learning_rate:g}, {self.measured}",
        ]


def choose(settings: Settings, records: Mapping[Run, Record], race: Race) -> Choice | None:
    """Return the placement with the best mean validation metric, at its rate; None where no run has learned.

    Args:
        settings, records, race: of a study that is over.
    """
    means = {}
    for name, rate in race.chosen.items():
        runs = cell(records, name, rate)
        if any(record.learned for record in runs):
            means[name] = float(np.mean([record.validation_accuracy for record in runs]))
    if not means:
        return None
    score = settings.measure.score
    best = max(means, key=lambda name: float(f"{score(means[name]):.9g}"))  # sums in other orders; ties go to the first
    rate = race.chosen[best]
    epochs = round(float(np.median([len(record.seconds) for record in cell(records, best, rate) if record.learned])))
    return Choice(best, rate, epochs, means[best], _why(best, settings, race))


def _why(best: str, settings: Settings, race: Race) -> str:
    metric = settings.measure
    by = f"by the mean validation {metric.title} of its repeats"
    if len(race.chosen) == 1:
        return "as the only placement"
    if any(pair.shown and pair.worse == best for pair in race.pairs.values()):
        return f"{by}, though another placement is {metric.better} it on the test samples"
    if leaders(settings, race) == [best]:
        return f"{by}, as the test samples have it too"
    return f"{by}; that it is better than all others could not be shown"


def hand_over(trainer: Trainer, fingerprint: Mapping[str, Any], choice: Choice) -> Best:
    """Write the model of `choice` into the folder of the results, unless the one there was made by the same choice.

    Several processes that end at the same moment write one model: who comes second waits, and finds it.

    Raises:
        InputError: it cannot be written.
    """
    settings = trainer.settings
    key = _key(settings, fingerprint, choice)
    with _alone(Path(settings.out)):
        found = handed.read(settings, key)
        if found is not None:
            return told(found)
        return _trained(trainer, choice, key)


def _key(settings: Settings, fingerprint: Mapping[str, Any], choice: Choice) -> str:
    """Return a key for the model: it depends on all that decides its numbers and on what is told with it."""
    text = json.dumps([dict(fingerprint), asdict(choice), settings.seed, settings.batch_size], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def told(values: Mapping[str, Any]) -> Best:
    """Return the record from what a model file says about itself."""
    made = Choice(**values["choice"])
    return Best(**{**values, "choice": made, "files": tuple(values["files"])})


def _trained(trainer: Any, choice: Choice, key: str) -> Best:
    data = together(trainer.unchanged)
    settings = replace(trainer.settings, epochs=choice.epochs, until_flat=False)
    other = type(trainer)(settings, data, trainer.architecture)
    for repeat in range(TRIES):
        model, record = other.trained(Run(choice.placement, choice.learning_rate, repeat), stop_if_interrupted)
        if record.learned:
            break
    value, (low, high), method = _on_test(model, record, other)
    if settings.framework == "torch":
        model = model.cpu().eval()
    findings, unchecked = _checked(model, other, settings)
    best = Best(
        handed.names(settings),
        choice,
        repeat,
        len(data.x_train),
        value,
        low,
        high,
        len(data.x_test),
        findings,
        unchecked,
        settings.metric,
        method,
    )
    handed.write(settings, model, key, asdict(best), other)
    return best


def _on_test(model: Any, record: Record, trainer: Any) -> tuple[float, tuple[float, float], str]:
    """Return the metric on the test samples, its interval, and how the interval was computed."""
    settings, y = trainer.settings, trainer.data.y_test
    value, count = record.test_accuracy[-1], len(y)
    if settings.task == "classification" and settings.metric == "accuracy":
        right = round(value * count)
        return right / count, share_interval(right, count), CLOPPER_PEARSON
    predicted = trainer.predicted(model, trainer.data.x_test, y)
    low, high = bootstrap_interval(lambda chosen: trainer.measured(y[chosen], predicted[chosen]), count, settings.seed)
    if settings.measure.is_share and low == high:  # as where all are right: no resampling makes one wrong
        return value, share_interval(round(value * count), count), CLOPPER_PEARSON
    return value, (low, high), BOOTSTRAP


def together(data: Data) -> Data:
    """Return the data with the validation samples moved to the training samples; the validation samples are then
    meaningless."""
    x = np.concatenate([data.x_train, data.x_validation])
    y = np.concatenate([data.y_train, data.y_validation])
    return replace(data, x_train=x, y_train=y)


def _checked(model: Any, trainer: Any, settings: Settings) -> tuple[list[dict[str, Any]], str | None]:
    """Run `evennorm check` on the model and training batches."""
    from evennorm.tools.check import check

    data, size = trainer.data, settings.batch_size
    count = min(CHECKED_BATCHES, len(data.x_train) // size)
    x = trainer.example(count * size) if settings.framework == "torch" else data.x_train
    ends = [(index * size, (index + 1) * size) for index in range(count)]
    try:
        report = check(model, [(x[low:high], data.y_train[low:high]) for low, high in ends], batch_size=size)
    except EvennormError as error:
        return [], first_line(error)
    return [finding.as_dict() for finding in report.findings], None


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Let one process at a time run this, on this machine, by a lock on the folder itself."""
    try:
        import fcntl
    except ImportError:  # Windows, where each of several processes writes the same model
        yield
        return
    folder = os.open(out, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)
