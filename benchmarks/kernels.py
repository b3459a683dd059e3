"""How fast batch normalization itself is on each engine: evennorm, other layers, and a copy, by `evennorm bench`.

Writes benchmarks/results/kernels-ENGINE.json for each engine, and from these files docs/kernels.md and its pictures.
--page writes the page from the files that are there; --engine measures on one engine only, --against one family of
other layers anew.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from _environment import ROOT, sentence

from evennorm.errors import InputError
from evennorm.tools.bench import measure
from evennorm.tools.bench.cases import PASSES, cases
from evennorm.tools.bench.contestants import LIMIT, OURS
from evennorm.tools.bench.machine import cores
from evennorm.tools.bench.picture import draw
from evennorm.tools.bench.report import Benchmark, Ratio, Summary, read
from evennorm.tools.bench.rows import ALONE, IN_TURNS, Row
from evennorm.tools.bench.settings import Settings
from evennorm.tools.spread import ratio, ratio_apart, told

ENGINES = ("torch", "jax", "tensorflow", "numpy")
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "kernels.md"

FEW = "32x56x56x64,256x1024,32x256x14x14:first"
"""Shapes that everything but float32 with ReLU is measured at."""


NOTES = {
    "torch": """\
With a ReLU, torch.compile spends most of its time on one store. Its forward pass saves the mask of the ReLU for the
backward pass, and Inductor's code for storing booleans is slow, as measured with AVX2: `torch.compile(lambda x: x > 0)`
alone took 10.6 ms of CPU time, eager torch 0.59 (4x64x56x56, channels last, one thread, torch 2.13.0). Batch
normalization with ReLU took 14.6 ms when gradients were recorded, and 0.87 when not. Without an activation no mask is
stored, and the ratio is smaller."""
}
"""Why a figure of an engine is what it is."""


def plan(engine: str, quick: bool = False) -> Settings:
    """All shapes in both layouts with ReLU; a few of them with a residual, without activation, and in bfloat16."""
    if quick:
        return Settings(engine, tuple(cases("8x4x6x5", ["last", "first"])), rounds=3, threads=cores())
    others = [
        *cases(FEW, residuals=["yes"]),
        *cases(FEW, activations=["none"]),
        *cases(FEW, dtypes=["float16" if engine == "numpy" else "bfloat16"]),
    ]
    every = (*cases("all", ["last", "first"]), *others)
    return Settings(engine, tuple(dict.fromkeys(every)), threads=cores(), each_alone=True)


def page(results: Iterable[Benchmark], pictures: dict[str, str]) -> str:
    """docs/kernels.md, from what was measured on each engine and the names of its pictures."""
    results = list(results)
    lines = [
        "# How fast the kernels are",
        "",
        "Batch normalization alone in training, forward and forward + backward: evennorm compared with what each framework",
        "offers. Every call allocates fresh memory for its results and frees it; both are part of the time. A mean is the",
        "geometric mean, over shapes of 1 MB or more in both layouts, of the best other time divided by evennorm's: above",
        "1 evennorm is faster. In turns, a ratio is the median over the rounds with its 95 % interval; each alone, it is",
        "the ratio of the medians. If the interval contains 1, no difference is shown. Operations are compared with",
        "operations. Keras's layer, with its layers for ReLU and sum, is compared with evennorm's layer.",
        "[bench.md](bench.md) describes the command, the protocols and what is measured.",
        "",
        "`python benchmarks/kernels.py` writes this page from `benchmarks/results/kernels-*.json`.",
    ]
    for found in results:
        engine = found.settings.engine
        lines += ["", f"## {engine}", "", introduction(found), "", *summary_table(found)]
        in_turns = [summary for summary in found.summaries() if summary.protocol == IN_TURNS]
        lines += ["", NOTES[engine]] if engine in NOTES else []
        if lost := [line for summary in in_turns if (line := summary.lost(decided=True))]:
            lines += ["", "Where evennorm is slower, in turns:", "", *(f"- {line}" for line in lost)]
        if undecided := [line for summary in in_turns if (line := summary.undecided())]:
            lines += ["", "Where the interval contains 1, in turns:", "", *(f"- {line}" for line in undecided)]
        if engine in pictures:
            lines += ["", f"![bandwidth of all layers on {engine} for each shape]({pictures[engine]})"]
        lines += ["", "Medians in turns, in milliseconds, for float32 with ReLU:", "", *times_table(found)]
        if kept := list(kept_table(found)):
            lines += ["", "Memory kept between the passes, in multiples of x:", "", *kept]
    lines += ["", *(sentence({**found.environment}) for found in results[:1])]
    return "\n".join([*lines, ""])


HEADLINE = {
    ("torch", "torch layer"): "torch's modules",
    ("torch", "torch eager"): "torch's functions, the better of `relu` and `relu_`",
    ("torch", "torch.compile"): "torch's functions under `torch.compile`",
    ("torch", "Keras's layer"): "Keras's layer on torch",
    ("tensorflow", "Keras's layer"): "Keras's layer on TensorFlow, in a graph",
    ("jax", "Keras's layer"): "Keras's layer on JAX, jitted",
}
"""What README.md names, and how."""


def headline(results: Iterable[Benchmark]) -> list[str]:
    """The table in README.md: forward + backward in turns, float32 with ReLU."""
    found = {
        (result.settings.engine, summary.family): summary
        for result in results
        for summary in result.summaries()
        if summary.protocol == IN_TURNS and summary.passes == "both" and not summary.variant
    }
    lines = ["| against | mean | worst |", "| --- | ---: | ---: |"]
    return lines + [f"| {name} | " + " | ".join(mean_and_worst(found[key])) + " |" for key, name in HEADLINE.items()]


def introduction(found: Benchmark) -> str:
    """Where it was measured, with which kernel, and how much else the machine had to do."""
    kernels = "; ".join(f"{dtype}: {kernel}" for dtype, kernel in found.kernels.items())
    threads = f"{found.settings.threads} thread{'s' if found.settings.threads > 1 else ''}"
    where = found.environment
    return (
        f"{where['device']}, {threads}, load average before {where['load before']}, commit {where['commit']}. "
        f"Kernels of evennorm: {kernels}."
    )


def summary_table(found: Benchmark) -> list[str]:
    """A row per family of other layers, variant and pass, and for each small case; the two protocols beside each other."""
    lines = [
        "| against | variant | pass | in turns: mean | worst | each alone: mean | worst |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    in_turns, alone = (
        {(s.family, s.variant, s.passes): s for s in found.summaries() if s.protocol == protocol}
        for protocol in (IN_TURNS, ALONE)
    )
    for key, summary in sorted(in_turns.items(), key=lambda item: item[0][1]):  # variants together, else as they were
        family, variant, passes = key
        head = f"| {family} | {variant or 'float32, ReLU'} | {PASSES[passes]} | "
        beside = alone.get(key)
        if summary.worst is not None:
            lines.append(head + " | ".join([*mean_and_worst(summary), *mean_and_worst(beside)]) + " |")
        others = {each.case: each for each in beside.small} if beside else {}
        for small in summary.small:
            other = others.get(small.case)
            lines.append(f"{head} | {at_place(small)} | | {at_place(other) if other else ''} |")
    return lines


def mean_and_worst(summary: Summary | None) -> tuple[str, str]:
    if summary is None or summary.worst is None or summary.mean is None:
        return "", ""
    return told(summary.mean, summary.spread), at_place(summary.worst)


def at_place(found: Ratio) -> str:
    return f"{told(found.ratio, found.spread)} at {found.case.place}"


def times_table(found: Benchmark) -> list[str]:
    """A row per case and pass: medians of everyone, and ours as a multiple of the copy."""
    usual = [case for case in found.settings.cases if not case.variant]
    measured = {row.contestant for row in found.rows if row.protocol == IN_TURNS and row.milliseconds and row.case in usual}
    names = [name for name in dict.fromkeys(row.contestant for row in found.rows) if name in measured]
    lines = [
        "| shape | pass | " + " | ".join(names) + f" | {OURS} / copy |",
        "| --- | --- |" + " ---: |" * (len(names) + 1),
    ]
    for case in usual:
        limit = found.limit(IN_TURNS, case)
        for passes in found.settings.passes:
            rows = {row.contestant: row for row in found.measured(IN_TURNS, case, passes)}
            if OURS not in rows:
                continue
            cells = [f"{rows[name].median:.3g}" if name in rows else "-" for name in names]
            share = beside_copy(rows[OURS], limit) if limit and case.large else "-"
            lines.append(f"| {case.place} | {PASSES[passes]} | " + " | ".join([*cells, share]) + " |")
    return lines


def beside_copy(ours: Row, copy: Row) -> str:
    """How many times as long as the copy ours takes: by rounds where both took turns."""
    in_turns = ours.passes == copy.passes and len(ours.milliseconds) == len(copy.milliseconds)
    spread = (ratio if in_turns else ratio_apart)(ours.milliseconds, copy.milliseconds)
    return told(spread.value, spread)


def kept_table(found: Benchmark) -> Iterator[str]:
    """Of one large shape, whoever lets one look."""
    variants = {
        (row.contestant, row.case.variant): row.saved_bytes / row.case.bytes
        for row in reversed(found.rows)
        if row.saved_bytes is not None and row.case.large
    }
    if not variants:
        return
    columns = sorted({variant for _, variant in variants}, key=lambda variant: (variant != "", variant))
    yield "| | " + " | ".join(variant or "float32, ReLU" for variant in columns) + " |"
    yield "| --- |" + " ---: |" * len(columns)
    for name in dict.fromkeys(row.contestant for row in found.rows if row.saved_bytes is not None):
        cells = [f"{variants[name, variant]:.2f}" if (name, variant) in variants else "-" for variant in columns]
        yield f"| {name} | " + " | ".join(cells) + " |"


def renewed(old: Benchmark, new: Benchmark) -> Benchmark:
    """`old` with the rows of `new` in the place of the old rows of the same layers.

    Raises:
        InputError: they were not measured on the same machine with the same versions.
    """
    for what in ("device", "versions"):
        if old.environment[what] != new.environment[what]:
            raise InputError(
                f"rows stand beside each other that have the same {what}: {old.environment[what]}; received "
                f"{new.environment[what]}; measure all of them anew"
            )
    again = tuple(row for row in new.rows if row.family != LIMIT)
    names = dict.fromkeys(row.contestant for row in again)
    rows = tuple(row for row in old.rows if row.contestant not in names)
    commit = f"{old.environment['commit']} ({' and '.join(names)}: {new.environment['commit']})"
    return replace(old, environment={**old.environment, "commit": commit}, rows=rows + again)


def draw_pictures(results: Iterable[Benchmark], folder: Path) -> dict[str, str]:
    """One per engine: float32 with ReLU, each shape in one layout."""
    names = {}
    for found in results:
        names[found.settings.engine] = f"kernels-{found.settings.engine}.png"
        draw(found, folder / names[found.settings.engine], only=cases("all"))
    return names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", choices=ENGINES, help="measure on this one only")
    parser.add_argument(
        "--against", metavar="FAMILY", help="measure this family anew, and the layers of evennorm that it is compared with"
    )
    parser.add_argument("--page", action="store_true", help="measure nothing: write the page from the files that are there")
    parser.add_argument("--quick", action="store_true", help="tiny arrays, three rounds; prints the page and writes nothing")
    arguments = parser.parse_args()
    results = {}
    for engine in ENGINES:
        path = RESULTS / f"kernels-{engine}.json"
        if not arguments.page and arguments.engine in (None, engine):
            print(f"kernels: {engine}", file=sys.stderr)
            settings = plan(engine, arguments.quick)
            if arguments.against is None:
                results[engine] = measure(settings, progress)
            else:
                again = measure(replace(settings, families=(arguments.against,)), progress)
                results[engine] = renewed(read(path), again)
            if not arguments.quick:
                path.parent.mkdir(exist_ok=True)
                results[engine].write(path)
        elif path.exists() and not arguments.quick:
            results[engine] = read(path)
    if arguments.quick:
        print(page(results.values(), {}))
    else:
        PAGE.write_text(page(results.values(), draw_pictures(results.values(), PAGE.parent)))


def progress(done: int, total: int) -> None:
    print(f"  {done} of {total} cases", file=sys.stderr, end="\r" if os.isatty(2) and done < total else "\n")


if __name__ == "__main__":
    main()
