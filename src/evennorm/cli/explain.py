"""Show which values batch normalization averages for a shape and an axis, and what looks wrong: `evennorm explain`."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import click

from evennorm.cli.group import force_option
from evennorm.cli.progress import bar
from evennorm.errors import InputError, printable, printable_json
from evennorm.tools.outputs import Output, check_outputs

if TYPE_CHECKING:
    from evennorm.tools.explain import Explanation
    from evennorm.tools.explain.model import ExplainedModel

_STYLES = {"title": "bold", "heading": "bold", "clean": "green", "warning": "bold yellow", "remedy": "yellow"}
_WIDTHS = (60, 80, 100)
"""Columns: the fewest, those where the output is no terminal, the most."""


@click.command(short_help="Show which values share a mean and a variance.")
@click.argument("model", required=False)
@click.option("--shape", metavar="SIZES", help="Shape of the array, batch first, ? for unknown sizes: 32,28,28,3")
@click.option("--axis", metavar="AXES", help="The channel axis, or several: 1,3  [default: -1]")
@click.option(
    "--batch-size", type=click.IntRange(1), metavar="N", help="Batch size of MODEL's training, if the model does not fix it."
)
@click.option("--svg", metavar="FILE", help="Draw the array; cells normalized together have one colour.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@force_option
@click.pass_context
def explain(ctx: click.Context, model: str | None, **options: Any) -> None:
    """Show which values share a mean and a variance, in an array or in each layer of MODEL, and what looks wrong.

    \b
    evennorm explain --shape 32,28,28,3 --axis -1
    evennorm explain --shape '?,8,8,64' --axis 1,3 --svg figure.svg
    evennorm explain model.keras --batch-size 32
    evennorm explain package.models:build --shape 32,3,224,224

    MODEL is a .keras, .h5 or .pt2 file; module:function, your own code; or timm:NAME or torchvision:NAME. For a torch
    MODEL, --shape is the shape of its inputs.

    Exit codes: 0 nothing looks wrong; 1 warnings; 2 the input could not be explained; 130 interrupted.
    """
    shape = None if options["shape"] is None else parsed_shape(options["shape"])
    if model is not None:
        _refuse(
            options, ("axis", "svg"), "without MODEL: each layer of a model has an axis of its own, and a figure shows one"
        )
        ctx.exit(_explain_model(model, shape, options["batch_size"], options["as_json"]))
    if shape is None:
        raise InputError("explain takes MODEL, or --shape of an array, as in --shape 32,28,28,3; received neither")
    _refuse(options, ("batch_size",), "with MODEL: the batch of an array is the first size of --shape")
    ctx.exit(
        _explain_array(
            shape,
            parsed_axes("-1" if options["axis"] is None else options["axis"]),
            options["svg"],
            options["as_json"],
            options["force"],
        )
    )


def _refuse(options: dict[str, Any], names: tuple[str, ...], rule: str) -> None:
    for name in names:
        if options[name] is not None:
            raise InputError(f"--{name.replace('_', '-')} is given {rule}; received {options[name]!r}")


def _explain_array(shape: list[int | None], axes: list[int], svg: str | None, as_json: bool, force: bool) -> int:
    check_outputs([Output("--svg", svg, (".svg",))], {}, force)
    from evennorm.tools.explain import explain as explained

    explanation = explained(shape, axes)
    if svg is not None:
        from evennorm.tools.atomic import write_text
        from evennorm.tools.explain.drawing import draw

        write_text(svg, draw(explanation))
    if as_json:
        click.echo(printable_json(explanation.as_dict() | {"svg": svg}))
    else:
        _print(explanation, svg)
    return 1 if explanation.findings else 0


def _explain_model(model: str, shape: list[int | None] | None, batch_size: int | None, as_json: bool) -> int:
    from evennorm.tools.explain.model import explain_model

    if shape is not None and None in shape:
        raise InputError(f"--shape of a model's inputs needs all sizes, since a batch of it is run; received {shape}")
    with bar():
        explained = explain_model(model, batch_size, None if shape is None else [size or 0 for size in shape])
    if as_json:
        click.echo(printable_json(explained.as_dict()))
    else:
        _print_model(explained)
    return 1 if explained.findings else 0


def parsed_shape(text: str) -> list[int | None]:
    """Parse sizes from "32,28,28,3", also with the brackets and the None that Keras prints; None where unknown.

    Raises:
        InputError: something else than whole numbers and ?, or nothing at all.
    """
    rule = "--shape takes whole numbers, ? where a size is unknown, as in 32,28,28,3"
    check_commas("--shape", text)
    parts = _parts(text, rule)
    for part in parts:
        if not re.fullmatch(r"[0-9]{1,18}|\?|None", part):
            received = repr(text) if part == text else f"{part!r} in {text!r}"
            raise InputError(f"{rule}; received {received}")
    return [int(part) if part.isdigit() else None for part in parts]


def check_commas(option: str, text: str) -> None:
    """Check that sizes are separated by commas.

    Raises:
        InputError: the sizes are separated by something else, as in 32x28x28.

    Example:
        >>> check_commas("--shape", "32x28x28")
        Traceback (most recent call last):
        evennorm.errors.InputError: --shape takes sizes with commas in between; received '32x28x28'; write 32,28,28
    """
    sizes = re.split(r"\s*[xX*\u00d7; ]\s*", text.strip(" ()[]"))
    if len(sizes) > 1 and all(re.fullmatch(r"[0-9]+|\?|None", size) for size in sizes):
        raise InputError(f"{option} takes sizes with commas in between; received {text!r}; write {','.join(sizes)}")


def parsed_axes(text: str) -> list[int]:
    """Parse axes from "-1" or "1,3", also with brackets.

    Raises:
        InputError: something else than whole numbers, or nothing at all.
    """
    rule = "--axis takes a whole number, or several, as in -1 or 1,3"
    parts = _parts(text, rule)
    for part in parts:
        if not re.fullmatch(r"-?[0-9]{1,9}", part):
            raise InputError(f"{rule}; received {part!r} in {text!r}")
    return [int(part) for part in parts]


def _parts(text: str, rule: str) -> list[str]:
    inside = re.fullmatch(r"\s*(?:\((.*?),?\s*\)|\[(.*)\]|(.*))\s*", text, re.DOTALL)
    bare = next((group for group in inside.groups() if group is not None), "") if inside else text
    if not bare.strip():
        raise InputError(f"{rule}; received {text!r}")
    return [part.strip() for part in bare.split(",")]


def _print(explanation: Explanation, svg: str | None) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    fewest, plain, most = _WIDTHS
    width = min(max(console.width, fewest), most) if console.is_terminal else plain
    for line in explanation.lines(width):
        console.print(Text(line.text, style=_STYLES.get(line.kind, "")), soft_wrap=True)
    if svg is not None:
        console.print(Text(f"\nFigure: {printable(svg)}"), soft_wrap=True)


def _print_model(explained: ExplainedModel) -> None:
    from rich.console import Console
    from rich.text import Text

    from evennorm.tools.explain.model import HEADER

    console = Console(highlight=False)
    number = len(explained.layers)
    console.print(Text(f"{printable(explained.name)}: {number:,} batch normalization{'' if number == 1 else 's'}", "bold"))
    rows = [HEADER, *explained.rows()] if explained.layers else []
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))] if rows else []
    for i, row in enumerate(rows):
        cells = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        console.print(Text(("\n" if i == 0 else "") + cells, style="bold" if i == 0 else ""), soft_wrap=True)
    if any(layer.explanation is None for layer in explained.layers):
        console.print(Text("\nSome shapes are unknown; for a torch model, --shape gives that of its inputs."))
    for finding in explained.findings:
        where = printable(finding.layer or "the model")
        text = f"{finding.code} {finding.level}: {where}: {printable(finding.what)}\n  -> {printable(finding.remedy)}"
        console.print(Text(f"\n{text}", style=_STYLES["warning"]), soft_wrap=True)
    if not explained.findings:
        console.print(Text("\nNothing looks wrong.", style=_STYLES["clean"]))
