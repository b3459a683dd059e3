"""Measure whole training steps of networks on the CPU, by `evennorm bench --network`.

Writes benchmarks/results/networks-torch.json, and from it docs/networks.md; prints the table of README.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from _environment import ROOT, sentence

from evennorm.tools.bench import measure_networks
from evennorm.tools.bench.contestants import OURS
from evennorm.tools.bench.machine import cores
from evennorm.tools.bench.network_cases import NetworkCase, parsed_networks
from evennorm.tools.bench.steps import COMPILED, EAGER, OURS_COMPILED, WITHOUT, NetworkBenchmark, NetworkSettings, Step, read
from evennorm.tools.spread import percent, told

RESULT = ROOT / "benchmarks" / "results" / "networks-torch.json"
PAGE = ROOT / "docs" / "networks.md"

QUICK = "mlp:8,article:4x24"


def page(found: NetworkBenchmark) -> str:
    """docs/networks.md."""
    return "\n".join([*_page(found), ""])


def _page(found: NetworkBenchmark) -> Iterator[str]:
    settings, where = found.settings, found.environment
    yield from f"""# How fast networks train

Whole training steps on the CPU with torch: `zero_grad`, forward pass, cross-entropy, backward pass and a step of SGD, in
float32 and torch's default layout. Each network is trained with torch's layers, converted by `evennorm.torch.convert`, and
without normalization. All three start from equal weights and take turns in one process. Figures are medians. Ratios and
shares are taken within each round; the page has their medians with 95 % intervals. If the interval of a ratio contains 1, no
difference is shown. [bench.md](bench.md) describes the measurement.

`python benchmarks/networks.py` writes this page from `benchmarks/results/networks-torch.json`.

{where["device"]}, {settings.threads} threads, load average before {where["load before"]}, commit {where["commit"]}.

The time of a step in milliseconds; the time with torch's layers divided by that with evennorm's, so that above 1 evennorm is
faster; and the share of a step that batch normalization takes:
""".splitlines()
    yield ""
    yield from headline(found)
    if settings.compiled:
        yield from ("", "Under `torch.compile`, in milliseconds:", "")
        yield from _table(found, ["torch.compile", "evennorm, torch.compile", "torch / evennorm"], _compiled)
    yield from ("", "The first step in seconds, each in its own process, with nothing compiled before:", "")
    yield from _table(found, _but_without(settings.contestants), _first)
    yield from (
        "",
        "MB that autograd keeps for the backward pass, and what `convert` fuses with a normalization:",
        "",
    )
    yield from _table(found, ["torch", "evennorm", "fused"], _kept)
    yield from _verdicts(found)
    yield from ("", sentence({**where}))


def _verdicts(found: NetworkBenchmark) -> Iterator[str]:
    """Where no difference is shown, and where evennorm is slower."""
    ratios = [(step, ratio, found.steps.spread(step)) for step in found.steps.all if (ratio := found.steps.ratio(step))]
    open_ = [step for step, _, spread in ratios if spread is None or not spread.is_known or spread.holds_one]
    if open_:
        yield from ("", "No difference is shown for:", "")
        yield from (f"- {step.contestant}, {step.network.title}" for step in open_)
    lost = [(step, ratio, spread) for step, ratio, spread in ratios if ratio < 1 and step not in open_]
    if lost:
        yield from ("", "Where evennorm is slower, with the other's time divided by evennorm's:", "")
        yield from (f"- {step.contestant}, {step.network.title}: {told(ratio, spread)}" for step, ratio, spread in lost)


def headline(found: NetworkBenchmark) -> Iterator[str]:
    """Yield the table that README.md begins with, too."""
    columns = ["torch, ms", "evennorm, ms", "without, ms", "torch / evennorm", "torch's share", "evennorm's share"]
    yield from _table(found, columns, _eager)


Cells = Callable[[NetworkBenchmark, NetworkCase], list[str]]


def _table(found: NetworkBenchmark, columns: list[str], cells: Cells) -> Iterator[str]:
    yield "| network | " + " | ".join(columns) + " |"
    yield "| --- |" + " ---: |" * len(columns)
    for case in found.steps.networks:
        yield f"| {case.title} | " + " | ".join(cells(found, case)) + " |"


def _eager(found: NetworkBenchmark, case: NetworkCase) -> list[str]:
    steps = found.steps
    theirs, ours, without = (_step(found, case, name) for name in (EAGER, OURS, WITHOUT))
    times = [milliseconds(step.median) for step in (theirs, ours, without)]
    return [*times, _ratio(found, theirs), *(percent(steps.shares(step)) for step in (theirs, ours))]


def _compiled(found: NetworkBenchmark, case: NetworkCase) -> list[str]:
    theirs, ours = (_step(found, case, name) for name in (COMPILED, OURS_COMPILED))
    return [milliseconds(theirs.median), milliseconds(ours.median), _ratio(found, theirs)]


def _ratio(found: NetworkBenchmark, theirs: Step) -> str:
    return told(found.steps.ratio(theirs) or 0.0, found.steps.spread(theirs))


def _but_without(names: list[str]) -> list[str]:
    return [name for name in names if name != WITHOUT]


def _first(found: NetworkBenchmark, case: NetworkCase) -> list[str]:
    seconds = [_step(found, case, name).first for name in _but_without(found.settings.contestants)]
    return ["-" if first is None else f"{first:.2f}" if first < 10 else f"{first:.0f}" for first in seconds]


def _kept(found: NetworkBenchmark, case: NetworkCase) -> list[str]:
    kept = [_step(found, case, name).memory for name in (EAGER, OURS)]
    together = ", ".join(f"{count} {steps or 'alone'}" for steps, count in found.fused[str(case)].items())
    return [*("-" if size is None else f"{size / 1e6:.3g}" for size in kept), together]


def _step(found: NetworkBenchmark, case: NetworkCase, name: str) -> Step:
    step = found.steps.get(case, name)
    assert step is not None, f"{name} is measured in every network"
    return step


def milliseconds(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", default="all", help="as evennorm bench --network takes them")
    parser.add_argument("--eager", action="store_true", help="leave torch.compile out")
    parser.add_argument("--rounds", type=int, default=None, help="samples of each figure; by time if not given")
    parser.add_argument("--page", action="store_true", help="measure nothing: write the page from the file that is there")
    parser.add_argument("--quick", action="store_true", help="two small networks; prints the page and writes nothing")
    asked = parser.parse_args()
    if asked.quick:
        settings = NetworkSettings(tuple(parsed_networks(QUICK)), False, cores(), 3)
        print(page(measure_networks(settings)))
        return
    if not asked.page:
        settings = NetworkSettings(tuple(parsed_networks(asked.networks)), not asked.eager, cores(), asked.rounds)
        found = measure_networks(settings, lambda done, total: print(f"networks: {done} of {total}", file=sys.stderr))
        RESULT.parent.mkdir(exist_ok=True)
        found.write(RESULT)
    found = read(RESULT)
    PAGE.write_text(page(found))
    print("\n".join(headline(found)))


if __name__ == "__main__":
    main()
