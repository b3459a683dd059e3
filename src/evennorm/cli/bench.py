"""Measure batch normalization on this machine: `evennorm bench`, on arrays or in the training steps of networks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from evennorm.cli.group import force_option
from evennorm.cli.progress import bar
from evennorm.cli.tables import plain_table, print_table
from evennorm.errors import InputError, printable
from evennorm.tools.outputs import Output, check_outputs

if TYPE_CHECKING:
    from evennorm.tools.bench.cases import Case
    from evennorm.tools.bench.processes import Report
    from evennorm.tools.bench.report import Benchmark, Summary
    from evennorm.tools.bench.rows import Row
    from evennorm.tools.bench.steps import NetworkBenchmark
    from evennorm.tools.spread import Median

BUSY = 0.5
"""Load average above which the user is told that other programs were running."""

ARRAYS_ONLY = ("shapes", "layouts", "dtypes", "activations", "residuals", "passes", "against", "each_alone", "plot")
"""Options without a meaning for networks."""

_NOTES = """\
ms         median of all rounds, with the quartiles
/evennorm  its time divided by evennorm's: above 1 evennorm is faster; from six rounds on with the 95 % interval of the
           median; if that contains 1, no difference is shown
/copy      its time divided by that of the fastest copy of x into fresh memory, with the same interval
GB/s       bytes that must be read and written once, divided by the time
saved      memory kept between the passes, in sizes of x
mean       geometric mean over the cases of 1 MB or more; smaller cases have their own lines
"""


@click.command(short_help="Measure how long batch normalization takes on this machine.")
@click.option(
    "--engine", metavar="ENGINE", help="torch, jax, tensorflow or numpy. [default: KERAS_BACKEND, else the first installed]"
)
@click.option(
    "--shapes",
    default="usual",
    show_default=True,
    metavar="LIST",
    help="Shapes in memory order, with :first if channels are axis 1: 32x56x56x64,8x64x7x7:first; or usual, or all.",
)
@click.option(
    "--layouts",
    default="",
    metavar="LIST",
    help="Where the channels of every shape are: last, first or both. [default: as in --shapes]",
)
@click.option(
    "--dtypes", default="float32", show_default=True, metavar="LIST", help="Any of float32, float64, bfloat16, float16."
)
@click.option("--activations", default="relu", show_default=True, metavar="LIST", help="Any of relu, none.")
@click.option(
    "--residuals",
    default="no",
    show_default=True,
    metavar="LIST",
    help="Any of no, yes. yes adds an array before the activation.",
)
@click.option(
    "--passes", default="forward,both", show_default=True, metavar="LIST", help="Any of forward, both (forward + backward)."
)
@click.option(
    "--against",
    metavar="LIST",
    help="Layers to compare with, by the names in the results: 'torch eager,torch.compile'. [default: all of the engine]",
)
@click.option("--threads", type=int, metavar="N", help="Number of threads. [default: number of cores]")
@click.option(
    "--rounds", type=int, metavar="N", help="How often each layer is measured. [default: 9 to 101, fewer if one takes long]"
)
@click.option("--each-alone", is_flag=True, help="Also measure each layer in a process of its own.")
@click.option(
    "--network",
    is_flag=False,
    flag_value="all",
    metavar="[LIST]",
    help="Measure whole training steps on torch: any of mlp, article, resnet18, resnet50, mobilenet. Add the batch size, "
    "or the batch size and image side: mlp:16,resnet50:8x224. Also timm:NAME, torchvision:NAME. Without a name: all of the "
    "first five.",
)
@click.option("--compile", "compiled", is_flag=True, help="With --network: also measure with torch.compile.")
@click.option("--json", "json_file", metavar="FILE", help="Write all samples, with device and versions, as JSON.")
@click.option("--plot", metavar="FILE", help="Draw the bandwidths, with that of a copy as the limit, as a PNG picture.")
@force_option
@click.pass_context
def bench(
    ctx: click.Context,
    json_file: str | None,
    plot: str | None,
    network: str | None,
    compiled: bool,
    force: bool,
    **options: Any,
) -> None:
    """Measure how long batch normalization takes on this machine, by evennorm and by the layers of other libraries.

    \b
    evennorm bench --network                      whole training steps of networks
    evennorm bench --network mlp,resnet50:8x224 --json steps.json
    evennorm bench --engine torch                 arrays
    evennorm bench --engine jax --shapes all --json jax.json --plot jax.png
    evennorm bench --shapes 64x28x28x128 --layouts both --dtypes float32,bfloat16 --residuals no,yes

    All layers are measured in turns in one process, including the allocation of memory. The time to copy an array is
    measured too: no layer can be faster. Close other programs first.

    Exit codes: 0 measured; 2 could not be measured; 130 interrupted.
    """
    _check_files(json_file, plot)
    check_outputs([Output("--json", json_file, (".json",)), Output("--plot", plot, (".png",))], {}, force)
    if network is None:
        _only_with_networks(compiled)
        found = _measured("cases", _arrays(options))
    else:
        _only_with_arrays(ctx, options["engine"])
        found = _measured("networks", _networks(network, compiled, options))
    if json_file is not None:
        found.write(json_file)
    if plot is not None:
        from evennorm.tools.bench.picture import draw

        draw(found, plot)
    _print(found)
    for what, path in (("All samples", json_file), ("Picture", plot)):
        if path is not None:
            click.echo(f"{what}: {printable(path)}")


def _check_files(*paths: str | None) -> None:
    for path in paths:
        if path is not None and not Path(path).resolve().parent.is_dir():
            raise InputError(f"cannot write {path}: there is no such folder; nothing was measured")


def _only_with_networks(compiled: bool) -> None:
    if compiled:
        raise InputError("--compile goes with --network; for arrays choose --against torch.compile")


def _only_with_arrays(ctx: click.Context, engine: str | None) -> None:
    """Raise InputError for an option that has no meaning for networks."""
    for name, source in ((name, ctx.get_parameter_source(name)) for name in ARRAYS_ONLY):
        if source is click.core.ParameterSource.COMMANDLINE:
            option = f"--{name.replace('_', '-')}"
            raise InputError(f"--network goes with --compile, --threads, --rounds and --json; received {option}")
    if engine not in (None, "torch"):
        raise InputError(f"networks are measured on torch; received --engine {engine}")


def _arrays(options: dict[str, Any]) -> Callable[[Report], Benchmark]:
    for name in ("layouts", "dtypes", "activations", "residuals", "passes"):
        options[name] = _words(options[name])
    if options["layouts"] == ["both"]:
        options["layouts"] = ["last", "first"]
    options["against"] = None if options["against"] is None else _words(options["against"])
    from evennorm.tools.bench import bench as measured

    return partial(measured, **options)


def _networks(networks: str, compiled: bool, options: dict[str, Any]) -> Callable[[Report], NetworkBenchmark]:
    from evennorm.tools.bench import bench_networks

    return partial(bench_networks, networks, compiled, options["threads"], options["rounds"])


def _measured(what: str, measure: Callable[..., Any]) -> Any:
    """Measure, with a progress bar."""
    with bar("starting") as move:
        return measure(progress=lambda done, total: move(f"{done} of {total} {what}", done, total))


def _words(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _print(found: Benchmark | NetworkBenchmark) -> None:
    from rich.console import Console

    from evennorm.tools.bench.report import Benchmark

    console = Console(highlight=False)
    if isinstance(found, Benchmark):
        kernels = ", ".join(f"{dtype}: {kernel}" for dtype, kernel in found.kernels.items())
        notes = [f"Kernel of evennorm for {kernels}"]
        _print_machine(console, found.settings.engine, found.settings.threads, found.environment, notes)
        _print_arrays(console, found)
    else:
        from evennorm.cli.bench_network import print_networks

        _print_machine(console, "torch", found.settings.threads, found.environment)
        print_networks(found, console)


def _print_machine(
    console: Any, engine: str, threads: int, environment: Mapping[str, Any], notes: Iterable[str] = ()
) -> None:
    """Print where it was measured, and whether other programs were running there."""
    from rich.text import Text

    version = environment["versions"].get(engine, "")
    on = f"{threads} thread{'s' if threads > 1 else ''} on {environment['device']}"
    for line in (f"{engine} {version}, {on}", *notes, ""):
        console.print(Text(line), soft_wrap=True)
    if (load := environment["load before"] or 0) > BUSY:
        busy = f"The machine was busy before (load average {load}): close what else runs and measure again.\n"
        console.print(Text(busy, style="yellow"), soft_wrap=True)


def _print_arrays(console: Any, found: Benchmark) -> None:
    from rich.text import Text

    from evennorm.tools.bench.cases import PASSES

    settings = found.settings
    for protocol in found.protocols:
        for case in settings.cases:
            for passes in settings.passes:
                if not any(row.ours for row in found.measured(protocol, case, passes)):
                    continue
                title = f"{case}, {PASSES[passes]}, {case.bytes / 1e6:.3g} MB, {protocol}"
                console.print(Text(title, style="bold"), soft_wrap=True)
                print_table(console, _table(found, protocol, case, passes))
                console.print()
    console.print(Text(_NOTES), soft_wrap=True)
    left_out = dict.fromkeys((row.contestant, row.reason) for row in found.rows if row.reason)
    for name, reason in left_out:
        cases = dict.fromkeys(str(row.case) for row in found.rows if (row.contestant, row.reason) == (name, reason))
        console.print(Text(f"Not measured: {name} at {'; '.join(cases)}: {reason}"), soft_wrap=True)
    if left_out:
        console.print()
    summaries = found.summaries()
    for protocol in found.protocols:
        console.print(Text(f"{_in_words(protocol)}: how many times as fast evennorm is", style="bold"), soft_wrap=True)
        print_table(console, _summary_table([summary for summary in summaries if summary.protocol == protocol]))
        console.print()
        for summary in summaries:
            if summary.protocol == protocol:
                for sentence in filter(None, (summary.lost(decided=True), summary.undecided())):
                    console.print(Text(sentence, style="yellow"), soft_wrap=True)


def _in_words(protocol: str) -> str:
    return {"in turns": "In turns in one process", "alone": "Each in a process of its own"}[protocol]


def _summary_table(summaries: list[Summary]) -> Any:
    """Return a table of means and worst cases, with a line for each case too small to count in them."""
    from evennorm.tools.bench.cases import PASSES

    table = plain_table("dim")
    table.add_column("compared with", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("", no_wrap=True)
    for header in ("mean", "worst"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("at", overflow="fold")
    for summary in summaries:
        words = (summary.family, PASSES[summary.passes], summary.variant)
        if summary.worst is not None:
            worst = summary.worst
            table.add_row(*words, times(summary.mean, summary.spread), times(worst.ratio, worst.spread), worst.case.place)
        for small in summary.small:
            table.add_row(*words, "", times(small.ratio, small.spread), small.case.place)
    return table


def _table(found: Benchmark, protocol: str, case: Case, passes: str) -> Any:
    table = plain_table("dim")
    table.add_column("", no_wrap=True, min_width=22)
    for header in ("ms", "", "/evennorm", "/copy", "GB/s", "saved"):
        table.add_column(header, justify="left" if header == "" else "right", no_wrap=True)
    for row in found.measured(protocol, case, passes):
        table.add_row(*_cells(found, row))
    return table


def _cells(found: Benchmark, row: Row) -> tuple[str, ...]:
    from evennorm.tools.bench.contestants import LIMIT

    low, high = row.quartiles
    ratio, copy = found.ratio(row), found.beside_limit(row)
    is_copy = row.family == LIMIT
    bandwidth = 2 * row.case.bytes / row.median / 1e6 if is_copy else row.bandwidth
    return (
        row.contestant,
        milliseconds(row.median),
        f"({milliseconds(low)} to {milliseconds(high)})",
        times(ratio, found.spread(row)),
        "" if copy is None else times(copy.value, copy),
        f"{bandwidth:.1f}" if row.case.large else "",
        "" if row.saved_bytes is None else f"{row.saved_bytes / row.case.bytes:.2f}",
    )


def times(ratio: float | None, spread: Median | None) -> str:
    """Format a ratio of times, with its interval where that is known.

    Example:
        >>> times(2.0, None), times(None, None)
        ('2.00', '')
    """
    if ratio is None:
        return ""
    return f"{ratio:.2f}" if spread is None or not spread.is_known else replace(spread, value=ratio).text(".2f")


def milliseconds(value: float) -> str:
    """
    Example:
        >>> milliseconds(0.01234), milliseconds(1.234), milliseconds(123.4)
        ('0.0123', '1.234', '123.4')
    """
    return f"{value:.4f}" if value < 0.1 else f"{value:.3f}" if value < 10 else f"{value:.1f}"
