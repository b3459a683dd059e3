"""Convert a model of Keras 1 or 2 to Keras 3, and say what was done: `evennorm migrate`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from evennorm.cli.group import force_option
from evennorm.cli.progress import bar
from evennorm.cli.tables import plain_table, print_table
from evennorm.errors import printable, printable_json
from evennorm.tools.outputs import Output, check_outputs

if TYPE_CHECKING:
    from evennorm.tools.migrate import Migration


@click.command(short_help="Convert a model of Keras 1 or 2 to Keras 3.")
@click.argument("old", metavar="OLD")
@click.option(
    "-o", "--output", metavar="FILE", required=True, help="Output file: .keras or .h5; with --to torch .safetensors."
)
@click.option(
    "--architecture",
    metavar="ARCHITECTURE",
    help="For a file of weights: FILE.json from model.to_json(), or module:function (your own code, which is run).",
)
@click.option(
    "--written-by",
    metavar="RELEASE,BACKEND",
    help="Release and backend that wrote OLD, if the file does not say: keras==1.0.4,theano, or one of the two.",
)
@click.option(
    "--to",
    type=click.Choice(["keras", "torch"]),
    default="keras",
    show_default=True,
    help="torch writes a state_dict of the layers that torch has; OLD may then also be a .keras file.",
)
@click.option(
    "--custom",
    metavar="MODULE:CLASS",
    multiple=True,
    help="Your own layer class that OLD contains (your own code, which is run). May be repeated.",
)
@click.option("--partial", is_flag=True, help="Leave out layers that cannot be migrated, and those that depend on them.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@force_option
@click.pass_context
def migrate(
    ctx: click.Context,
    old: str,
    output: str,
    architecture: str | None,
    written_by: str | None,
    to: str,
    custom: tuple[str, ...],
    partial: bool,
    as_json: bool,
    force: bool,
) -> None:
    """Convert a file of Keras 1.0 to 1.2, Keras 2 or tf.keras 2 to a Keras 3 model.

    \b
    evennorm migrate old.h5 -o new.keras
    evennorm migrate weights.h5 --architecture model.json --written-by keras==1.0.4,theano -o new.keras
    evennorm migrate old.h5 --to torch -o new.safetensors

    OLD is an HDF5 file (.h5, .hdf5). TensorFlow's SavedModel folders and checkpoints cannot be read. Code in the file is
    never run. The report says for each layer what it became, what was converted, and what had to be assumed.

    Exit codes: 0 written; 1 written without some layers (--partial); 2 failed, or --partial leaves no layer;
    130 interrupted. After 2 and 130 no file is written.
    """
    check_outputs([Output("-o", output, ())], {"OLD": old, "--architecture": architecture}, force)
    from evennorm.tools.migrate import migrate as migrated

    with bar(f"migrating {printable(Path(old).name)}") as progress:
        result = migrated(
            old,
            output,
            architecture=architecture,
            written_by=written_by,
            partial=partial,
            to=to,
            custom=custom,
            progress=progress,
        )
    if as_json:
        click.echo(printable_json(result.as_dict()))
    else:
        _print(result)
    ctx.exit(1 if result.left_out else 0)


def _print(result: Migration) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)

    def say(text: str, style: str = "") -> None:
        console.print(Text(printable(text), style=style), soft_wrap=True)

    say(f"{result.old}: {result.written_by}", "bold")
    for sentence in result.evidence:
        say(f"  concluded: {sentence}")
    console.print()
    table = plain_table("bold")
    table.add_column("layer", no_wrap=True)
    table.add_column("old", no_wrap=True)
    table.add_column("new", overflow="fold")
    table.add_column("weights", justify="right", no_wrap=True)
    for layer in result.layers:
        words = (Text(printable(word)) for word in (layer.old, layer.old_class, layer.new or "-"))
        table.add_row(*words, str(layer.weights or ""))
    print_table(console, table)
    _print_notes(say, "converted", {x.old: x.converted for x in result.layers})
    _print_notes(say, "assumed", {x.old: x.assumed for x in result.layers})
    if result.from_architecture:
        say("\nfrom the architecture", "bold")
    for sentence in result.from_architecture:
        say(f"  {sentence}")
    if result.notes:
        console.print()
    for note in result.notes:
        say(f"note: {note}")
    if result.left_out:
        console.print()
        say(f"left out: {', '.join(result.left_out)}", "bold yellow")
    console.print()
    say(f"{result.parameters:,} parameters; written to {result.new}")


def _print_notes(say: Callable[..., None], heading: str, notes: dict[str, tuple[str, ...]]) -> None:
    """Print one line for each sentence, with all layers that it is true of."""
    by_sentence: dict[str, list[str]] = {}
    for name, sentences in notes.items():
        for sentence in sentences:
            by_sentence.setdefault(sentence, []).append(name)
    if by_sentence:
        say("")
        say(heading, "bold")
    for sentence, names in by_sentence.items():
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        say(f"  {shown}: {sentence}")
