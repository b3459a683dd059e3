"""Write a report as one self-contained HTML page: findings, and a picture of each layer."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from evennorm.models.network import Step
from evennorm.notebook import escaped
from evennorm.tools.check import Finding, Report
from evennorm.tools.check.picture import Panel, Scale, picture
from evennorm.tools.check.rule import each_layer, grouped, in_words, written
from evennorm.tools.check.rules import RULES
from evennorm.tools.pages import filled


def page(report: Report, path: str = "") -> str:
    """Return the text of the page. Names from the model are escaped, and the page loads no script and no other file.

    Args:
        report: of a check.
        path: where the model is, as the reader knows it.
    """
    return filled(
        str(__package__),
        {"anchor": _anchor, "with_code": _with_code},
        name=report.network.name,
        facts=list(_facts(report, path)),
        gaps=report.network.gaps,
        found=in_words(report.findings),
        groups=list(grouped(report.findings)),
        titles={rule.code: rule.title for rule in RULES},
        layers=list(_layers(report)),
    )


def _facts(report: Report, path: str) -> Iterator[tuple[str, str]]:
    """Yield what was checked, and what was measured on data."""
    if path:
        yield "model", path
    yield "layers", f"{sum(1 for _ in each_layer(report.network)):,}"
    yield "framework", report.network.framework
    if report.network.iterations is not None:
        yield "training steps", f"{report.network.iterations:,}"
    measured = report.measurements
    if measured is not None:
        yield "data", f"{measured.samples:,} samples in batches of {measured.batch_size:,}"
        yield "output difference", f"{measured.output_difference:.3g} of the outputs' spread, between the two modes"
        if measured.training_accuracy is not None and measured.inference_accuracy is not None:
            yield "accuracy by batch statistics", f"{100 * measured.training_accuracy:.1f} %"
            yield "accuracy by moving statistics", f"{100 * measured.inference_accuracy:.1f} %"


def _anchor(finding: Finding) -> str:
    return f"{finding.code}-{finding.level}"


def _layers(report: Report) -> Iterator[dict[str, Any]]:
    """Yield each layer's name, facts, findings and pictures; pictures of one kind have one scale."""
    rows = [(step, _panels(report, step)) for step in each_layer(report.network)]
    titles = dict.fromkeys(panel.title for _, panels in rows for panel in panels)
    scales = {title: Scale.over(panel for _, panels in rows for panel in panels if panel.title == title) for title in titles}
    for step, panels in rows:
        if step.state is not None:
            drawn = panels if all(np.size(panel.values) for panel in panels) else []
            yield {
                "name": step.layer,
                "facts": _layer_facts(report, step),
                "findings": [finding for finding in report.findings if finding.layer == step.layer],
                "pictures": [picture(panel, scales[panel.title], step.layer) for panel in drawn],
            }


def _layer_facts(report: Report, step: Step) -> str:
    state = step.state
    assert state is not None
    momentum = "cumulative average" if state.decay is None else written(report.network, state.decay)
    shape = "" if step.shape is None else f"output ({', '.join('?' if n is None else str(n) for n in step.shape)}), "
    axis = ", ".join(map(str, state.axis))
    return f"{shape}axis {axis}, {momentum}, epsilon {state.epsilon:g}{', frozen' if not step.trainable else ''}"


def _panels(report: Report, step: Step) -> list[Panel]:
    """Return the panels of a layer."""
    state = step.state
    if state is None:
        return []
    arrays = (("gamma", state.gamma, 1.0), ("beta", state.beta, 0.0), ("moving mean", state.mean, 0.0))
    panels = [Panel(name, values, mark) for name, values, mark in arrays if values is not None]
    if state.variance is not None:
        panels.append(Panel("moving variance", state.variance, 1.0))
    measured = None if report.measurements is None else report.measurements.of(step.name)
    if measured is not None:
        panels.append(Panel("drift", measured.drifts, 0.0))
    return panels


def _with_code(text: str) -> str:
    """Return text as HTML, with `this` marked as code."""
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", escaped(text))
