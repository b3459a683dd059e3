"""Find the documentation page of a finding: what is wrong, when it is reported, what to do."""

from __future__ import annotations

from pathlib import Path

from evennorm.errors import ArgumentError, InputError
from evennorm.tools.check.rules import RULES

_FOLDERS = (Path(__file__).with_name("findings"), Path(__file__).parents[4] / "docs" / "findings")
"""Where pages are beside an installed package, and in a checkout."""


def manual(code: str) -> str:
    """Return the page of a finding, in Markdown.

    Args:
        code: "BN201", or the finding's name, "bias-before-norm".

    Raises:
        ArgumentError: there is no such finding.

    Example:
        >>> from evennorm.tools.check.manual import manual
        >>> print(manual("BN201").splitlines()[0])
        # BN201 bias-before-norm
    """
    rule = next((rule for rule in RULES if code.upper() == rule.code or code == rule.name), None)
    if rule is None:
        raise ArgumentError(f"there is no finding {code!r}; there are {', '.join(rule.code for rule in RULES)}")
    path = next((path for folder in _FOLDERS if (path := folder / f"{rule.code}.md").is_file()), None)
    if path is None:
        raise InputError(f"the page of {rule.code} is not installed; reinstall evennorm")
    lines = path.read_text(encoding="utf-8").splitlines()
    # Links lead to other files of the documentation, which are not here.
    return "\n".join(line for line in lines if not line.startswith(("Run both: ", "[All findings]"))).rstrip() + "\n"
