"""A report goes in; one HTML page comes out that asks for nothing else: findings, and a picture of each layer."""

from __future__ import annotations

import html
from collections.abc import Iterator
from itertools import groupby

import numpy as np

from evennorm.core.network import Step
from evennorm.errors import printable
from evennorm.tools.check import Report
from evennorm.tools.check.picture import Panel, picture
from evennorm.tools.check.rule import each_layer, written
from evennorm.tools.check.rules import RULES

_STYLE = """
:root { --paper: #fff; --ink: #1f2933; --soft: #5c6b7a; --line: #d5dce3; --curve: #4f8fd0; --mark: #f0953f;
  --error: #b3261e; --warning: #8a5a00; --note: #1d6478 }
@media (prefers-color-scheme: dark) { :root { --paper: #14191f; --ink: #e6edf3; --soft: #9aa7b4; --line: #35404b;
  --error: #ff8a80; --warning: #f2c14e; --note: #7fd1e6 } }
body { background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif;
  max-width: 1150px; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.2rem } h3 { font-size: 1rem; margin: 1.6rem 0 .2rem }
code { font-family: ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere }
.soft, footer { color: var(--soft) }
.error { color: var(--error) } .warning { color: var(--warning) } .note { color: var(--note) }
table { border-collapse: collapse } td, th { text-align: left; padding: .1rem 1.2rem .1rem 0; vertical-align: top }
figure { margin: .3rem 0; overflow-x: auto } svg text { fill: var(--ink); font-size: 12px }
svg .soft { fill: var(--soft); font-size: 11px }
svg .frame { fill: none; stroke: var(--line) } svg .curve { fill: var(--curve) } svg .mark { stroke: var(--mark) }
ul { margin: .3rem 0; padding-left: 1.3rem }
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def page(report: Report) -> str:
    """The page's text; names that come from the model are escaped, and no script or outside file is asked for."""
    name = escape(report.network.name)
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>evennorm check: {name}</title><style>{_STYLE}</style></head><body>",
        f"<h1>Batch normalization in {name}</h1>",
        *_summary(report),
        *_findings(report),
        "<h2>Layers</h2>",
        '<p class="soft">Each panel goes over the channels from left to right; the line marks what a new layer has. Drift '
        "is the distance of the data's mean from the moving mean, in moving standard deviations.</p>",
        *(part for step in each_layer(report.network) for part in _layer(report, step)),
        "<footer><p>Made by <code>evennorm check --html</code>.</p></footer></body></html>",
    ]
    return "\n".join(parts) + "\n"


def _summary(report: Report) -> Iterator[str]:
    layers = sum(1 for _ in each_layer(report.network))
    rows = [("layers", f"{layers:,}"), ("framework", report.network.framework)]
    if report.network.iterations is not None:
        rows.append(("training steps", f"{report.network.iterations:,}"))
    measured = report.measurements
    if measured is not None:
        rows.append(("data", f"{measured.samples:,} samples in batches of {measured.batch_size:,}"))
        rows.append(("output difference", f"{measured.output_difference:.3g} of the outputs' spread, between the two modes"))
        if measured.training_accuracy is not None and measured.inference_accuracy is not None:
            rows.append(("accuracy by batch statistics", f"{100 * measured.training_accuracy:.1f} %"))
            rows.append(("accuracy by moving statistics", f"{100 * measured.inference_accuracy:.1f} %"))
    body = "".join(f"<tr><th>{escape(head)}</th><td>{escape(text)}</td></tr>" for head, text in rows)
    yield f"<table>{body}</table>"
    if report.network.gaps:
        items = "".join(f"<li>{escape(gap)}</li>" for gap in report.network.gaps)
        yield f"<p>Not read, so that findings about neighbours may be missing there:</p><ul>{items}</ul>"


def _findings(report: Report) -> Iterator[str]:
    yield "<h2>Findings</h2>"
    if not report.findings:
        yield "<p>Nothing looks wrong.</p>"
    titles = {rule.code: rule.title for rule in RULES}
    for code, group in groupby(report.findings, key=lambda finding: finding.code):
        found = list(group)
        yield f'<h3 class="{found[0].level}">{code} {escape(titles[code])}</h3><p>{escape(found[0].why)}</p><ul>'
        for finding in found:
            yield f"<li><code>{escape(finding.layer or 'the model')}</code>: {escape(finding.what)}</li>"
        remedies = "".join(f"<p>What to do: {escape(text)}.</p>" for text in dict.fromkeys(f.remedy for f in found))
        yield f"</ul>{remedies}"


def _layer(report: Report, step: Step) -> Iterator[str]:
    state = step.state
    if state is None:
        return
    mine = [finding for finding in report.findings if finding.layer == step.layer]
    codes = ", ".join(f'<span class="{finding.level}">{finding.code}</span>' for finding in mine)
    yield f"<h3><code>{escape(step.layer)}</code></h3>"
    momentum = "cumulative average" if state.decay is None else written(report.network, state.decay)
    shape = "" if step.shape is None else f"output ({', '.join('?' if n is None else str(n) for n in step.shape)}), "
    facts = f"{shape}axis {', '.join(map(str, state.axis))}, {momentum}, epsilon {state.epsilon:g}"
    yield f'<p class="soft">{escape(facts)}{", frozen" if not step.trainable else ""}{"; " + codes if codes else ""}</p>'
    arrays = (("gamma", state.gamma, 1.0), ("beta", state.beta, 0.0), ("moving mean", state.mean, 0.0))
    panels = [Panel(name, values, mark) for name, values, mark in arrays if values is not None]
    if state.variance is not None:
        panels.append(Panel("moving variance", state.variance, 1.0))
    measured = None if report.measurements is None else report.measurements.of(step.name)
    if measured is not None:
        panels.append(Panel("drift", measured.drifts, 0.0))
    if panels and all(np.size(panel.values) for panel in panels):
        yield f"<figure>{picture(panels, f'{step.layer}: ' + ', '.join(panel.title for panel in panels))}</figure>"


def escape(text: str) -> str:
    """Text of unknown origin, for a page."""
    return html.escape(printable(text))
