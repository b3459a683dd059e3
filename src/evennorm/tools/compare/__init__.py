"""Train a model with batch normalization in each placement, in paired repeats, and say what that shows."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING

from evennorm.errors import ArgumentError, InputError, MissingExtra
from evennorm.tools.compare.confidence import DEFAULT_MAX_REPEATS
from evennorm.tools.compare.flat import parsed
from evennorm.tools.compare.settings import (
    DEFAULT_EPOCHS,
    DEFAULT_EQUIVALENT,
    DEFAULT_PLACEMENTS,
    DEMO_EPOCHS,
    DEMO_EQUIVALENT,
    DEMO_LEARNING_RATES,
    PLACEMENTS,
    Run,
    Settings,
    word,
)

if TYPE_CHECKING:
    from evennorm.tools.compare.report import Comparison
    from evennorm.tools.compare.train import Trainer
    from evennorm.tools.compare.work import Report

__all__ = ["PLACEMENTS", "Run", "Settings", "compare", "settings_for"]

NEEDED = {"optuna": "tools", "matplotlib": "tools", "scipy": "tools", "keras": "demo"}


def compare(
    data: str = "digits",
    model: str = "article-cnn",
    placements: Iterable[str] = DEFAULT_PLACEMENTS,
    repeats: int | None = None,
    learning_rates: Iterable[float] | None = None,
    epochs: int | str | None = None,
    batch_size: int | None = None,
    engine: str | None = None,
    jobs: int = 1,
    out: str | None = None,
    storage: str | None = None,
    study: str | None = None,
    seed: int = 0,
    max_repeats: int = DEFAULT_MAX_REPEATS,
    equivalent: float | None = None,
    advantages: bool = False,
    hand_over: bool = True,
    progress: Report | None = None,
    notice: Callable[[str], None] = lambda text: None,
) -> Comparison:
    """Trains each placement of batch normalization x learning rate x repeat, and tells which differences that shows.

    Repeats are added only to pairs of placements that are not told apart yet, by intervals that hold however often one
    looks. What is trained already, by an interrupted call or with fewer repeats, is not trained again. The same call gives
    the same numbers on the same machine and engine.

    Args:
        data: `digits`, `fashion-mnist`, an `.npz` file, a folder of IDX files or of class folders of images.
        model: `article-cnn`, `paper-mlp`, a `.keras` file or `module:function`.
        placements: some of `none`, `before`, `after`, `input`, `as-is`.
        repeats: trainings of each placement at each rate; repeat i has the same seed in all of them. None trains as many as
            each pair takes to be told apart.
        learning_rates: None is 0.02 and 0.1; for `paper-mlp` 0.1 and 0.5; for the demo 0.005 and 0.2.
        epochs: of each training; `auto` or `auto:BUDGET` ends each one where its validation loss is flat. None is 5 for
            the demo, 10 for other models on the digits, else `auto`.
        batch_size: None is 32, for `paper-mlp` 60.
        engine: Keras backend; None is that of KERAS_BACKEND, else the lightest that is installed.
        jobs: how many processes train.
        out: folder for study, runs.csv, summary.json and curves.png; None is `evennorm-runs/DATA-MODEL-ENGINE`.
        storage: URL of an Optuna storage that several machines share; None is a SQLite file in `out`.
        study: its name in that storage; None is DATA-MODEL-ENGINE.
        seed: another one gives other initial weights, orders and dropout in every repeat.
        max_repeats: where `repeats` is None: the last look comes after so many at most.
        equivalent: percentage points; a difference below counts as none. None is 2; for the demo, `article-cnn` on the
            digits, 3.
        advantages: whether to train from larger and smaller initial weights too, and to record one hidden unit's input.
        hand_over: whether the best placement is trained once more and its model written into `out`.
        progress: called with the number of runs done, in parts, and of all as far as is known.
        notice: called with what to know meanwhile, such as that a database does not answer and is waited for.

    Raises:
        EvennormError: data, model or an argument cannot be used, or the storage holds a study of other settings.

    Source: Ioffe & Szegedy 2015, arXiv 1502.03167, whose advice is to train with each placement and keep the best.

    Example:
        >>> from tempfile import mkdtemp
        >>> from evennorm.tools.compare import compare
        >>> comparison = compare(
        ...     model="paper-mlp", placements=["none", "before"], repeats=2, learning_rates=[0.5], epochs=1, out=mkdtemp()
        ... )
        >>> [(row.placement, row.learning_rate, row.chosen) for row in comparison.table]
        [('none', 0.5, 2), ('before', 0.5, 2)]
        >>> comparison.verdict
        '...'
    """
    for package, extra in NEEDED.items():
        if importlib.util.find_spec(package) is None:
            raise MissingExtra("evennorm compare", extra, package)
    settings = settings_for(
        data,
        model,
        placements,
        repeats,
        learning_rates,
        epochs,
        batch_size,
        engine,
        out,
        storage,
        seed,
        max_repeats,
        equivalent,
        study,
        advantages,
    )
    if jobs < 1:
        raise ArgumentError(f"the number of jobs must be at least 1; received {jobs}")

    from evennorm.tools.compare.engine import device
    from evennorm.tools.compare.report import Comparison
    from evennorm.tools.compare.train import Trainer
    from evennorm.tools.compare.work import Progress, join_study, prepare, work, work_in_processes

    samples, architecture, fingerprint = prepare(settings)
    trainer = Trainer(settings, samples, architecture)
    for placement in settings.placements:
        architecture.place(placement)  # an impossible one is told before anything is trained
    _check_writable(Path(settings.out))
    runs = join_study(settings, samples, fingerprint, notice)
    told = Progress(settings, len(runs.records()), progress or (lambda done, total: None), notice)
    if jobs == 1 or not runs.enqueue_missing():
        work(runs, trainer, told)
    else:
        work_in_processes(settings, jobs, told)
    comparison = Comparison.of(
        settings, str(samples), fingerprint, device(settings.engine), runs.records(), 1 / len(samples.x_test)
    )
    if hand_over:
        comparison = with_model(comparison, trainer)
    comparison.write()
    return comparison


def with_model(comparison: Comparison, trainer: Trainer) -> Comparison:
    """The comparison with the model that it hands over, trained where it is not there yet; none where no run has learned."""
    from evennorm.tools.compare import best

    choice = best.choose(comparison.settings, comparison.records, comparison.race)
    if choice is None:
        return comparison
    return replace(comparison, best=best.hand_over(trainer, comparison.fingerprint, choice))


def settings_for(
    data: str,
    model: str,
    placements: Iterable[str],
    repeats: int | None,
    learning_rates: Iterable[float] | None,
    epochs: int | str | None,
    batch_size: int | None,
    engine: str | None,
    out: str | None,
    storage: str | None,
    seed: int,
    max_repeats: int = DEFAULT_MAX_REPEATS,
    equivalent: float | None = None,
    study: str | None = None,
    advantages: bool = False,
) -> Settings:
    """The arguments of `compare` with everything that was left open filled in."""
    from evennorm.tools.compare.engine import choose_engine
    from evennorm.tools.compare.models import DEFAULTS, Defaults

    defaults = DEFAULTS.get(model, Defaults())
    chosen = choose_engine(engine)
    demo = (data, model) == ("digits", "article-cnn")
    own_epochs = DEMO_EPOCHS if demo else DEFAULT_EPOCHS if data == "digits" else "auto"
    rates = DEMO_LEARNING_RATES if demo else defaults.learning_rates
    if equivalent is None:
        equivalent = 100 * (DEMO_EQUIVALENT if demo else DEFAULT_EQUIVALENT)
    try:
        most, until_flat = parsed(own_epochs if epochs is None else epochs)
    except ValueError:
        raise ArgumentError(f"epochs are a number, auto or auto:BUDGET, as in auto:50; received {epochs!r}") from None
    return Settings(
        data,
        model,
        tuple(placements),
        max_repeats if repeats is None else repeats,
        tuple(rates if learning_rates is None else learning_rates),
        most,
        defaults.batch_size if batch_size is None else batch_size,
        chosen,
        seed,
        out or str(Path("evennorm-runs", "-".join([word(data), word(model), chosen]))),
        storage,
        sequential=repeats is None,
        until_flat=until_flat,
        equivalent=equivalent / 100,
        study=study,
        advantages=advantages,
    )


def _check_writable(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise InputError(
            f"--out {out} cannot be written to: {error.strerror}; choose a folder that takes new files"
        ) from error
