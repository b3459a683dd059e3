"""Write a report as one self-contained HTML page: findings, and a picture of each layer."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime

import numpy as np

from evennorm import __version__
from evennorm.models.network import Step
from evennorm.notebook import escaped as escape
from evennorm.tools.check import Finding, Report
from evennorm.tools.check.picture import Panel, Scale, picture
from evennorm.tools.check.rule import each_layer, grouped, in_words, written
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
.error { color: var(--error) } .warning { color: var(--warning) } .note { color: var(--note) } a { color: inherit }
.level { border: 1px solid; border-radius: .3rem; padding: 0 .4rem; font-size: .85rem; font-weight: normal }
table { border-collapse: collapse } td, th { text-align: left; padding: .1rem 1.2rem .1rem 0; vertical-align: top }
figure { margin: .3rem 0 } svg { max-width: 100% } svg text { fill: var(--ink); font-size: 12px }
svg .soft { fill: var(--soft); font-size: 11px } svg .end { text-anchor: end }
svg .frame { fill: none; stroke: var(--line) } svg .curve { fill: var(--curve) } svg .mark { stroke: var(--mark) }
ul { margin: .3rem 0; padding-left: 1.3rem }
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def page(report: Report, path: str = "") -> str:
    """Return the text of the page. Names from the model are escaped, and the page loads no script and no other file.

    Args:
        report: of a check.
        path: where the model is, as the reader knows it.
    """
    name = escape(report.network.name)
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>evennorm check: {name}</title><style>{_STYLE}</style></head><body>",
        f"<h1>Batch normalization in {name}</h1>",
        *_summary(report, path),
        *_findings(report),
        *_layers(report),
        f"<footer><p>Made by <code>evennorm check --html</code> of evennorm {__version__}, {_now()}.</p></footer>",
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")


def _summary(report: Report, path: str) -> Iterator[str]:
    layers = sum(1 for _ in each_layer(report.network))
    rows = [("model", path)] if path else []
    rows += [("layers", f"{layers:,}"), ("framework", report.network.framework)]
    if report.network.iterations is not None:
        rows.append(("training steps", f"{report.network.iterations:,}"))
    measured = report.measurements
    if measured is not None:
        rows.append(("data", f"{measured.samples:,} samples in batches of {measured.batch_size:,}"))
        rows.append(("output difference", f"{measured.output_difference:.3g} of the outputs' spread, between the two modes"))
        if measured.training_accuracy is not None and measured.inference_accuracy is not None:
            rows.append(("accuracy by batch statistics", f"{100 * measured.training_accuracy:.1f} %"))
            rows.append(("accuracy by moving statistics", f"{100 * measured.inference_accuracy:.1f} %"))
    yield from _contents(report)
    body = "".join(f"<tr><th>{escape(head)}</th><td>{escape(text)}</td></tr>" for head, text in rows)
    yield f"<table>{body}</table>"
    if report.network.gaps:
        items = "".join(f"<li>{escape(gap)}</li>" for gap in report.network.gaps)
        yield f"<p>Not read, so findings about neighbouring layers may be missing:</p><ul>{items}</ul>"


def _contents(report: Report) -> Iterator[str]:
    """Yield how many findings there are of each level, and links to them."""
    yield f"<p><b>{in_words(report.findings)}</b></p>"
    if report.findings:
        groups = ((found[0], len(found)) for found in grouped(report.findings))
        links = (f'<a href="#{_anchor(first)}">{first.code}</a> {first.name}, {count:,}' for first, count in groups)
        yield f"<ul>{''.join(f'<li>{link}</li>' for link in links)}</ul>"


def _findings(report: Report) -> Iterator[str]:
    yield "<h2>Findings</h2>"
    if not report.findings:
        yield "<p>Nothing looks wrong.</p>"
    titles = {rule.code: rule.title for rule in RULES}
    for found in grouped(report.findings):
        first = found[0]
        yield f'<h3 id="{_anchor(first)}">{_badge(first)} {first.code} {escape(titles[first.code])}</h3>'
        yield f"<p>{_with_code(first.why)}</p><ul>"
        for finding in found:
            yield f"<li><code>{escape(finding.layer or 'the model')}</code>: {escape(finding.what)}</li>"
        yield "</ul>"
        yield from (f"<p>What to do: {_with_code(text)}.</p>" for text in dict.fromkeys(finding.remedy for finding in found))
        yield f'<p class="soft">More about it: <code>evennorm check --explain {first.code}</code></p>'


def _badge(finding: Finding) -> str:
    return f'<span class="level {finding.level}">{finding.level}</span>'


def _anchor(finding: Finding) -> str:
    return f"{finding.code}-{finding.level}"


def _layers(report: Report) -> Iterator[str]:
    yield "<h2>Layers</h2>"
    yield (
        '<p class="soft">Each panel goes over the channels from left to right; panels of one kind have one scale, and the '
        "line marks what a new layer has. Drift is the distance of the data's mean from the moving mean, in moving standard "
        "deviations.</p>"
    )
    rows = [(step, _panels(report, step)) for step in each_layer(report.network)]
    titles = dict.fromkeys(panel.title for _, panels in rows for panel in panels)
    scales = {title: Scale.over(panel for _, panels in rows for panel in panels if panel.title == title) for title in titles}
    known = {title: scale for title, scale in scales.items() if scale is not None}
    for step, panels in rows:
        yield from _layer(report, step, panels, known)


def _layer(report: Report, step: Step, panels: list[Panel], scales: dict[str, Scale]) -> Iterator[str]:
    state = step.state
    if state is None:
        return
    mine = [finding for finding in report.findings if finding.layer == step.layer]
    codes = ", ".join(f'<a class="{each.level}" href="#{_anchor(each)}">{each.code} {each.level}</a>' for each in mine)
    yield f"<h3><code>{escape(step.layer)}</code></h3>"
    momentum = "cumulative average" if state.decay is None else written(report.network, state.decay)
    shape = "" if step.shape is None else f"output ({', '.join('?' if n is None else str(n) for n in step.shape)}), "
    facts = f"{shape}axis {', '.join(map(str, state.axis))}, {momentum}, epsilon {state.epsilon:g}"
    yield f'<p class="soft">{escape(facts)}{", frozen" if not step.trainable else ""}{"; " + codes if codes else ""}</p>'
    if panels and all(np.size(panel.values) for panel in panels):
        yield f"<figure>{''.join(picture(panel, scales.get(panel.title), step.layer) for panel in panels)}</figure>"


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
    """Return text with `this` marked as code."""
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", escape(text))
