"""Every pair in examples/pitfalls runs: the wrong half is found under the file's code, nothing at all in the right half."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from evennorm.tools.check.rule import Rule
from evennorm.tools.check.rules import RULES

ROOT = Path(__file__).resolve().parent.parent.parent
PAIRS = {path.name[:5].upper(): path for path in sorted((ROOT / "examples" / "pitfalls").glob("bn*.py"))}


@pytest.mark.parametrize("code", [rule.code for rule in RULES])
def test_the_wrong_half_is_found_and_the_right_one_clean(code: str) -> None:
    pair = runpy.run_path(str(PAIRS[code]))
    assert code in pair["codes"](pair["wrong"]())
    assert pair["codes"](pair["right"]()) == []


def test_files_are_named_after_their_rules() -> None:
    assert {path.name for path in PAIRS.values()} == {f"{r.code.lower()}_{r.name.replace('-', '_')}.py" for r in RULES}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.code)
def test_each_rule_has_a_page_that_shows_its_pair(rule: Rule) -> None:
    page = (ROOT / "docs" / "findings" / f"{rule.code}.md").read_text()
    path = PAIRS[rule.code]
    assert page.startswith(f"# {rule.code} {rule.name}\n")
    assert f"**{rule.title}.** {rule.why}" in " ".join(page.split())
    assert f"Level: {rule.level}." in " ".join(page.split())
    assert f"../../examples/pitfalls/{path.name}" in page
    shown = page.split("```python\n")[1].split("```")[0].strip()
    program = path.read_text().replace("from evennorm.tools.check import check\n", "").replace("\n\n\n\n", "\n\n\n")
    assert shown.split("\n\n\n", 1)[1] in program


def test_the_overview_lists_all() -> None:
    overview = (ROOT / "docs" / "check.md").read_text()
    for rule in RULES:
        assert f"| [{rule.code}](findings/{rule.code}.md) | {rule.name} | {rule.level} | {rule.title} |" in overview
