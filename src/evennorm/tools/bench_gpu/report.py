"""Measured rows of a GPU go in; ratios, shares of the copy's bandwidth and tables come out, and the file that keeps them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from evennorm.errors import InputError
from evennorm.tools.atomic import write_text
from evennorm.tools.bench.cases import PASSES, Case
from evennorm.tools.bench.contestants import LIMIT, OURS
from evennorm.tools.bench.report import Benchmark, geometric_mean
from evennorm.tools.bench.rows import IN_TURNS, Row
from evennorm.tools.bench_gpu.cases import VARIANTS, kept_on_chip, traffic

if TYPE_CHECKING:
    from evennorm.tools.bench_gpu.network import Step

FORMAT = "evennorm bench gpu 1"
"""Of the JSON file."""

RIVALS = ("torch eager", "torch.compile")

WORTH = 8_000_000
"""Bytes of x from which no rival is to be faster."""


class Target(NamedTuple):
    """A figure to reach: `value` at least `wanted`."""

    what: str
    value: float
    wanted: float

    @property
    def reached(self) -> bool:
        return self.value >= self.wanted

    def __str__(self) -> str:
        """
        Example:
            >>> str(Target("faster than them", 1.25, 1.5))
            'missed: faster than them: 1.25, wanted 1.50'
        """
        return f"{'reached' if self.reached else 'missed'}: {self.what}: {self.value:.2f}, wanted {self.wanted:.2f}"


@dataclass(frozen=True)
class GpuBenchmark:
    """What was measured on a GPU: arrays by `mode`, and the training steps of a network."""

    mode: str
    arrays: Benchmark
    steps: tuple[Step, ...] = ()

    @property
    def gpu(self) -> dict[str, Any]:
        """The device in words and numbers."""
        return self.arrays.environment["gpu"]

    def rows(self, case: Case, passes: str) -> dict[str, Row]:
        """Those that have samples, by contestant."""
        return {row.contestant: row for row in self.arrays.measured(IN_TURNS, case, passes)}

    def best(self, case: Case, passes: str, family: str) -> Row | None:
        """The fastest of a family."""
        found = [row for row in self.rows(case, passes).values() if row.family == family]
        return min(found, key=lambda row: row.median, default=None)

    def share(self, row: Row) -> float | None:
        """The bytes that have to move by time, as a part of what a copy of x moves in its time.

        Of ours: a rival may have to move more.
        """
        copy = self.best(row.case, row.passes, LIMIT)
        if copy is None:
            return None
        on_chip = kept_on_chip(row.case, self.gpu["multiprocessors"])
        moved = traffic(row.case, row.passes, on_chip).bytes_of(row.case)
        return moved / row.median / (2 * row.case.bytes / copy.median)

    def ratio(self, case: Case, passes: str, family: str) -> float | None:
        """How many times as long as ours the best of a family takes."""
        ours, rival = self.rows(case, passes).get(OURS), self.best(case, passes, family)
        return rival.median / ours.median if ours and rival else None

    def targets(self) -> list[Target]:
        """What GPU kernels of batch normalization are to reach with channels last, forward + backward."""
        found = []
        for variant, dtype in ((v, d) for v in ("bn+relu", "bn+add+relu") for d in ("bfloat16", "float32")):
            cases = [
                case
                for case in self.arrays.settings.cases
                if (case.layout, case.dtype, variant_of(case)) == ("last", dtype, variant)
            ]
            for family, wanted in zip(RIVALS, (1.5, 1.1), strict=True):
                ratios = [ratio for case in cases if (ratio := self.ratio(case, "both", family))]
                if ratios:
                    what = f"{variant}, {dtype}: times as fast as {family}, geometric mean of {len(ratios)} shapes"
                    found.append(Target(what, geometric_mean(ratios), wanted))
            large = [case for case in cases if case.bytes >= WORTH]
            worst = [ratio for case in large for family in RIVALS if (ratio := self.ratio(case, "both", family))]
            if worst:
                found.append(
                    Target(f"{variant}, {dtype}: times as fast as either rival, worst shape of 8 MB", min(worst), 1.0)
                )
            shares = [share for case in large for row in self._ours(case) if (share := self.share(row))]
            if shares:
                what = f"{variant}, {dtype}: share of the copy's bandwidth, worst shape of 8 MB"
                found.append(Target(what, min(shares), 0.8))
        return found + list(self._memory_targets())

    def _ours(self, case: Case) -> Iterator[Row]:
        row = self.rows(case, "both").get(OURS)
        if row is not None:
            yield row

    def _memory_targets(self) -> Iterator[Target]:
        from evennorm.tools.bench_gpu.network import SAVED

        peaks = {step.contestant: step.peak for step in self.steps if step.peak}
        for before, after, wanted in SAVED:
            if before in peaks and after in peaks:
                yield Target(f"{after}: part of the step's peak memory saved", 1 - peaks[after] / peaks[before], wanted)

    def as_dict(self) -> dict[str, Any]:
        """As JSON takes it; the arrays are a file of `evennorm bench` in it."""
        return {
            "format": FORMAT,
            "mode": self.mode,
            "targets": [{**target._asdict(), "reached": target.reached} for target in self.targets()],
            "steps": [step.as_dict() for step in self.steps],
            "arrays": self.arrays.as_dict(),
        }

    def write(self, path: str | os.PathLike[str]) -> None:
        """A row on one line.

        Raises:
            InputError: the file cannot be written.
        """
        values = self.as_dict()
        arrays = values.pop("arrays")
        rows = ",\n".join(f"   {json.dumps(row)}" for row in arrays.pop("rows"))
        head, inside = json.dumps(values, indent=1)[:-2], json.dumps(arrays, indent=1)[:-2]
        write_text(path, f'{head},\n "arrays": {inside},\n  "rows": [\n{rows}\n  ]\n }}\n}}\n')


def read(path: str | os.PathLike[str]) -> GpuBenchmark:
    """What `GpuBenchmark.write` wrote.

    Raises:
        InputError: there is no such file, or it holds something else.
    """
    from evennorm.tools.bench_gpu.network import Step

    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        if values["format"] != FORMAT:
            raise InputError(f"a file of the GPU benchmark has the format {FORMAT!r}; received {values['format']!r}")
        steps = tuple(Step.from_dict(step) for step in values["steps"])
        return GpuBenchmark(values["mode"], Benchmark.from_dict(values["arrays"]), steps)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
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
    """Everything in Markdown: device, what was to be reached, a row for each array and pass, the network."""
    gpu, versions = found.gpu, found.arrays.environment["versions"]
    listed = ", ".join(f"{name} {number}" for name, number in versions.items())
    how = {"recorded": "as CUDA graphs: the device alone", "queued": "call by call, as an eager program has it"}[found.mode]
    lines = [f"{gpu['name']}, {gpu['multiprocessors']} multiprocessors, {listed}.", f"Medians by device events, {how}.", ""]
    lines += [f"- {target}" for target in found.targets()]
    lines += ["", *_arrays(found), *_network(found)]
    return "\n".join([*lines, ""])


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
            cells += ["-" if share is None else f"{100 * share:.0f} %"]
            yield f"| {case.place} | {case.bytes / 1e6:.1f} | {what} | {PASSES[passes]} | " + " | ".join(cells) + " |"
    yield ""
    reasons = dict.fromkeys((row.contestant, row.reason) for row in found.arrays.rows if row.reason)
    yield from (f"- {name} did not take part everywhere: {reason}" for name, reason in reasons)


def _network(found: GpuBenchmark) -> Iterator[str]:
    if not found.steps:
        return
    yield ""
    yield f"Training step of {found.steps[0].network}, batch {found.steps[0].batch}:"
    yield ""
    yield "| | ms | peak memory of the step, MB |"
    yield "| --- | ---: | ---: |"
    for step in found.steps:
        if step.reason:
            yield f"| {step.contestant} | {step.reason} | |"
        else:
            yield f"| {step.contestant} | {step.median:.1f} | {'-' if step.peak is None else f'{step.peak / 1e6:.0f}'} |"
