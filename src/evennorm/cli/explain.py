"""`evennorm explain`: which values batch normalization averages for a shape and an axis, and what looks wrong."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import click

from evennorm.cli.group import force_option
from evennorm.errors import InputError, printable, printable_json
from evennorm.tools.outputs import Output, check_outputs

if TYPE_CHECKING:
    from evennorm.tools.explain import Explanation

_STYLES = {"title": "bold", "heading": "bold", "clean": "green", "warning": "bold yellow", "remedy": "yellow"}
_WIDTHS = (60, 80, 100)
"""Columns: the fewest, those where the output is no terminal, the most."""


@click.command()
@click.option("--shape", required=True, metavar="SIZES", help="Sizes of the array, batch first, ? where unknown: 32,28,28,3")
@click.option("--axis", default="-1", metavar="AXES", show_default=True, help="The channel axis, or several: 1,3")
@click.option("--svg", metavar="FILE", help="Draw the array, the cells that are normalized together in one colour.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@force_option
@click.pass_context
def explain(ctx: click.Context, shape: str, axis: str, svg: str | None, as_json: bool, force: bool) -> None:
    """Show what batch normalization averages over an array, and what looks wrong.

    \b
    evennorm explain --shape 32,28,28,3 --axis -1
    evennorm explain --shape '?,8,8,64' --axis 1,3 --svg figure.svg

    Exit code 0: nothing looks wrong; 1: there are warnings; 2: the question could not be answered;
    130: interrupted.
    """
    sizes = parsed_shape(shape)
    axes = parsed_axes(axis)
    check_outputs([Output("--svg", svg, (".svg",))], {}, force)
    from evennorm.tools.explain import explain as explained

    explanation = explained(sizes, axes)
    if svg is not None:
        from evennorm.tools.atomic import write_text
        from evennorm.tools.drawing import draw

        write_text(svg, draw(explanation))
    if as_json:
        click.echo(printable_json(explanation.as_dict() | {"svg": svg}))
    else:
        _print(explanation, svg)
    ctx.exit(1 if explanation.findings else 0)


def parsed_shape(text: str) -> list[int | None]:
    """Sizes from "32,28,28,3", also with the brackets and the None that Keras prints; None where unknown.

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
    """
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
    """Axes from "-1" or "1,3", also with brackets.

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
