"""Write findings as workflow commands that GitHub shows beside a change."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from evennorm.errors import printable
from evennorm.tools.check import Report

_COMMANDS = {"error": "error", "warning": "warning", "note": "notice"}


def workflow_commands(report: Report, path: Path | None = None) -> Iterator[str]:
    """Yield one workflow command per finding.

    Args:
        report: of a check.
        path: the model's file, which findings are shown at; None: they are shown at the run.

    Source: GitHub, "Workflow commands for GitHub Actions"; percent signs and line breaks are escaped as its toolkit does.
    """
    for finding in report.findings:
        title = f"{finding.code} {finding.name}"
        place = {"file": path.as_posix()} if path is not None else {}
        properties = ",".join(f"{name}={_property(value)}" for name, value in (place | {"title": title}).items())
        text = printable(f"{finding.layer or 'the model'}: {finding.what}. What to do: {finding.remedy}.")
        yield f"::{_COMMANDS[finding.level]} {properties}::{_data(text)}"


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(printable(text)).replace(":", "%3A").replace(",", "%2C")
