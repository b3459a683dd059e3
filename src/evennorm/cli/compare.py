"""Compare placements of batch normalization: `evennorm compare` trains a network in each, prints a table and a verdict."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from evennorm.cli.group import force_option
from evennorm.cli.progress import bar
from evennorm.cli.sharing import pass_on, take_part
from evennorm.cli.tables import plain_table, print_table
from evennorm.errors import InputError, printable, printable_json
from evennorm.tools.compare.confidence import DEFAULT_MAX_REPEATS
from evennorm.tools.compare.flat import BUDGET
from evennorm.tools.compare.measure import TASKS
from evennorm.tools.compare.settings import (
    DEFAULT_EPOCHS,
    DEFAULT_EQUIVALENT,
    DEFAULT_PLACEMENTS,
    DEMO_EPOCHS,
    DEMO_EQUIVALENT,
    PLACEMENTS,
)
from evennorm.tools.compare.variants import NORMS
from evennorm.tools.interrupts import INTERRUPTED, remembered, stop_if_interrupted
from evennorm.tools.outputs import Output, check_outputs, refuse_inputs

if TYPE_CHECKING:
    from evennorm.tools.compare.report import Comparison
    from evennorm.tools.compare.settings import Settings

_NOTES = """\
( - )       95 % interval of the mean over the runs
*           the learning rate that validation samples chose
gap         {gap}, both measured after training, in inference mode
at chance   runs that ended no better than guessing
not finite  runs whose loss stopped being finite
"""


@click.command(short_help="Train a network with batch normalization in different places.")
@click.option(
    "--data",
    default="digits",
    show_default=True,
    metavar="DATA",
    help="digits, fashion-mnist, an .npz file (x and y, or x_train, y_train, x_test, y_test), a folder of IDX files, "
    "a folder with one folder of images per class, or module:function.",
)
@click.option(
    "--model",
    default="article-cnn",
    show_default=True,
    metavar="MODEL",
    help="article-cnn (a small convolutional network), paper-mlp (the fully connected network of the paper), a .keras or "
    ".pt2 file (its architecture, with new weights), module:function that returns a Keras model or a torch.nn.Module, "
    "timm:NAME or torchvision:NAME.",
)
@click.option("--task", metavar="TASK", help=f"One of {', '.join(TASKS)}. [default: chosen from the labels]")
@click.option(
    "--metric",
    metavar="NAME",
    help="Metric that judges the runs: a name of Keras, or of torchmetrics for torch models. NAME:min or NAME:max says "
    "which is better. [default: by task: accuracy, binary_accuracy, mean_absolute_error]",
)
@click.option(
    "--data-format",
    metavar="FORMAT",
    help="Where the images of an .npz file have their channels: channels_last or channels_first. "
    "[default: what their sizes tell]",
)
@click.option("--device", metavar="DEVICE", help="Device for torch models: cpu, cuda or mps. [default: the best available]")
@click.option(
    "--placements",
    default=",".join(DEFAULT_PLACEMENTS),
    show_default=True,
    metavar="LIST",
    help=f"Any of {', '.join(PLACEMENTS)}. search, or search:RUNS, looks for a mixture of the first three, layer by layer.",
)
@click.option(
    "--norms",
    default="batch",
    show_default=True,
    metavar="LIST",
    help=f"Normalizations to place: any of {', '.join(NORMS)}.",
)
@click.option(
    "--repeats",
    type=int,
    metavar="N",
    help="Number of runs of each placement, with paired seeds. [default: as many as each pair needs]",
)
@click.option(
    "--max-repeats",
    default=DEFAULT_MAX_REPEATS,
    show_default=True,
    metavar="N",
    help="Most repeats, if --repeats is not given.",
)
@click.option(
    "--equivalent",
    type=float,
    metavar="D",
    help="Differences below D count as equal: in points of accuracy, or in the unit of another metric. "
    f"[default: {100 * DEFAULT_EQUIVALENT:g} points; for the demo {100 * DEMO_EQUIVALENT:g}; for other metrics 0]",
)
@click.option(
    "--learning-rates",
    metavar="LIST",
    help="Learning rates to try. [default: 0.02,0.1; for paper-mlp 0.1,0.5; for the demo 0.005,0.2]",
)
@click.option(
    "--epochs",
    metavar="N",
    help=f"Epochs of each run. auto ends a run when its validation loss is flat; auto:N does so after at most N epochs. "
    f"[default: {DEMO_EPOCHS} for the demo, {DEFAULT_EPOCHS} for other models on digits, else auto:{BUDGET}]",
)
@click.option("--batch-size", type=int, metavar="N", help="Batch size. [default: 32; for paper-mlp 60]")
@click.option(
    "--engine", metavar="ENGINE", help="jax, torch or tensorflow. [default: KERAS_BACKEND, else the first installed]"
)
@click.option("--jobs", default=1, show_default=True, metavar="N", help="Number of processes that train in parallel.")
@click.option("--out", metavar="DIR", help="Folder for the results. [default: evennorm-runs/DATA-MODEL-ENGINE]")
@click.option(
    "--storage",
    metavar="URL",
    help="Database that several machines share: postgresql://USER@HOST/NAME, or grpc://HOST:PORT of a proxy. "
    "[default: SQLite, in --out]",
)
@click.option("--study", metavar="NAME", help="Name of the study in the database. [default: DATA-MODEL-ENGINE]")
@click.option(
    "--worker",
    metavar="URL",
    help="Join the study in this database, with its settings. --data and --model say where to find them on this machine.",
)
@click.option("--serve", metavar="grpc://HOST:PORT", help="Run a gRPC proxy for --storage, until interrupted.")
@click.option("--seed", default=0, show_default=True, metavar="N", help="Seed of initial weights, sample order and dropout.")
@click.option(
    "--advantages",
    is_flag=True,
    help="Also train from larger and smaller initial weights, and record how the input of one hidden unit changes.",
)
@click.option("--no-model", is_flag=True, help="Write no model. [default: write the best one, trained again, to best.keras]")
@click.option("--tensorboard", metavar="DIR", help="Write TensorBoard curves, with one folder in DIR for each run.")
@click.option("--open", "show", is_flag=True, help="Open report.html in the browser.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@force_option
@click.pass_context
def compare(
    ctx: click.Context,
    placements: str,
    learning_rates: str | None,
    as_json: bool,
    force: bool,
    worker: str | None,
    serve: str | None,
    no_model: bool,
    show: bool,
    **options: Any,
) -> None:
    """Train a network with batch normalization in each placement, and say which differences are real.

    Without options, it runs a demo of 2 minutes: a small convolutional network on images of digits, without a download.

    \b
    evennorm compare
    evennorm compare --data images/ --placements none,before --repeats 10
    evennorm compare --data fashion-mnist --engine torch --jobs 4 --out results
    evennorm compare --worker postgresql://me@host/database

    You can interrupt it at any time: the same command trains only what is missing.

    Exit codes: 0 all runs are trained; 2 the comparison could not be made; 130 interrupted.
    """
    for name, value in {**options, "worker": worker, "serve": serve}.items():
        if value == "" and name not in ("norms", "study"):  # which say more
            raise InputError(f"--{name.replace('_', '-')} is empty; give it a value, or leave it out")
    if worker is not None or serve is not None:
        take_part(ctx, worker, options, _bar) if worker is not None else pass_on(ctx, str(serve), options["storage"])
        return
    options["placements"] = _parts(placements)
    options["norms"] = _parts(options["norms"])
    options["learning_rates"] = None if learning_rates is None else [_number(part) for part in _parts(learning_rates)]
    if options["out"] is not None:
        _check_folder(Path(options["out"]), {"--data": options["data"], "--model": options["model"]}, force)
    from evennorm.tools.compare import compare as compared

    try:
        with _bar() as (progress, notice):
            comparison = compared(progress=progress, notice=notice, hand_over=not no_model, **options)
    except KeyboardInterrupt:
        click.echo("evennorm: interrupted; finished runs are kept, the same command continues from there", err=True)
        ctx.exit(INTERRUPTED)
    if as_json:
        click.echo(printable_json(comparison.as_dict()))
    else:
        _print(comparison)
    if show:
        _show(Path(comparison.settings.out, "report.html"))


def _show(page: Path) -> None:
    """Open the page where there is a browser; else say where it is."""
    if click.launch(page.resolve().as_uri()) != 0:
        click.echo(f"evennorm: no browser could be opened; the page is {printable(str(page))}", err=True)


@contextmanager
def _bar() -> Iterator[tuple[Callable[[float, int], None], Callable[[str], None]]]:
    """Show a progress bar; yield a function that moves it, and one that writes a line above it."""
    # The speed is that of the last ten minutes: runs of different placements differ in length.
    with bar(period=600) as move, remembered_interrupts():
        yield lambda done, total: move(f"{int(done)} of {total} runs", done, total), move.note


@contextmanager
def remembered_interrupts() -> Iterator[Callable[[], None]]:
    """Yield a function that raises KeyboardInterrupt again after Ctrl-C, wherever a library has swallowed it."""
    with remembered():
        yield stop_if_interrupted


def _check_folder(out: Path, inputs: dict[str, str], force: bool) -> None:
    refuse_inputs(out, inputs, "--out")
    names = {
        "runs.csv": ".csv",
        "summary.json": ".json",
        "curves.png": ".png",
        "report.html": ".html",
        "best.keras": ".keras",
        "best.pt2": ".pt2",
        "best.pt": ".pt",
    }
    check_outputs([Output("--out", out / name, (suffix,)) for name, suffix in names.items() if out.is_dir()], inputs, force)


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InputError(f"--learning-rates takes numbers, as in 0.02,0.1; received {text!r}") from None


def _plan(settings: Settings) -> str:
    repeats = f"{settings.repeats} at most, as pairs need" if settings.sequential else settings.repeats
    epochs = f"until flat, {settings.epochs} at most" if settings.until_flat else settings.epochs
    return f"repeats: {repeats}; epochs: {epochs}; batches of {settings.batch_size}"


def _print(comparison: Comparison) -> None:
    from rich.console import Console
    from rich.text import Text

    from evennorm.tools.compare.praise import told

    console = Console(highlight=False)
    settings = comparison.settings
    console.print(Text(printable(f"{settings.model} on {comparison.data}")), soft_wrap=True)
    console.print(Text(f"{printable(f'{_plan(settings)}; {comparison.device}')}\n"), soft_wrap=True)
    table = plain_table("bold")
    table.add_column("placement", no_wrap=True)
    metric = settings.measure
    dash = "-" if metric.is_share else " to "
    judged = printable(f"test {metric.short}{' %' if metric.is_share else ''}")
    for header in ("rate", judged, "epochs\nto none", "s per\nepoch", "gap", "runs", "at\nchance", "not\nfinite"):
        table.add_column(header, justify="right", no_wrap=True)
    for row in comparison.table:
        interval = "" if row.low is None or row.high is None else f" ({metric.text(row.low)}{dash}{metric.text(row.high)})"
        table.add_row(
            row.placement,
            f"{row.learning_rate:g}{'*' if row.chosen else ' '}",
            f"{metric.text(row.test_accuracy)}{interval}",
            "-" if row.epochs_to_reference is None else str(row.epochs_to_reference),
            "-" if row.seconds_per_epoch is None else f"{row.seconds_per_epoch:.2f}",
            metric.text(row.gap),
            str(row.repeats),
            str(row.at_chance or ""),
            str(row.diverged or ""),
        )
    print_table(console, table)
    console.print()
    gap = "training minus test accuracy" if metric.name == "accuracy" else "how much better on training than on test samples"
    console.print(Text(_NOTES.format(gap=gap)), soft_wrap=True)
    for line in told(settings, comparison.advantages, comparison.at_rates):
        console.print(Text(line), soft_wrap=not console.is_terminal)
    console.print()
    for line in comparison.verdict.splitlines():
        console.print(Text(printable(line), style="bold"), soft_wrap=not console.is_terminal)
    for line in [] if comparison.search is None else ["", *comparison.search.lines]:
        console.print(Text(printable(line)), soft_wrap=not console.is_terminal)
    names = [name for name in comparison.file_names if not name.startswith("best.")]
    console.print(Text(f"\n{', '.join(names[:-1])} and {names[-1]} are in {printable(settings.out)}"), soft_wrap=True)
    for line in [] if comparison.best is None else comparison.best.lines(settings.out):
        console.print(Text(printable(line)), soft_wrap=True)
