"""Print the training steps that `evennorm bench --network` measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from evennorm.cli.tables import plain_table, print_table

if TYPE_CHECKING:
    from evennorm.tools.bench.network_cases import NetworkCase
    from evennorm.tools.bench.steps import NetworkBenchmark, Step, Steps

NOTES = """\
ms         median of all rounds, with the quartiles: zero_grad, forward, loss, backward, SGD
/evennorm  its time divided by evennorm's: above 1 evennorm is faster; the median over the rounds, from six on with its
           95 % interval; if that contains 1, no difference is shown
share      the part of an eager step that normalization takes, compared with a step without it
first      seconds of the first step, in its own process
kept       MB that autograd keeps for the backward pass
"""


def print_networks(found: NetworkBenchmark, console: Any) -> None:
    """Print a table for each network, what the columns mean, and where evennorm is slower."""
    from rich.text import Text

    from evennorm.cli.bench import times
    from evennorm.tools.bench.steps import in_words

    steps = found.steps
    for case in steps.networks:
        console.print(Text(f"{case.title}, training steps, in turns", style="bold"), soft_wrap=True)
        console.print(Text(in_words(found.fused[str(case)]), style="dim"), soft_wrap=True)
        print_table(console, _table(steps, case))
        console.print()
    console.print(Text(NOTES), soft_wrap=True)
    for step in steps.all:
        ratio, spread = steps.ratio(step), steps.spread(step)
        if ratio is not None and spread is not None and spread.holds_one:
            told = f"No difference between evennorm and {step.contestant} is shown in {step.network}."
            console.print(Text(told, style="yellow"), soft_wrap=True)
        elif ratio is not None and ratio < 1:
            long = times(1 / ratio, spread and spread.inverse)
            lost = f"evennorm is slower than {step.contestant} in {step.network}: {long} times as long."
            console.print(Text(lost, style="yellow"), soft_wrap=True)


def _table(steps: Steps, case: NetworkCase) -> Any:
    table = plain_table("dim")
    table.add_column("", no_wrap=True, min_width=22)
    for header in ("ms", "", "/evennorm", "share", "first", "kept"):
        table.add_column(header, justify="left" if header == "" else "right", no_wrap=True)
    for step in steps.of(case):
        table.add_row(*_cells(steps, step))
    return table


def _cells(steps: Steps, step: Step) -> tuple[str, ...]:
    from evennorm.cli.bench import milliseconds, times
    from evennorm.tools.spread import percent

    low, high = step.quartiles
    ratio, share = steps.ratio(step), steps.shares(step)
    return (
        step.contestant,
        milliseconds(step.median),
        f"({milliseconds(low)} to {milliseconds(high)})",
        times(ratio, steps.spread(step)),
        "" if share is None else percent(share) if share.is_known else f"{100 * share.value:.0f} %",
        "" if step.first is None else f"{step.first:.2f}",
        "" if step.memory is None else f"{step.memory / 1e6:.3g}",
    )
