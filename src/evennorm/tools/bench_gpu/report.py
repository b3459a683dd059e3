"""Compare what was measured on a GPU, print it as tables, whole training steps first, and write it to a file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from evennorm.errors import InputError
from evennorm.tools.atomic import write_text
from evennorm.tools.bench.cases import PASSES, Case
from evennorm.tools.bench.contestants import LIMIT, OURS
from evennorm.tools.bench.report import Benchmark
from evennorm.tools.bench.rows import IN_TURNS, Row
from evennorm.tools.bench.steps import Step, Steps
from evennorm.tools.bench_gpu.calls import Call
from evennorm.tools.bench_gpu.cases import VARIANTS, kept_on_chip, traffic
from evennorm.tools.spread import Median, percent, ratio_apart, together, told

FORMAT = "evennorm bench gpu 2"
"""Format of the JSON file."""

BASELINES = ("torch eager", "torch.compile")

WORTH = 8_000_000
"""Bytes of x from which no other layer may be faster."""


class Target(NamedTuple):
    """A goal: `value` of at least `wanted`."""

    what: str
    value: float
    wanted: float
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, what: str, found: Median, wanted: float) -> Target:
        return cls(what, found.value, wanted, found.low, found.high)

    @property
    def reached(self) -> bool:
        return self.value >= self.wanted

    def __str__(self) -> str:
        """
        Example:
            >>> str(Target("faster than them", 1.25, 1.5, 1.2, 1.3))
            'missed: faster than them: 1.25 (1.20 to 1.30), wanted 1.50'
        """
        value = told(self.value, Median(self.value, self.low, self.high))
        return f"{'reached' if self.reached else 'missed'}: {self.what}: {value}, wanted {self.wanted:.2f}"


@dataclass(frozen=True)
class GpuBenchmark:
    """What was measured on a GPU.

    Args:
        mode: how the arrays were measured, "recorded" or "queued".
        arrays: normalization alone, with where everything was measured.
        steps: training steps of networks.
        networks: for each of them, in words, how it trained.
        calls: of layers.
    """

    mode: str
    arrays: Benchmark
    steps: tuple[Step, ...] = ()
    networks: Mapping[str, str] = field(default_factory=dict)
    calls: tuple[Call, ...] = ()

    @property
    def gpu(self) -> dict[str, Any]:
        """The device in words and numbers."""
        return self.arrays.environment["gpu"]

    def rows(self, case: Case, passes: str) -> dict[str, Row]:
        """Return the rows that have samples, by contestant."""
        return {row.contestant: row for row in self.arrays.measured(IN_TURNS, case, passes)}

    def best(self, case: Case, passes: str, family: str) -> Row | None:
        """Return the fastest of a family."""
        found = [row for row in self.rows(case, passes).values() if row.family == family]
        return min(found, key=lambda row: row.median, default=None)

    def share(self, row: Row) -> Median | None:
        """Return the bandwidth of the bytes that have to move, relative to that of a copy of x.

        Of ours: another layer may have to move more.
        """
        copy = self.best(row.case, row.passes, LIMIT)
        if copy is None:
            return None
        on_chip = kept_on_chip(row.case, self.gpu["multiprocessors"])
        moved = traffic(row.case, row.passes, on_chip).bytes_of(row.case)
        times = moved / (2 * row.case.bytes)
        return ratio_apart([times * each for each in copy.milliseconds], row.milliseconds)

    def ratio(self, case: Case, passes: str, family: str) -> Median | None:
        """Return how many times as long as ours the best of a family takes."""
        ours, other = self.rows(case, passes).get(OURS), self.best(case, passes, family)
        return ratio_apart(other.milliseconds, ours.milliseconds) if ours and other else None

    def targets(self) -> list[Target]:
        """Return the goals of the GPU kernels with channels last, forward + backward."""
        found = []
        for variant, dtype in ((v, d) for v in ("bn+relu", "bn+add+relu") for d in ("bfloat16", "float32")):
            cases = [
                case
                for case in self.arrays.settings.cases
                if (case.layout, case.dtype, variant_of(case)) == ("last", dtype, variant)
            ]
            for family, wanted in zip(BASELINES, (1.5, 1.1), strict=True):
                ratios = [ratio for case in cases if (ratio := self.ratio(case, "both", family))]
                if ratios:
                    what = f"{variant}, {dtype}: times as fast as {family}, geometric mean of {len(ratios)} shapes"
                    found.append(Target.of(what, together(ratios), wanted))
            large = [case for case in cases if case.bytes >= WORTH]
            worst = [ratio for case in large for family in BASELINES if (ratio := self.ratio(case, "both", family))]
            if worst:
                what = f"{variant}, {dtype}: times as fast as either baseline, worst shape of 8 MB"
                found.append(Target.of(what, min(worst, key=lambda each: each.value), 1.0))
            shares = [share for case in large for row in self._ours(case) if (share := self.share(row))]
            if shares:
                what = f"{variant}, {dtype}: share of the copy's bandwidth, worst shape of 8 MB"
                found.append(Target.of(what, min(shares, key=lambda each: each.value), 0.8))
        return found + list(self._memory_targets())

    def _ours(self, case: Case) -> Iterator[Row]:
        row = self.rows(case, "both").get(OURS)
        if row is not None:
            yield row

    def _memory_targets(self) -> Iterator[Target]:
        from evennorm.tools.bench_gpu.network import SAVED

        peaks = {step.contestant: step.memory for step in self.steps if step.memory and step.network.name == "resnet50"}
        for before, after, wanted in SAVED:
            if before in peaks and after in peaks:
                saved = 1 - peaks[after] / peaks[before]  # counted, not timed, and so the same in every step
                yield Target(f"{after}: part of the step's peak memory saved", saved, wanted, saved, saved)

    def as_dict(self) -> dict[str, Any]:
        """Return the benchmark as JSON data; its arrays are a file of `evennorm bench`."""
        return {
            "format": FORMAT,
            "mode": self.mode,
            "targets": [{**target._asdict(), "reached": target.reached} for target in self.targets()],
            "networks": dict(self.networks),
            "steps": [step.as_dict() for step in self.steps],
            "calls": [call.as_dict() for call in self.calls],
            "arrays": self.arrays.as_dict(),
        }

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the benchmark, each row on one line.

        Raises:
            InputError: the file cannot be written.
        """
        values = self.as_dict()
        arrays, steps, calls = (values.pop(name) for name in ("arrays", "steps", "calls"))
        head = json.dumps(values, indent=1)[:-2]
        inside = json.dumps({name: value for name, value in arrays.items() if name != "rows"}, indent=1)[:-2]
        lists = f' "steps": {_lines(steps)},\n "calls": {_lines(calls)},\n'
        write_text(path, f'{head},\n{lists} "arrays": {inside},\n  "rows": {_lines(arrays["rows"])}\n }}\n}}\n')


def _lines(records: list[dict[str, Any]]) -> str:
    """Return a list in JSON, each record on a line of its own."""
    lines = ",\n".join(f"   {json.dumps(record)}" for record in records)
    return f"[\n{lines}\n  ]" if lines else "[]"


def read(path: str | os.PathLike[str]) -> GpuBenchmark:
    """Read what `GpuBenchmark.write` wrote.

    Raises:
        InputError: there is no such file, or it holds something else.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        if values["format"] != FORMAT:
            raise InputError(f"a file of the GPU benchmark has the format {FORMAT!r}; received {values['format']!r}")
        steps = tuple(Step.from_dict(step) for step in values["steps"])
        calls = tuple(Call.from_dict(call) for call in values["calls"])
        return GpuBenchmark(values["mode"], Benchmark.from_dict(values["arrays"]), steps, values["networks"], calls)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is no result of the GPU benchmark: {error}") from error


def variant_of(case: Case) -> str:
    """
    Example:
        >>> variant_of(Case((8, 16), residual=True)), variant_of(Case((8, 16), activation="none"))
        ('bn+add+relu', 'bn')
    """
    named = {(activation, residual): name for name, (activation, residual) in VARIANTS.items()}
    return named.get((case.activation, case.residual), case.variant)


def table(found: GpuBenchmark) -> str:
    """Return everything in Markdown: device, networks, calls, goals, and a row for each array and pass."""
    gpu, versions = found.gpu, found.arrays.environment["versions"]
    listed = ", ".join(f"{name} {number}" for name, number in versions.items())
    how = {"recorded": "as CUDA graphs: the device alone", "queued": "call by call, as an eager program has it"}[found.mode]
    lines = [f"{gpu['name']}, {gpu['multiprocessors']} multiprocessors, {listed}.", ""]
    lines += [*_networks(found), *_calls(found)]
    lines += [f"Arrays: medians by device events, {how}.", ""]
    lines += [*(f"- {target}" for target in found.targets()), ""]
    return "\n".join([*lines, *_arrays(found), ""])


def _arrays(found: GpuBenchmark) -> Iterator[str]:
    names = list(dict.fromkeys(row.contestant for row in found.arrays.rows if row.milliseconds))
    if not names:
        return
    yield "| array | MB | | pass | " + " | ".join(f"{name}, us" for name in names) + " | evennorm of the copy's bandwidth |"
    yield "| --- | ---: | --- | --- |" + " ---: |" * (len(names) + 1)
    for case in found.arrays.settings.cases:
        for passes in found.arrays.settings.passes:
            rows = found.rows(case, passes)
            if not rows:
                continue
            cells = [f"{1000 * rows[name].median:.1f}" if name in rows else "-" for name in names]
            share = found.share(rows[OURS]) if OURS in rows else None
            what = f"{case.dtype}, {variant_of(case)}"
            cells += [percent(share)]
            yield f"| {case.place} | {case.bytes / 1e6:.1f} | {what} | {PASSES[passes]} | " + " | ".join(cells) + " |"
    yield ""
    reasons = dict.fromkeys((row.contestant, row.reason) for row in found.arrays.rows if row.reason)
    yield from (f"- {name} did not take part everywhere: {reason}" for name, reason in reasons)


def _networks(found: GpuBenchmark) -> Iterator[str]:
    """Yield a table for each network."""
    steps = Steps(found.steps)
    for case in steps.networks:
        yield f"{found.networks.get(str(case), case.title)}: a training step, in turns."
        yield ""
        yield "| | step, ms | times ours | normalization's share | host, ms | first step, s | peak memory, MB |"
        yield "| --- |" + " ---: |" * 6
        for step in steps.of(case):
            yield f"| {step.contestant} | " + " | ".join(_step_cells(steps, step)) + " |"
        yield ""


def _step_cells(steps: Steps, step: Step) -> list[str]:
    if step.reason:
        return [step.reason, *[""] * 5]
    ratio, share = steps.ratio(step), steps.shares(step)
    return [
        f"{step.median:.2f}",
        "" if ratio is None else told(ratio, steps.spread(step)),
        "" if share is None else percent(share),
        f"{median(step.host):.2f}" if step.host else "-",
        "-" if step.first is None else f"{step.first:.2f}",
        "-" if step.memory is None else f"{step.memory / 1e6:.0f}",
    ]


def _calls(found: GpuBenchmark) -> Iterator[str]:
    """Yield the costs of a call on host and device, a row for each array and pass."""
    if not found.calls:
        return
    names = list(dict.fromkeys(call.contestant for call in found.calls))
    figures = {(call.case, call.passes, call.contestant): call.medians for call in found.calls}
    yield "A call of a layer: the host's time to hand it over, and the device's to do it, recorded as a CUDA graph."
    yield ""
    yield "| array | | pass | " + " | ".join(f"{name}: host, us | device, us" for name in names) + " |"
    yield "| --- | --- | --- |" + " ---: |" * (2 * len(names))
    for case, passes in dict.fromkeys((call.case, call.passes) for call in found.calls):
        pairs = [figures.get((case, passes, name), (None, None)) for name in names]
        cells = ["-" if value is None else f"{value:.1f}" for pair in pairs for value in pair]
        yield f"| {case.place} | {case.dtype} | {PASSES[passes]} | " + " | ".join(cells) + " |"
    yield ""
    reasons = dict.fromkeys((call.contestant, call.reason) for call in found.calls if call.reason)
    yield from (f"- {name} lacks figures: {reason}" for name, reason in reasons)
    if reasons:
        yield ""
