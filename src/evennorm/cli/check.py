"""Find mistakes with the batch normalizations of a model: `evennorm check`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from evennorm.cli.explain import parsed_shape
from evennorm.cli.group import force_option
from evennorm.cli.progress import Progress, bar
from evennorm.errors import InputError, printable, printable_json
from evennorm.tools.interrupts import between_batches
from evennorm.tools.outputs import Output, check_outputs

if TYPE_CHECKING:
    from evennorm.tools.check import Report
    from evennorm.tools.check.fix import Fixed
    from evennorm.tools.models import Opened

_STYLES = {
    "title": "bold",
    "error": "bold red",
    "warning": "bold yellow",
    "note": "bold cyan",
    "soft": "dim",
    "remedy": "green",
    "clean": "green",
}
_WIDTHS = (60, 80, 110)
"""Columns: the fewest, those where the output is no terminal, the most."""


FORMATS = ("text", "json", "sarif", "github")


def _explained(ctx: click.Context, parameter: click.Parameter, code: str | None) -> None:
    """Print the page of a finding and end the command."""
    if code is None or ctx.resilient_parsing:
        return
    from rich.console import Console
    from rich.markdown import Markdown

    from evennorm.tools.check.manual import manual

    text, console = manual(code), Console()
    if console.is_terminal:
        console.print(Markdown(text), width=min(console.width, _WIDTHS[2]))
    else:
        click.echo(text, nl=False)
    ctx.exit()


@click.command(short_help="Find and fix mistakes with batch normalization in a model.")
@click.argument("model")
@click.option(
    "--data", metavar="DATA", help="Training data: an .npz file with x (and y), an .npy file, a folder, or module:function."
)
@click.option("--weights", metavar="FILE", help="Weights to load into a model that module:function builds.")
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    metavar="N",
    help="Batch size of training, over all replicas. [default with --data: 128]",
)
@click.option(
    "--batches",
    type=click.IntRange(1),
    metavar="N",
    help="Number of batches to take, evenly spread over --data. [default: 16]",
)
@click.option("--shape", metavar="SIZES", help="Shape of an input batch of a torch model: 32,3,224,224.")
@click.option(
    "--replicas", default=1, show_default=True, type=click.IntRange(1), metavar="N", help="Number of devices in training."
)
@click.option(
    "--steps", type=click.IntRange(0), metavar="N", help="Number of training steps so far. [default: the model's own count]"
)
@click.option(
    "--select",
    metavar="CODES",
    default="",
    help="Report only these findings: BN201, or BN2 for all codes that start with it.",
)
@click.option("--ignore", metavar="CODES", default="", help="Do not report these findings.")
@click.option("--format", "form", type=click.Choice(FORMATS), help="Output format. [default: text]")
@click.option("--json", "as_json", is_flag=True, help="Same as --format json: print one JSON object.")
@click.option("--sarif", "as_sarif", is_flag=True, help="Same as --format sarif: print a SARIF 2.1.0 log.")
@click.option("--exit-zero", is_flag=True, help="Exit with 0 even if there are findings.")
@click.option(
    "--explain", metavar="CODE", is_eager=True, expose_value=False, callback=_explained, help="Show the page of a finding."
)
@click.option("--html", metavar="FILE", help="Write an HTML page with a picture of each layer.")
@click.option("--fix", is_flag=True, help="Fix what can be fixed safely, and write the model to -o.")
@click.option("-o", "--output", metavar="OUT", help="Output file of --fix: .keras or .h5; .pt or .safetensors for torch.")
@force_option
@click.pass_context
def check(ctx: click.Context, model: str, **options: Any) -> None:
    """Find mistakes with batch normalization in MODEL, and fix those that can be fixed safely.

    MODEL is a .keras, .h5 or .pt2 file; module:function, your own code; or timm:NAME or torchvision:NAME.

    \b
    evennorm check model.keras
    evennorm check model.keras --data train.npz --html report.html
    evennorm check model.keras --fix -o fixed.keras --data train.npz
    evennorm check package.models:build --select BN2,BN3 --format sarif
    evennorm check --explain BN201

    module:function is your own code: it is imported and called. Code inside a model file is never run.

    Exit codes: 0 no findings; 1 findings; 2 the model could not be checked; 130 interrupted.
    `[tool.evennorm.check]` in pyproject.toml sets options: select = ["BN2"].
    """
    form = _form(options["form"], options["as_json"], options["as_sarif"])
    html, fix, output = options["html"], options["fix"], options["output"]
    if fix != (output is not None):
        raise InputError("--fix writes a new model and -o says where; give both or none")
    inputs = {"MODEL": model, "--data": options["data"], "--weights": options["weights"]}
    check_outputs([Output("--html", html, (".html", ".htm"))], inputs, options["force"])
    from evennorm.tools.check.rules import selected
    from evennorm.tools.models import check_output, open_model

    select, ignore = _codes(options["select"]), _codes(options["ignore"])
    selected(select, ignore)  # report a wrong code before a model is loaded
    with bar() as move:
        opened = open_model(model, options["weights"])
        if fix:
            check_output(opened.framework, output)
            check_outputs([Output("-o", output, ())], inputs, options["force"])
        report, fixed = _checked(opened, options, select, ignore, move)
        if html is not None:
            from evennorm.tools.atomic import write_text
            from evennorm.tools.check.page import page

            write_text(html, page(report, model))
    if form == "sarif":
        from evennorm.tools.check.sarif import sarif

        click.echo(printable_json(sarif(report, opened.path)))
    elif form == "github":
        from evennorm.tools.check.github import workflow_commands

        for line in workflow_commands(report, opened.path):
            click.echo(line)
    elif form == "json":
        extra = {"notes": list(opened.notes), "html": html, "fixed": None if fixed is None else fixed.as_dict()}
        click.echo(printable_json(report.as_dict() | extra))
    else:
        _print(report, opened.notes)
        for line in [] if fixed is None else ["", *fixed.lines()]:
            click.echo(printable(line))
        if html is not None:
            click.echo(f"\nPage: {printable(html)}")
    ctx.exit(1 if report.findings and not options["exit_zero"] else 0)


def _checked(
    opened: Opened, options: dict[str, Any], select: list[str], ignore: list[str], move: Progress
) -> tuple[Report, Fixed | None]:
    """Check a model, and write a fixed one if --fix is given."""
    from evennorm.tools.check import check as checked

    settings: dict[str, Any] = {name: options[name] for name in ("batch_size", "replicas", "steps")}
    if options["shape"] is not None:
        settings["shape"] = _sizes(options["shape"])
    data, batches, total = None, None, None
    if options["data"] is not None:
        from evennorm.tools.data import check_fit, open_data

        data = open_data(options["data"], opened.framework)
        check_fit(data, opened)
        size, most = options["batch_size"] or 128, options["batches"] or 16
        batches = data.batches(size, most)
        total = None if data.samples is None else min(data.samples, size * most)
    with between_batches():
        measured = lambda samples: move(f"{samples:,} samples", samples, total)  # noqa: E731
        report = checked(opened, batches, **settings, select=select, ignore=ignore, progress=measured)
    if not options["fix"]:
        return report, None
    from evennorm.tools.check.fix import fix

    with between_batches():
        batch_size = options["batch_size"] or 128
        return report, fix(opened, report, data, options["output"], batch_size=batch_size, progress=move)


def _form(form: str | None, as_json: bool, as_sarif: bool) -> str:
    """Return what is printed.

    Raises:
        InputError: options that ask for more than one form.
    """
    asked = {form} - {None} | ({"json"} if as_json else set()) | ({"sarif"} if as_sarif else set())
    if len(asked) > 1:
        raise InputError(f"an answer is printed in one form; received options for {' and '.join(sorted(map(str, asked)))}")
    return str(asked.pop()) if asked else "text"


def _sizes(text: str) -> list[int]:
    sizes = parsed_shape(text)
    if None in sizes:
        raise InputError(f"--shape needs all sizes, since a batch of it is run; received {text!r}")
    return [size or 0 for size in sizes]


def _codes(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _print(report: Report, notes: tuple[str, ...]) -> None:
    from rich.console import Console
    from rich.text import Text

    from evennorm.tools.check.text import lines

    console = Console(highlight=False)
    fewest, plain, most = _WIDTHS
    width = min(max(console.width, fewest), most) if console.is_terminal else plain
    for line in lines(report, width):
        console.print(Text(printable(line.text), style=_STYLES.get(line.kind, "")), soft_wrap=True)
    for note in notes:
        console.print(Text(printable(note), style="dim"), soft_wrap=True)
