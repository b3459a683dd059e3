"""Show which kernels run here, and what to do where the compiled ones do not: `evennorm doctor`."""

from __future__ import annotations

import click

from evennorm.cli.progress import bar
from evennorm.errors import printable_json


@click.command(short_help="Show which kernels run here, and what to do if they do not.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Show which kernels run here: versions, compiled parts, and a trial of each framework.

    Exit codes: 0 compiled kernels run in every installed framework; 1 they do not, and a line for each reason
    says what to do; 130 interrupted.
    """
    from evennorm.tools.doctor import diagnose
    from evennorm.tools.doctor.text import lines

    with bar("trying each framework that is installed"):
        diagnosis = diagnose()
    if as_json:
        click.echo(printable_json(diagnosis.as_dict()))
    else:
        from rich.console import Console
        from rich.text import Text

        console = Console(highlight=False)
        for line in lines(diagnosis):
            console.print(Text(line, style="yellow" if line.startswith("problem: ") else ""), soft_wrap=True)
    ctx.exit(0 if diagnosis.served else 1)
