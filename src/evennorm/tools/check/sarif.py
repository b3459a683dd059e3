"""Write a report as a SARIF 2.1.0 log for code hosts and editors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from evennorm import __version__
from evennorm.errors import printable
from evennorm.tools.check import Report
from evennorm.tools.check.manual import manual
from evennorm.tools.check.rule import Finding
from evennorm.tools.check.rules import RULES

SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"


def sarif(report: Report, path: Path | None = None) -> dict[str, Any]:
    """Return a log with one run.

    Args:
        report: of a check.
        path: the model's file; results point to it, and by a logical location to the layer in it.

    Source: OASIS, Static Analysis Results Interchange Format (SARIF) version 2.1.0.
    """
    rules = [
        {
            "id": rule.code,
            "name": "".join(word.capitalize() for word in rule.name.split("-")),
            "shortDescription": {"text": f"{rule.title}."},
            "fullDescription": {"text": rule.why},
            "help": {"text": f"evennorm check --explain {rule.code}", "markdown": manual(rule.code)},
            "defaultConfiguration": {"level": rule.level},
        }
        for rule in RULES
    ]
    driver = {"name": "evennorm", "version": __version__, "semanticVersion": __version__, "rules": rules}
    notes = [{"level": "note", "message": {"text": printable(gap)}} for gap in report.network.gaps]
    run: dict[str, Any] = {
        "tool": {"driver": driver},
        "results": [_result(finding, path) for finding in report.findings],
        "columnKind": "unicodeCodePoints",
    }
    if notes:
        run["invocations"] = [{"executionSuccessful": True, "toolExecutionNotifications": notes}]
    return {"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}


def _result(finding: Finding, path: Path | None) -> dict[str, Any]:
    location: dict[str, Any] = {}
    layer = printable(finding.layer or "")
    if layer:
        location["logicalLocations"] = [{"fullyQualifiedName": layer, "kind": "member"}]
    if path is not None:
        location["physicalLocation"] = {"artifactLocation": {"uri": _uri(path)}}
    where = f"{layer}: " if layer else ""
    remedy = f"{finding.remedy[:1].upper()}{finding.remedy[1:]}"
    result: dict[str, Any] = {
        "ruleId": finding.code,
        "ruleIndex": [rule.code for rule in RULES].index(finding.code),
        "level": finding.level,
        "message": {"text": where + printable(f"{finding.what}. {finding.why} {remedy}.")},
        "partialFingerprints": {"evennorm/v1": f"{finding.code}/{layer}"},
    }
    return result | ({"locations": [location]} if location else {})


def _uri(path: Path) -> str:
    from urllib.parse import quote

    return path.resolve().as_uri() if path.is_absolute() else quote(path.as_posix())
