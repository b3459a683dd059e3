#!/usr/bin/env python3
"""Make a checkout ready for PyPI, which knows neither its files nor its address.

The release workflow runs it before it builds:

    .ci/pypi_readme.py https://forge.example/owner/evennorm v1.2.3

Links and pictures of README.md become absolute, anchors within the page stay, and pyproject.toml gets its project.urls.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FENCED = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(!?)(\[[^\]]*\]\()([^)\s]+)")
BEFORE = "[project.optional-dependencies]"


def readme(text: str, base: str, ref: str) -> str:
    """The README with absolute links: to pages of the forge, and to the bytes of pictures."""

    def absolute(found: re.Match[str]) -> str:
        picture, words, target = found.groups()
        if target.startswith("#") or re.match(r"[a-z][a-z0-9+.-]*:", target):
            return found[0]
        return f"{picture}{words}{base}/{'raw' if picture else 'blob'}/{ref}/{target.removeprefix('./')}"

    parts = FENCED.split(text)
    parts[::2] = [LINK.sub(absolute, part) for part in parts[::2]]
    return "".join(parts)


def pyproject(text: str, base: str, ref: str) -> str:
    """pyproject.toml with the addresses of the project."""
    if "[project.urls]" in text or BEFORE not in text:
        sys.exit(f"pypi_readme: pyproject.toml has project.urls already, or no {BEFORE}; start from a clean checkout")
    urls = {
        "Source": base,
        "Documentation": f"{base}/blob/{ref}/docs/README.md",
        "Changelog": f"{base}/blob/{ref}/CHANGELOG.md",
        "Issues": f"{base}/issues",
    }
    table = "".join(f'{name} = "{url}"\n' for name, url in urls.items())
    return text.replace(BEFORE, f"[project.urls]\n{table}\n{BEFORE}", 1)


def main() -> None:
    if (
        len(sys.argv) != 3
        or not re.fullmatch(r"https://[^\s\"\\]+", sys.argv[1])
        or not re.fullmatch(r"[\w./-]+", sys.argv[2])
    ):
        sys.exit("pypi_readme: give the https address of the repository and a tag, branch or commit of it")
    base, ref = sys.argv[1].rstrip("/"), sys.argv[2]
    for name, change in (("pyproject.toml", pyproject), ("README.md", readme)):
        path = ROOT / name
        path.write_text(change(path.read_text(encoding="utf-8"), base, ref), encoding="utf-8")


if __name__ == "__main__":
    main()
