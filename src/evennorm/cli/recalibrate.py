"""Set the moving statistics of a model to the exact ones of data, and say what that changes: `evennorm recalibrate`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import click

from evennorm.cli.group import force_option
from evennorm.cli.progress import bar
from evennorm.cli.tables import plain_table, print_table
from evennorm.errors import printable, printable_json
from evennorm.tools.interrupts import between_batches
from evennorm.tools.outputs import Output, check_outputs

if TYPE_CHECKING:
    from evennorm.tools.recalibrate import Recalibration

_SHOWN = 12
"""Layers in the table: those whose statistics moved most."""


_NOTES = """\
mean moved by  the channel that moved most, in standard deviations of the data
sd times       the new standard deviation divided by the old one, for the channel where this is furthest from 1
drift          root mean square over the channels, in old standard deviations, as in `evennorm check --data`; there, and with
               --one-pass, all layers normalize by the batch; otherwise each is measured after recalibrated ones
"""


@click.command(short_help="Compute exact moving means and variances, without training.")
@click.argument("model")
@click.option(
    "--data",
    required=True,
    metavar="DATA",
    help="Training data: an .npz file with x (and y), an .npy file, a folder of these or of images in class folders, or "
    "module:function that returns batches.",
)
@click.option(
    "-o",
    "--output",
    required=True,
    metavar="OUT",
    help="Output file: .keras or .h5; for torch a state_dict, .safetensors or .pt.",
)
@click.option("--weights", metavar="FILE", help="Weights to load first: a state_dict for torch, .weights.h5 for Keras.")
@click.option("--batches", type=click.IntRange(1), metavar="N", help="Number of batches to use. [default: all]")
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    default=128,
    show_default=True,
    metavar="N",
    help="Batch size for files and arrays.",
)
@click.option(
    "--one-pass", is_flag=True, help="Recalibrate all layers at once, normalizing by the batch: faster, but not exact."
)
@click.option("--keep-frozen", is_flag=True, help="Do not change layers that are not trainable.")
@click.option(
    "--cache",
    type=click.FloatRange(0),
    metavar="GB",
    help="Memory for values between layers. [default: half of what is free]",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@force_option
def recalibrate(
    model: str,
    data: str,
    output: str,
    weights: str | None,
    cache: float | None,
    as_json: bool,
    force: bool,
    **options: Any,
) -> None:
    """Set the moving means and variances to the exact ones of the data, without training.

    MODEL is a .keras, .h5 or .pt2 file; module:function, which is imported from the current folder and called; or
    timm:NAME or torchvision:NAME.

    \b
    evennorm recalibrate model.keras --data train.npz -o better.keras
    evennorm recalibrate nets:resnet --weights resnet.pt --data nets:loader --batches 200 -o better.safetensors

    Exit codes: 0 done; 2 failed; 130 interrupted. In the last two cases OUT is unchanged.
    """
    from evennorm.tools.data import open_data
    from evennorm.tools.models import check_output, open_model, save_model
    from evennorm.tools.recalibrate import recalibrate as recalibrated

    with bar() as progress:
        opened = open_model(model, weights)
        check_output(opened.framework, output)
        check_outputs([Output("-o", output, ())], {"MODEL": model, "--data": data, "--weights": weights}, force)
        room = None if cache is None else int(cache * 1e9)
        source = open_data(data, opened.framework)
        with between_batches():
            done = recalibrated(opened, source, cache=room, progress=progress, **options)
            save_model(opened, opened.model, output)
    if as_json:
        click.echo(printable_json(done.as_dict() | {"output": output}))
    else:
        _print(done, output)


def _print(done: Recalibration, output: str) -> None:
    from rich.console import Console
    from rich.text import Text

    from evennorm.tools.recalibrate.report import HEAD

    console = Console(highlight=False)

    def say(text: str, style: str = "") -> None:
        console.print(Text(printable(text), style=style), soft_wrap=True)

    say(done.title, "bold")
    console.print()
    table = plain_table("dim")
    table.add_column(HEAD[0], overflow="fold")
    for header in HEAD[1:-1]:
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column(HEAD[-1])
    moved = sorted(done.layers, key=lambda layer: -max(layer.shift, abs(math.log(layer.stretch or 1e-300))))[:_SHOWN]
    for layer in (layer for layer in done.layers if layer in moved):
        table.add_row(*(Text(printable(cell)) for cell in layer.cells))
    print_table(console, table)
    for line in ["", *_NOTES.splitlines(), ""]:
        say(line, "dim")
    if len(done.layers) > _SHOWN:
        say(f"and {len(done.layers) - _SHOWN} more, which moved less", "dim")
    for line in done.kept:
        say(line, "yellow")
    if any(layer.frozen for layer in done.layers):
        say(
            "frozen layers normalize by their moving statistics in training too; --keep-frozen leaves them as they are",
            "yellow",
        )
    for note in done.notes:
        say(note, "yellow")
    if done.effect is not None:
        console.print()
        for line in done.effect.lines:
            say(line)
    console.print()
    say(f"written: {output}")
