"""Train a model with batch normalization in each placement, in paired repeats, and say what that shows."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any

from evennorm.errors import ArgumentError, InputError, MissingExtra
from evennorm.tools.compare.confidence import DEFAULT_MAX_REPEATS
from evennorm.tools.compare.flat import parsed
from evennorm.tools.compare.measure import DEFAULT_METRICS, TASKS, metric_named
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
    from evennorm.tools.compare.work import Report

__all__ = ["PLACEMENTS", "Run", "Settings", "compare", "settings_for"]

NEEDED = {**dict.fromkeys(("optuna", "matplotlib", "scipy", "plotly", "jinja2"), "tools"), "keras": "demo"}


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
    norms: Iterable[str] = ("batch",),
    hand_over: bool = True,
    tensorboard: str | None = None,
    task: str | None = None,
    metric: str | None = None,
    device: str | None = None,
    data_format: str | None = None,
    progress: Report | None = None,
    notice: Callable[[str], None] = lambda text: None,
) -> Comparison:
    """Train each placement of batch normalization x learning rate x repeat, and tell which differences that shows.

    Repeats are added only to pairs of placements that are not told apart yet, by intervals that hold however often one
    looks. What is trained already, by an interrupted call or with fewer repeats, is not trained again. The same call gives
    the same numbers on the same machine and engine.

    Args:
        data: `digits`, `fashion-mnist`, an `.npz` file, a folder of IDX files or of class folders of images, or
            `module:function`.
        model: `article-cnn`, `paper-mlp`, a `.keras` file, `module:function` that returns a Keras model or a
            torch.nn.Module, `timm:NAME` or `torchvision:NAME`.
        placements: some of `none`, `before`, `after`, `input`, `as-is`, and `search` or `search:BUDGET`, which looks for a
            mixture of the first three, layer by layer.
        repeats: trainings of each placement at each rate; repeat i has the same seed in all of them. None trains as many as
            each pair takes to be told apart.
        learning_rates: None is 0.02 and 0.1; for `paper-mlp` 0.1 and 0.5; for the demo 0.005 and 0.2.
        epochs: of each training; `auto` or `auto:BUDGET` ends each one where its validation loss is flat. None is 5 for
            the demo, 10 for other models on the digits, else `auto`.
        batch_size: None is 32, for `paper-mlp` 60.
        engine: Keras backend; None is that of KERAS_BACKEND, else the lightest that is installed.
        jobs: how many processes train.
        out: folder for study, runs.csv, summary.json, curves.png and report.html; None is `evennorm-runs/DATA-MODEL-ENGINE`.
        storage: URL of an Optuna storage that several machines share; None is a SQLite file in `out`.
        study: its name in that storage; None is DATA-MODEL-ENGINE.
        seed: another one gives other initial weights, orders and dropout in every repeat.
        max_repeats: where `repeats` is None: the last look comes after so many at most.
        equivalent: a difference below counts as none: in percentage points, or in the unit of another metric. None is 2
            points, for the demo, `article-cnn` on the digits, 3; of another metric 0.
        tensorboard: folder that takes the curves of every run, in a folder of its own.
        task: `classification`, `multilabel` or `regression`; None chooses it from the labels.
        metric: what runs are judged by: Keras's name, or for torch models that of torchmetrics; `:min` or `:max` after it
            says which is better. None is `accuracy`, `binary_accuracy` or `mean_absolute_error`.
        device: where torch models are trained: `cpu`, `cuda` or `mps`; None is the best there is.
        data_format: `channels_last` or `channels_first`, where the images of an `.npz` file have their channels; None is
            what their sizes tell. Models get them where their framework has them.
        advantages: whether to train from larger and smaller initial weights too, and to record one hidden unit's input.
        norms: some of `batch`, `layer`, `group`, `rms`, which stand in each of the placements, and `none`.
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
        if package == "keras":
            continue
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
        task,
        metric,
        device,
        norms,
        data_format,
    )
    if tensorboard is not None:
        from evennorm.tools.compare import tensorboard as curves

        curves.check(tensorboard)
    if jobs < 1:
        raise ArgumentError(f"the number of jobs must be at least 1; received {jobs}")

    from evennorm.tools.compare import search
    from evennorm.tools.compare.engine import device as in_words
    from evennorm.tools.compare.report import Comparison
    from evennorm.tools.compare.work import (
        Progress,
        join_study,
        prepare,
        prepare_data,
        trainer_for,
        work,
        work_in_processes,
    )

    samples = prepare_data(settings, task)
    settings = judged_by(settings, samples.task, metric, equivalent)
    samples, architecture, fingerprint = prepare(settings, samples)
    if settings.search:
        settings = replace(settings, sites=len(architecture.sites()))
        search.check(settings)
    trainer = trainer_for(settings, samples, architecture)
    for placement in settings.placements:
        architecture.place(placement)  # report an impossible one before anything is trained
    _check_writable(Path(settings.out))
    runs = join_study(settings, samples, fingerprint, notice)
    told = Progress(settings, len(runs.records()), progress or (lambda done, total: None), notice)
    if jobs == 1 or not runs.enqueue_missing():
        work(runs, trainer, told)
    else:
        work_in_processes(settings, jobs, told)
    records = runs.records()
    known = search.resolved(settings, records)
    assert known is not None  # all of its runs have been trained
    comparison = Comparison.of(
        known,
        str(samples),
        fingerprint,
        in_words(settings.engine, settings.device),
        records,
        settings.measure.step(len(samples.x_test)),
    )
    if settings.search:
        found = search.outcome(settings, records, architecture.sites(), comparison.race.pairs)
        comparison = replace(comparison, search=found)
    if hand_over:
        comparison = with_model(comparison, trainer)
    comparison.write()
    if tensorboard is not None:
        curves.write_runs(tensorboard, {**comparison.records, **comparison.scaled}, settings.measure.name)
    return comparison


def with_model(comparison: Comparison, trainer: Any) -> Comparison:
    """Return the comparison with the model that it hands over, trained if it is not there yet; none where no run has
    learned."""
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
    task: str | None = None,
    metric: str | None = None,
    device: str | None = None,
    norms: Iterable[str] = ("batch",),
    data_format: str | None = None,
) -> Settings:
    """Return the settings of `compare`, with open arguments filled in as far as possible without looking at the data."""
    from evennorm.tools.compare import search, variants
    from evennorm.tools.compare.models import DEFAULTS, Defaults

    if task is not None and task not in TASKS:
        raise ArgumentError(f"tasks are {', '.join(TASKS)}; received {task!r}")
    defaults = DEFAULTS.get(model, Defaults())
    framework, chosen, device = _engine(model, engine, device)
    demo = (data, model) == ("digits", "article-cnn")
    own_epochs = DEMO_EPOCHS if demo else DEFAULT_EPOCHS if data == "digits" else "auto"
    rates = DEMO_LEARNING_RATES if demo else defaults.learning_rates
    try:
        most, until_flat = parsed(own_epochs if epochs is None else epochs)
    except ValueError:
        raise ArgumentError(f"epochs are a number, auto or auto:BUDGET, as in auto:50; received {epochs!r}") from None
    named, budget = search.budget_of(list(placements))
    settings = Settings(
        data,
        model,
        variants.expanded(named or (DEFAULT_PLACEMENTS if budget else ()), norms),
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
        study=study,
        advantages=advantages,
        framework=framework,
        device=device,
        search=budget,
        data_format=data_format,
    )
    return judged_by(settings, task or "classification", metric, equivalent)


def judged_by(settings: Settings, task: str, metric: str | None, equivalent: float | None) -> Settings:
    """Return the settings with a task, its metric, and the difference that counts as none."""
    name = metric or DEFAULT_METRICS[task]
    found = metric_named(name)
    demo = (settings.data, settings.model) == ("digits", "article-cnn")
    own = DEMO_EQUIVALENT if demo else DEFAULT_EQUIVALENT
    points = own if equivalent is None else equivalent / 100
    margin = points if found.is_share else equivalent or 0.0
    plain = found.name if name.partition(":")[2] == "" else f"{found.name}:{name.partition(':')[2]}"
    return replace(settings, task=task, metric=plain, equivalent=margin)


def _engine(model: str, engine: str | None, device: str | None) -> tuple[str, str, str | None]:
    """Return framework, engine and device."""
    from evennorm.tools.compare.engine import choose_engine, preset_engine
    from evennorm.tools.compare.framework import FUNCTION, framework_of

    if FUNCTION.fullmatch(model) and importlib.util.find_spec("keras") is not None:
        preset_engine(engine)  # before the user's module can import Keras
    if framework_of(model) == "torch":
        if engine not in (None, "torch"):
            raise ArgumentError(
                f"a torch.nn.Module is trained by torch; received --engine {engine} for {model}; leave it out"
            )
        if importlib.util.find_spec("torch") is None:
            raise MissingExtra(f"--model {model}", "torch", "torch")
        from evennorm.tools.compare.torch_train import choose_device

        return "torch", "torch", choose_device(device)
    if device is not None:
        raise ArgumentError(
            f"--device is for models of PyTorch, and Keras's engines find theirs; received --device {device} for {model}; "
            "set CUDA_VISIBLE_DEVICES to choose"
        )
    if importlib.util.find_spec("keras") is None:
        raise MissingExtra("evennorm compare", NEEDED["keras"], "keras")
    return "keras", choose_engine(engine), None


def _check_writable(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise InputError(
            f"--out {out} cannot be written to: {error.strerror}; choose a folder that takes new files"
        ) from error
