"""Write a model without batch normalization, and say where each one went and what changes: `evennorm fold`."""

from __future__ import annotations

import re
from typing import Any

import click

from evennorm.cli.explain import check_commas
from evennorm.cli.group import force_option
from evennorm.cli.progress import bar
from evennorm.errors import InputError, printable_json
from evennorm.tools.interrupts import between_batches
from evennorm.tools.outputs import Output, check_outputs


@click.command(short_help="Fold batch normalization into the layers around it.")
@click.argument("model")
@click.option(
    "-o",
    "--output",
    required=True,
    metavar="FILE",
    help="Output file: .onnx; .keras or .h5; for torch .pt2, .safetensors, .pt or .pth.",
)
@click.option(
    "--data", metavar="DATA", help="Also compare outputs on this data: an .npz with x, a folder, or module:function."
)
@click.option(
    "--batches",
    default=8,
    show_default=True,
    type=click.IntRange(1),
    metavar="N",
    help="Number of batches of --data, of 32 samples each.",
)
@click.option(
    "--input-shape",
    "shapes",
    multiple=True,
    metavar="SIZES",
    help="Shape of one sample of a torch model: 3,224,224. Repeat it for each input. [default: from the first layer]",
)
@click.option("--weights", metavar="FILE", help="Weights to load first: .safetensors, .pt, .pth, .weights.h5.")
@click.option(
    "--tolerance",
    type=float,
    metavar="PART",
    help="Largest difference allowed, relative to the largest output. [default: 1e-4 in float32]",
)
@click.option("--no-speed", is_flag=True, help="Do not measure the speed.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@force_option
@click.pass_context
def fold(
    ctx: click.Context,
    model: str,
    output: str,
    data: str | None,
    shapes: tuple[str, ...],
    no_speed: bool,
    as_json: bool,
    force: bool,
    **options: Any,
) -> None:
    """Fold the batch normalization of MODEL into the neighbouring layers, for inference.

    MODEL is a .keras, .h5 or .pt2 file; module:function, your own code that returns a Keras or torch model; or timm:NAME or
    torchvision:NAME.

    \b
    evennorm fold model.keras -o folded.keras
    evennorm fold net:resnet50 --weights resnet50.pth -o resnet50.pt2 --data images/
    evennorm fold torchvision:resnet18 --weights resnet18.pth -o resnet18.onnx

    fold first compares the outputs. If they differ by more than the tolerance, it writes nothing.

    nn.Linear takes vectors and sequences, whose channels are on different axes. A torch model that takes both is folded
    for the rank of --input-shape or --data, and the report and the file say which.

    Exit codes: 0 written; 1 written, but nothing was folded; 2 failed; 130 interrupted, without writing.
    """
    sizes = [_sizes(text) for text in shapes]
    inputs = {"MODEL": model, "--data": data, "--weights": options["weights"]}
    check_outputs([Output("-o", output, ())], inputs, force)
    from evennorm.tools.data import open_data
    from evennorm.tools.fold import files
    from evennorm.tools.fold import fold as folded
    from evennorm.tools.models import open_model

    with bar() as progress:
        progress("opening", 0, None)
        opened = open_model(model, options.pop("weights"))
        files.check(opened.framework, output)
        source = None if data is None else open_data(data, opened.framework)
        with between_batches():
            report = folded(
                opened, output, data=source, input_shape=sizes, measure=not no_speed, progress=progress, **options
            )
    click.echo(printable_json(report.as_dict()) if as_json else report.text())
    ctx.exit(0 if report.count("folded") else 1)


def _sizes(text: str) -> tuple[int, ...]:
    """Parse sizes separated by commas.

    Raises:
        InputError: something else than whole numbers above 0.
    """
    check_commas("--input-shape", text)
    parts = text.strip(" ()[]").split(",")
    if not all(re.fullmatch(r"\s*[1-9][0-9]{0,8}\s*", part) for part in parts):
        raise InputError(f"--input-shape takes the sizes of one sample, as in 3,224,224; received {text!r}")
    return tuple(int(part) for part in parts)
