"""Write a report as lines for people, findings of one code together."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import NamedTuple

from evennorm.errors import printable
from evennorm.tools.check import Report
from evennorm.tools.check.fix import is_fixable
from evennorm.tools.check.rule import counted, grouped
from evennorm.tools.check.rules import RULES

_MOST = 8
"""Layers listed under one finding before the rest is counted."""


class Line(NamedTuple):
    """One line; `kind` is title, error, warning, note, layer, soft, remedy, clean or ""."""

    kind: str
    text: str


def lines(report: Report, width: int = 80) -> list[Line]:
    """Return what was looked at, what was found, and how often."""
    return [*_head(report), *_measured(report), *_findings(report, width), *_gaps(report, width), *_tail(report)]


def _head(report: Report) -> Iterator[Line]:
    layers = len({step.layer for step in report.network.batch_norms()})
    yield Line("title", f"{printable(report.network.name)}: {_count(layers, 'batch normalization')}")


def _measured(report: Report) -> Iterator[Line]:
    measured = report.measurements
    if measured is None:
        return
    yield Line("", "")
    yield Line("", f"On {_count(measured.samples, 'sample')} in batches of {measured.batch_size}:")
    rows = [("output difference", f"{measured.output_difference:.3g} of the outputs' spread, between the two modes")]
    if measured.training_accuracy is not None and measured.inference_accuracy is not None:
        rows.append(("accuracy", f"{100 * measured.training_accuracy:.1f} % by batch statistics, in training mode"))
        rows.append(("", f"{100 * measured.inference_accuracy:.1f} % by moving statistics, in inference mode"))
    if measured.layers:
        worst = max(measured.layers, key=lambda layer: layer.drift)
        rows.append(("largest drift", f"{worst.drift:.3g} standard deviations, in {worst.layer}"))
        rows.append(("", "(moving ones; root mean square over channels; all layers"))
        rows.append(("", "normalize by the batch; recalibrate measures each after"))
        rows.append(("", "recalibrated ones)"))
    yield from (Line("", f"  {name:18} {value}") for name, value in rows)


def _findings(report: Report, width: int) -> Iterator[Line]:
    titles = {rule.code: rule.title for rule in RULES}
    for found in grouped(report.findings):
        code, level = found[0].code, found[0].level
        yield Line("", "")
        yield Line(level, f"{code} {level}: {titles[code]} ({found[0].name})")
        yield from _wrapped("soft", found[0].why, width, rest="  ")
        for finding in found[:_MOST]:
            yield from _wrapped("layer", f"{finding.layer or 'the model'}: {finding.what}", width, "    ")
        if len(found) > _MOST:
            yield Line("soft", f"    and {_count(len(found) - _MOST, 'layer')} more (--json lists all)")
        for remedy in dict.fromkeys(finding.remedy for finding in found):
            yield from _wrapped("remedy", f"-> {remedy}", width, "  ", "     ")


def _gaps(report: Report, width: int) -> Iterator[Line]:
    if report.network.gaps:
        yield Line("", "")
        yield Line("", "Not read, so findings about neighbouring layers may be missing:")
        for gap in report.network.gaps:
            yield from _wrapped("soft", gap, width, rest="  ")


def _tail(report: Report) -> Iterator[Line]:
    yield Line("", "")
    if not report.findings:
        yield Line("clean", "Nothing looks wrong.")
        return
    counts = ", ".join(_count(number, level) for level, number in counted(report.findings).items())
    fixable = sum(is_fixable(finding, report) for finding in report.findings)
    yield Line("title", counts + (f"; --fix takes care of {fixable:,}" if fixable else ""))


def _wrapped(kind: str, text: str, width: int, first: str = "  ", rest: str = "") -> Iterator[Line]:
    for line in textwrap.wrap(
        printable(text),
        width,
        initial_indent=first,
        subsequent_indent=rest or first + "  ",
        break_on_hyphens=False,
        break_long_words=False,
    ):
        yield Line(kind, line)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
